"""What a comparison can run, from the headers of a checkpoint alone: known before any weight is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moe_jax.checkpoint.converted import Converted, open_checkpoint
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.evaluation.modes import Mode
from moe_jax.inference import host_memory
from moe_jax.inference.session import shipped
from moe_jax.offload.pinned import provide
from moe_jax.offload.source import BUDGET_FLAG, parse_budget
from moe_jax.offload.widen import widened_bytes


def settle(
    config: Config, modes: Sequence[Mode], chosen: bool, budgets: Sequence[str], say: Callable[[str], None]
) -> tuple[Config, list[Mode], dict[str, int]]:
    """The configuration for `Lab`, the modes that the machine has room for, and bytes by budget.

    Args:
      chosen: whether the user named the modes: what cannot run is then refused, and otherwise left out.
      budgets: the user's; none: as configured, or "25%" for "auto".
      say: told in a line what is not as one might expect.

    Raises:
      UserError: a budget is none, or a mode cannot run; the text names the flag.
    """
    checkpoint = open_checkpoint(config.checkpoint or shipped("model"))
    flag, offload = "--budgets" if budgets else BUDGET_FLAG, config.offload
    if not budgets and offload.device_budget == "auto":
        say("budgets: 25%, as auto differs from run to run; for others --budgets")
        budgets = ["25%"]
    sizes = {text: budget(text, config, checkpoint, flag) for text in budgets or [offload.device_budget]}
    check(modes, list(sizes.values()), config, checkpoint)
    if any(mode.resident for mode in modes) and (why := shortage(config, checkpoint, max(sizes.values()))):
        if chosen:
            raise UserError(f"--modes: resident has no room: {why}; leave it out")
        say(f"resident is left out: {why}")
        modes = [mode for mode in modes if not mode.resident]
    if offload.device_budget == "auto":  # that of the rehearsal, which stays beside the modes' own
        offload = dataclasses.replace(offload, device_budget=f"{min(sizes.values())}B")
    return dataclasses.replace(config, offload=offload), list(modes), sizes


def expert_bytes(config: Config, checkpoint: HFCheckpoint | Converted, upcast: str | None = None) -> int:
    """Of one expert in a budget; `upcast`: None as configured."""
    if (upcast or config.offload.upcast) == "arrival":
        return widened_bytes(checkpoint.expert_spec, jnp.dtype(config.dtype))
    if config.offload.tier == "disk" and isinstance(checkpoint, Converted):  # whose blocks are padded
        a = checkpoint.architecture
        keys = ((layer, expert) for layer in range(a.num_moe_layers) for expert in range(a.num_experts))
        return max(checkpoint.expert_location(*key).nbytes for key in keys)
    return checkpoint.expert_bytes


def budget(text: str, config: Config, checkpoint: HFCheckpoint | Converted, flag: str = "--budgets") -> int:
    """Bytes of a budget: as `config.offload.device_budget`, or "min", the smallest that can run.

    Raises:
      UserError: it is malformed, too small, or "auto"; `flag` named it.
    """
    a, each, fewest = checkpoint.architecture, expert_bytes(config, checkpoint), _fewest(config, checkpoint)
    if text == "auto":
        raise UserError(f'{flag}=auto differs from run to run; give bytes ("6GiB") or a share ("25%")')
    if text == "min":
        return fewest * each
    found = parse_budget(text, a.num_moe_layers * a.num_experts * each, flag=flag)
    if found < fewest * each:
        raise UserError(f"{flag}={text} is too small: the smallest is --budgets=min, {fewest} experts of {each} bytes")
    return found


def check(modes: Sequence[Mode], budgets: Sequence[int], config: Config, checkpoint: HFCheckpoint | Converted) -> None:
    """Raises UserError where a mode cannot run in one of these budgets, or in its own."""
    if config.offload.host_budget == "auto":
        raise UserError('--config.offload.host_budget=auto differs from run to run; give bytes ("6GiB") or "25%"')
    fewest = _fewest(config, checkpoint)
    for mode in modes:
        each = expert_bytes(config, checkpoint, mode.upcast)
        if mode.experts and mode.experts < fewest:
            raise UserError(
                f"--modes: {mode.name} has a budget of {mode.experts} experts, and --config.offload.budget_scope=layer"
                f" needs {fewest}; leave it out, or choose --config.offload.budget_scope=global"
            )
        if not mode.experts and not mode.resident and min(budgets) < fewest * each:
            raise UserError(f"--modes: {mode.name} needs a budget of {fewest * each}B; give more, or leave it out")


def shortage(config: Config, checkpoint: HFCheckpoint | Converted, budget_bytes: int) -> str:
    """Why the device cannot hold every expert beside such a budget and the other weights; empty where it can."""
    experts = checkpoint.architecture.num_moe_layers * checkpoint.architecture.num_experts
    bank = experts * checkpoint.expert_bytes if config.offload.tier == "host" else 0
    if bank:
        provide(bank)  # what follows starts jax's backend
    dense = sum(math.prod(x.shape) for x in checkpoint.dense_spec.values()) * jnp.dtype(config.dtype).itemsize
    needed = experts * expert_bytes(config, checkpoint) + budget_bytes + dense
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        there = stats["bytes_limit"] - stats["bytes_in_use"]
    else:  # the device is the host, and holds the bank too
        needed, there = needed + bank, host_memory.available()
    return f"it takes {needed / 1e9:.3g} GB, of which {there / 1e9:.3g} GB are free" if needed > there else ""


def _fewest(config: Config, checkpoint: HFCheckpoint | Converted) -> int:
    """Experts of the smallest budget."""
    a = checkpoint.architecture
    return a.top_k * (a.num_moe_layers if config.offload.budget_scope == "layer" else 1)
