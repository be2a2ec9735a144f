"""``jdetune report``: the table and the page of a former run, from its report.json alone."""

from collections.abc import Sequence
from pathlib import Path

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
example:
  jdetune report recovered                      # writes recovered/report.html
  jdetune report recovered/report.json --out=page.html

exit codes: 0 written; 2 usage; 3 no report, or the page cannot be written"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "report",
        "jdetune report OUT [--out=FILE.html] [flags]",
        "Prints the table of a former `jdetune recover` or `extract` and writes its page,\n"
        "report.html, again. OUT is the folder that it wrote, or its report.json.",
        _NOTES,
    )
    command.string("out", None, "The page to write. Default: report.html beside report.json.")
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from jdetune.cli import extract, recover
    from jdetune.errors import InputError
    from jdetune.pages.files import PAGE_NAME, write_page
    from jdetune.report import read_report

    command = make_command()
    arguments = command.parse(argv)
    if len(arguments) != 1:
        raise UsageError("give one OUT folder or report.json.\nTry: jdetune report --help")
    source = Path(arguments[0])
    folder = source if source.is_dir() else source.parent
    report = read_report(source)
    render = extract.render if report.get("kind") == "extract" else recover.render
    page = folder / PAGE_NAME if command["out"] is None else Path(command["out"])
    try:
        text = render(common.one_line(report), str(folder))
        n_bytes = write_page(report, page)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: not a whole report ({error}). Make it again.") from error
    if command["json"]:
        common.write_json({"page": str(page), "bytes": n_bytes, "summary": report["summary"]})
    else:
        common.write_out(f"{text}\n\nwritten   {page}")
    return 0
