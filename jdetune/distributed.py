"""Several processes that work on one recovery: who does what, and what they tell each other."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jdetune.errors import JdetuneError

#: Variables by which launchers say how many processes they started together.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


#: Seconds without a sign of life after which a process counts as lost.
HEARTBEAT_SECONDS = 30


class LostProcessError(JdetuneError):
    """Another process of the run does not answer: it was killed, or its machine is gone."""


class PeerError(JdetuneError):
    """Another process of the run failed; its exit code is taken over."""

    def __init__(self, text: str, exit_code: int) -> None:
        """Keeps what the other process said."""
        super().__init__(text)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all that work on a recovery.

    Attributes:
      index: its number, from 0.
      count: how many there are.

    Example:
      >>> ALONE.share([3, 1, 2]), ALONE.exchange("done")
      ([0, 1, 2], ['done'])
    """

    index: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this one writes index and report."""
        return self.index == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Indices of this process's work: the largest first, each to who has the least so far."""
        loads = [0] * self.count
        mine = []
        for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            least = loads.index(min(loads))
            loads[least] += max(sizes[item], 1)
            if least == self.index:
                mine.append(item)
        return sorted(mine)

    def exchange(self, value: Any) -> list[Any]:
        """What every process hands in, in the order of the processes; waits for all of them.

        Args:
          value: what JSON can hold.

        Raises:
          PeerError: another process failed instead of getting here.
        LostProcessError: another process is gone.
        """
        if self.count == 1:
            return [value]
        answers = _gather({"value": value})
        for index, answer in enumerate(answers):
            if "error" in answer:
                raise PeerError(f"process {index}: {answer['error']}", answer["exit_code"])
        return [answer["value"] for answer in answers]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Tells the others of an error, so that none waits for a process that has stopped."""
        try:
            yield
        except (PeerError, LostProcessError):
            raise
        except BaseException as error:
            if self.count > 1:
                text = f"{error}" if isinstance(error, JdetuneError) else repr(error)
                _gather({"error": text, "exit_code": getattr(error, "exit_code", 3)})
            raise


#: The only process.
ALONE = Processes(0, 1)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Processes:
    """Joins the processes of this run; must come before JAX's first computation.

    Args:
      coordinator: ``HOST:PORT`` of the first process; ``auto`` if JAX is to find out (TPU pods,
        Kubernetes); None for a single process, or where Slurm's ``srun`` or Open MPI's ``mpirun``
        started several, which is seen in the environment.
      num_processes: how many there are; found by JAX if None.
      process_id: this one's number, from 0; found by JAX if None.

    Raises:
      JdetuneError: the others do not answer, or a number is missing.
    """
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise JdetuneError("--num_processes and --process_id need --coordinator=HOST:PORT.")
    if coordinator is None and not launched(os.environ):
        return ALONE
    import jax

    address = None if coordinator == "auto" else coordinator
    try:
        with _native_output_to_stderr():
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
            return Processes(jax.process_index(), jax.process_count())
    except (RuntimeError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise JdetuneError(
            f"--coordinator={coordinator or 'found by JAX'}: the processes did not come together "
            f"({cause}). Start all of them with one HOST:PORT, --num_processes=N and "
            "--process_id=0 to N-1."
        ) from error


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher says that it started more than one process.

    Example:
      >>> launched({"SLURM_STEP_NUM_TASKS": "8"}), launched({"SLURM_STEP_NUM_TASKS": "1"})
      (True, False)
    """
    counts = (environment.get(name, "") for name in LAUNCHERS)
    return any(count.isdigit() and int(count) > 1 for count in counts)


def _gather(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One message of every process, through JAX's collectives."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    try:
        with _native_output_to_stderr():
            sizes = multihost_utils.process_allgather(np.int32(len(data)))
            padded = np.pad(data, (0, int(sizes.max()) - len(data)))
            rows = multihost_utils.process_allgather(padded)
    except (RuntimeError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise LostProcessError(
            f"another process of this run does not answer any more ({cause}). Nothing was put in "
            "place; start all processes again."
        ) from error
    pairs = zip(np.asarray(rows), np.ravel(sizes), strict=True)
    return [json.loads(row[: int(size)].tobytes()) for row, size in pairs]


@contextlib.contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """Gloo says on stdout, where results go, that it is connected."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
