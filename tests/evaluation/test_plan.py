"""What a comparison leaves out, or refuses, by what the device has room for."""

import dataclasses

import pytest

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import open_checkpoint
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.evaluation import plan
from moe_jax.evaluation.lab import Lab
from moe_jax.evaluation.modes import Mode
from moe_jax.inference.sampling import Sampling
from tests.tiny import TINY, write_tiny

MODES = [Mode("resident"), Mode("lru")]
EXPERTS = 5 * 7 * 3 * 32 * 24 * 2  # bytes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("plan") / "model", dataclasses.replace(TINY, eos_ids=()))


@pytest.mark.parametrize(
    ("tier", "weights", "there"),
    # The experts once, and in host memory once more; the budget of half of them; the dense weights, about 130 kB.
    [("host", 2.5, False), ("host", 4.5, True), ("disk", 1.5, False), ("disk", 2.5, True)],
)
def test_resident_is_left_out_where_the_machine_has_no_room(directory, monkeypatch, tier, weights, there):
    monkeypatch.setattr(plan.host_memory, "available", lambda: int(weights * EXPERTS))
    config, said = Config.from_dict({"checkpoint": str(directory), "offload": {"tier": tier}}), []
    settled, modes, budgets = plan.settle(config, MODES, False, ["50%"], said.append)
    assert (settled, budgets) == (config, {"50%": EXPERTS // 2})
    assert modes == (MODES if there else MODES[1:])
    if there:
        assert not said and plan.settle(config, MODES, True, ["50%"], said.append)[1] == MODES
    else:
        assert said == [f"resident is left out: {plan.shortage(config, open_checkpoint(directory), EXPERTS // 2)}"]
        with pytest.raises(UserError, match="--modes: resident has no room: it takes .* leave it out"):
            plan.settle(config, MODES, True, ["50%"], said.append)


def test_auto_is_a_quarter_and_what_is_rehearsed_in_stays_small(directory):
    config, said = Config.from_dict({"checkpoint": str(directory), "offload": {"device_budget": "auto"}}), []
    settled, _, budgets = plan.settle(config, MODES[1:], False, [], said.append)
    assert budgets == {"25%": EXPERTS // 4} and settled.offload.device_budget == f"{EXPERTS // 4}B" and len(said) == 1
    settled, _, budgets = plan.settle(config, MODES[1:], False, ["50%", "min"], said.append)
    assert budgets["min"] == 2 * EXPERTS // 35 and settled.offload.device_budget == f"{2 * EXPERTS // 35}B"


@pytest.mark.parametrize("offload", [{"tier": "host"}, {"tier": "disk"}, {"tier": "host", "upcast": "arrival"}])
def test_bytes_of_an_expert_are_those_of_the_run(directory, tmp_path, offload):
    bank = convert(open_checkpoint(directory), tmp_path / "bank").directory
    config = Config.from_dict({"checkpoint": str(bank), "offload": offload})
    lab = Lab(config, False, 2, Sampling())
    assert lab.expert_bytes == plan.expert_bytes(config, lab.model.checkpoint)
    assert lab.bytes_of(Mode("lru@arrival", upcast="arrival")) == plan.expert_bytes(
        config, lab.model.checkpoint, "arrival"
    )
    lab.close()
