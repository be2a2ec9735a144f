"""``jdetune recover``: base and adapters from merged models."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError
from jdetune.noise import ROUNDINGS
from jdetune.types import STORAGE_DTYPES

_NOTES = """\
example:
  jdetune recover tune-a tune-b tune-c --out=recovered

exit codes: 0 all recovered; 2 usage; 3 bad input; 4 not one base or not low rank;
5 partial (what could be recovered is written); 130 interrupted"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "recover",
        "jdetune recover MODEL MODEL MODEL... --out=DIR [flags]",
        "Recovers the weights before fine-tuning, and every model's LoRA adapter, from three or\n"
        "more models that were fine-tuned from one base and merged. MODEL is a folder, a\n"
        ".safetensors file or, with huggingface_hub, an id org/name or org/name@revision.",
        _NOTES,
    )
    command.string("out", None, "Folder to write: base/, adapters/, report.json.")
    command.boolean("overwrite", False, "Replace a former output of jdetune in --out.")
    add_run_flags(command)
    command.platform()
    common.add_process_flags(command)
    return command


def add_run_flags(command: Command) -> None:
    """Flags that say how to recover; ``make_options`` reads them."""
    command.boolean("masks", False, "Also write OUT/masks.safetensors: which elements are certain.")
    command.boolean("dry_run", False, "Say what would be recovered, then stop.")
    common.add_trust(command, "the first model")
    command.string("include", None, "Recover only matrices whose name matches this regex.")
    command.string("exclude", None, "Leave out matrices whose name matches this regex.")
    common.add_adapter_format(command)
    add_solver_flags(command)
    command.string(
        "max_memory",
        None,
        "Memory that weights may take at a time, such as 8GB, on the host and on a device; fewer "
        "layers are then worked on together, one at the least. Default: a share of what is free.",
    )


def add_solver_flags(command: Command) -> None:
    """Flags that choose and tune the solver."""
    command.choice("solver", "intersection", ("intersection", "spectral"), "Which solver.")
    command.string(
        "rank",
        "auto",
        "auto finds the ranks. An integer is the rank of every update, where it is known. A share\n"
        "below 1 finds them and cuts each adapter to that share of its energy.",
    )
    command.integer("steps", 300, "Iterations, for --solver=spectral.")
    command.choice(
        "space",
        "full",
        ("full", "core"),
        "Where --solver=spectral iterates: on the weights, as the paper does, or on small cores.",
    )
    command.choice("precision", "auto", ("auto", "float64", "float32"), "Arithmetic.")
    command.choice(
        "base_dtype",
        "auto",
        ("auto", *STORAGE_DTYPES),
        "Grid that the base lies on; auto finds bfloat16 and float16 in wider models.",
    )
    command.choice(
        "rounding",
        "R1",
        tuple(ROUNDINGS),
        "How the models were merged: R1 rounds the sum (PEFT's default), R2 also the update "
        "before (safe_merge=True), R3 the update twice (16-bit adapters on a GPU).",
    )


def make_solver(command: Command) -> Any:
    """The solver that the flags describe."""
    rank = parse_rank(command["rank"])
    if command["solver"] == "spectral":
        if not isinstance(rank, int):
            raise UsageError("--solver=spectral needs --rank=INT; the default solver finds ranks.")
        from jdetune.solvers.spectral import SpectralDeTuning

        try:
            return SpectralDeTuning(
                rank=rank,
                steps=command["steps"],
                space=command["space"],
                precision=command["precision"],
            )
        except ValueError as error:
            raise UsageError(f"--rank, --steps: {error}.") from error
    from jdetune.solvers.intersection import SubspaceIntersection

    try:
        return SubspaceIntersection(
            precision=command["precision"],
            base_dtype=command["base_dtype"],
            rounding=command["rounding"],
            rank=rank,
        )
    except ValueError as error:
        raise UsageError(f"--rank: {error}.") from error


def make_options(command: Command, argv: Sequence[str]) -> Any:
    """The pipeline's options; a field without a line of its own here is the flag of its name."""
    from jdetune.pipeline import Options

    made = {
        "solver": make_solver(command),
        "max_memory": common.parse_size(command["max_memory"], "--max_memory"),
        "command": command.command_line(argv),
    }
    fields = [field.name for field in dataclasses.fields(Options)]
    return Options(**{name: command[name] for name in fields if name not in made}, **made)


def parse_rank(text: str) -> int | float | None:
    """``auto``, an integer or a share, as PEFT has it.

    Example:
      >>> parse_rank("auto"), parse_rank("16"), parse_rank("0.99")
      (None, 16, 0.99)
    """
    if text == "auto":
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise UsageError(f"--rank is auto, an integer or a share below 1; got {text!r}.") from None


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from jdetune import pipeline

    command = make_command()
    models = command.parse(argv)
    if not models:
        raise UsageError("no MODEL is given.\nTry: jdetune recover --help")
    if command["out"] is None and not command["dry_run"]:
        raise UsageError("--out=DIR is missing.\nTry: jdetune recover --help")
    processes = common.join_processes(command)
    options = make_options(command, argv)
    with common.progress_bar(command["quiet"] or not processes.first) as progress:
        if command["dry_run"]:
            checkpoints = pipeline.open_models(models, command["trust_remote_code"])
            if command["out"] is not None:
                pipeline.check_out(command["out"], checkpoints, options)
            plan = pipeline.plan_models(checkpoints, options, progress)
            text, value = _plan_text(plan), _plan_json(plan)
        else:
            value = pipeline.run(models, command["out"], options, progress, processes=processes)
            text = render(common.one_line(value), command["out"])
    if not processes.first:
        pass  # the first one says it
    elif command["json"]:
        common.write_json(value)
    else:
        common.write_out(text)
    return 0 if command["dry_run"] else value["summary"]["exit_code"]


