"""What the modes of one lab share."""

import contextlib
from typing import Any

import pytest

from moe_jax.config import Config
from moe_jax.evaluation import plan
from moe_jax.evaluation.lab import Lab
from moe_jax.evaluation.modes import Mode
from moe_jax.inference.sampling import Sampling


@pytest.mark.parametrize("resident", [True, False])
def test_every_mode_asks_the_network_of_later_use(resident):
    """Whether every expert is held beside them or not: the shipped predictor has one."""
    lab = Lab(Config(), resident, 2, Sampling())
    with contextlib.closing(lab._open(Mode("predicted", policy="predicted"), "25%", None)) as source:
        found: Any = source
        assert lab.model.usage is not None and found._loader._outlook._history._expect is lab.model.usage
    lab.close()


def test_texts_are_drawn_as_asked_and_the_same_in_every_mode():
    texts = []
    for temperature in (0.0, 1.0):
        lab = Lab(Config(), False, 12, Sampling(temperature))
        request = lab.rehearse([lab.model.tokenizer.encode("def read(file):")])
        lab.run(
            Mode("lru"), request, plan.budget("25%", lab.config, lab.model.checkpoint)
        )  # raises where it generates anything else
        texts.append(request.token_ids)
        lab.close()
    assert texts[0] != texts[1]
