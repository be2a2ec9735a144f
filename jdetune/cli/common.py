"""What all subcommands share: flags, output, progress, platform, number formats."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from jdetune.distributed import Processes, join
from jdetune.errors import JdetuneError, escaped

PLATFORMS = {"auto": None, "cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class UsageError(JdetuneError):
    """The command line itself is wrong."""

    exit_code = 2


class HelpRequested(Exception):  # noqa: N818 - not an error
    """``--help`` was given; the message is the help."""


class Command:
    """Flags and help of one subcommand, with no global state.

    Example:
      >>> command = Command("try", "jdetune try FILE...", "Tries.")
      >>> command.integer("times", 1, "How often.")
      >>> command.parse(["a", "--times=3", "b"]), command["times"]
      (['a', 'b'], 3)
    """

    def __init__(self, name: str, usage: str, summary: str, notes: str = "") -> None:
        """Defines the flags that every command has."""
        self.name = name
        self._usage, self._summary, self._notes = usage, summary, notes
        self._values = flags.FlagValues()
        self._values.set_gnu_getopt(True)
        self._order: list[str] = []
        self.boolean("json", False, "Print one JSON object on stdout and nothing else.")
        self.boolean("quiet", False, "No progress on stderr.")
        self.boolean("debug", False, "Show tracebacks.")
        self.string("flagfile", None, "Read more flags from this file, one a line.")

    def string(self, name: str, default: str | None, text: str) -> None:
        """Defines a text flag."""
        flags.DEFINE_string(name, default, text, flag_values=self._values)
        self._order.append(name)

    def integer(self, name: str, default: int | None, text: str, lower: int = 1) -> None:
        """Defines an integer flag with a least value."""
        flags.DEFINE_integer(name, default, text, lower_bound=lower, flag_values=self._values)
        self._order.append(name)

    def number(self, name: str, default: float | None, text: str) -> None:
        """Defines a float flag."""
        flags.DEFINE_float(name, default, text, flag_values=self._values)
        self._order.append(name)

    def boolean(self, name: str, default: bool, text: str) -> None:
        """Defines an on-off flag."""
        flags.DEFINE_boolean(name, default, text, flag_values=self._values)
        self._order.append(name)

    def choice(self, name: str, default: str, values: Sequence[str], text: str) -> None:
        """Defines a flag with a few possible values."""
        flags.DEFINE_enum(name, default, list(values), text, flag_values=self._values)
        self._order.append(name)

    def platform(self) -> None:
        """Defines ``--platform``."""
        self.choice("platform", "auto", tuple(PLATFORMS), "Where JAX computes.")

    def __getitem__(self, name: str) -> Any:
        """A flag's value."""
        return self._values[name].value

    def given(self, skip: Sequence[str] = ()) -> list[str]:
        """Flags that were given, as words of a command line.

        Example:
          >>> command = Command("try", "jdetune try", "Tries.")
          >>> command.parse(["--nojson", "a", "--quiet"]), command.given(skip=["quiet"])
          (['a'], ['--nojson'])
        """
        names = [name for name in self._order if self._values[name].present and name not in skip]
        return [
            f"--{'' if self[name] else 'no'}{name}"
            if self._values[name].boolean
            else f"--{name}={self[name]}"
            for name in names
        ]

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Sets the flags and returns the other arguments.

        Raises:
          HelpRequested: ``--help`` is among the arguments.
          UsageError: an unknown flag or a bad value.
        """
        if any(word in ("--help", "-h", "-help") for word in argv):
            raise HelpRequested(self.help())
        try:
            return self._values([self.name, *argv])[1:]
        except flags.Error as error:
            text = " ".join(str(error).split())
            raise UsageError(f"{text}\nTry: jdetune {self.name} --help") from error

    def help(self) -> str:
        """Usage, summary and every flag."""
        lines = [f"usage: {self._usage}", "", self._summary, "", "flags:"]
        for name in self._order:
            flag = self._values[name]
            choices = getattr(flag.parser, "enum_values", None)
            value = "" if flag.boolean else "=" + ("|".join(choices) if choices else "VALUE")
            default = "" if flag.default in (None, False) else f" Default: {flag.default}."
            text = flag.help.splitlines()[0].removeprefix(f"<{'|'.join(choices or ())}>: ")
            lines += [f"  --{name}{value}", f"      {text}{default}"]
        return "\n".join([*lines, "", self._notes] if self._notes else lines)

    def command_line(self, argv: Sequence[str]) -> str:
        """The command as it was typed."""
        return " ".join(["jdetune", self.name, *argv])


def write_out(text: str) -> None:
    """Writes a line of results to stdout."""
    _write(sys.stdout, text)


def write_err(text: str) -> None:
    """Writes a line that is not a result to stderr."""
    _write(sys.stderr, text)


def _write(stream: Any, text: str) -> None:
    """Writes lines; what steers a terminal, or what it cannot show, is escaped."""
    safe = "\n".join(escaped(line) for line in text.split("\n"))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(safe.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def one_line(value: Any) -> Any:
    r"""A report whose names cannot break out of their line when they are shown.

    Example:
      >>> one_line({"names": ["a\nb"]})
      {'names': ['a\\nb']}
    """
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {key: one_line(item) for key, item in value.items()}
    return [one_line(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(value: Mapping[str, Any]) -> None:
    """Writes a JSON object to stdout; NaN is an error."""
    write_out(json.dumps(value, indent=2, allow_nan=False))  # in ASCII: right for every terminal


def add_trust(command: Command, whose: str) -> None:
    """The flag that lets code of a model be copied."""
    command.boolean(
        "trust_remote_code",
        False,
        f"Also copy Python files of {whose}, and the auto_map in its config that makes "
        "transformers run them.",
    )


def add_adapter_format(command: Command) -> None:
    """Defines ``--adapter_format``."""
    from jdetune.checkpoint.adapter_formats import FORMATS

    command.choice(
        "adapter_format",
        "auto",
        FORMATS,
        "How adapters are written; auto: diffusers' for its pipelines and models, kohya's for "
        "single Stable Diffusion files, PEFT's for the rest.",
    )


def add_process_flags(command: Command) -> None:
    """Defines how several processes find each other."""
    command.string(
        "coordinator",
        None,
        "HOST:PORT of the first of several processes, or auto on TPU pods and Kubernetes. Under "
        "srun and mpirun nothing is needed.",
    )
    command.integer("num_processes", None, "How many processes there are, with --coordinator.")
    command.integer("process_id", None, "This process's number, with --coordinator.", lower=0)


def join_processes(command: Command) -> Processes:
    """Chooses JAX's backend and joins the other processes, before the first computation."""
    platform = PLATFORMS[command["platform"]]
    if platform is not None:
        import jax

        jax.config.update("jax_platforms", platform)
    flags_ = (command[name] for name in ("coordinator", "num_processes", "process_id"))
    try:
        processes = join(*flags_)
    except JdetuneError as error:
        raise UsageError(str(error)) from error
    set_platform(command["platform"])
    return processes


