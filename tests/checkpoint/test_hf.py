"""HFCheckpoint: exact tensors without a second copy, and one clear line for everything that can be wrong."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from moe_jax.checkpoint.converted import open_checkpoint
from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import INDEX, SINGLE, HFCheckpoint
from moe_jax.checkpoint.names import EMBEDDING, HEAD
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, Experts
from moe_jax.model.layers import Decoder

A = mixtral.architecture(
    vocab_size=33,
    d_model=12,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    num_experts=5,
    top_k=2,
    expert_ff=7,
    max_seq_len=16,
)
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def tensors(a: Architecture = A, dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = mixtral.layouts(a)[0]
    parts = [names.expert(layer, e) for layer in range(a.num_layers) for e in range(a.num_experts)]
    rows = [*names.dense.values(), *(rows for part in parts for rows in part.values())]
    return {piece.name: rng.normal(size=piece.shape).astype(dtype) for row in rows for piece in row}


def write(directory, weights: dict[str, np.ndarray], a: Architecture = A, shards: int = 0, index=None) -> None:
    """A Hugging Face directory; with `shards` > 0 tensors go round robin over that many files."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(mixtral.write_config(a, "bfloat16")))
    if not shards:
        save_file(weights, directory / SINGLE)
        return
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in weights if where[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where if index is None else index(where)}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_reads_every_tensor_exactly(tmp_path, tied, shards, dtype):
    a = dataclasses.replace(A, tie_embeddings=tied)
    weights = tensors(a, dtype)
    write(tmp_path, weights, a, shards)
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.architecture == a
    assert checkpoint.dtype == np.dtype(dtype).name
    dense = checkpoint.dense()
    np.testing.assert_array_equal(dense["embedding"], weights["model.embed_tokens.weight"])
    attention = [weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(dense["layers"][1]["attention"]["qkv"], np.concatenate(attention))
    np.testing.assert_array_equal(dense["layers"][1]["router"]["weight"], weights[ROUTER])
    gate_up, down, *biases = checkpoint.expert(1, 3)
    assert biases == [None, None]
    w1, w3 = (weights[W2.replace("w2", w)] for w in ("w1", "w3"))
    np.testing.assert_array_equal(gate_up, np.concatenate([w1, w3]))
    np.testing.assert_array_equal(down, weights[W2])
    assert gate_up.dtype == down.dtype == dtype
    assert gate_up.nbytes + down.nbytes == checkpoint.expert_bytes
    assert {"gate_up": gate_up.shape, "down": down.shape} == a.expert_shapes()
    assert gate_up.ctypes.data % 64 == down.ctypes.data % 64 == 0


def test_every_expert_is_its_own(tmp_path):
    """Each expert is filled with its own number, so that no two can be confused."""
    weights = tensors()
    for layer in range(A.num_layers):
        for e in range(A.num_experts):
            for w in ("w1", "w2", "w3"):
                weights[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"][:] = 10 * layer + e
    write(tmp_path, weights)
    checkpoint = HFCheckpoint(tmp_path)
    for layer in range(A.num_layers):
        for e in range(A.num_experts):
            assert all((part == 10 * layer + e).all() for part in jax.tree.leaves(checkpoint.expert(layer, e)))


@pytest.mark.parametrize("tied", [True, False])
def test_dense_tree_is_that_of_the_decoder(tmp_path, tied):
    a = dataclasses.replace(A, tie_embeddings=tied)
    write(tmp_path, tensors(a), a)
    state = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Decoder(a, rngs=nnx.Rngs(0))))[1])
    dense = HFCheckpoint(tmp_path).dense()
    assert jax.tree.structure(dense) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.shape, dense) == jax.tree.map(lambda x: x.shape, state)


def without(name):
    return lambda weights: weights.pop(name)


def replaced(name, change):
    return lambda weights: weights.update({name: change(weights[name])})


