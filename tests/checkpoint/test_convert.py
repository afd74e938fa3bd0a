"""Conversion: the same model, aligned and without a copy; one clear line for everything that can be wrong."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from moe_jax.checkpoint import convert as module
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import DENSE, JOURNAL, MANIFEST, Converted, open_checkpoint
from moe_jax.checkpoint.hf import INDEX, SINGLE, HFCheckpoint
from moe_jax.checkpoint.quantize import FORMATS, dequantize, quantize
from moe_jax.errors import UserError
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
FIRST = "experts-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A finished conversion, not to be changed."""
    output = tmp_path_factory.mktemp("converted")
    convert(HFCheckpoint(source), output)
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A finished conversion, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def keys(checkpoint):
    a = checkpoint.architecture
    return [(layer, e) for layer in range(a.num_moe_layers) for e in range(a.num_experts)]


def same(a, b) -> None:
    """Equal trees of arrays, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_model(source, tmp_path, form):
    original = HFCheckpoint(source)
    made = convert(original, tmp_path / "out", form)
    assert isinstance(open_checkpoint(tmp_path / "out"), Converted)
    for converted in (made, Converted(tmp_path / "out")):
        assert converted.architecture == original.architecture
        assert converted.quantization == form
        assert converted.dense_spec == original.dense_spec
        same(converted.dense(), original.dense())
    for key in keys(original):
        expert = made.expert(*key)
        same(expert, quantize(original.expert(*key), form))
        assert made.expert_spec == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expert)
        assert made.expert_bytes == sum(x.nbytes for x in jax.tree.leaves(expert))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.partial")) and not (tmp_path / "out" / JOURNAL).exists()


def test_what_lies_beside_the_weights_comes_along(source, tmp_path):
    """Every kind of tokenizer and what says how to use it; weights in other formats, and hidden files, do not."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    small = ["tokenizer.model", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE"]
    for name in small:
        (copy / name).write_text("{}")
    (copy / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    for name in ("pytorch_model.bin", ".hidden"):
        (copy / name).write_text("")
    made = convert(HFCheckpoint(copy), tmp_path / "out")
    assert made.architecture.eos_ids == (5, 6) and HFCheckpoint(source).architecture.eos_ids == (1,)
    there = {file.name for file in made.directory.iterdir()}
    assert {*small, "generation_config.json", "tokenizer.json"} <= there
    assert not there & {"pytorch_model.bin", ".hidden", SINGLE}


def test_sizes(source, tmp_path):
    """Bytes over the link: what quantising is for."""
    original = HFCheckpoint(source)
    a = original.architecture
    f, d = a.experts.ff, a.d_model  # 24, filled up to 32, and 32
    size = {form: convert(original, tmp_path / form, form).expert_bytes for form in FORMATS}
    assert size["none"] == size["bf16"] == original.expert_bytes == 3 * f * d * 2
    assert size["packed"] == 3 * f * d * 3 // 2 + 2 * f + d + (17 + 16) * 10  # listed or not
    assert size["int8"] == 3 * f * d + 4 * (2 * f + d)
    assert size["int4"] == 2 * f * (16 + 2) + d * (16 + 2)


def test_arrays_are_aligned(finished):
    """So that JAX on a CPU copies none."""
    converted = Converted(finished)
    location = converted.expert_location(1, 2)
    assert location.start % 4096 == location.nbytes % 4096 == 0
    for array in [*jax.tree.leaves(converted.expert(1, 2)), *jax.tree.leaves(converted.dense())]:
        assert array.ctypes.data % 64 == 0
    assert not any(array.flags.writeable for array in jax.tree.leaves(converted.dense()))  # mapped
    expert = converted.expert(1, 2)
    raw = location.file.read_bytes()[location.start : location.start + location.nbytes]
    assert raw.startswith(expert.gate_up.tobytes())
    assert jax.device_put(expert.gate_up).unsafe_buffer_pointer() == expert.gate_up.ctypes.data


def test_the_index_names_every_tensor(finished):
    index = json.loads((finished / INDEX).read_text())
    assert all((finished / file).is_file() for file in index["weight_map"].values())
    found = {}
    for file in finished.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: file.name for name in opened.keys() if not name.startswith("_pad.")}  # noqa: SIM118
    assert index["weight_map"] == found
    assert "layers.4.experts.6.down" in found and found["dense.embedding"] == DENSE


