"""GPT-OSS: see `tests/families/parity.py`. Released checkpoints hold their experts in MXFP4, and so do two cases here;
`transformers` reads those itself and dequantises them."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.quantized import Mxfp4, mxfp4_values
from moe_jax.model.rope import Yarn
from moe_jax.offload.bank import HostBank
from moe_jax.offload.source import OffloadedExperts
from tests.families import parity
from tests.families.parity import Case, no_windows, without

transformers = pytest.importorskip("transformers")

QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def config(**changes):
    sizes = dict(
        vocab_size=59,
        hidden_size=20,
        intermediate_size=14,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=7,
        max_position_embeddings=512,
        rms_norm_eps=1e-3,
        swiglu_limit=1.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20.0,
            "factor": 8.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    )
    return transformers.GptOssConfig(**{**sizes, **changes})


def save_mxfp4(model, directory):
    """Saves the model with its experts in random MXFP4, as the released files are; gives what transformers reads."""
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, x in list(tensors.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, out = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
            # The mean square of the sixteen values is 8.6; scales are chosen for products of the scale of their inputs.
            middle = 127 + round(math.log2(1.5 * width**-0.5 / 8.6**0.5))
            scales = rng.integers(middle - 1, middle + 2, (experts, out, width // 32)).astype(np.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = torch.tensor(blocks), torch.tensor(scales)
        else:
            tensors[name] = x.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": QUANTIZED}))
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )


EVERYWHERE = {
    "attention sinks": without(attention=dict(sinks=False)),
    "router bias": without(routing=dict(bias=False)),
    "softmax over the chosen": without(routing=dict(scoring="softmax", renormalise=False)),
    "expert bias": without(experts=dict(bias=False)),
    "the clamp": without(experts=dict(activation=dict(limit=math.inf))),
    "alpha": without(experts=dict(activation=dict(alpha=1.0))),
    "interleaved gate and up": without(experts=dict(activation=dict(interleaved=False))),
}
CASES = [
    Case(
        "released_shape",
        config(),
        {
            **EVERYWHERE,
            "sliding windows": no_windows,
            "full layers": without(layers=lambda kinds: tuple(dataclasses.replace(k, window=7) for k in kinds)),
            "q/k/v bias": without(attention=dict(qkv_bias=False)),
            "output bias": without(attention=dict(out_bias=False)),
            "yarn": without(rope=dict(scaling=None)),
            "yarn's attention factor": without(rope=dict(scaling=dict(attention_factor=1.0))),
            "yarn's fractional ramp": without(rope=dict(scaling=dict(truncate=True))),
        },
    ),
    Case(
        "tied_unbiased_full_first",
        config(
            tie_word_embeddings=True,
            attention_bias=False,
            hidden_size=28,
            intermediate_size=9,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=6,
            num_local_experts=7,
            num_experts_per_tok=1,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
            sliding_window=3,
            swiglu_limit=0.7,
            swiglu_alpha=2.5,
            rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        ),
        {**EVERYWHERE, "sliding windows": no_windows},
    ),
    Case(
        "mxfp4",
        config(
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            num_local_experts=9,
            num_experts_per_tok=8,
            sliding_window=16,
        ),
        {**EVERYWHERE, "sliding windows": no_windows, "yarn": without(rope=dict(scaling=None))},
        save=save_mxfp4,
    ),
    Case(
        "mxfp4_at_the_released_limit",
        config(
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=7,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=3,
            tie_word_embeddings=True,
            swiglu_limit=7.0,
        ),
        {name: EVERYWHERE[name] for name in ("attention sinks", "expert bias", "the clamp")},
        save=save_mxfp4,
    ),
]
QUANTIZED_CASES = [case for case in CASES if case.save]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)


@pytest.mark.parametrize("case", [CASES[0], QUANTIZED_CASES[0]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smallest_budget_changes_no_bit(case, dtype):
    s = parity.subject(case)
    a, stages, dense = s.architecture, Stages(s.architecture, jnp.dtype(dtype)), device_weights(s.dense, dtype)
    bank, runs = HostBank(s.checkpoint), []
    offloaded = OffloadedExperts(bank, a, a.top_k * bank.expert_bytes)
    for source in (ResidentExperts(s.checkpoint), offloaded):
        engine = Engine(stages, dense, source, prefill_chunk=32)
        logits, state = engine.prefill(s.prompts, 8)
        steps = [np.asarray(logits)]
        for _ in range(8):
            steps.append(np.asarray(engine.decode(steps[-1].argmax(-1).astype(np.int32), state)))
        source.close()
        runs.append(np.stack(steps))
    assert offloaded.trace.peak_bytes <= a.top_k * bank.expert_bytes
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_is_dequantised_to_the_last_bit(dtype):
    """Every byte under every scale for which all sixteen values are normal numbers."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = np.repeat(np.arange(2, 253, dtype=np.uint8)[:, None], 16, axis=1)  # [out, groups]
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (len(scales), 16, 16))
    even, odd = mxfp4_values(Mxfp4(jnp.asarray(blocks), jnp.asarray(scales)), jnp.dtype(dtype))
    ours = np.stack([np.asarray(even), np.asarray(odd)], axis=-1).reshape(len(scales), -1)
    theirs = convert_moe_packed_tensors(
        torch.tensor(blocks.copy())[None], torch.tensor(scales)[None], dtype=getattr(torch, dtype)
    )[0].T.contiguous()
    bits = torch.int32 if dtype == "float32" else torch.int16
    assert ours.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    np.testing.assert_array_equal(ours.view(np.int32 if dtype == "float32" else np.int16), theirs.view(bits).numpy())


