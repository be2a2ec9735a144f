"""Host exceptions. Every message names the tensor or file and says what to do."""


class JdetuneError(Exception):
    """Root of jdetune's own errors; ``exit_code`` is what the command line returns."""

    exit_code = 3


class InputError(JdetuneError):
    """A checkpoint, adapter or file cannot be used."""

    exit_code = 3


class NotOneBaseError(JdetuneError):
    """The models do not share one base, or do not differ by low-rank updates."""

    exit_code = 4


class RecoveryFailed(JdetuneError):  # noqa: N818 - reads as what happened, as in `raise`
    """Some layers have a status other than OK and the caller asked for an exception."""

    exit_code = 4


class OutputError(JdetuneError):
    """The output folder cannot be used or written."""

    exit_code = 2


class VerificationError(JdetuneError):
    """Recovered weights differ from the reference by more than was asked."""

    exit_code = 6