def test_from_float32_to_bf16(tmp_path):
    original = HFCheckpoint(write_tiny(tmp_path / "in", dtype=np.float32))
    made = convert(original, tmp_path / "out", "bf16")
    assert made.dtype == "bfloat16" and made.dense()["embedding"].dtype == np.float32
    same(made.expert(2, 3).down, original.expert(2, 3).down.astype(ml_dtypes.bfloat16))


def test_a_converted_directory_can_be_quantised_and_a_quantised_one_cannot(source, finished, tmp_path):
    again = convert(open_checkpoint(finished), tmp_path / "b", "int4")
    same(again.expert(1, 1), convert(HFCheckpoint(source), tmp_path / "a", "int4").expert(1, 1))
    with pytest.raises(UserError, match="quantised experts already"):
        convert(again, tmp_path / "c", "int8")
    same(convert(again, tmp_path / "d").expert(1, 1), again.expert(1, 1))


def test_a_second_call_does_nothing(finished, source):
    before = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    convert(HFCheckpoint(source), finished)
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == before


def test_a_second_call_copies_what_has_changed_beside_the_weights(source, tmp_path):
    """As if converted now; what someone else put there stays."""
    copy, output = Path(shutil.copytree(source, tmp_path / "copy")), tmp_path / "out"
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert convert(HFCheckpoint(copy), output).architecture.eos_ids == (5,)
    (output / "notes.txt").write_text("mine")
    before = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    (copy / "generation_config.json").write_text('{"eos_token_id": 6}')
    (copy / "chat_template.jinja").write_text("new")
    (output / "tokenizer.json").unlink()
    assert convert(HFCheckpoint(copy), output).architecture.eos_ids == (6,)
    convert(HFCheckpoint(copy), tmp_path / "now")
    assert contents(output) == {**contents(tmp_path / "now"), "notes.txt": b"mine"}
    written = {file.name for file in output.iterdir() if before.get(file.name) != file.stat().st_mtime_ns}
    assert written == {"generation_config.json", "chat_template.jinja", "tokenizer.json"}


def test_a_second_call_names_a_file_that_cannot_be_read(source, copy, monkeypatch):
    read = Path.read_bytes

    def refuse(file):
        if file == source / "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"source.*/tokenizer\.json cannot be read: Permission denied"):
        convert(HFCheckpoint(source), copy)


