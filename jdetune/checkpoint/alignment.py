"""Makes models comparable tensor by tensor: one set of names, tied heads, common rows."""

import dataclasses
from collections.abc import Mapping, Sequence

from jdetune.checkpoint.aliases import align_names
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.ties import tie_pairs, with_ties
from jdetune.checkpoint.vocabulary import cut_rows


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Models under one set of names.

    Attributes:
      checkpoints: the models, in the order given; the first gives the names.
      notes: what was done, in words.
      ties: heads that may be tied, with their embeddings.
      cut: tensors of which only common rows are compared, with what to say of it.
    """

    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...]
    ties: Mapping[str, str]
    cut: Mapping[str, str]


def align(checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Brings the names of several models together; weights are not read.

    Args:
      checkpoints: opened models, at least one.
    """
    named, notes = align_names(checkpoints)
    cut, reasons = cut_rows(named)
    ties = tie_pairs(cut)
    # a copy that no model has a tensor for is not needed
    tied = [with_ties(checkpoint, ties) for checkpoint in cut]
    names = [f"{name}: {reason}" for name, reason in list(reasons.items())[:1]]
    return Alignment(tuple(tied), (*notes, *names), ties, reasons)
