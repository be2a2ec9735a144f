"""Recover base weights and LoRA adapters from merged checkpoints."""

from jdetune.errors import RecoveryFailed as RecoveryFailed
from jdetune.recovery import recover as recover
from jdetune.result import Adapters as Adapters
from jdetune.result import Recoveries as Recoveries
from jdetune.result import Recovery as Recovery
from jdetune.solvers.intersection import SubspaceIntersection as SubspaceIntersection
from jdetune.status import Status as Status

__version__ = "0.1.0"