def refused(directory, *parts) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint = open_checkpoint(directory)
        checkpoint.dense()
        for key in keys(checkpoint):
            checkpoint.expert(*key)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def flip(file: Path, at: int) -> None:
    """Changes one bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_one_flipped_bit_anywhere_is_found(copy):
    """In every block of the bank, in padding too, and in every header."""
    rng = np.random.default_rng(0)
    manifest = json.loads((copy / MANIFEST).read_text())
    places = [(b["file"], b["start"] + int(rng.integers(b["bytes"]))) for b in manifest["blocks"].values()]
    places += [(file, at) for file in manifest["files"] for at in (0, 30, 2000)]
    for file, at in places:
        flip(copy / file, at)
        refused(copy, str(copy / file), "damaged", "checksum", "convert the checkpoint again")
        flip(copy / file, at)
    open_checkpoint(copy)


def test_a_damaged_expert_is_named(copy):
    location = Converted(copy).expert_location(3, 5)
    flip(location.file, location.start + 100)
    converted = Converted(copy)
    converted.expert(3, 4)
    with pytest.raises(UserError, match=r"layers\.3\.experts\.5 does not have the checksum"):
        converted.expert(3, 5)


def test_checksums_are_plain_crc32(copy):
    """Anyone can check a bank without us."""
    for block in json.loads((copy / MANIFEST).read_text())["blocks"].values():
        data = (copy / block["file"]).read_bytes()[block["start"] : block["start"] + block["bytes"]]
        assert zlib.crc32(data) == int(block["crc32"], 16)


@pytest.mark.parametrize("cut", [1, 4096, -4096])
def test_truncated_or_longer(copy, cut):
    data = (copy / FIRST).read_bytes()
    (copy / FIRST).write_bytes(data[:-cut] if cut > 0 else data + bytes(-cut))
    refused(copy, FIRST, "bytes, not", "convert the checkpoint again")


def test_two_files_swapped(copy):
    """Same sizes, other names inside."""
    other = copy / FIRST.replace("00001-", "00002-")
    (copy / FIRST).rename(copy / "x")
    other.rename(copy / FIRST)
    (copy / "x").rename(other)
    refused(copy, "damaged")


def change(file: Path, edit) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda d: (d / FIRST).unlink(), [FIRST, "is missing"]),
        (lambda d: (d / "config.json").unlink(), ["has no config.json"]),
        (lambda d: (d / MANIFEST).write_text("{"), ["not valid JSON"]),
        (lambda d: change(d / MANIFEST, lambda m: m.update(format="moe_jax bank 0")), ["not of this version"]),
        (lambda d: change(d / MANIFEST, lambda m: m.pop("blocks")), ["damaged"]),
        (lambda d: change(d / MANIFEST, lambda m: m["blocks"].pop("layers.1.experts.2")), ["another model"]),
        (lambda d: change(d / MANIFEST, lambda m: m["files"][FIRST].pop("bytes")), ["damaged"]),
        (lambda d: change(d / "config.json", lambda c: c.update(num_hidden_layers=4)), ["another model"]),
        (lambda d: change(d / "config.json", lambda c: c.update(num_local_experts=9)), ["another model"]),
        (lambda d: change(d / "config.json", lambda c: c.update(vocab_size=300)), ["another model"]),
        (lambda d: change(d / "config.json", lambda c: c.update(intermediate_size=32)), ["another model"]),
    ],
)
def test_damaged_directories(copy, damage, parts):
    damage(copy)
    refused(copy, *parts)


# The output.


@pytest.mark.parametrize("name", [MANIFEST, "config.json", DENSE, FIRST])
def test_what_may_not_be_read_is_named(finished, unreadable, name):
    unreadable(name)
    with pytest.raises(UserError, match=f"^{finished / name} cannot be read: Permission denied$"):
        open_checkpoint(finished)


def test_a_small_file_of_the_source_that_may_not_be_read(source, tmp_path, unreadable):
    opened = open_checkpoint(source)
    unreadable("tokenizer_config.json")
    with pytest.raises(UserError, match=f"^{source}/tokenizer_config.json cannot be read: Permission denied$"):
        convert(opened, tmp_path / "out")


def test_refuses_bad_outputs(source, tmp_path):
    original = HFCheckpoint(source)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "link").symlink_to(source)
    cases = {
        source: "is the checkpoint itself or lies inside it",
        source / "out": "is the checkpoint itself or lies inside it",
        tmp_path / "link" / "out": "is the checkpoint itself or lies inside it",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "cannot be written",
        tmp_path / "full": r"is not empty \(thesis.tex\)",
        source.parent: "is not empty",
    }
    before = sorted(source.parent.rglob("*"))
    for output, message in cases.items():
        with pytest.raises(UserError, match=message):
            convert(original, output)
    assert sorted(source.parent.rglob("*")) == before
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_refuses_another_job_in_the_same_place(source, finished, tmp_path):
    with pytest.raises(UserError, match="another checkpoint, quantization or version"):
        convert(HFCheckpoint(source), finished, "int8")
    other = write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another checkpoint, quantization or version"):
        convert(HFCheckpoint(other), finished)


def test_two_at_once(source, tmp_path):
    def meddle(done, total):
        with pytest.raises(UserError, match="another conversion is writing"):
            convert(HFCheckpoint(source), tmp_path / "out")

    convert(HFCheckpoint(source), tmp_path / "out", progress=meddle)


def test_too_little_space_is_said_first(source, tmp_path, monkeypatch):
    needed = sum(file.stat().st_size for file in source.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* MB and the disk of .* has .* MB free"):
        convert(HFCheckpoint(source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_progress_ends_at_the_total(source, tmp_path):
    seen = []
    convert(HFCheckpoint(source), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1


def test_a_weight_that_is_not_finite(source, tmp_path):
    class Broken(HFCheckpoint):
        def expert(self, layer, expert):
            weights = super().expert(layer, expert)
            if (layer, expert) == (2, 3):
                weights.down[0, 0] = np.nan
            return weights

    with pytest.raises(UserError, match=r"layers\.2\.experts\.3 holds a weight that is NaN or infinite"):
        convert(Broken(source), tmp_path / "out", "int4")
    convert(Broken(source), tmp_path / "as_it_is")


# Interrupted.


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("form", ["none", "int4"])
def test_goes_on_where_it_stopped(source, tmp_path, form):
    """Stopped again and again, each time a little later; at the end the bytes are those of one go."""
    convert(HFCheckpoint(source), tmp_path / "whole", form)
    output, allowed, stops = tmp_path / "out", 1, 0
    while True:
        calls = iter(range(allowed))
        try:
            convert(HFCheckpoint(source), output, form, lambda *_, calls=calls: next(calls))
            break
        except StopIteration:
            allowed, stops = allowed + 7, stops + 1
            assert not (output / MANIFEST).exists() and not (output / "config.json").exists()
            with pytest.raises(UserError, match="was interrupted; give the same convert.py command again"):
                open_checkpoint(output)
            with pytest.raises(UserError, match="no config.json"):
                HFCheckpoint(output)
    assert stops > 5
    assert contents(output) == contents(tmp_path / "whole")


def test_finished_files_are_not_written_again(source, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(HFCheckpoint(source), tmp_path / "out", progress=stop)
    journal = json.loads((tmp_path / "out" / JOURNAL).read_text())
    done = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in journal["finished"]}
    assert len(done) >= 2
    first = tmp_path / "out" / FIRST
    first.write_bytes(first.read_bytes()[:-1])  # but one that has changed is
    convert(HFCheckpoint(source), tmp_path / "out")
    for name, time in done.items():
        assert ((tmp_path / "out" / name).stat().st_mtime_ns == time) == (name != FIRST)


def test_an_unfinished_conversion_of_something_else(source, tmp_path):
    def stop(done, total):
        raise Interrupted

    with pytest.raises(Interrupted):
        convert(HFCheckpoint(source), tmp_path / "out", progress=stop)
    with pytest.raises(UserError, match="another checkpoint, quantization or version"):
        convert(HFCheckpoint(source), tmp_path / "out", "int8")


def test_killed_between_manifest_and_journal(source, tmp_path, finished):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / JOURNAL).write_text("{}")
    open_checkpoint(copy)
    convert(HFCheckpoint(source), copy)
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_fingerprint_sees_changes(source, tmp_path, name):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert module.fingerprint(copy) == module.fingerprint(source)
    data = bytearray((copy / name).read_bytes())
    data[len(data) * 3 // 64 + 5] ^= 1
    (copy / name).write_bytes(data)
    assert module.fingerprint(copy) != module.fingerprint(source)


# The script.


def run(*flags, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "convert.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, **options)


def test_script(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, " * 20)
    done = run(f"--checkpoint={source}", f"--output={tmp_path / 'out'}", "--quantization=int8", f"--compare={text}")
    assert done.returncode == 0, done.stderr
    assert "35 experts" in done.stdout and "KL, nats per token" in done.stdout and "infer.py" in done.stdout
    assert "converting: " in done.stderr
    assert Converted(tmp_path / "out").quantization == "int8"


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--output=OUT"], "--checkpoint=DIR is needed"),
        (["--checkpoint=SOURCE"], "--output=DIR is needed"),
        (["--checkpoint=/nowhere", "--output=OUT"], "/nowhere does not exist"),
        (["--checkpoint=SOURCE", "--output=SOURCE"], "is the checkpoint itself"),
        (["--checkpoint=SOURCE", "--output=OUT", "--quantization=int5"], "not one of none, bf16, packed, int8, int4"),
        (["--checkpoint=SOURCE", "--output=OUT", "--quantisation=int8"], "did you mean --quantization?"),
        (["--checkpoint=SOURCE", "--output=OUT", "--compare=/nowhere"], "no such file"),
        (["--checkpoint=SOURCE", "--output=OUT", "--compare=SOURCE"], "cannot be read (Is a directory)"),
        (
            ["--checkpoint=SOURCE", "--output=OUT", "--compare=SOURCE/tokenizer_config.json"],
            "tokenizer_config.json has 36 tokens; give a text of at least 256",
        ),
    ],
)
def test_script_says_what_is_wrong(source, tmp_path, flags, part):
    done = run(*(f.replace("SOURCE", str(source)).replace("OUT", str(tmp_path / "out")) for f in flags))
    assert done.returncode == 2
    assert part in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_dequantised_experts_are_near(source, tmp_path):
    original, worst = HFCheckpoint(source), {"int8": 0.01, "int4": 0.12}
    for form, limit in worst.items():
        made = convert(original, tmp_path / form, form)
        for key in keys(original):
            for name in ("gate_up", "down"):
                want = np.asarray(getattr(original.expert(*key), name), np.float32)
                got = dequantize(getattr(made.expert(*key), name))[:, : want.shape[1]]
                assert np.linalg.norm(got - want) < limit * np.linalg.norm(want)
