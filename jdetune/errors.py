"""Host exceptions. Every message names the tensor or file and says what to do."""

#: Characters of a name that a message shows at most.
_SHOWN = 200


def printable(text: object) -> str:
    r"""Text from a file as it may be shown: control characters escaped, cut where it is long.

    Example:
      >>> printable("a.weight"), printable("a\x1b[2J\nb")
      ('a.weight', 'a\\x1b[2J\\nb')
    """
    said = str(text)
    return escaped(said if len(said) <= _SHOWN else f"{said[:_SHOWN]}... ({len(said)} characters)")


def escaped(text: str) -> str:
    """Text without characters that steer a terminal or break a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    """The output folder cannot be used."""

    exit_code = 2


class WriteError(OutputError):
    """The disk is full or fails while output is written; what was solved so far is kept."""

    exit_code = 3


class VerificationError(JdetuneError):
    """Recovered weights differ from the reference by more than was asked."""

    exit_code = 6