def render(report: dict[str, Any], out: str) -> str:
    """The report for people."""
    summary, form = report["summary"], report.get("adapter_format", "peft")
    solved = [t for t in report["tensors"] if t["code"] is not None]
    n_models = len(_solved_inputs(report))
    good = sum(t["code"] == "OK" for t in solved)
    lines = [
        f"{good} of {len(solved)} differing matrices recovered from {n_models} models "
        f"in {report['seconds']:.1f} s ({report['device']})",
        _timing(report["timing"]),
    ]
    if solved:
        lines += ["", _solved_table(solved)]
    lines += ["", _counts(summary)]
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += _failures(report["tensors"])
    if summary["base_written"]:
        lines += [
            "",
            f"base      {out}/base",
        ]
        if form != "none":
            names = ", ".join(_adapter_names(report))
            lines.append(f"adapters  {out}/adapters/{{{names}}} ({form})")
    else:
        lines += ["", "no base was written"]
    lines += [f"report    {out}/report.json", f"page      {out}/report.html"]
    if summary["base_written"]:
        needs = " --reference=BASE" if form == "none" else ""
        lines += ["", f"next: jdetune verify {out}{needs}"]
    return "\n".join(lines)


def _timing(timing: dict[str, Any]) -> str:
    """Where the time went."""
    several = f"{timing['processes']} processes, " if timing["processes"] > 1 else ""
    stages = ", ".join(f"{name} {timing[name]:.1f} s" for name in ("compare", "recover", "write"))
    share = f"{timing['not_in_solve']:.0%} of the time is not the solver's"
    busy = f"reading and writing {timing['transferring']:.1f} s, computing "
    busy += f"{timing['computing']:.1f} s: all took {timing['over_larger']:.2f} times the larger"
    return f"{several}{stages}; {share}\n{busy}"


def _solved_table(tensors: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for tensor in tensors:
        key = (tensor["code"], tuple(tensor["shape"]), tensor["dtype"])
        groups.setdefault(key, []).append(tensor)
    rows = []
    for (code, shape, dtype), members in groups.items():
        known = code in ("OK", "NOISE_DOMINATED", "NOT_CONVERGED")
        ranks = [rank for member in members for rank in member["ranks"] or ()] if known else []
        rows.append(
            [
                f"{' x '.join(map(str, shape))} {dtype}",
                str(len(members)),
                code,
                common.span(ranks),
                common.fixed(common.mean([m["predicted_error"] for m in members])),
                common.fixed(common.mean([m["exact_fraction_est"] for m in members]), 3),
                common.fixed(common.mean([m["residual_ratio"] for m in members])),
                _verdicts(members),
            ]
        )
    headers = ["matrix", "n", "status", "ranks", "log10 MSE (est.)", "exact (est.)", "residual"]
    headers += ["verdict"]
    return common.table(headers, rows)


def _verdicts(members: Sequence[dict[str, Any]]) -> str:
    """The verdict of most, and how many have another."""
    words = [m["verdict"] or "-" for m in members]
    most = max(set(words), key=words.count)
    rest = len(words) - words.count(most)
    return most + (f" (+{rest} other)" if rest else "")


def _counts(summary: dict[str, Any]) -> str:
    words = {
        "copied": "equal in all models, copied",
        "consensus": "taken from the majority",
        "per_model": "different in most models, kept with each adapter",
        "failed": "failed",
        "skipped": "skipped",
    }
    parts = [f"{summary[key]} {text}" for key, text in words.items() if summary[key]]
    return "other tensors: " + ("; ".join(parts) if parts else "none")


def _failures(tensors: Sequence[dict[str, Any]]) -> list[str]:
    """Every distinct reason once, with how many tensors it holds for and an example."""
    reasons: dict[str, list[str]] = {}
    for tensor in tensors:
        bad = tensor["code"] not in (None, "OK") or tensor["status"] in ("failed", "skipped")
        if bad or tensor["status"] == "per_model":
            reasons.setdefault(tensor["reason"] or "unknown", []).append(tensor["name"])
    return [
        f"{len(names)} tensor(s), e.g. {names[0]}: {reason}" for reason, names in reasons.items()
    ]


def _solved_inputs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Models that are neither a duplicate nor left out."""
    inputs = report["inputs"]
    return [e for e in inputs if e["duplicate_of"] is None and e["left_out"] is None]


def _adapter_names(report: dict[str, Any]) -> list[str]:
    names = [entry["name"] for entry in _solved_inputs(report)]
    return names if len(names) <= 6 else [*names[:5], f"... {len(names) - 5} more"]


def _plan_json(plan: Any) -> dict[str, Any]:
    return {
        "models": [c.name for c in plan.checkpoints],
        "duplicates": dict(plan.duplicates),
        "warnings": list(plan.warnings),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype}
            | {"action": t.action, "reason": t.reason}
            for t in plan.tensors
        ],
    }


def _plan_text(plan: Any) -> str:
    actions = ("recover", "tied", "identical", "consensus", "per_model", "failed", "skipped")
    rows = [[action, str(len(plan.names(action)))] for action in actions if plan.names(action)]
    lines = [f"{len(plan.solved)} distinct models", "", common.table(["tensors", "n"], rows)]
    lines += [f"warning: {name} equals {twin}" for name, twin in plan.duplicates]
    lines += common.one_line([f"warning: {text}" for text in plan.warnings])
    if plan.names("recover"):
        names = common.one_line(plan.names("recover"))
        lines += ["", "to recover:", *(f"  {name}" for name in names)]
    return "\n".join(lines)
