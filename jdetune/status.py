"""Status of a layer: what the numbers allow, as a code with a cause and a remedy."""

import enum


class Status(enum.IntEnum):
    """Why a layer was recovered or not.

    ``OK`` is zero, so ``status.any()`` asks whether anything went wrong.

    Example:
      >>> Status(1).name, Status(1).exit_code
      ('TOO_FEW_MODELS', 3)
    """

    OK = 0
    TOO_FEW_MODELS = 1
    NOT_LOW_RANK = 2
    RANK_TOO_LARGE = 3
    SHARED_DIRECTIONS = 4
    NON_FINITE = 5
    NOISE_DOMINATED = 6
    NOT_CONVERGED = 7

    @property
    def message(self) -> str:
        """Cause and remedy in a sentence or two."""
        return _MESSAGES[self]

    @property
    def exit_code(self) -> int:
        """Process exit code when nothing better than this status was reached."""
        return _EXIT_CODES[self]

    @property
    def has_base(self) -> bool:
        """Whether a layer of this status carries an estimate of the base (else it is NaN)."""
        return self in (Status.OK, Status.NOISE_DOMINATED, Status.NOT_CONVERGED)


_MESSAGES = {
    Status.OK: "recovered",
    Status.TOO_FEW_MODELS: (
        "fewer than three distinct models: with two, any split of their difference fits. "
        "Add merged models of the same base."
    ),
    Status.NOT_LOW_RANK: (
        "the models differ by more than low-rank updates and rounding: another base, full "
        "fine-tuning, quantised or DoRA merges. Leave out the models that do not belong."
    ),
    Status.RANK_TOO_LARGE: (
        "the ranks are too large for the shape: those of three models exceed its smaller side. "
        "Add models with smaller ranks."
    ),
    Status.SHARED_DIRECTIONS: (
        "the updates of several models share directions, exactly or very nearly, so the base "
        "cannot be told from them. Add models trained from other seeds or on other data; if their "
        "rank is known, give it."
    ),
    Status.NON_FINITE: (
        "NaN or infinity in the merged weights. Remove or repair the model that holds them."
    ),
    Status.NOISE_DOMINATED: (
        "the predicted error is no better than that of the mean of the models: the updates are "
        "too small against the rounding. Add models, or models stored in a wider dtype."
    ),
    Status.NOT_CONVERGED: (
        "the iterative solver stopped before its residual reached the rounding error. "
        "Raise steps, check the rank, or use SubspaceIntersection()."
    ),
}

_EXIT_CODES = {
    Status.OK: 0,
    Status.TOO_FEW_MODELS: 3,
    Status.NOT_LOW_RANK: 4,
    Status.RANK_TOO_LARGE: 4,
    Status.SHARED_DIRECTIONS: 4,
    Status.NON_FINITE: 3,
    Status.NOISE_DOMINATED: 4,
    Status.NOT_CONVERGED: 4,
}