def set_platform(name: str) -> None:
    """Chooses JAX's backend; must come before the first computation."""
    platform = PLATFORMS[name]
    if platform is None:
        return
    import jax

    jax.config.update("jax_platforms", platform)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"--platform={name}: JAX finds no such device ({cause}). Install the matching jax "
            "build, or use --platform=auto."
        ) from error


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress callable that draws a bar with the time left on stderr; None if it cannot."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def step(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield step


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right.

    Example:
      >>> write_out(table(["what", "n"], [["a", "10"]]))
      what   n
      a     10
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for row in (headers, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits, a dash where it is not known."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values, None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def span(values: Sequence[int]) -> str:
    """``4`` or ``4-32``.

    Example:
      >>> span([4, 32, 8]), span([4, 4])
      ('4-32', '4')
    """
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def size(n_bytes: float | int) -> str:
    """Bytes in words.

    Example:
      >>> size(90_868_376)
      '90.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def parse_size(text: str | None, flag: str) -> int | None:
    """Bytes of a size in words, the inverse of ``size``; None stays None.

    Example:
      >>> parse_size("1.5GB", "--max_memory"), parse_size("800 MiB", "--max_memory")
      (1500000000, 838860800)
    """
    if text is None:
        return None
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    words = text.strip().upper()
    digits = words.rstrip("BIKMGT ")
    unit = words[len(digits) :].strip() or "B"
    try:
        value = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise UsageError(f"{flag} is a size such as 8GB or 800MB; got {text!r}.")
    return value