@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=str)
def test_mxfp4_stays_as_released(case):
    """What lies in the bank, goes over the link and is resident are the bytes of the file."""
    from safetensors.numpy import load_file

    checkpoint = parity.subject(case).checkpoint
    a, tensors = checkpoint.architecture, load_file(checkpoint.directory / "model.safetensors")
    assert checkpoint.dtype == "mxfp4"
    experts = {name: x for name, x in tensors.items() if ".experts." in name}
    assert sum(x.nbytes for x in experts.values()) == a.num_layers * a.num_experts * checkpoint.expert_bytes
    bank, resident = HostBank(checkpoint), ResidentExperts(checkpoint)
    assert bank.expert_bytes == checkpoint.expert_bytes
    for layer in range(a.num_layers):
        for e in range(a.num_experts):
            for weights in (bank.copy((layer, e)), resident.take(layer, [e])[0]):
                for field in ("gate_up", "down"):
                    matrix, name = getattr(weights, field), f"model.layers.{layer}.mlp.experts.{field}_proj"
                    assert isinstance(matrix, Mxfp4)
                    np.testing.assert_array_equal(matrix.blocks, experts[f"{name}_blocks"][e])
                    np.testing.assert_array_equal(matrix.scales, experts[f"{name}_scales"][e])
                    np.testing.assert_array_equal(getattr(weights, f"{field}_bias"), experts[f"{name}_bias"][e])


def test_a_dtype_must_be_what_the_layout_says(tmp_path):
    from safetensors.numpy import load_file, save_file

    source: Path = parity.subject(QUANTIZED_CASES[0]).checkpoint.directory
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for wrong, part in ((name, f"{name} is F32; supported dtypes: U8"), ("lm_head.weight", "lm_head.weight is U8;")):
        tensors = load_file(source / "model.safetensors")
        tensors[wrong] = tensors[wrong].astype(np.float32 if wrong == name else np.uint8)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError) as caught:
            HFCheckpoint(tmp_path)
        assert part in str(caught.value)


def test_defaults_are_those_of_transformers():
    from moe_jax.checkpoint.families import gpt_oss

    config = transformers.GptOssConfig().to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    needed = ("model_type", *sizes, "num_key_value_heads", "num_local_experts", "num_experts_per_tok")
    a = gpt_oss.read_config(config)
    assert gpt_oss.read_config({name: config[name] for name in needed}) == a
    assert [kind.window for kind in a.layers[:3]] == [128, None, 128]
    assert a.rope.scaling == Yarn(32.0, 4096, truncate=False, attention_factor=0.1 * math.log(32) + 1)
