import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdetune.cli import main as program
from jdetune.cli.common import Command, HelpRequested, UsageError, set_platform


def command():
    made = Command("try", "jdetune try", "Tries.", "notes")
    made.integer("rank", None, "The rank.")
    made.choice("platform", "auto", ("auto", "cpu"), "Where.")
    return made


def test_flags_and_paths_mix():
    made = command()
    assert made.parse(["a", "--rank=3", "b", "--json"]) == ["a", "b"]
    assert made["rank"] == 3
    assert made["json"]
    assert made["platform"] == "auto"


def test_commands_share_no_state():
    command().parse(["--rank=3"])
    assert command()["rank"] is None


def test_flagfile(tmp_path):
    path = tmp_path / "x.flags"
    path.write_text("# comment\n--rank=7\n--json\n")
    made = command()
    assert made.parse(["a", f"--flagfile={path}", "b"]) == ["a", "b"]
    assert made["rank"] == 7
    assert made["json"]
    with pytest.raises(UsageError):
        command().parse([f"--flagfile={tmp_path}/none"])


@pytest.mark.parametrize("bad", ["--nope", "--rank=x", "--rank=0", "--platform=abacus"])
def test_bad_flags_are_usage_errors(bad, capsys):
    with pytest.raises(UsageError, match="--help"):
        command().parse([bad])
    assert program.main(["recover", bad]) == 2
    assert "jdetune recover:" in capsys.readouterr().err


def test_help_lists_every_flag():
    with pytest.raises(HelpRequested) as caught:
        command().parse(["--help"])
    text = str(caught.value)
    assert all(f"--{name}" in text for name in ("rank", "platform=auto|cpu", "json", "flagfile"))


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert program.main([name, "--help"]) == 0
    assert f"usage: jdetune {name}" in capsys.readouterr().out


def test_program_level_arguments(capsys):
    assert program.main(["--help"]) == 0
    assert "recover" in capsys.readouterr().out
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jdetune ")
    assert program.main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    assert program.main([]) == 2


def test_interrupt_and_errors_become_exit_codes(monkeypatch, capsys):
    from jdetune.cli import recover
    from jdetune.errors import NotOneBaseError

    def raising(error):
        def run(argv):
            raise error

        return run

    for error, code in ((KeyboardInterrupt(), 130), (NotOneBaseError("x"), 4), (OSError("y"), 3)):
        monkeypatch.setattr(recover, "main", raising(error))
        assert program.main(["recover"]) == code
        assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(recover, "main", raising(NotOneBaseError("x")))
    with pytest.raises(NotOneBaseError):
        program.main(["recover", "--debug"])


def test_environment_is_prepared_and_respected(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    program.prepare_environment()
    assert os.environ["XLA_FLAGS"] == (
        "--xla_one=1 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    program.prepare_environment()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"
    assert os.environ["XLA_FLAGS"].count("scheduler") == 1


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "jdetune", "dance"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert "no command" in done.stderr


def test_shipped_flagfiles_parse():
    from jdetune.cli import recover

    configs = Path(__file__).parents[2] / "configs"
    for name in ("recover", "paper"):
        made = recover.make_command()
        made.parse([f"--flagfile={configs / name}.flags"])
        solver = recover.make_solver(made)
        assert (
            type(solver).__name__
            == {
                "recover": "SubspaceIntersection",
                "paper": "SpectralDeTuning",
            }[name]
        )


def test_the_program_asks_for_huge_pages_before_it_does_anything(monkeypatch):
    order = []
    monkeypatch.setattr(program, "prepare_environment", lambda: order.append("environment"))
    monkeypatch.setattr(
        program.huge_pages, "start_again", lambda environment: order.append("asked")
    )
    monkeypatch.setattr(program, "main", lambda argv: order.append("main") or 0)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        program.console_main()
    assert order == ["asked", "environment", "main"]


def test_an_interrupt_leaves_without_teardown(monkeypatch):
    monkeypatch.setattr(program, "prepare_environment", lambda: None)
    monkeypatch.setattr(program.huge_pages, "start_again", lambda environment: None)
    monkeypatch.setattr(program, "main", lambda argv: 130)
    left = []
    monkeypatch.setattr(program.os, "_exit", left.append)
    with pytest.raises(SystemExit):
        program.console_main()
    assert left == [130]


@pytest.mark.parametrize("error", [RuntimeError("no cuda\nx"), AssertionError()])
def test_a_missing_platform_is_a_usage_error(monkeypatch, error):
    import jax

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UsageError, match="--platform=gpu: JAX finds no such device"):
        set_platform("gpu")


@pytest.mark.parametrize(("text", "value"), [("8GB", 8 * 10**9), ("1.5 mb", 1500000), ("12", 12)])
def test_sizes_are_read(text, value):
    from jdetune.cli.common import parse_size

    assert parse_size(text, "--max_memory") == value


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "GB", "3XB", "inf"])
def test_sizes_that_are_none_are_usage_errors(text):
    from jdetune.cli.common import UsageError, parse_size

    with pytest.raises(UsageError, match="--max_memory is a size such as 8GB"):
        parse_size(text, "--max_memory")
