"""Recover base weights and LoRA adapters from merged checkpoints.

Names are loaded when they are first asked for: ``import jdetune`` costs next to nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# JAX takes LAPACK from SciPy's OpenBLAS, loaded at the first factorisation. Its threads and XLA's
# wait for each other: a solve of a second then takes minutes. A setting of the user's stays.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from jdetune.checkpoint import load_stack as load_stack
    from jdetune.checkpoint import save_adapters as save_adapters
    from jdetune.checkpoint import save_base as save_base
    from jdetune.errors import RecoveryFailed as RecoveryFailed
    from jdetune.rank_schedule import RankSchedule as RankSchedule
    from jdetune.recovery import recover as recover
    from jdetune.result import Adapters as Adapters
    from jdetune.result import Recoveries as Recoveries
    from jdetune.result import Recovery as Recovery
    from jdetune.solvers.intersection import SubspaceIntersection as SubspaceIntersection
    from jdetune.solvers.spectral import SpectralDeTuning as SpectralDeTuning
    from jdetune.status import Status as Status

__version__ = "0.1.0"

#: Public name to the module that defines it.
_HOME = {
    "Adapters": "result",
    "RankSchedule": "rank_schedule",
    "Recoveries": "result",
    "Recovery": "result",
    "RecoveryFailed": "errors",
    "SpectralDeTuning": "solvers.spectral",
    "Status": "status",
    "SubspaceIntersection": "solvers.intersection",
    "load_stack": "checkpoint",
    "recover": "recovery",
    "save_adapters": "checkpoint",
    "save_base": "checkpoint",
}
__all__ = [*_HOME]  # noqa: PLE0604 - the names above


def __getattr__(name: str) -> Any:
    """Loads a public name."""
    if name not in _HOME:
        raise AttributeError(f"module 'jdetune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jdetune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *_HOME})
