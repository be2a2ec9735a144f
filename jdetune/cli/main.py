"""Dispatches to the subcommands and turns exceptions into exit codes."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from jdetune.cli import huge_pages
from jdetune.cli.compile_cache import use_compile_cache

#: Subcommand to what it does; each is a module of this package with ``main(argv) -> int``.
COMMANDS = {
    "recover": "base and adapters of three or more merged models",
    "inspect": "what recover would do: sizes, ranks of a sample, memory",
    "verify": "compare a recovery with a reference and with the merged models",
    "report": "the table and report.html of a former run again",
    "extract": "adapters of merged models whose base is known",
    "merge": "merge a PEFT adapter into its base, by a chosen rounding",
    "group": "which of many models share a base; one recover per group",
    "pack": "many merged models in one small store, without loss",
    "unpack": "the models of a store, byte for byte",
    "watch": "what a fine-tune added, a monitor for it, and inputs that reach it",
    "leak": "what an adapter shows of its training pictures",
    "bench": "the paper's benchmark, LoWRA Bench, on a local copy of its data",
    "demo": "recover a real sentence encoder from five real fine-tunes",
}
_INTERRUPTED = 130
_BAD_INPUT = 3
_SCHEDULER_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"


def console_main() -> None:
    """Entry point of the program: memory and environment first, then the command."""
    huge_pages.start_again(os.environ)
    prepare_environment()
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _once_more
    code = main(sys.argv[1:])
    if code == _INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # XLA's threads still run, and crash a regular teardown
    sys.exit(code)


def _interrupt(*_: object) -> None:
    """Ctrl-C ends what runs, and a second one the process: nothing is lost that was solved."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    raise KeyboardInterrupt


def _once_more(lost: Any) -> None:
    """Ctrl-C during a callback of the garbage collector, which swallows it, is sent again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGINT, _interrupt)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


def prepare_environment() -> None:
    """Settings that must stand before NumPy and JAX start their threads.

    One BLAS thread: JAX has its own pool, and two pools fight for the cores. XLA's
    concurrency-optimised scheduler is off, since it slows many small factorisations on CPU.
    Compiled programs are kept between runs.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    xla = os.environ.get("XLA_FLAGS", "")
    if _SCHEDULER_FLAG not in xla:
        os.environ["XLA_FLAGS"] = f"{xla} {_SCHEDULER_FLAG}=false".strip()
    use_compile_cache(os.environ)


def main(argv: Sequence[str]) -> int:
    """Runs one subcommand.

    Args:
      argv: arguments after the program's name.

    Returns:
      The exit code: 0 all recovered, 2 usage, 3 bad input, 4 not one base or not low rank,
      5 partial, 6 verification failed, 130 interrupted.
    """
    from jdetune.cli import common
    from jdetune.distributed import LostProcessError
    from jdetune.errors import JdetuneError

    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "help"):
        common.write_out(usage())
        return 0 if argv else 2
    if name == "--version":
        from jdetune.pipeline import version

        common.write_out(f"jdetune {version()}")
        return 0
    if name not in COMMANDS:
        common.write_err(f"jdetune: no command {name!r}.\n\n{usage()}")
        return 2
    try:
        return importlib.import_module(f"jdetune.cli.{name}").main(list(argv[1:]))
    except common.HelpRequested as text:
        common.write_out(str(text))
        return 0
    except KeyboardInterrupt:
        common.write_err("jdetune: interrupted; nothing was put in place. Run it again to go on.")
        return _INTERRUPTED
    except JdetuneError as error:
        if "--debug" in argv:
            raise
        common.write_err(f"jdetune {name}: {error}")
        if isinstance(error, LostProcessError):
            os._exit(error.exit_code)  # a regular end waits for the lost one, and then crashes
        return error.exit_code
    except (OSError, MemoryError) as error:
        if "--debug" in argv:
            raise
        common.write_err(f"jdetune {name}: {type(error).__name__}: {error}")
        return _BAD_INPUT


def usage() -> str:
    """The list of commands."""
    lines = [
        "usage: jdetune COMMAND [arguments]",
        "",
        "Recover base weights and LoRA adapters from merged checkpoints.",
        "",
        *(f"  {name:<8} {text}" for name, text in COMMANDS.items()),
        "",
        "jdetune COMMAND --help lists the flags; jdetune --version the version.",
    ]
    return "\n".join(lines)
