"""Settings of every test. Shared builders of small models belong to the room whose tests use them."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from moe_jax import cli

# Compilation inside an example takes seconds; in CI a failure must be repeatable from its log alone.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")

# A shell starts background jobs with Ctrl-C ignored, and the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What one test compiled the next ones load, as do the scripts that they start.
cli.use_compilation_cache()


@pytest.fixture
def nobody():
    """A context in which permissions bind, whoever runs the tests."""

    @contextlib.contextmanager
    def bound():
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return bound


@pytest.fixture
def unreadable(monkeypatch):
    """A function that makes the files of a name ones that may not be opened, whoever runs the tests."""
    opens = Path.open

    def make(name: str):
        def refused(path, *args, **kwargs):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return opens(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refused)

    return make