FAULTS = {
    "missing expert": (without(W2), ["lacks tensor", W2]),
    "missing dense": (without(ROUTER), ["lacks tensor", ROUTER]),
    "extra": (lambda w: w.update({"model.layers.2.extra": w[W2]}), ["unexpected tensor model.layers.2.extra"]),
    "shape": (replaced(W2, lambda x: np.ascontiguousarray(x.T)), [f"{W2} is [7, 12], not [12, 7]"]),
    "rank": (replaced("model.norm.weight", lambda x: x[None]), ["model.norm.weight is [1, 12], not [12]"]),
    "expert dtype": (replaced(W2, lambda x: x.astype(np.float32)), ["mixes dtypes", f"{W2} is F32"]),
    "fused dtype": (
        replaced("model.layers.0.self_attn.v_proj.weight", lambda x: x.astype(np.float32)),
        ["mixes dtypes", "model.layers.0.self_attn.v_proj.weight is F32"],
    ),
    "integer dtype": (replaced(ROUTER, lambda x: x.astype(np.int8)), [f"{ROUTER} is I8", "F32, F16, BF16"]),
}


def refused(directory, *parts: str) -> None:
    """The directory is refused in one line that holds every part."""
    with pytest.raises(UserError) as caught:
        HFCheckpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_tensors(tmp_path, fault, shards):
    weights = tensors()
    change, parts = FAULTS[fault]
    change(weights)
    write(tmp_path, weights, shards=shards)
    refused(tmp_path, *parts)


def test_a_dense_tensor_may_have_its_own_dtype(tmp_path):
    weights = tensors()
    weights[ROUTER] = weights[ROUTER].astype(np.float32)
    write(tmp_path, weights)
    assert HFCheckpoint(tmp_path).dense()["layers"][1]["router"]["weight"].dtype == np.float32


def test_lists_at_most_five_names(tmp_path):
    weights = {name: value for name, value in tensors().items() if "experts" not in name}
    write(tmp_path, weights)
    refused(tmp_path, "lacks 30 tensors", "(30 in all)")
    with pytest.raises(UserError) as caught:
        HFCheckpoint(tmp_path)
    assert str(caught.value).count("block_sparse_moe") == 5


@pytest.mark.parametrize("cut", [1, 1000, -1])
@pytest.mark.parametrize("shards", [0, 2])
def test_truncated(tmp_path, shards, cut):
    write(tmp_path, tensors(), shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - cut] if cut > 0 else data + b"x")
    refused(tmp_path, str(file), "truncated" if cut > 0 else "too long", "download it again")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_truncated_in_the_header(tmp_path, size):
    write(tmp_path, tensors())
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:size])
    refused(tmp_path, "truncated or not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'"x"',
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": "ab"}}',
        b"\xff\xfe",
    ],
)
def test_damaged_header(tmp_path, header):
    write(tmp_path, tensors())
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    refused(tmp_path, "damaged safetensors header")


def test_tensor_twice_in_one_file(tmp_path):
    write(tmp_path, tensors())
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = b"{" + entry + b", " + entry + b"}"
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refused(tmp_path, "holds the tensor a twice")


