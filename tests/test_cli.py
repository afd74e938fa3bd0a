"""Mistakes on the command line: one line that names the fix, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
from absl import flags
from ml_collections import config_flags
from moe_jax import cli
from moe_jax.config import Config

CONFIG = config_flags.DEFINE_config_file("config", None)
COUNT = flags.DEFINE_integer("count", 1, "", lower_bound=1)
FAULT = flags.DEFINE_string("fault", "", "")

def main():
    if FAULT.value == "interrupt":
        raise KeyboardInterrupt
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


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    config = f"--config={ROOT / 'configs' / 'mixtral.py'}"
    command = [sys.executable, script, config, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "HOME": "/tmp"})


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--cuont=3"], ["unknown flag --cuont; did you mean --count?"]),
        (["--qqqqqq"], ["unknown flag --qqqqqq; see --help"]),
        (["--count=three"], ["--count=three"]),
        (["--count=0"], ["--count=0", "lower bound"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--config.chekpoint=x"], ["unknown config field", "chekpoint", "checkpoint"]),
        (["--config.offload.teir=host"], ["unknown config field", "teir", "tier"]),
        (["--config.offlaod.tier=host"], ["unknown config field", "offlaod", "offload"]),
        (["--config.batch_size.x=1"], ["batch_size"]),
        (["--config.offload=host"], ["offload"]),
        (["--config.batch_size=many"], ["config.batch_size", "many"]),
        (["--config.batch_size=1.5"], ["config.batch_size", "1.5"]),
        (["--config.offload.link_gbps=fast"], ["config.offload.link_gbps", "fast"]),
        (["--config.batch_size"], ["config.batch_size"]),
        (["--config.batch_size=0"], ["config.batch_size must be at least 1"]),
        (["--config.prefetch.predictor=lerned"], ["none, random", "did you mean learned?"]),
        (["--config.offload.tier=disk"], ["is not one of none, host"]),
        (["--config=absent.py"], ["config file", "absent.py", "not found"]),
        (["--config=README.md"], ["README.md"]),
        (["--config="], ["config"]),
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


@pytest.mark.parametrize("text, parts", [("def get_config(:", ["broken.py"]), ("import no_such_module", ["no_such_module"]), ("x = 1", ["get_config"])])
def test_broken_config_file(script, tmp_path, text, parts):
    (tmp_path / "broken.py").write_text(text)
    result = run(script, f"--config={tmp_path / 'broken.py'}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_values_arrive(script):
    result = run(script, "--config.offload.device_budget=10%", "--config.offload.link_gbps=2", "--config.batch_size=3")
    assert result.returncode == 0, result.stderr
    for part in ("device_budget='10%'", "link_gbps=2.0", "batch_size=3"):
        assert part in result.stdout


def test_interrupt(script):
    result = run(script, "--fault=interrupt")
    assert result.returncode == 130
    assert result.stderr.strip() == "interrupted"


def test_a_bug_keeps_its_traceback(script):
    result = run(script, "--fault=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a bug" in result.stderr


def test_help(script):
    result = run(script, "--help")
    assert "--count" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
