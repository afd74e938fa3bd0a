"""Bank files: aligned, without holes, readable by the safetensors package, and named only once they are whole."""

import json
import os
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from moe_jax.checkpoint.bank_file import BankWriter, partial, plan, write_durably
from moe_jax.checkpoint.safetensors_file import read_header

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8]
rng = np.random.default_rng(0)


def random_blocks(seed: int, count: int) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    blocks = {}
    for b in range(count):
        parts = {}
        for p in range(random.integers(1, 4)):
            shape = tuple(random.integers(1, 40, random.integers(1, 4)))
            dtype = DTYPES[random.integers(len(DTYPES))]
            parts[f"block{b}.part{p}"] = random.integers(-99, 99, shape).astype(dtype)
        blocks[f"block{b}"] = parts
    return blocks


def specs(blocks):
    return {
        name: {part: jax.ShapeDtypeStruct(x.shape, x.dtype) for part, x in parts.items()}
        for name, parts in blocks.items()
    }


def write(file, blocks) -> dict[str, int]:
    with BankWriter(file, specs(blocks)) as writer:
        for name, parts in blocks.items():
            writer.write(name, parts)
        return writer.finish()


@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_layout(tmp_path_factory, seed, count):
    file = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    blocks = random_blocks(seed, count)
    checksums = write(file, blocks)
    placed = plan(file, specs(blocks))[1]
    data, headers = file.read_bytes(), read_header(file)
    assert not partial(file).exists()
    end = 0
    for name, parts in blocks.items():
        block = placed[name]
        assert block.start % 4096 == block.nbytes % 4096 == 0
        assert block.start == end or not end
        end = block.start + block.nbytes
        assert zlib.crc32(data[block.start : end]) == checksums[name]
        for part, array in parts.items():
            tensor = headers[part]
            assert tensor == block.tensors[part]
            assert tensor.start % 64 == 0 and block.start <= tensor.start and tensor.start + tensor.nbytes <= end
            assert data[tensor.start : tensor.start + tensor.nbytes] == array.tobytes()
    assert end == len(data)
    assert {name for name in headers if not name.startswith("_pad.")} == {n for parts in blocks.values() for n in parts}


def test_the_safetensors_package_reads_it(tmp_path):
    """It refuses holes and overlaps, which is why gaps are tensors."""
    blocks = random_blocks(5, 4)
    write(tmp_path / "a.safetensors", blocks)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith("_pad.")]  # noqa: SIM118  not a dictionary
        assert sorted(names) == sorted(part for parts in blocks.values() for part in parts)
        for parts in blocks.values():
            for name, array in parts.items():
                np.testing.assert_array_equal(file.get_tensor(name).float().numpy(), array.astype(np.float32))


def test_arrays_need_not_be_contiguous(tmp_path):
    array = rng.normal(size=(6, 8)).astype(np.float32)
    write(tmp_path / "a.safetensors", {"b": {"b": array.T}})
    tensor = read_header(tmp_path / "a.safetensors")["b"]
    assert (tmp_path / "a.safetensors").read_bytes()[tensor.start :][: tensor.nbytes] == array.T.tobytes()


def test_no_name_until_it_is_whole(tmp_path):
    file, blocks = tmp_path / "a.safetensors", random_blocks(1, 3)
    with pytest.raises(RuntimeError, match="halfway"), BankWriter(file, specs(blocks)) as writer:
        writer.write("block0", blocks["block0"])
        raise RuntimeError("halfway")
    assert not file.exists() and partial(file).exists()
    with pytest.raises(AssertionError, match="not all"), BankWriter(file, specs(blocks)) as writer:
        writer.write("block0", blocks["block0"])
        writer.finish()
    assert not file.exists()


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.astype(np.float64)])
def test_refuses_what_was_not_planned(tmp_path, change):
    blocks = {"b": {"b": np.ones((2, 2), np.float32)}}
    with BankWriter(tmp_path / "a", specs(blocks)) as writer, pytest.raises(AssertionError):
        writer.write("b", {"b": change(blocks["b"]["b"])})


def test_refuses_another_order(tmp_path):
    blocks = random_blocks(1, 3)
    with BankWriter(tmp_path / "a", specs(blocks)) as writer, pytest.raises(AssertionError, match="order"):
        writer.write("block1", blocks["block1"])


def test_flushed_before_it_is_named(tmp_path, monkeypatch):
    """After a power cut a named file has its bytes: fsync of the file, rename, fsync of the directory."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    write(tmp_path / "a", {"b": {"b": np.ones(3, np.float32)}})
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    write_durably(tmp_path / "c.json", json.dumps({}).encode())
    assert calls == ["fsync", "replace", "fsync"]
