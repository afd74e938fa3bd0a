"""Mistakes on the command line: one line that names the fix, exit code 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import cli

ROOT = Path(__file__).parents[1]
SCRIPT = """
import threading
from absl import flags
from moe_jax import cli
from moe_jax.config import Config

CONFIG = cli.config_flag("configs/mixtral.py", "")
COUNT = flags.DEFINE_integer("count", 1, "", lower_bound=1)
FAULT = flags.DEFINE_string("fault", "", "")

def main():
    if FAULT.value == "interrupt":
        print("what was said")
        threading.Thread(target=threading.Event().wait).start()  # never ends
        raise KeyboardInterrupt
    if FAULT.value == "unread":
        threading.Thread(target=threading.Event().wait).start()  # never ends
        print("what nobody reads", flush=True)
    if FAULT.value == "bug":
        raise RuntimeError("a bug")
    print(Config.from_dict(CONFIG.value.to_dict() if CONFIG.value else {}))

cli.run(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("cli") / "toy.py"
    file.write_text(SCRIPT)
    return file


def run(script: Path, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cli.MALLOC}  # set already: no second start
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--cuont=3"], ["unknown flag --cuont; did you mean --count?"]),
        (["--qqqqqq"], ["unknown flag --qqqqqq; see --help"]),
        (["--count=three"], ["--count=three"]),
        (["--count=0"], ["--count=0", "positive"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--config.chekpoint=x"], ["unknown config field chekpoint; did you mean checkpoint?"]),
        (["--config.offload.teir=host"], ["unknown config field teir; did you mean tier?"]),
        (["--config.offlaod.tier=host"], ["unknown config field offlaod; did you mean offload?"]),
        (["--config.batch_size.x=1"], ["unknown config field batch_size.x"]),
        (["--config.zzz=1"], ["unknown config field", "zzz"]),
        (["--config.offload=host"], ["--config.offload=host: 'host' is a value, this is a group of fields"]),
        (["--config.batch_size=many"], ["config.batch_size", "many"]),
        (["--config.batch_size=1.5"], ["config.batch_size", "1.5"]),
        (["--config.offload.link_gbps=fast"], ["config.offload.link_gbps", "fast"]),
        (["--config.batch_size"], ["config.batch_size"]),
        (["--config.batch_size=0"], ["config.batch_size must be at least 1"]),
        (["--config.prefetch.predictor=lerned"], ["none, random", "did you mean learned?"]),
        (["--config.offload.tier=tape"], ["is not one of none, host, disk"]),
        (["--config=absent.py"], ["--config=absent.py: no such config file; see configs/"]),
        (["--config=absent.py", "--config.batch_size=1"], ["--config=absent.py: no such config file; see configs/"]),
        (["--config=configs/mixtral.py", "--config.zzz=1"], ["unknown config field", "zzz"]),
        (["--config=configs"], ["--config=configs: no such config file"]),
        (["--config="], ["--config=: no such config file"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and value[0].startswith(("--", "stray")) else "",
)
def test_mistakes(script, arguments, parts):
    result = run(script, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("toy.py: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def get_config(:", ["SyntaxError", "broken.py"]),
        ("import no_such_module", ["no_such_module"]),
        ("x = 1", ["has no function get_config"]),
        ("def get_config():\n    return int('x')", ["invalid literal", "'x'"]),
        ("def get_config():\n    return undefined", ["NameError", "undefined"]),
    ],
)
def test_broken_config_file(script, tmp_path, text, parts):
    (tmp_path / "broken.py").write_text(text)
    result = run(script, f"--config={tmp_path / 'broken.py'}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_starts_again_with_its_memory_settings(tmp_path):
    """The settings are read before a process starts, so the script replaces itself, arguments and all."""
    (tmp_path / "toy.py").write_text(
        "import os, sys\nfrom absl import flags\nfrom moe_jax import cli\n"
        "flags.DEFINE_string('text', '', '')\n"
        "cli.run(lambda: print(flags.FLAGS.text, os.environ['MALLOC_MMAP_THRESHOLD_']))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "toy.py", "--text=a b  c"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == "a b  c 4294967296\n", result.stderr


def test_values_arrive(script):
    result = run(script, "--config.offload.device_budget=10%", "--config.offload.link_gbps=2", "--config.batch_size=3")
    assert result.returncode == 0, result.stderr
    for part in ("device_budget='10%'", "link_gbps=2.0", "batch_size=3"):
        assert part in result.stdout


def test_the_default_config_is_found_from_anywhere(script, tmp_path):
    result = run(script, "--config.batch_size=3", folder=tmp_path)
    assert "batch_size=3" in result.stdout, result.stderr


def test_interrupt(script):
    result = run(script, "--fault=interrupt")
    assert result.returncode == 130
    assert result.stderr.strip() == "interrupted" and result.stdout == "what was said\n"


@pytest.mark.parametrize("arguments", [["--fault=unread"], [], ["--help"], ["--qqqqqq"]])
def test_a_reader_that_has_gone_ends_it_quietly(script, arguments):
    """As `| head` does, in the middle or where what is left is written at the end; a mistake is still said."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cli.MALLOC}
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
    os.close(writer)
    mistaken = arguments == ["--qqqqqq"]
    assert result.returncode == (2 if mistaken else 141)
    assert result.stderr == ("toy.py: error: unknown flag --qqqqqq; see --help\n" if mistaken else "")


def test_a_bug_keeps_its_traceback(script):
    result = run(script, "--fault=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a bug" in result.stderr


def test_progress_off_a_terminal_is_a_line_for_every_tenth(capsys):
    with cli.progress("reading 40 texts", 40) as advance:
        assert capsys.readouterr().err == "reading 40 texts ...\n"
        said = []
        for done in range(41):
            advance(done, {"loss": 1 / (1 + done)} if done % 2 else {})
            said.append(capsys.readouterr().err)
    assert [done for done, line in enumerate(said) if line] == list(range(4, 41, 4))
    assert said[8] == "reading 40 texts: 8 of 40 loss 0.1250\n"  # the last that there was
    assert not capsys.readouterr().err
    with cli.progress("nothing", 0) as advance:
        advance(0)


def test_help(script):
    result = run(script, "--help")
    assert "--count" in result.stdout
    for said in ("--config: ", "--config.FIELD=VALUE", "configs/mixtral.py", '"Configuration" in README.md'):
        assert said in " ".join(result.stdout.split())
    assert "Traceback" not in result.stderr
