"""Settings of a backend: defaults, what the probe wrote, and files that are not what it wrote."""

import dataclasses
import json
import subprocess
import sys

import pytest

from moe_jax.errors import UserError
from moe_jax.offload.settings import Settings, settings_file

FOUND = Settings("inline", read_threads=3, slice_bytes=2**18, inline_quota_bytes=2**22)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_defaults_where_the_probe_never_ran():
    assert Settings.load("cpu") == Settings("thread", 2, 2**22, 0)
    for platform in ("gpu", "tpu"):
        settings = Settings.load(platform)
        assert settings.issue_mode == "inline" and settings.inline_quota_bytes > 0 and not settings.fault()


def test_loads_what_was_saved(cache):
    FOUND.save(settings_file("cpu"), "cpu", {"copy": 1})
    assert Settings.load("cpu") == FOUND
    assert Settings.load("gpu") == Settings.default("gpu")  # each platform has a file of its own
    assert settings_file("cpu").parent == cache / "moe_jax"
    assert [file.name for file in settings_file("cpu").parent.iterdir()] == ["settings-cpu.json"]
    assert json.loads(settings_file("cpu").read_text())["measured"] == {"copy": 1}


def test_loads_another_file(cache):
    FOUND.save(cache / "mine" / "s.json", "cpu", {})
    assert Settings.load("cpu", cache / "mine" / "s.json") == FOUND
    assert Settings.load("cpu") == Settings.default("cpu")


def test_a_file_of_another_platform():
    FOUND.save(settings_file("gpu"), "cpu", {})
    with pytest.raises(UserError, match=r"measured on 'cpu', this is 'gpu'; run `python -m moe_jax.probe` again"):
        Settings.load("gpu")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"platform": "cpu"}', '{"platform": "cpu", "settings": []}', "\xff"])
def test_a_damaged_file(text):
    settings_file("cpu").parent.mkdir()
    settings_file("cpu").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"settings-cpu.json (is no|cannot be).*probe` again, or delete") as caught:
        Settings.load("cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"issue_mode": "both"}, "issue_mode 'both' is not one of thread, inline"),
        ({"read_threads": 0}, "read_threads must be an integer of at least 1, not 0"),
        ({"read_threads": 2.0}, "read_threads must be an integer of at least 1, not 2.0"),
        ({"read_threads": True}, "read_threads must be an integer of at least 1, not True"),
        ({"slice_bytes": 6000}, "slice_bytes must be a multiple of 4096, not 6000"),
        ({"inline_quota_bytes": -1}, "inline_quota_bytes must be an integer of at least 0, not -1"),
        ({"more": 1}, "no settings file of this version"),
    ],
)
def test_values_out_of_range(change, says):
    document = {"platform": "cpu", "settings": dataclasses.asdict(FOUND) | change}
    settings_file("cpu").parent.mkdir()
    settings_file("cpu").write_text(json.dumps(document))
    with pytest.raises(UserError, match=says):
        Settings.load("cpu")


def test_a_place_that_cannot_be_written(cache):
    (cache / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*; give another --output"):
        FOUND.save(cache / "file" / "s.json", "cpu", {})


def test_reading_settings_imports_no_jax():
    code = (
        "import sys; from moe_jax.offload.settings import Settings; Settings.load('cpu'); print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
