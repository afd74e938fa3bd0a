"""DeepSeek-V2 and -V3: see `tests/families/parity.py`."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moe_jax.checkpoint.families import family
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.latent_attention import LatentAttention
from moe_jax.model.rope import rope_table
from moe_jax.model.router import Router, choose
from moe_jax.offload.bank import HostBank
from moe_jax.offload.source import OffloadedExperts
from tests.families import parity
from tests.families.parity import Case, without

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=26,
    moe_intermediate_size=10,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=3,
    num_key_value_heads=3,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    kv_lora_rank=10,
    q_lora_rank=None,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-3,  # the latents' own norms keep 1e-6
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
)


def v2(**changes):
    return transformers.DeepseekV2Config(**{**SIZES, **changes})


def v3(**changes):
    groups = dict(n_group=1, topk_group=1)
    return transformers.DeepseekV3Config(**{**SIZES, **groups, **changes})


def yarn(mscale, mscale_all_dim, **more):
    return {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "original_max_position_embeddings": 20,
        "beta_fast": 4,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        **more,
    }


def plain_scale(a):
    return dataclasses.replace(a, attention=dataclasses.replace(a.attention, score_scale=_head(a) ** -0.5))


def _head(a):
    return a.attention.nope_dim + a.attention.rope_dim


ALWAYS = {"neighbours rotated": without(rope=dict(interleaved=False)), "shared experts": without(shared=None)}
YARN = {
    "yarn": without(rope=dict(scaling=None)),
    "yarn's scale of the scores": plain_scale,
}
SCALE = {"routed scale": without(routing=dict(scale=1.0))}
CORRECTION = {"the correction bias": without(routing=dict(correction_bias=False))}
GROUPS = {"groups": without(routing=dict(num_groups=1, groups_kept=1))}

V2_CASES = [
    Case(
        "v2_lite_greedy",
        v2(rope_parameters=yarn(0.707, 0.707), n_group=1, topk_group=1),
        {**ALWAYS, **YARN, "gates as they are": without(routing=dict(renormalise=True))},
    ),
    Case(
        "v2_grouped_low_rank_queries_biased_tied",
        v2(
            q_lora_rank=11,
            attention_bias=True,
            tie_word_embeddings=True,
            n_routed_experts=15,
            n_group=5,
            topk_group=2,
            num_experts_per_tok=4,
            topk_method="group_limited_greedy",
            routed_scaling_factor=3.0,
            n_shared_experts=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            rope_parameters=yarn(1.3, 0.4),
        ),
        {
            **ALWAYS,
            **YARN,
            **SCALE,
            **GROUPS,
            "yarn's scale of the rotation": without(rope=dict(scaling=dict(attention_factor=1.0))),
            "a group's score": without(routing=dict(group_score="top2")),
            "attention bias": without(attention=dict(bias=False)),
        },
        fused=True,
    ),
    Case(
        "v2_one_expert_no_dense_layer",
        v2(
            first_k_dense_replace=0,
            num_hidden_layers=2,
            num_experts_per_tok=1,
            n_routed_experts=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            qk_rope_head_dim=4,
            kv_lora_rank=16,
            attention_bias=True,
            routed_scaling_factor=2.0,
        ),
        {**ALWAYS, **SCALE, "attention bias": without(attention=dict(bias=False))},
    ),
]
V3_CASES = [
    Case(
        "v3_grouped",
        v3(
            q_lora_rank=11,
            n_routed_experts=12,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=5,
            routed_scaling_factor=2.5,
            n_shared_experts=1,
            norm_topk_prob=True,
            rope_parameters=yarn(1.0, 1.0),
        ),
        {
            **ALWAYS,
            **YARN,
            **SCALE,
            **GROUPS,
            **CORRECTION,
            "a group's score": without(routing=dict(group_score="max")),
            "sigmoid scores": without(routing=dict(scoring="softmax")),
            "renormalised gates": without(routing=dict(renormalise=False)),
        },
    ),
    Case(
        "v3_halves_rotated_biased_tied",
        v3(
            rope_interleave=False,
            attention_bias=True,
            tie_word_embeddings=True,
            norm_topk_prob=False,
            first_k_dense_replace=2,
            num_hidden_layers=4,
            routed_scaling_factor=1.5,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=8,
            num_experts_per_tok=7,
            rope_parameters=yarn(0.5, 1.0, truncate=False),
        ),
        {
            **YARN,
            **SCALE,
            "halves rotated": without(rope=dict(interleaved=True)),
            "shared experts": without(shared=None),
            "yarn's scale of the rotation": without(rope=dict(scaling=dict(attention_factor=1.0))),
            "sigmoid scores": without(routing=dict(scoring="softmax")),
            "gates as they are": without(routing=dict(renormalise=True)),
            "attention bias": without(attention=dict(bias=False)),
        },
        fused=True,
    ),
    Case(
        "v3_eight_of_fifteen",
        v3(
            n_routed_experts=15,
            n_group=3,
            topk_group=2,
            num_experts_per_tok=8,
            kv_lora_rank=9,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
            first_k_dense_replace=0,
            num_hidden_layers=2,
        ),
        {**ALWAYS, **GROUPS, **CORRECTION, "linear rope": without(rope=dict(scaling=None))},
    ),
]
CASES = V2_CASES + V3_CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)


@pytest.mark.parametrize("case", [V2_CASES[1], V3_CASES[0]], ids=str)
def test_smallest_budget_changes_no_bit(case):
    s = parity.subject(case)
    a, bank = s.architecture, HostBank(s.checkpoint)
    weights, stages, found = device_weights(s.dense, jnp.float32), Stages(a, jnp.float32), []
    for source in (ResidentExperts(s.checkpoint), OffloadedExperts(bank, a, a.top_k * bank.expert_bytes)):
        engine = Engine(stages, weights, source, prefill_chunk=32)
        logits, state = engine.prefill(s.prompts, 8)
        rows = [np.asarray(logits)]
        for _ in range(8):
            rows.append(np.asarray(engine.decode(rows[-1].argmax(-1).astype(np.int32), state)))
        source.close()
        found.append(np.stack(rows))
    np.testing.assert_array_equal(found[0], found[1])


def test_absorbed_attention_equals_keys_and_values_of_every_head():
    a = parity.subject(V2_CASES[1]).architecture
    module = LatentAttention(a, a.layers[0], jnp.float32, rngs=nnx.Rngs(0), std=0.3)
    x = jax.random.normal(jax.random.key(0), (2, 16, a.d_model))
    table = jnp.asarray(rope_table(16, a.attention.rope_dim, a.rope))
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    kv = tuple(jnp.zeros(shape) for shape in module.cache_shapes(module.spec, 2, 24))
    assert sum(x.size for x in kv) == 2 * 24 * (10 + 6)  # the latent and one rotated key, whatever the number of heads
    cached, _ = module.cached(x, positions, table, kv)
    np.testing.assert_allclose(module.full(x, table[None]), cached, rtol=0, atol=1e-5 * np.abs(cached).max())


def test_router_stays_in_float32():
    a = parity.subject(V3_CASES[0]).architecture
    h = jax.random.normal(jax.random.key(0), (64, a.d_model)).astype(jnp.bfloat16)
    for spec, same in ((a, True), (without(routing=dict(float32=False))(a), False)):
        router = Router(spec, jnp.bfloat16, rngs=nnx.Rngs(0), std=1.0)
        exact = np.asarray(h, np.float64) @ np.asarray(router.weight[...], np.float64).T
        error = np.abs(np.asarray(router.logits(h)) - exact).max() / np.abs(exact).max()
        assert (error < 1e-6) == same


def test_gates_of_sigmoids_that_are_all_zero():
    a = parity.subject(V3_CASES[0]).architecture
    _, gates = choose(jnp.full((1, 12), -200.0), a.routing, jnp.zeros(12))
    assert not np.isnan(gates).any()


def test_every_other_layer_dense():
    config = {**v2(num_hidden_layers=6).to_dict(), "moe_layer_freq": 2}
    assert family(config).read_config(config).moe_layers == (2, 4)  # from the first on, those that 2 divides


class TestPredictionLayer:
    """The released V3 has one more layer, for multi-token prediction."""

    @pytest.fixture
    def directory(self, tmp_path):
        shutil.copytree(parity.subject(V3_CASES[0]).checkpoint.directory, tmp_path, dirs_exist_ok=True)
        return tmp_path

    def rewrite(self, directory: Path, change):
        """Replaces the checkpoint's tensors by `change` of them."""
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors), directory / "model.safetensors")

    def with_prediction_layer(self, tensors, less=""):
        """A copy of the last layer past it, with what such a layer has besides."""
        extra = {n.replace("layers.2.", "layers.3."): x for n, x in tensors.items() if ".layers.2." in n}
        names = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head"]
        extra |= {f"model.layers.3.{name}.weight": np.zeros(3, np.float32) for name in names}
        return tensors | {name: x for name, x in extra.items() if name != less}

    def test_is_not_read(self, directory):
        self.rewrite(directory, self.with_prediction_layer)
        found, before = HFCheckpoint(directory), parity.subject(V3_CASES[0])
        assert found.architecture == before.architecture
        jax.tree.map(np.testing.assert_array_equal, found.dense(), before.dense)

    def test_may_leave_out_its_copies(self, directory):
        self.rewrite(directory, lambda t: self.with_prediction_layer(t, "model.layers.3.embed_tokens.weight"))
        HFCheckpoint(directory)

    @pytest.mark.parametrize("name", ["eh_proj", "self_attn.o_proj", "mlp.experts.11.down_proj", "mlp.gate"])
    def test_half_of_it_is_unexpected(self, directory, name):
        self.rewrite(directory, lambda t: self.with_prediction_layer(t, f"model.layers.3.{name}.weight"))
        with pytest.raises(UserError, match=r"unexpected .*model\.layers\.3\."):
            HFCheckpoint(directory)

    def test_a_layer_too_many_is_unexpected(self, directory):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "num_hidden_layers": 2}))
        with pytest.raises(UserError, match=r"unexpected .*model\.layers\.2\."):
            HFCheckpoint(directory)
