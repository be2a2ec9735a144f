"""What the machine offers: cores, devices and memory, and how many layers that makes at a time."""

import os
from typing import NamedTuple

import jax

#: Share of the free memory that is used by default.
SHARE = 0.6
#: Arrays of the size of all models in float64 that a layer needs at its peak, refined or not; the
#: first as `benchmarks.pipeline` measured it on a CPU: 15.5 for 8 models of 1024 x 1024.
COPIES = {True: 16, False: 5}
#: Layers that one GPU or TPU works on at a time, at most.
MOST_LAYERS = 8


class Sizes(NamedTuple):
    """How a group is worked on: layers at a time on how many devices, models, host threads."""

    layers: int
    devices: int
    batch_size: int
    threads: int


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Free bytes of a device, or of the host where it computes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":") for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def plan(shape: tuple[int, ...], count: int, polish: bool, max_memory: int | None = None) -> Sizes:
    """Layers at a time so that the peak stays inside a budget; at least one.

    Args:
      shape: (model, row, col) of a layer.
      count: number of layers.
      polish: whether they are refined.
      max_memory: bytes on every device; ``SHARE`` of what is free if None.

    Returns:
      On one CPU device one layer at a time on each of several threads; else as many layers on
      every device as fit.

    Example:
      >>> plan((3, 1000, 1000), 4, polish=False, max_memory=1).layers
      1
    """
    n_models, row, col = shape
    budget = int(SHARE * free_memory()) if max_memory is None else max_memory
    fit = max(1, budget // (8 * n_models * row * col * COPIES[polish]))
    devices = min(len(jax.local_devices()), count)
    if jax.default_backend() == "cpu":
        if devices > 1:
            return Sizes(devices, devices, 1, 1)
        return Sizes(1, 1, 1, max(1, min(fit, cores(), count)))
    here = min(fit, MOST_LAYERS, -(-count // devices))
    return Sizes(here * devices, devices, 2 * n_models if fit > 1 else 1, 1)
