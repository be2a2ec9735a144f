"""``jdetune leak``: what an adapter shows of the pictures that it was trained on."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
example:
  python -m benchmarks.leak --quick --bank=bank      # a bank, and adapters to try in bank/victims
  jdetune leak audit bank/victims/0 --bank=bank --pictures=bank/victims/0/pictures.npy

The bank holds public fine-tunes of the same base. With --pictures the report says whether an
attack puts the true identity before all identities of the bank's gallery. Without, --out has what
was drawn.
That these attacks find nothing proves nothing: only training with differential privacy does.

exit codes: 0 done, also where the adapter leaks; 2 usage; 3 bad input"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "leak",
        "jdetune leak audit ADAPTER --bank=DIR [flags]",
        "Attacks an adapter as an outsider could, and reports what it shows of its training\n"
        "pictures. ADAPTER is a PEFT folder, or one that jdetune recovered.",
        _NOTES,
    )
    command.string("bank", None, "Folder of public fine-tunes of the same base.")
    command.string("pictures", None, "The training pictures, .npy [picture, side, side], -1 to 1.")
    command.string("out", None, "Write the reconstructions to this .npy file.")
    command.integer("samples", 8, "Pictures drawn from the adapter's model without a prompt.")
    command.integer("seed", 0, "Of those.", lower=0)
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    arguments = command.parse(argv)
    if len(arguments) != 2 or arguments[0] != "audit":
        raise UsageError("say audit and one ADAPTER.\nTry: jdetune leak --help")
    if command["bank"] is None:
        raise UsageError("--bank=DIR is missing.\nTry: jdetune leak --help")
    if command["out"] is not None and not command["out"].endswith(".npy"):
        raise UsageError("--out is a .npy file.")
    common.set_platform(command["platform"])
    import numpy as np

    from jdetune.leak.audit import audit, load_for, load_pictures
    from jdetune.leak.bank import load_bank

    bank = load_bank(command["bank"])
    adapter = load_for(bank, arguments[1])
    path = command["pictures"]
    pictures = None if path is None else load_pictures(bank, path)
    found = audit(bank, adapter, pictures, command["samples"], command["seed"])
    if command["out"] is not None:
        np.save(command["out"], np.stack([seen.picture for seen in found.attacks.values()]))
    value = {
        "adapter": arguments[1],
        **found.to_json(),
        "measured": bank.about.get("measured", {}),
        "pictures": command["out"],
    }
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(common.one_line(value)))
    return 0


def render(value: dict[str, Any]) -> str:
    """The report for people."""
    verdict = {
        None: "not judged: give --pictures",
        True: "LEAKS: an attack puts the true identity first",
        False: "these attacks do not find the identity",
    }[value["identified"]]
    rows = []
    for name, seen in value["attacks"].items():
        place = "-" if seen["rank"] is None else f"{seen['rank']} of {value['candidates']}"
        measured = value["measured"].get(name)
        right = "-" if measured is None else f"{measured:.0%}"
        rows.append([name, common.fixed(seen["likeness"], 3), place, right])
    count = value["count"]
    counted = (
        "not estimated: the bank has one number only" if count is None else f"{count} (estimated)"
    )
    lines = [
        f"{'adapter':<24}{value['adapter']}",
        f"{'verdict':<24}{verdict}",
        f"{'class of the pictures':<24}{value['class']} (estimated)",
        f"{'training pictures':<24}{counted}",
        f"{'attacks agree':<24}{value['agreement']:.3f} (cosine; 1 is the same identity)",
        "",
        common.table(["attack", "likeness", "place", "right on the bank's victims"], rows),
    ]
    if value["pictures"]:
        lines += ["", f"{'reconstructions':<24}{value['pictures']}"]
    return "\n".join(lines)
