"""Ways to run a model that `speed.py` compares, by name.

resident             every expert on the device
lru, lfu, ...        on demand, with this eviction policy; `lru` is the yardstick
learned, router, ... prefetching with this predictor, evicting by LRU; `oracle` knows what will be needed
learned+predicted    a predictor and another eviction policy
lru@arrival          experts widened to the compute dtype when they arrive (`config.offload.upcast`), any mode
no_cache             on demand, K experts of budget: nothing survives its layer
paper                arXiv 2603.19289, exact: what one layer is predicted to need is loaded while the layer before it
                     computes, and nothing is kept across tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from moe_jax.config import suggestion
from moe_jax.errors import UserError

RESIDENT, BASELINE, NO_CACHE, PAPER = "resident", "lru", "no_cache", "paper"


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run.

    Attributes:
      name: in tables.
      predictor: of `config.prefetch.predictor`; "none" is on demand.
      policy: of eviction.
      horizon: layers ahead; None: as configured.
      experts: budget in experts; None: whatever the table is for.
      upcast: of `config.offload.upcast`; None: as configured.
    """

    name: str
    predictor: str = "none"
    policy: str = "lru"
    horizon: int | None = None
    experts: int | None = None
    upcast: str | None = None

    @property
    def resident(self) -> bool:
        return self.name == RESIDENT


def parse(
    names: Sequence[str],
    predictors: Collection[str],
    policies: Collection[str],
    upcasts: Collection[str],
    top_k: int,
    trained: bool,
) -> list[Mode]:
    """Modes by name, each once, in the order given.

    Args:
      predictors, policies, upcasts: names that the configuration accepts.
      top_k: experts that a token needs of a layer.
      trained: whether there is a trained predictor, whose default vectors the paper's method uses.

    Raises:
      UserError: an unknown name, one given twice, or none at all.
    """
    if not names:
        raise UserError("--modes is empty; give for instance --modes=resident,lru,router")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--modes names {twice[0]} twice")
    speculating = [name for name in predictors if name != "none"]
    modes = []
    for name in names:
        what, at, upcast = name.partition("@")
        first, plus, second = what.partition("+")
        add = lambda name=name, upcast=upcast, **fields: modes.append(Mode(name, upcast=upcast or None, **fields))
        known_upcast = not at or upcast in upcasts
        if what == RESIDENT and not at:
            add()
        elif what == NO_CACHE and known_upcast:
            add(experts=top_k)
        elif what == PAPER and known_upcast:
            vectors = trained and "default_vector" in predictors
            # This layer's experts and the next one's: too few for any to survive a token.
            add(predictor="default_vector" if vectors else "router", horizon=1, experts=2 * top_k)
        elif what in policies and known_upcast:
            add(policy=what)
        elif first in speculating and (not plus or second in policies) and known_upcast:
            add(predictor=first, policy=second or "lru")
        else:
            known = [RESIDENT, NO_CACHE, PAPER, *policies, *speculating]
            raise UserError(
                f"unknown mode {name!r}{suggestion(name, known)}; modes are {', '.join(known)},"
                f" PREDICTOR+POLICY, and any of them with @{' or @'.join(upcasts)}"
            )
    return modes
