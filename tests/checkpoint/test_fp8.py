"""DeepSeek-V3's FP8, as released: against NumPy alone, against `transformers`, and through a conversion."""

import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.checkpoint import fp8
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import SINGLE, HFCheckpoint
from moe_jax.checkpoint.safetensors_file import read_header
from moe_jax.errors import UserError

transformers = pytest.importorskip("transformers")
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
# No size is a multiple of the blocks', and some are less than one.
SIZES = dict(
    vocab_size=61,
    hidden_size=150,
    intermediate_size=270,
    moe_intermediate_size=130,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=3,
    num_key_value_heads=3,
    qk_nope_head_dim=50,
    qk_rope_head_dim=6,
    v_head_dim=47,
    kv_lora_rank=140,
    q_lora_rank=29,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=3,
    topk_group=2,
    num_nextn_predict_layers=1,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def value(byte: int) -> float:
    """What a byte of e4m3 is: sign, four bits of exponent, three of mantissa, no infinities (arXiv 2209.05433)."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def widened(numbers: np.ndarray, scales: np.ndarray, block=(128, 128)) -> np.ndarray:
    """Number by number, in float64, then float32 and bfloat16 by rounding to nearest even on the bits."""
    table = np.array([value(byte) for byte in range(256)])
    i, j = np.indices(numbers.shape)
    exact = (table[numbers.view(np.uint8)] * scales.astype(np.float64)[i // block[0], j // block[1]]).astype(np.float32)
    bits = exact.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return bits.astype(np.uint16).view(BF16)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny V3 in the form of its release: matrices in FP8, with the layer for multi-token prediction."""
    import torch

    directory = tmp_path_factory.mktemp("released")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES)).to(torch.bfloat16)
        model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in read_header(directory / SINGLE).items():
        x = np.zeros(tensor.shape, np.float32)
        if len(tensor.shape) == 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            numbers = rng.integers(0, 256, tensor.shape, np.uint8)
            numbers[numbers & 127 == 127] = 8
            tensors[name] = numbers.view(E4M3)
            scales = [-(-n // 128) for n in tensor.shape]
            # Numbers have a mean square of about 110^2; products keep the scale of their inputs.
            tensors[name + "_scale_inv"] = rng.uniform(0.5, 2, scales).astype(np.float32) / 110 / tensor.shape[1] ** 0.5
        elif name.endswith("correction_bias"):
            tensors[name] = rng.normal(size=tensor.shape).astype(np.float32)
        else:
            x = rng.normal(size=tensor.shape) * (0.3 if "norm" in name else 1) + ("norm" in name)
            tensors[name] = x.astype(BF16)
    extra = {name.replace("layers.2.", "layers.3."): x for name, x in tensors.items() if ".layers.2." in name}
    extra |= {f"model.layers.3.{name}.weight": np.ones(3, BF16) for name in ("enorm", "hnorm", "shared_head.norm")}
    save(directory, {**tensors, **extra, "model.layers.3.eh_proj.weight": np.ones((3, 6), BF16)})
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return directory


def save(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def stored(directory: Path) -> dict[str, np.ndarray]:
    """The file's tensors, read by our own header and numpy."""
    data = (directory / SINGLE).read_bytes()
    dtypes = {"F8_E4M3": E4M3, "BF16": BF16, "F32": np.float32}
    return {
        name: np.frombuffer(data, dtypes[t.dtype], math.prod(t.shape), t.start).reshape(t.shape)
        for name, t in read_header(directory / SINGLE).items()
    }


def as_bf16(directory: Path) -> dict[str, np.ndarray]:
    """The same checkpoint in bfloat16, without the layer that is not read, by `widened`."""
    tensors = stored(directory)
    return {
        name: widened(x, tensors[name + "_scale_inv"]) if x.dtype == E4M3 else x
        for name, x in tensors.items()
        if not name.endswith("_scale_inv") and ".layers.3." not in name
    }


@pytest.fixture(scope="module")
def cast(released, tmp_path_factory):
    """What `fp8_cast_bf16.py` would make of it."""
    directory = tmp_path_factory.mktemp("cast")
    save(directory, as_bf16(released))
    config = json.loads((released / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_every_byte():
    np.testing.assert_array_equal(fp8._VALUES, np.array([value(byte) for byte in range(256)], np.float32))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (127, 129), (300, 5), (5, 300), (130, 9000)])
@pytest.mark.parametrize("block, dtype", [((128, 128), np.float32), ((128, 128), BF16), ((64, 32), np.float32)])
def test_blocks_and_their_edges(tmp_path, shape, block, dtype):
    """Strips are of one block's height where a row is long, of several where it is short."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 256, shape, np.uint8).view(E4M3)
    scales = (rng.normal(size=[-(-n // b) for n, b in zip(shape, block, strict=True)]) ** 2).astype(dtype)
    save(tmp_path, {"x": numbers, "x_scale_inv": scales})
    tensor = fp8.with_scales(read_header(tmp_path / SINGLE), block)["x"]
    got = np.empty(shape, BF16)
    fp8.read_widened(tensor, block, got)
    want = widened(numbers, scales, block)
    finite = np.isfinite(want.astype(np.float32))
    np.testing.assert_array_equal(got.view(np.uint16)[finite], want.view(np.uint16)[finite])
    assert np.isnan(got.astype(np.float32)[~finite]).all()


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("form", ["none", "int4"])
def test_read_and_converted_as_if_cast_before(released, cast, tmp_path, form):
    ours, theirs = HFCheckpoint(released), HFCheckpoint(cast)
    assert ours.dtype == "bfloat16" and ours.expert_bytes == theirs.expert_bytes
    assert ours.dense_spec == theirs.dense_spec
    same(ours.dense(), theirs.dense())
    converted, wanted = convert(ours, tmp_path / "a", form), convert(theirs, tmp_path / "b", form)
    same(Converted(tmp_path / "a").dense(), theirs.dense())
    for layer in range(ours.architecture.num_moe_layers):
        for e in range(ours.architecture.num_experts):
            same(ours.expert(layer, e), theirs.expert(layer, e))
            same(converted.expert(layer, e), wanted.expert(layer, e))


def test_the_same_text_as_transformers(cast, released):
    """Which reads the cast one; the architecture in full is compared in tests/families/test_deepseek.py."""
    import torch

    from tests.families.parity import dense_forward

    checkpoint = HFCheckpoint(released)
    a = checkpoint.architecture
    experts = [
        jax.tree.map(
            lambda *x: np.stack(x).astype(np.float32), *(checkpoint.expert(layer, e) for e in range(a.num_experts))
        )
        for layer in range(a.num_moe_layers)
    ]
    dense = jax.tree.map(lambda x: x.astype(np.float32), checkpoint.dense())
    tokens = np.random.default_rng(0).integers(0, 61, 23)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        cast, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        theirs = model(torch.tensor(tokens[None])).logits[0].numpy()
    ours = np.asarray(dense_forward(a, dense, experts, tokens))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


GATE, SCALES = (
    "model.layers.1.mlp.experts.2.gate_proj.weight",
    "model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv",
)


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda t: t.pop(SCALES), f"{GATE} in FP8 and {SCALES} is nowhere"),
        (lambda t: t.update({SCALES: t[SCALES][:1]}), f"{SCALES} is F32 [1, 2], not floats [2, 2]"),
        (lambda t: t.update({SCALES: t[SCALES].astype(np.uint8)}), f"{SCALES} is U8"),
        (lambda t: t.update({GATE: t[GATE].astype(BF16)}), f"unexpected tensor {SCALES}"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), f"{GATE} is [150, 130], not [130, 150]"),
        (lambda t: t.pop(GATE), f"lacks tensor {GATE}"),
        (lambda t: t.pop("model.layers.3.mlp.experts.2.gate_proj.weight_scale_inv"), "is nowhere"),
    ],
)
def test_faults(released, tmp_path, change, part):
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    tensors = stored(copy)
    change(tensors)
    save(copy, tensors)
    with pytest.raises(UserError) as caught:
        HFCheckpoint(copy)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_fp8_without_its_configuration_is_refused(released, tmp_path):
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"unexpected .*_scale_inv"):
        HFCheckpoint(copy)


def test_fused_experts_are_refused_by_name(tmp_path):
    save(tmp_path, {"x": np.zeros((2, 4, 4), E4M3), "x_scale_inv": np.ones((2, 1, 1), np.float32)})
    with pytest.raises(UserError, match="has x, fused experts in FP8"):
        fp8.with_scales(read_header(tmp_path / SINGLE), (128, 128))
