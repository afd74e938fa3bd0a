"""From a configuration to an expert source: bank, budget, policy and loader put together."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import OffloadConfig
from moe_jax.errors import UserError
from moe_jax.model.experts import Key
from moe_jax.offload.bank import HostBank
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.policies import POLICIES, Eviction
from moe_jax.offload.source import Mode, OffloadedExperts, check_budget, issue_mode, parse_budget
from moe_jax.trace import Trace

READ_THREADS = 2
"""On the disk tier. One thread leaves the disk idle between its reads; more than two were no faster (measured)."""


def open_source(
    config: OffloadConfig,
    checkpoint: HFCheckpoint | Converted,
    free_bytes: int,
    host_bank: HostBank | None = None,
    future: Sequence[Key] | None = None,
) -> OffloadedExperts:
    """The source for tier "host" or "disk".

    Args:
      free_bytes: what a budget of "auto" may use.
      host_bank: for tier "host": one to share; None reads its own.
      future: for policy "belady": what the run will need, in order; None reads `config.trace`.

    Raises:
      UserError: the budget is malformed or too small, the tier or the policy lacks something.
    """
    a, per_layer = checkpoint.architecture, config.budget_scope == "layer"
    policy = _policy(config, future)
    if config.tier == "disk":
        if not isinstance(checkpoint, Converted):
            raise UserError(
                "--config.offload.tier=disk reads a converted checkpoint; make one with"
                f" python convert.py --checkpoint={checkpoint.directory} --output=DIR, then --config.checkpoint=DIR"
            )
        bank = DiskBank(checkpoint)
        total = bank.total_bytes
        expert_bytes = bank.expert_bytes
    else:
        bank, expert_bytes = None, checkpoint.expert_bytes
        total = a.num_moe_layers * a.num_experts * expert_bytes
    budget = parse_budget(config.device_budget, total, free_bytes)
    check_budget(budget, a, expert_bytes, per_layer)  # before a host bank is read, which takes a while
    # Reading blocks whoever does it, so that a disk needs threads on every backend.
    mode: Mode = issue_mode(jax.default_backend()) if bank is None else "thread"
    return OffloadedExperts(
        bank or host_bank or HostBank(checkpoint),
        a,
        budget,
        policy=policy,
        mode=mode,
        link_gbps=config.link_gbps,
        per_layer=per_layer,
        threads=READ_THREADS if config.tier == "disk" else 1,
    )


def _policy(config: OffloadConfig, future: Sequence[Key] | None) -> Eviction:
    if config.policy != "belady":
        return POLICIES[config.policy]()
    if future is not None:
        return POLICIES["belady"](future)
    if not config.trace:
        raise UserError(
            "--config.offload.policy=belady needs the future: record the same run once with --trace=FILE,"
            " then give --config.offload.trace=FILE"
        )
    steps = Trace.read(config.trace).steps()
    return POLICIES["belady"]([(step.layer, expert) for step in steps for expert in step.needed])
