"""Recover base weights and LoRA adapters from merged checkpoints."""

import os
from typing import TYPE_CHECKING, Any

# JAX takes LAPACK from SciPy's OpenBLAS, loaded at the first factorisation. Its threads and XLA's
# wait for each other: a solve of a second then takes minutes. A setting of the user's stays.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from jdetune.errors import RecoveryFailed as RecoveryFailed
from jdetune.rank_schedule import RankSchedule as RankSchedule
from jdetune.recovery import recover as recover
from jdetune.result import Adapters as Adapters
from jdetune.result import Recoveries as Recoveries
from jdetune.result import Recovery as Recovery
from jdetune.solvers.intersection import SubspaceIntersection as SubspaceIntersection
from jdetune.solvers.spectral import SpectralDeTuning as SpectralDeTuning
from jdetune.status import Status as Status

if TYPE_CHECKING:
    from jdetune.checkpoint import load_stack as load_stack
    from jdetune.checkpoint import save_adapters as save_adapters
    from jdetune.checkpoint import save_base as save_base

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the functions that need safetensors when they are first asked for."""
    if name in ("load_stack", "save_adapters", "save_base"):
        from jdetune import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'jdetune' has no attribute {name!r}")
