"""Configuration at the door: defaults, types, ranges, choices."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from moe_jax.config import Config, OffloadConfig, PrefetchConfig
from moe_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def documents() -> list[Path]:
    names = "deepseek", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"
    return [ROOT / "configs" / f"{name}.py" for name in names]


@pytest.mark.parametrize("file", documents(), ids=lambda file: file.stem)
def test_documents_build_from_anywhere_and_hold_every_field(file, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "configs").is_dir()])
    for name in ("configs", "configs.mixtral"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config().to_dict()
    assert dataclasses.asdict(Config.from_dict(values)) == values


def test_defaults_are_those_of_the_document():
    from configs import mixtral  # pyright: ignore[reportMissingImports]

    assert Config.from_dict(mixtral.get_config().to_dict()) == Config() == Config.from_dict({})


def test_partial_dictionaries_and_dataclasses():
    config = Config.from_dict({"offload": {"tier": "none"}, "prefetch": PrefetchConfig(horizon=2), "batch_size": 3})
    assert config == Config(offload=OffloadConfig(tier="none"), prefetch=PrefetchConfig(horizon=2), batch_size=3)
    assert Config.from_dict({"offload": {"link_gbps": 2}}).offload.link_gbps == 2.0


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().dtype = "bfloat16"  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(Config()) == hash(Config())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"chekpoint": ""}, "unknown config field chekpoint; did you mean checkpoint?"),
        (
            {"offload": {"device_bugdet": "1%"}},
            "unknown config field offload.device_bugdet; did you mean device_budget?",
        ),
        ({"zzz": 1}, "unknown config field zzz"),
        ({"offload": "host"}, "config.offload must be a group of fields, not 'host'"),
        ({"offload": PrefetchConfig()}, "config.offload must be a group of fields"),
        ({"batch_size": "8"}, "config.batch_size must be of type int, not '8'"),
        ({"batch_size": True}, "config.batch_size must be of type int, not True"),
        ({"batch_size": 8.0}, "config.batch_size must be of type int, not 8.0"),
        ({"checkpoint": None}, "config.checkpoint must be of type str, not None"),
        ({"offload": {"link_gbps": "fast"}}, "config.offload.link_gbps must be of type float, not 'fast'"),
        ({"batch_size": 0}, "config.batch_size must be at least 1, not 0"),
        ({"prefill_chunk": 0}, "config.prefill_chunk must be at least 1, not 0"),
        ({"max_seq_len": -1}, "config.max_seq_len must be at least 0, not -1"),
        ({"prefetch": {"horizon": 0}}, "config.prefetch.horizon must be at least 1, not 0"),
        ({"offload": {"link_gbps": -1.0}}, "config.offload.link_gbps must be at least 0, not -1.0"),
        ({"offload": {"link_gbps": float("nan")}}, "config.offload.link_gbps must be at least 0, not nan"),
        ({"offload": {"link_gbps": float("inf")}}, "config.offload.link_gbps must be at least 0, not inf"),
        (
            {"offload": {"tier": "hots"}},
            "config.offload.tier='hots' is not one of none, host, disk; did you mean host?",
        ),
        (
            {"offload": {"policy": "least_stael"}},
            "config.offload.policy='least_stael' is not one of lru, lfu, least_st",
        ),
        ({"offload": {"budget_scope": "expert"}}, "config.offload.budget_scope='expert' is not one of global, layer"),
        (
            {"prefetch": {"predictor": "lerned"}},
            "config.prefetch.predictor='lerned' is not one of none, random, frequency, repeat, router,",
        ),
        (
            {"execution": "cache-aware"},
            "config.execution='cache-aware' is not one of exact, speculative, speculative_gated, hybrid, cache_aware;"
            " did you mean cache_aware?",
        ),
        (
            {"execution": "cache_aware", "prefetch": {"predictor": "oracle"}},
            "config.execution='cache_aware': the oracle knows what exact execution needs",
        ),
        ({"speculation": {"bonus": -0.5}}, "config.speculation.bonus must be at least 0, not -0.5"),
        ({"speculation": {"threshold": 1.5}}, "config.speculation.threshold must be at most 1, not 1.5"),
        ({"dtype": "float16"}, "config.dtype='float16' is not one of float32, bfloat16; did you mean"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(UserError) as caught:
        Config.from_dict(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
