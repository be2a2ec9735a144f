"""JAX is set up once, before any backend starts: 8 host devices, strict promotion."""

import os
from pathlib import Path

# Two batched solves in one program deadlock under this scheduler in jaxlib 0.10.2; it is slower.
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Compiling is most of what the tests' time goes to; the programs are the same, less optimised.
_COMPILE_FAST = "--xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{_COMPILE_FAST} {os.environ.get('XLA_FLAGS', '')} {_SCHEDULER}".strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

#: Memory maps of a process, of the 65,530 that Linux allows: every compiled program takes some, and
#: the compiler aborts where none is left.
_MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
    """Forgets compiled programs before a worker has too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
