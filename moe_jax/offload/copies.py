"""Copies from one memory of a device to another, issued by a short way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import core
from jax.sharding import SingleDeviceSharding

try:  # what `device_put` itself comes to, in jax 0.10 and 0.11
    from jax._src.interpreters.pxla import global_aval_to_result_handler as _as_array
    from jax._src.lib import xla_client as _client  # pyright: ignore[reportPrivateImportUsage]

    _copy: Any = _client.batched_copy_array_to_devices_with_sharding
    _devices: Any = _client.DeviceList
    _ALWAYS: Any = _client.ArrayCopySemantics.ALWAYS_COPY
except (ImportError, AttributeError):
    _copy = None


def to_device(arrays: Any, sharding: SingleDeviceSharding) -> Any:
    """Starts copies of a pytree's jax arrays, which lie in another memory of the device, into new arrays.

    `jax.device_put` would do. Its Python takes several times as long as what it comes to (an expert's two arrays on a
    CPU: 99 and 20 us), on the thread that decodes or beside it, holding the GIL.

    Args:
      sharding: of memory kind "device".
    """
    if _copy is None:
        return jax.device_put(arrays, sharding)
    leaves, tree = jax.tree.flatten(arrays)
    count = len(leaves)
    made = _copy(leaves, [_devices(tuple(sharding.device_set))] * count, [sharding] * count, [_ALWAYS] * count)
    return tree.unflatten([_said_of(x.shape, x.dtype, sharding)(x) for x in made])


@functools.cache
def _said_of(shape: tuple[int, ...], dtype: Any, sharding: SingleDeviceSharding) -> Callable[[Any], jax.Array]:
    """Makes what was copied an array that says of itself what `device_put`'s do: else it would say that it is where it
    was copied from."""
    return _as_array(core.ShapedArray(shape, dtype), sharding, True)
