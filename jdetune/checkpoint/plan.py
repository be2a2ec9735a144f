"""What to do with every tensor of a set of checkpoints."""

import dataclasses
from collections.abc import Mapping

from jdetune.checkpoint.index import Checkpoint, TensorInfo
from jdetune.checkpoint.shapes import units, view_of


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """What is known of one tensor before any solving.

    Attributes:
      name: its name.
      shape: its shape in the first model that has it.
      dtype: its dtype there.
      action: ``identical``, ``recover``, ``consensus``, ``per_model``, ``failed`` or ``skipped``.
      reason: why, where it is not simply recovered or copied.
      source: index of the model to copy it from, None if there is none.
      tied_to: the tensor that it equals in every model, where it is tied to one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    reason: str | None = None
    source: int | None = None
    tied_to: str | None = None

    @property
    def info(self) -> TensorInfo:
        """Its header, without a file."""
        return TensorInfo(self.name, "", self.dtype, self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do with every tensor of a set of checkpoints.

    Attributes:
      checkpoints: distinct models, in the order given; the first is the template.
      duplicates: names of dropped models, each with the name of the one it equals.
      tensors: one entry a tensor, in the template's order.
      groups: names of matrices to recover together: one shape and dtype each.
      warnings: things that are odd but not wrong.
      alike: for every model, index of the first one that equals it in every matrix in which the
        models differ; the solver sees each such set once.
      left_out: names of models that do not belong with the others, each with the reason.
      fingerprint: of every tensor of every model, by content.
      ties: heads that can be tied, each with its embedding and with which models have both equal.
    """

    checkpoints: tuple[Checkpoint, ...]
    duplicates: tuple[tuple[str, str], ...]
    tensors: tuple[TensorPlan, ...]
    groups: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    alike: tuple[int, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    fingerprint: str = ""
    ties: Mapping[str, tuple[str, tuple[bool, ...]]] = dataclasses.field(default_factory=dict)

    @property
    def solved(self) -> tuple[int, ...]:
        """Indices of the models that the solver sees: distinct in the matrices that differ."""
        return tuple(sorted(set(self.alike)))

    @property
    def matrices(self) -> dict[str, TensorPlan]:
        """Plan of every matrix to recover, by its name: a tensor's, or that of a slice of it."""
        found: dict[str, TensorPlan] = {}
        for tensor in self.tensors:
            if tensor.action == "recover":
                found.update(slice_plans(tensor))
        return found

    def names(self, action: str) -> tuple[str, ...]:
        """Names of the tensors that an action is planned for."""
        return tuple(t.name for t in self.tensors if t.action == action)


def slice_plans(tensor: TensorPlan) -> dict[str, TensorPlan]:
    """Plans of a tensor's matrices, by name; of a stack, each slice has its own."""
    view, names = view_of(tensor.info), units(tensor.info)
    if view is None or view.slices is None:
        return {tensor.name: tensor}
    shape = (view.row, view.col)
    return {n: dataclasses.replace(tensor, name=n, shape=shape, reason=None) for n in names}
