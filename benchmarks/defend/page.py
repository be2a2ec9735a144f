"""Tables, figure and checks of the defences."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.tables import Check, at_most, table

#: Of the markers in docs/defend.md.
MARKED = "measured"
#: A base counts as recovered from this many decades below the mean of the models.
DECADES = 2.0
#: Rounding to float32 in another basis, through six blocks.
UNCHANGED = 1e-9
#: Models at which the paper's solver runs, where it does.
PAPER_MODELS = 5


def words(found: Mapping[str, Any]) -> str:
    """Status, W-error and exact share of one recovery."""
    status = ", ".join(
        name if len(found["status"]) == 1 else f"{count} {name}"
        for name, count in found["status"].items()
    )
    if found["w_error"] is None:
        return status
    part = "" if found["with_base"] == found["matrices"] else f" ({found['with_base']} bases)"
    return f"{status}: {found['w_error']:.2f}, exact {found['exact']:.3f}{part}"


def recovered(row: Mapping[str, Any]) -> bool:
    """Whether every matrix has a base, far nearer to the truth than the mean of the models."""
    found = row["after"]
    whole = found["with_base"] == found["matrices"] and found["w_error"] is not None
    return whole and found["w_error"] < row["mean"] - DECADES


def needed(rows: Mapping[int, Mapping[str, Any]], paper: Mapping[str, Any] | None = None) -> str:
    """The fewest models that are enough, or how many are not.

    Args:
      rows: by number of models.
      paper: what the paper's solver found.
    """
    enough = [n for n, row in rows.items() if recovered(row)]
    if enough:
        return str(min(enough))
    known = rows.get(PAPER_MODELS)
    if paper is not None and known is not None and recovered({**known, "after": paper}):
        return f"{PAPER_MODELS}, by the paper's solver"
    return f"more than {max(rows)}"


def text(result: Mapping[str, Any]) -> str:
    """Everything that is printed, as Markdown."""
    by_case: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_case.setdefault(row["case"], {})[row["n"]] = row
    counts, main = result["settings"]["n"], min(result["settings"]["n"])
    first, second, third = [], [], []
    for name, rows in by_case.items():
        row, cost = rows[main], result["costs"][name]
        same = row["released"] == row["after"]
        first.append(
            [
                name,
                f"{cost['moved']:.1e} ({100 * cost['share']:.2g}%)",
                words(row["released"]),
                "as released" if same else words(row["after"]),
                needed(rows, result["paper"].get(name)),
            ]
        )
        paper = _paper(result["paper"].get(name))
        second.append([name, paper, f"{row['mean']:.2f}", f"{row['base_apart']:.1e}"])
        third.append([name, *(_short(rows[n]["after"]) if n in rows else "-" for n in counts)])
    parts = [
        f"Settings: {json.dumps(result['settings'])}. {result['seconds']} s,"
        f" {result['processor']} s of processor time, on {result['machine']}.",
        f"With {main} models:",
        table(
            ["defence", "cost: 1 - cosine (of the fine-tune's own)", "recovery as released",
             "after the counter-attack", "LoRAs needed"], first,
        ),
        "What else the attacker has after the counter-attack: the W-errors of the paper's solver"
        f" (if run) and of the mean of {main} models, and how the attacker's base embeds texts:",
        table(
            ["defence", "paper's solver, rank given", "mean of the models",
             "1 - cosine of the attacker's base to the true one"], second,
        ),
        "W-error after the counter-attack by number of models, until they are enough:",
        table(["defence", *(f"n = {n}" for n in counts)], third),
    ]  # fmt: skip
    return "\n\n".join(parts)


def checks(result: Mapping[str, Any]) -> list[Check]:
    """What must hold whatever the defence is."""
    rows = result["rows"]
    wrong = sum(row[part]["wrong_under_ok"] for row in rows for part in ("released", "after"))
    free = [
        cost["moved"]
        for name, cost in result["costs"].items()
        if ("units" in name) and "bfloat16" not in name and "common" not in name
    ]
    return [
        at_most("bases of status OK that are worse than predicted by a decade", wrong, 0, 0),
        *(
            [at_most("1 - cosine that a change of coordinates cost", max(free), UNCHANGED, 12)]
            if free
            else []
        ),
    ]


def draw(result: Mapping[str, Any], figure: Any) -> None:
    """W-errors of every defence, as released and after the counter-attack."""
    axes, names = figure.subplots(), list(dict.fromkeys(row["case"] for row in result["rows"]))
    main = min(result["settings"]["n"])
    rows = {row["case"]: row for row in result["rows"] if row["n"] == main}
    y = range(len(names))
    axes.plot([rows[n]["mean"] for n in names], y, "|", color="#5b5b5b", ms=14, label="mean")
    for part, mark, colour, label in (
        ("released", "o", "#0072b2", "recovered as released"),
        ("after", "D", "#c25100", "after the counter-attack"),
    ):
        known = [(rows[n][part]["w_error"], i) for i, n in enumerate(names)]
        at = [(x, i) for x, i in known if x is not None]
        axes.plot([x for x, _ in at], [i for _, i in at], mark, color=colour, label=label,
                  fillstyle="none" if part == "released" else "full", ms=8)  # fmt: skip
    papers = {n: found["w_error"] for n, found in result["paper"].items() if found["w_error"]}
    axes.plot(list(papers.values()), [names.index(n) for n in papers], "x", color="#117733",
              label=f"the paper's solver, {PAPER_MODELS} models", ms=7)  # fmt: skip
    for i, name in enumerate(names):
        if rows[name]["after"]["w_error"] is None:
            status = next(iter(rows[name]["after"]["status"]))
            axes.text(rows[name]["mean"] - 0.3, i, f"refused: {status}", va="center", ha="right",
                      fontsize=8)  # fmt: skip
    axes.set_yticks(list(y), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"W-error (log10 of the mean squared error), {main} models")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)


def _short(found: Mapping[str, Any]) -> str:
    if found["w_error"] is None:
        return next(iter(found["status"]))
    whole = found["with_base"] == found["matrices"]
    part = "" if whole else f" ({found['with_base']} of {found['matrices']})"
    return f"{found['w_error']:.2f}{part}"


def _paper(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None or found["w_error"] is None else f"{found['w_error']:.2f}"
