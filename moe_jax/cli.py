"""What every script shares: flags parsed with one-line errors, user mistakes without tracebacks, exit codes."""

from __future__ import annotations

import contextlib
import difflib
import logging as std_logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from moe_jax.errors import UserError

# Copies above 32 MiB otherwise fault in fresh pages on every call; malloc reads these only before it starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

flags.disclaim_key_flags()  # --config belongs to the script that asks for it, whose --help then lists it


def run(main: Callable[[], None]) -> None:
    """Parses flags and runs `main()`. A mistake of the user ends in one line on stderr and exit code 2."""
    if any(os.environ.get(name) is None for name in MALLOC) and sys.platform == "linux":
        os.environ.update({name: os.environ.get(name, value) for name, value in MALLOC.items()})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags start with --, see --help")
        logging.set_verbosity(logging.WARNING)  # JAX and orbax say much at INFO
        _hush_orbax()
        try:
            use_compilation_cache()
            main()
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            # Not through Python's own end, in which threads that write checkpoints still run: they raise, or crash.
            # What is on disk is whole at any moment, as it is when a run is killed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)

    try:
        try:
            app.run(guarded, flags_parser=_parse)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as in `infer.py | head`
        os._exit(141)  # as a shell says of what SIGPIPE ended; not through Python's own end, see above


def _hush_orbax() -> None:
    """What it logs with a traceback it raises too; tasks left behind then fail unheard, or on a closed event loop."""
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    show = sys.unraisablehook
    sys.unraisablehook = lambda what: None if str(what.exc_value) == "Event loop is closed" else show(what)


def use_compilation_cache() -> None:
    """Compiled executables persist between runs; JAX_COMPILATION_CACHE_DIR names another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "moe_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def status(what: str) -> Iterator[None]:
    """Shows on stderr that something is under way: a spinner on a terminal, one line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """How far something is, on stderr: a bar with the time that is left on a terminal, elsewhere a line every tenth.

    Gives a function of the steps done, and of numbers to show by name, each kept until it is replaced.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, seen, tenth = Console(stderr=True), {}, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[shown]}"), console=console) if console.is_terminal else None
    with bar or contextlib.nullcontext():
        task = bar.add_task(title, total=total, shown="") if bar else None
        if not bar:
            print(f"{title} ...", file=sys.stderr, flush=True)

        def advance(done: int, values: Mapping[str, float] | None = None) -> None:
            nonlocal tenth
            seen.update(values or {})
            shown = " ".join(f"{name} {value:.4f}" for name, value in seen.items())
            if bar and task is not None:
                bar.update(task, completed=done, shown=shown)
            elif 10 * done // max(total, 1) > tenth:
                tenth = 10 * done // max(total, 1)
                print(f"{title}: {done:,} of {total:,} {shown}".rstrip(), file=sys.stderr, flush=True)

        yield advance


def fail(message: str, code: int = 2) -> None:
    """Prints one line on stderr and exits: 2 for a mistake of the user, 1 for a machine that failed."""
    print(f"{os.path.basename(sys.argv[0])}: error: {_line(message)}", file=sys.stderr)
    sys.exit(code)


def config_flag(default: str, help: str) -> flags.FlagHolder:
    """Defines --config: a document such as `default`, a path from the repository's root, and --config.FIELD=VALUE."""
    # Where no --config is given, ml_collections reads the default, and what overrides it, here and now.
    with _plain_errors():
        root = Path(__file__).parents[1]
        fields = f'{default} lists its fields, "Configuration" in README.md explains those of inference'
        help = f"{help} --config.FIELD=VALUE sets a field: {fields}."
        return config_flags.DEFINE_config_file("config", os.path.relpath(root / default), help)


def _parse(argv: Sequence[str]) -> list[str]:
    with _plain_errors():
        rest = flags.FLAGS(list(argv))
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        try:
            getattr(flag.value, "to_dict", None)  # ml_collections hides an unreadable file until the value is used
        except OSError:
            fail(f"--{name}={getattr(flag, 'config_filename', '')}: no such config file; see configs/")
    return rest


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What is wrong with the flags, in one line."""
    try:
        yield
    except BrokenPipeError:  # --help prints while flags are parsed
        raise
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        fail(f"unknown flag --{error.flagname}" + (f"; did you mean --{close[0]}?" if close else "; see --help"))
    except (flags.Error, UserError) as error:
        message = str(error)
        if "Error whilst parsing config file" in message:  # followed by a traceback, whose last line says it all
            message = "the config file fails: " + message.strip().splitlines()[-1]
        fail(
            re.sub(
                r"Failed to parse (.*) as a ConfigDict.*", r"\1 is a value, this is a group of fields", _line(message)
            )
        )
    except (AttributeError, KeyError) as error:
        if "get_config" in str(error):
            fail("the config file has no function get_config; see configs/mixtral.py")
        fail(_unknown_field(str(error.args[0])))
    except (TypeError, ValueError) as error:
        fail(f"bad config value: {_line(str(error))}")
    except Exception as error:  # whatever the user's config file raises
        if absent := re.search(r"Failed loading config file(?s:.*)No such file or directory: '(.*)'", str(error)):
            fail(f"--config={absent[1]}: no such config file; see configs/")
        fail(f"the config file fails: {type(error).__name__}: {_line(str(error))}")


def _unknown_field(message: str) -> str:
    """What ml_collections says of a field it did not find, and of its nearest neighbour, in our words."""
    if near := re.search(r'Did you mean "(.*)" instead of "(.*)"\?', message):
        return f"unknown config field {near[2]}; did you mean {near[1]}?"
    if beyond := re.search(r"Attempting to lookup: (.*)", message):
        return f"unknown config field {beyond[1]}"
    return "unknown config field " + _line(message).strip("'\"")


def _line(message: str) -> str:
    return " ".join(message.split())
