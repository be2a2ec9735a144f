"""``jdetune extract``: adapters of merged models whose base is known."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError
from jdetune.cli.recover import parse_rank

_NOTES = """\
example:
  jdetune extract --base=base tune-a tune-b --out=extracted

residual is the rms of what an adapter leaves over, in units of the rounding error; re-merge the
share of weights that come back bit for bit when base and adapter are merged again.

exit codes: 0 all good; 2 usage; 3 bad input; 4 not a low-rank update of this base; 5 partial
(what could be extracted is written)"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "extract",
        "jdetune extract --base=DIR MODEL... --out=DIR [flags]",
        "Extracts the LoRA adapter of every merged model from its difference to a known base.\n"
        "MODEL is a folder, a .safetensors file or a hub id (org/name@revision).",
        _NOTES,
    )
    command.string("base", None, "Folder or .safetensors file of the base.")
    command.string("out", None, "Folder to write: adapters/, report.json, report.html.")
    command.boolean("overwrite", False, "Replace a former output of jdetune in --out.")
    common.add_adapter_format(command)
    command.string(
        "rank",
        "auto",
        "auto counts the directions above the rounding. An integer keeps as many, a share below 1\n"
        "as many as hold that share of the energy.",
    )
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    models = command.parse(argv)
    for flag in ("base", "out"):
        if command[flag] is None:
            raise UsageError(f"--{flag}=DIR is missing.\nTry: jdetune extract --help")
    if not models:
        raise UsageError("no MODEL is given.\nTry: jdetune extract --help")
    rank = parse_rank(command["rank"])
    if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise UsageError(f"--rank is auto, an integer or a share below 1; got {rank}.")
    common.set_platform(command["platform"])
    from jdetune import extraction

    options = extraction.Options(
        rank, command["overwrite"], command.command_line(argv), command["adapter_format"]
    )
    with common.progress_bar(command["quiet"]) as progress:
        value = extraction.run(command["base"], models, command["out"], options, progress)
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(common.one_line(value), command["out"]))
    return value["summary"]["exit_code"]


def render(report: dict[str, Any], out: str) -> str:
    """The report for people."""
    from jdetune.pages.extraction_page import match_of

    rows = []
    for entry in report["inputs"]:
        own = [t for t in report["tensors"] if t["model"] == entry["name"]]
        good = [t for t in own if t["status"] == "extracted"]
        count = {t["status"]: 0 for t in own}
        for tensor in own:
            count[tensor["status"]] += 1
        rest = sum(count.get(status, 0) for status in ("not_low_rank", "failed", "skipped"))
        rows.append(
            [
                entry["name"],
                str(len(good)),
                common.span([t["rank"] for t in good]),
                common.fixed(max((t["residual_ratio"] or 0 for t in good), default=None)),
                common.fixed(match_of(good), 4),
                str(count.get("identical", 0)),
                str(count.get("kept_whole", 0)),
                str(rest),
            ]
        )
    headers = ["model", "extracted", "ranks", "worst residual", "re-merge", "identical", "whole"]
    lines = [common.table([*headers, "other"], rows), "", f"{report['seconds']:.1f} s"]
    lines += [f"note: {text}" for text in report["notes"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for tensor in report["tensors"]:
        if tensor["reason"]:
            key = (tensor["model"], tensor["reason"])
            reasons.setdefault(key, []).append(tensor["name"])
    lines += [
        f"{model}: {len(names)} tensor(s), e.g. {names[0]}: {reason}"
        for (model, reason), names in reasons.items()
    ]
    written = [entry["name"] for entry in report["inputs"] if entry["written"]]
    lines += [f"adapter   {out}/adapters/{name}" for name in written] or ["no adapter was written"]
    lines += [f"report    {out}/report.json", f"page      {out}/report.html"]
    return "\n".join(lines)
