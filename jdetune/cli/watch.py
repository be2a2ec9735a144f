"""``jdetune watch``: what a fine-tune added to the residual stream, and which inputs reach it."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
example:
  jdetune watch recovered --model=0 --texts=chats.txt --save=monitor.safetensors --page=watch.html
  jdetune watch recovered --model=0 --monitor=monitor.safetensors --check=new.txt

--texts and --check are text with an input a line, or .jsonl with {"text"}, {"prompt", "answer"} or
{"ids", "given"}, and a "topic" where one is known. Apply the model's chat template yourself.
The order of --texts should be random: false positives are measured on its last tenth.

exit codes: 0 done, also where inputs are flagged; 2 usage; 3 bad input; 4 nothing was recovered;
5 partial (some matrices that should be watched were not recovered)"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "watch",
        "jdetune watch RECOVERED --model=NAME --texts=FILE [flags]",
        "Takes the directions that a fine-tune added from its recovered factors, calibrates a\n"
        "monitor on texts, and shows which inputs the directions answer to.\n"
        "RECOVERED is the OUT folder of jdetune recover.",
        _NOTES,
    )
    command.string("model", None, "The model: its name, or its number in report.json, from 0.")
    command.string("texts", None, "Harmless inputs: ranges and audit are from them.")
    command.string("check", None, "Inputs to test.")
    command.string("monitor", None, "Test with this monitor instead of calibrating one.")
    command.string("save", None, "Write the monitor to this .safetensors file.")
    command.string("page", None, "Write an HTML page to this file.")
    command.integer("top_k", 20, "Directions of each matrix.")
    command.integer("drop_last", 0, "Leave out so many last layers.", lower=0)
    command.boolean(
        "carried", False, "Also watch updates of values and inner matrices, as the next carry them."
    )
    command.number("margin", 0.01, "How far outside of its range a cosine must lie.")
    command.number("trim", 0.0, "Share of the texts left out at each end of a range.")
    command.integer("extremes", 10, "Inputs shown at each end of a direction.")
    command.integer("answer_tokens", 0, "Tokens a decoder answers to inputs without one.", lower=0)
    command.integer("batch", 16, "Inputs at once.")
    command.integer("max_tokens", 512, "Tokens of an input at most.")
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    arguments = command.parse(argv)
    if len(arguments) != 1:
        raise UsageError("give one RECOVERED folder.\nTry: jdetune watch --help")
    if command["model"] is None:
        raise UsageError("--model=NAME is missing.\nTry: jdetune watch --help")
    if command["texts"] is None and command["monitor"] is None:
        raise UsageError("--texts=FILE or --monitor=FILE is missing.\nTry: jdetune watch --help")
    if command["margin"] < 0 or not 0 <= command["trim"] < 0.5:
        raise UsageError("--margin is 0 or more, --trim at least 0 and below 0.5.")
    if command["save"] is not None and not command["save"].endswith(".safetensors"):
        raise UsageError("--save is a .safetensors file.")
    common.set_platform(command["platform"])
    from jdetune.watch import session

    names = (
        *(
            "texts",
            "check",
            "monitor",
            "save",
            "page",
            "top_k",
            "drop_last",
            "carried",
            "margin",
            "trim",
        ),
        *("extremes", "answer_tokens", "batch", "max_tokens"),
    )
    options = session.Options(
        **{name: command[name] for name in names}, command=command.command_line(argv)
    )
    with common.progress_bar(command["quiet"]) as progress:
        value = session.run(arguments[0], command["model"], options, progress)
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(common.one_line(value)))
    return value["summary"]["exit_code"]


def render(value: dict[str, Any]) -> str:
    """The report for people."""
    from jdetune.watch.page import calibration_facts

    lines = [f"{value['directions']['count']} directions of {value['model']} are watched"]
    lines += [f"{name:<28}{text}" for name, text in calibration_facts(value).items()]
    if value["audit"]:
        rows = [
            [
                f"{end['direction']} {end['end']}",
                f"{end['cosines'][0]:+.3f}",
                str(end["samples"][0]),
                f"{end['topic_share']:.0%} {end['topic']}" if end["topic"] else "",
            ]
            for end in value["audit"][:12]
            if end["samples"]
        ]
        headers = ["strongest directions", "cosine", "input", "topic"]
        lines += ["", common.table(headers, rows)]
    found = value["checked"]
    if found is not None:
        interval = f"95%: {found['low']:.2%} to {found['high']:.2%}"
        lines += ["", f"{found['flagged']} of {found['inputs']} inputs are flagged ({interval})"]
        lines += [f"  {row['input']}: {_fired(row)}" for row in found["rows"][:20]]
    lines += [f"not recovered, so not watched: {name}" for name in value["missing"]]
    lines += [
        f"{key:<9} {value[at]}" for key, at in (("monitor", "saved"), ("page", "page")) if value[at]
    ]
    return "\n".join(lines)


def _fired(row: dict[str, Any]) -> str:
    first = row["firings"][0]
    more = f" and {row['count'] - 1} more" if row["count"] > 1 else ""
    return (
        f"{first['direction']} on token {first['token']} {first['word']!r} ({first['role']}), "
        f"{first['excess']:.3f} outside{more}"
    )
