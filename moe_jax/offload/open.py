"""From a configuration to an expert source: bank, budget, policy and loader put together."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import POLICIES, OffloadConfig
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import Key
from moe_jax.offload.bank import HostBank
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.history import Expect
from moe_jax.offload.host_cache import HostCache
from moe_jax.offload.policies import Belady, Eviction
from moe_jax.offload.settings import Settings
from moe_jax.offload.source import OffloadedExperts, check_budget, parse_budget
from moe_jax.offload.widen import WidenedBank, widened_bytes
from moe_jax.trace import Trace

HOST_FLAG = "--config.offload.host_budget"


def open_source(
    config: OffloadConfig,
    checkpoint: HFCheckpoint | Converted,
    dtype: Any,
    free_bytes: int | None,
    host_free: Callable[[], int] | None = None,
    host_bank: HostBank | None = None,
    future: Sequence[Key] | None = None,
    expect: Expect | None = None,
) -> OffloadedExperts:
    """The source for tier "host" or "disk".

    Args:
      dtype: of the computation.
      free_bytes: what a device budget of "auto" may use; None: it is not "auto".
      host_free: bytes of free host memory, for a host budget of "auto"; a tenth is left to others.
      host_bank: for tier "host": one to share; None reads its own.
      future: for policy "belady": what the run will need, in order; None reads `config.trace`.
      expect: how often experts will be used, given how often they were; None: without a trained network.

    Raises:
      UserError: a budget is malformed or too small, the tier or the policy lacks something.
    """
    a, settings = checkpoint.architecture, Settings.load(jax.default_backend())
    policy = _policy(config, a, future)
    on_disk = config.tier == "disk"
    if not on_disk and parse_budget(config.host_budget, 10**12, 1, HOST_FLAG):
        raise UserError(f"{HOST_FLAG} is for tier disk; with tier host all experts are in host memory")
    disk = _disk_bank(checkpoint, settings) if on_disk else None
    expert_bytes = disk.expert_bytes if disk else checkpoint.expert_bytes
    if config.upcast == "arrival":
        expert_bytes = widened_bytes(checkpoint.expert_spec, dtype)
    budget = parse_budget(config.device_budget, a.num_moe_layers * a.num_experts * expert_bytes, free_bytes)
    check_budget(budget, a, expert_bytes, config.budget_scope == "layer")  # before a host bank is read: that takes time
    bank = _with_host_cache(disk, config.host_budget, budget, host_free) if disk else host_bank or HostBank(checkpoint)
    if config.upcast == "arrival":
        bank = WidenedBank(bank, checkpoint.expert_spec, dtype)
    # Reading from a disk blocks whoever does it: it needs threads on every backend.
    return OffloadedExperts(
        bank,
        a,
        budget,
        policy=policy,
        mode="thread" if on_disk else settings.issue_mode,
        link_gbps=config.link_gbps,
        per_layer=config.budget_scope == "layer",
        threads=settings.read_threads if on_disk else 1,
        quota_bytes=settings.inline_quota_bytes,
        expect=expect,
        trace=Trace(details=False),
    )


def _disk_bank(checkpoint: HFCheckpoint | Converted, settings: Settings) -> DiskBank:
    if not isinstance(checkpoint, Converted):
        raise UserError(
            "--config.offload.tier=disk reads a converted checkpoint; make one with"
            f" python convert.py --checkpoint={checkpoint.directory} --output=DIR, then --config.checkpoint=DIR"
        )
    return DiskBank(checkpoint, settings.slice_bytes, settings.read_threads)


def _with_host_cache(
    bank: DiskBank, budget: str, device_budget: int, host_free: Callable[[], int] | None
) -> DiskBank | HostCache:
    free = None
    if budget == "auto" and host_free is not None:
        # Where the device is the host, its experts come out of the same memory.
        free = max(0, int(0.9 * host_free()) - (min(device_budget, bank.total_bytes) if bank.aliases else 0))
    size = parse_budget(budget, bank.total_bytes, free, HOST_FLAG)
    return HostCache(bank, size) if size else bank


def _policy(config: OffloadConfig, a: Architecture, future: Sequence[Key] | None) -> Eviction:
    if config.policy != "belady":
        return pkgutil.resolve_name(POLICIES[config.policy])()
    if future is not None:
        return Belady(future)
    if not config.trace:
        raise UserError(
            "--config.offload.policy=belady needs the future: record the same run once with --trace=FILE,"
            " then give --config.offload.trace=FILE"
        )
    return Belady.of(Trace.read(config.trace).steps(), a.num_moe_layers, a.num_experts, a.top_k)