def test_tensor_in_two_shards(tmp_path):
    write(tmp_path, tensors(), shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    both = load_file_bf16(second)
    both["model.embed_tokens.weight"] = tensors()["model.embed_tokens.weight"]
    save_file(both, second)
    refused(tmp_path, "model.embed_tokens.weight twice", first.name, second.name)


def load_file_bf16(file) -> dict[str, np.ndarray]:
    """`load_file` of the package knows no bfloat16: the file's names, values from `tensors`."""
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    return {name: tensors()[name] for name in header if name != "__metadata__"}


@pytest.mark.parametrize(
    "index, part",
    [
        (lambda where: {**where, W2: "absent.safetensors"}, "lacks file absent.safetensors"),
        (lambda where: {**where, "ghost": where[W2]}, "disagree about tensor ghost"),
        (lambda where: {**where, W2: where[ROUTER]}, f"disagree about tensor {W2}"),
        (lambda where: list(where), "no weight_map"),
        (lambda where: {W2: 3}, "no weight_map"),
    ],
)
def test_wrong_index(tmp_path, index, part):
    write(tmp_path, tensors(), shards=7, index=index)
    refused(tmp_path, part)


def test_no_directory(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a directory")


@pytest.mark.parametrize(
    "text, part",
    [
        (None, "has no config.json"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "llama"}', "'mixtral'"),
        ('{"model_type": "mixtral"}', "has no field"),
    ],
)
def test_bad_config(tmp_path, text, part):
    write(tmp_path, tensors())
    if text is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(text)
    refused(tmp_path, part)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_what_may_not_be_read_is_named(tmp_path, unreadable, name):
    write(tmp_path, tensors(), shards=3)
    (tmp_path / "generation_config.json").write_text("{}")
    unreadable(name)
    with pytest.raises(UserError, match=f"^{tmp_path / name} cannot be read: Permission denied$"):
        open_checkpoint(tmp_path)


def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path, nobody):
    write(tmp_path / "model", tensors())
    (tmp_path / "model").chmod(0)
    with nobody(), pytest.raises(UserError, match=rf"^{tmp_path}/model/\S+ cannot be read: Permission denied$"):
        open_checkpoint(tmp_path / "model")
    (tmp_path / "model").chmod(0o700)


def test_no_weights(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, SINGLE, INDEX, "only safetensors")


def test_a_file_cut_while_open_is_named(tmp_path):
    write(tmp_path, tensors())
    checkpoint = HFCheckpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:3000])
    with pytest.raises(UserError, match="ended while it was read"):
        for layer in range(A.num_layers):
            for e in range(A.num_experts):
                checkpoint.expert(layer, e)


MEASURE = """
import re, sys
from moe_jax.checkpoint.hf import HFCheckpoint
rss = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
checkpoint = HFCheckpoint(sys.argv[1])
a, start, peak = checkpoint.architecture, rss(), 0
for layer in range(a.num_layers):
    for e in range(a.num_experts):
        held = checkpoint.expert(layer, e)
        peak = max(peak, rss() - start)
print(peak, sum(part.nbytes for part in held if part is not None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_needs_no_second_copy(tmp_path):
    """300 MB of experts of 19 MB: while one is held and the next is read, two of them are in memory, and no more."""
    a = dataclasses.replace(A, d_model=512, experts=Experts(8, 6144))
    weights = {name: np.zeros(value.shape, value.dtype) for name, value in tensors(a).items()}
    write(tmp_path, weights, a)
    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    peak, expert = map(int, out.stdout.split())
    assert expert == HFCheckpoint(tmp_path).expert_bytes == 3 * 512 * 6144 * 2
    assert peak < 2.3 * expert


@pytest.mark.parametrize("said, ids", [(None, (2,)), (7, (7,)), ([7, 9], (7, 9)), ([], ())])
def test_generation_config_says_where_a_text_ends(tmp_path, said, ids):
    a = dataclasses.replace(A, eos_ids=(2,))
    write(tmp_path, tensors(a), a)
    assert HFCheckpoint(tmp_path).architecture.eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said, "temperature": 0.7}))
    assert HFCheckpoint(tmp_path).architecture == dataclasses.replace(a, eos_ids=ids)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert said is None or theirs == said


@pytest.mark.parametrize("said", ["</s>", [True], 33, -1, [2, None]])
def test_end_tokens_must_be_ids(tmp_path, said):
    write(tmp_path, tensors())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    refused(tmp_path, "generation_config.json has eos_token_id=", "a token id or a list of them")


TIED = dataclasses.replace(A, tie_embeddings=True)


def test_a_tied_head_that_is_stored_is_the_embedding(tmp_path):
    weights = tensors(TIED)
    write(tmp_path, {**weights, HEAD: weights[EMBEDDING].copy()}, TIED)
    found = HFCheckpoint(tmp_path)
    assert ("head",) not in found.dense_spec
    assert found.dense()["embedding"].tobytes() == weights[EMBEDDING].tobytes()


@pytest.mark.parametrize("row", [0, 32])
def test_a_tied_head_that_is_another_is_refused(tmp_path, row):
    weights = tensors(TIED)
    other = weights[EMBEDDING].copy()
    other[row] += 1
    write(tmp_path, {**weights, HEAD: other}, TIED)
    with pytest.raises(UserError, match="is not the embedding, to which config.json ties it"):
        HFCheckpoint(tmp_path)
