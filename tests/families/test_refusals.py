"""A config.json that asks for what is not implemented is refused in one line that names the field."""

import pytest
import transformers

from moe_jax.checkpoint.families import FAMILIES, family
from moe_jax.errors import UserError
from moe_jax.model.rope import Llama3, Yarn
from tests.families.test_real_sizes import MODELS

# Fields of GPT-OSS that say again what others say.
TWICE = ("experts_per_token", "initial_context_length")
RELEASED = {
    model.config["model_type"]: {name: x for name, x in model.config.items() if name not in TWICE}
    for model in MODELS.values()
}
FP8 = MODELS["DeepSeek-V3"].config["quantization_config"]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

ANY = [
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported: 'silu'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'; supported: 'default', 'linear'"),
    ({"rope_scaling": {**YARN, "mystery": 3}}, "unsupported fields {'mystery': 3}"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling without factor"),
    ({"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling.factor='4'; it must be a number"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; supported: 1.0"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"new_attention_trick": True}, "does not know: new_attention_trick=True"),
    ({"vocab_size": "many"}, "vocab_size='many'; it must be a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number of at least 1"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; it must be true or false"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps='small'; it must be a number"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id=['</s>']"),
    ({"num_experts_per_tok": 1000}, "1000 of "),
    ({"num_key_value_heads": 5}, "query heads over 5 of keys"),
    ({"num_local_experts": 8, "num_experts": 9}, "contradicts itself"),
    ({"hidden_size": None}, "no field 'hidden_size'"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn'; it must be an object"),
    ({"rope_parameters": [1]}, "rope_parameters=[1]; it must be an object"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    # What the cards of Qwen advise to add, to a file that transformers 5 has written.
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN}, "leave one of the two"),
]
OWN = {
    "deepseek_v2": [
        ({"norm_topk_prob": True}, "norm_topk_prob=True; supported: False"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'; supported: 'greedy', 'group_limited_greedy'"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'; supported: 'softmax'"),
        ({"rope_interleave": False}, "rope_interleave=False; supported: True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
    ],
    "deepseek_v3": [
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "weight_block_size=None; supported: two"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt='e5m2'; supported: 'e4m3'"),
        ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme='static'"),
        ({"quantization_config": {**FP8, "weight_block_size": [128]}}, "weight_block_size=[128]"),
        ({"quantization_config": {**FP8, "bits": 3}}, "unsupported fields {'bits': 3}"),
        ({"topk_method": "greedy"}, "topk_method='greedy'; supported: 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'; supported: 'sigmoid'"),
        ({"head_dim": 128}, "head_dim=128; supported: 64"),
        ({"n_group": 7}, "4 of 7 groups of 256 experts"),
        ({"n_group": 256, "topk_group": 256}, "groups of 1 expert"),
        ({"index_topk": 2048}, "does not know: index_topk=2048"),  # V3.2's sparse attention
        # For transformers null is false.
        ({"norm_topk_prob": None}, "norm_topk_prob=None; it must be true or false"),
        ({"rope_interleave": None}, "rope_interleave=None; it must be true or false"),
    ],
    "mixtral": [({"attention_bias": True}, "attention_bias=True")],
    "qwen3_moe": [
        ({"use_sliding_window": True}, "no field 'sliding_window'"),
        ({"use_qk_norm": False}, "use_qk_norm=False; supported: True"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8; supported: 0"),
        ({"mlp_only_layers": list(range(48))}, "no layer with experts"),
    ],
    "qwen2_moe": [
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types=['chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "supported: 24 of"),
        ({"layer_types": ["sliding_attention"] * 24}, "but use_sliding_window=False"),
    ],
    "gpt_oss": [
        ({"layer_types": ["chunked_attention"] * 36}, "layer_types=['chunked_attention'"),
        ({"layer_types": 5}, "layer_types=5; supported: 36 of"),
        ({"initial_context_length": 2048}, "initial_context_length=2048; supported: 4096"),
        ({"experts_per_token": 2}, "contradicts itself"),
        ({"hidden_size": 2864}, "MXFP4 needs multiples of 32"),
        ({"quantization_config": {"quant_method": "mxfp4", "bits": 3}}, "unsupported fields {'bits': 3}"),
        ({"sliding_window": 0}, "sliding_window=0; it must be a whole number of at least 1"),
    ],
    "olmoe": [({"head_dim": 64}, "head_dim=64; supported: 128"), ({"sliding_window": 4096}, "sliding_window=4096")],
}
CASES = [(kind, *case) for kind in OWN for case in [*ANY, *OWN[kind]]]


@pytest.mark.parametrize("model_type, change, part", CASES, ids=[f"{k}-{list(c)}" for k, c, _ in CASES])
def test_refused_by_name(model_type, change, part):
    config = {**RELEASED[model_type], **change}
    with pytest.raises(UserError) as caught:
        family(config).read_config(config)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_family():
    with pytest.raises(UserError, match="model_type 'llama'; supported: .*'mixtral', "):
        family({"model_type": "llama"})


@pytest.mark.parametrize("model_type", OWN)
def test_what_changes_nothing_is_accepted(model_type):
    config = RELEASED[model_type]
    extra = {"torch_dtype": "bfloat16", "use_cache": True, "_name_or_path": "x", "auto_map": {"A": "b"}, "future": None}
    chosen = FAMILIES[model_type]
    assert chosen.read_config({**config, **extra}) == chosen.read_config(config)


@pytest.mark.parametrize("model_type", OWN)
def test_a_field_that_is_absent_is_what_transformers_takes_for_it(model_type):
    chosen = FAMILIES[model_type]
    experts = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}  # there it has no default
    config = transformers.AutoConfig.for_model(model_type, **experts).to_dict()
    whole, read = chosen.read_config(config), 0
    for name in config.keys() - {"model_type", "bos_token_id", "eos_token_id"}:
        try:
            assert chosen.read_config({key: value for key, value in config.items() if key != name}) == whole, name
            read += 1
        except UserError as error:
            assert "no field 'num_" in str(error) or f"no field '{name}'" in str(error)
    assert read > 5


@pytest.mark.parametrize("model_type", OWN)
def test_rope_parameters_twice(model_type):
    chosen, base = FAMILIES[model_type], RELEASED[model_type]
    once = chosen.read_config({**base, "rope_theta": 5e5, "rope_scaling": YARN})
    new = {**YARN, "rope_type": "yarn", "rope_theta": 5e5}
    del new["type"]
    for again in (new, {}, None):
        assert chosen.read_config({**base, "rope_theta": 5e5, "rope_scaling": YARN, "rope_parameters": again}) == once


def test_qwen3_coder_says_things_twice():
    config, chosen = RELEASED["qwen3_moe"], FAMILIES["qwen3_moe"]
    again = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert chosen.read_config({**config, **again}) == chosen.read_config(config)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_fp8_changes_nothing_but_how_weights_are_read(model_type):
    config, chosen = RELEASED[model_type], FAMILIES[model_type]
    kept = {"modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0"}
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    assert chosen.read_config({**config, "quantization_config": {**FP8, **kept}}) == chosen.read_config(plain)


@pytest.mark.parametrize("model_type", OWN)
def test_old_and_new_rope_fields_mean_the_same(model_type):
    chosen, base = FAMILIES[model_type], RELEASED[model_type]
    old = chosen.read_config({**base, "rope_theta": 5e5, "rope_scaling": YARN})
    new = {**YARN, "rope_type": "yarn", "rope_theta": 5e5}
    base = {name: value for name, value in base.items() if name not in ("rope_theta", "rope_scaling")}
    assert chosen.read_config({**base, "rope_parameters": new}) == old
    assert isinstance(old.rope.scaling, Yarn) and old.rope.theta == 5e5
    assert old.rope.scaling.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = chosen.read_config({**base, "rope_scaling": {**llama3, "original_max_position_embeddings": 8192}})
    assert found.rope.scaling == Llama3(8.0, 8192, 1.0, 4.0)
