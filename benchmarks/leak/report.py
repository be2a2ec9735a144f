"""Tables, checks and figures from the rows of all seeds; victims of all seeds are pooled."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.leak import attacks
from benchmarks.leak.setting import Setting
from benchmarks.tables import Check, at_least, at_most
from jdetune.leak.scoring import interval

Table = tuple[list[str], list[list[str]]]
_HEAD = ["identity", "first five", "within class", "cosine", "error"]
#: What may open a release: attacks, not baselines and not the honest prompt.
ATTACKS = (attacks.RIDGE, attacks.NEAREST, attacks.SILENT, attacks.RANDOM, attacks.USUAL)


#: Victims in the figure of reconstructions.
_SHOWN = 12


def pooled(scores: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Figures of the victims of all seeds."""
    every = list(scores)
    return {name: [x for one in every for x in one[name]] for name in every[0]}


def cell(values: list[float], percent: bool = True) -> str:
    """A mean with its bootstrap interval."""
    found = interval(np.asarray(values, np.float64))
    if percent:
        return f"{found.mean:.1%} ({found.low:.0%} to {found.high:.0%})"
    return f"{found.mean:.3f} ({found.low:.2f} to {found.high:.2f})"


def _cells(score: dict[str, list[float]]) -> list[str]:
    shares = [cell(score[name]) for name in ("top1", "top5", "in_class")]
    return [*shares, *(cell(score[name], False) for name in ("cosine", "error"))]


def _parts(result: dict[str, Any], part: str) -> list[Any]:
    return [seed[part] for seed in result["seeds"].values() if part in seed]


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """All tables by title."""
    found: dict[str, Table] = {}
    attack = _parts(result, "attack")
    if attack:
        rows = []
        one = pooled(seed[attacks.MEAN] for seed in attack)
        chance, victims = 1 / result["settings"]["held_out"], len(one["top1"])
        within = f"{np.mean(one['class_chance']):.1%}"
        rows.append(["chance", f"{chance:.1%}", f"{5 * chance:.1%}", within, "-", "-"])
        for name in attack[0]:
            rows.append([name, *_cells(pooled(seed[name] for seed in attack))])
        for part, of in (("encoder", "B A"), ("ablation", "factors less their start")):
            every = _parts(result, part)
            if every:
                rows.append([f"encoder of {of}", *_cells(pooled(e["score"] for e in every))])
                swapped = pooled(e["swapped"] for e in every)
                rows.append([f"encoder of {of}, context of another victim", *_cells(swapped)])
                alone = pooled(e["base"] for e in every)
                rows.append([f"encoder of {of}, drawn by the base", *_cells(alone)])
        found[f"Attacks on {victims} unseen victims"] = (["attack", *_HEAD], rows)
    noise = [(p, _parts(result, p)) for p in ("encoder", "ablation") if _parts(result, p)]
    if noise:
        own = [_relative(pooled(e["own_noise"] for e in every)) for _, every in noise]
        rows = [[name, *(cell(one[name], False) for one in own)] for name in own[0]]
        head = ["context", *({"encoder": "of B A", "ablation": "of factors"}[p] for p, _ in noise)]
        found["Loss on victims' own pictures, over that under the mean of the trigger words"] = (
            head,
            rows,
        )
    chains = _parts(result, "chain")
    if chains:
        rows = [_chain_row("true adapters", attack, None)] if attack else []
        rows += [_chain_row(f"recovered from {d} merges", chains, d) for d in chains[0]]
        head = [
            "adapters",
            attacks.RIDGE,
            attacks.SILENT,
            attacks.RANDOM,
            attacks.HONEST,
            "W-error of the base",
        ]
        found["Merged models only"] = (
            [*head, "error of B A", "layers not recovered"],
            rows,
        )
    for part, title in (("defences", "Defences on release"), ("dp", "DP-SGD")):
        every = _parts(result, part)
        if every:
            head = ["defence", "epsilon, one picture", "epsilon, all of a victim's"]
            names = [attacks.RIDGE, attacks.NEAREST, attacks.SILENT, attacks.RANDOM, attacks.HONEST]
            rows = [_defence_row([seed[i] for seed in every], names) for i in range(len(every[0]))]
            found[title] = ([*head, *names], rows)
    extra = _parts(result, "byproducts")
    if extra:
        counts, classes = pooled(e["counts"] for e in extra), pooled(e["classes"] for e in extra)
        rows = [
            ["number of pictures (1 to 6), mean absolute error", cell(counts["error"], False),
             f"{np.mean(counts['median_error']):.3f} (median)"],
            ["number of pictures, right", cell(counts["right"]), f"{1 / 6:.1%} (chance)"],
            ["class of the pictures, right", cell(classes["right"]),
             f"{np.mean(classes['commonest']):.1%} (commonest class)"],
        ]  # fmt: skip
        found["By-products"] = (["what", "estimated from B A", "without the adapter"], rows)
    return found


def _relative(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Losses over their mean under the mean of the trigger words."""
    unit = float(np.mean(losses[attacks.USUAL]))
    return {name: [x / unit for x in one] for name, one in losses.items()}


def _chain_row(name: str, seeds: list[Any], dtype: str | None) -> list[str]:
    scores = [seed if dtype is None else seed[dtype]["scores"] for seed in seeds]
    names = (attacks.RIDGE, attacks.SILENT, attacks.RANDOM, attacks.HONEST)
    cells = [cell(pooled(one[n] for one in scores)["top1"]) for n in names]
    if dtype is None:
        return [name, *cells, "-", "-", "-"]
    own = [seed[dtype] for seed in seeds]
    lost = f"{sum(o['not_recovered'] for o in own)} of {sum(o['layers'] for o in own)}"
    error = f"{np.mean([o['update_error'] for o in own]):.1e}"
    return [name, *cells, f"{np.mean([o['w_error'] for o in own]):.2f}", error, lost]


def _defence_row(seeds: list[Any], names: list[str]) -> list[str]:
    first, said = seeds[0], []
    for of in ("epsilon", "group"):
        said.append("no guarantee" if first[of] is None else f"{first[of]:.3g}")
    cells = [cell(pooled(one["scores"][name] for one in seeds)["top1"]) for name in names]
    return [first["defence"], *said, *cells]


def _mean(scores: Iterable[dict[str, list[float]]]) -> float:
    return float(np.mean(pooled(scores)["top1"]))


def checks(result: dict[str, Any]) -> list[Check]:
    """Measured figures beside the targets."""
    found, attack = [], _parts(result, "attack")
    if attack:
        best = max(_mean(seed[name] for seed in attack) for name in ATTACKS)
        found.append(at_least("identity accuracy without defence, best attack", best, 0.5))
    for dtype in ("float32", "bfloat16"):
        chains = _parts(result, "chain")
        if attack and chains:
            for name in (attacks.RIDGE, attacks.RANDOM):
                lost = _mean(seed[name] for seed in attack) - _mean(
                    seed[dtype]["scores"][name] for seed in chains
                )
                what = f"identity accuracy lost by recovery from {dtype} merges, {name}"
                found.append(at_most(what, abs(lost), 0.02))
    rows = [{row["defence"]: row for row in seed} for seed in _parts(result, "defences")]
    if rows:
        apart = max(
            abs(a - b)
            for row in rows
            for a, b in zip(
                row["none"]["scores"][attacks.RIDGE]["cosine"],
                row["refactored"]["scores"][attacks.RIDGE]["cosine"],
                strict=True,
            )
        )
        found.append(at_most("change of a reconstruction's cosine by refactoring", apart, 1e-3))
    return found


def keep_pictures(out: Path, seed: int, setting: Setting, found: dict[str, Any]) -> None:
    """Keeps what was drawn of the first victims, for the figure."""
    shown = {"private pictures (mean)": setting.targets[:_SHOWN]}
    shown |= {
        "view that no fine-tune saw": setting.unseen()[:_SHOWN, 0],
        **{name: np.asarray(one)[:_SHOWN] for name, one in found.items()},
    }
    shown = {name: one if one.ndim == 3 else one[:, 0] for name, one in shown.items()}
    np.savez(out / f"pictures-{seed}.npz", **shown)


def draw(result: dict[str, Any], out: Path) -> None:
    """Both figures."""
    import matplotlib

    matplotlib.use("Agg")
    _draw_pictures(out)
    if _parts(result, "defences"):
        _draw_defences(result, out)


def _draw_pictures(out: Path) -> None:
    """Reconstructions of the first victims, a row for every attack."""
    if not (out / "pictures-0.npz").exists():
        return
    import matplotlib.pyplot as plt

    with np.load(out / "pictures-0.npz") as shown:
        rows = {name: shown[name] for name in shown.files}
    figure, axes = plt.subplots(len(rows), _SHOWN, figsize=(9.5, 0.62 * len(rows)))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            place.set_axis_off()
        line[0].text(-0.3, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    figure.subplots_adjust(left=0.27, right=0.995, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(out / "pictures.png", dpi=110)
    plt.close(figure)


def _draw_defences(result: dict[str, Any], out: Path) -> None:
    """Figure of the defences: identity accuracy against utility."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), constrained_layout=True)
    groups = {"noise": "o-", "DP-SGD": "s-", "stopped": "^-", "rank": "D", "int8": "P", "nf4": "X"}
    groups |= {"refactored": "*", "none": "*"}
    rows = [
        [seed[i] for seed in every]
        for every in (_parts(result, "defences"), _parts(result, "dp"))
        if every
        for i in range(len(every[0]))
    ]
    for start, style in groups.items():
        own = [row for row in rows if row[0]["defence"].startswith(start)]
        if not own:
            continue
        x = [_mean(seed["scores"][attacks.HONEST] for seed in row) for row in own]
        y = [max(_mean(seed["scores"][n] for seed in row) for n in ATTACKS) for row in own]
        axes.plot(x, y, style, label=start, markersize=8, alpha=0.8)
        for row, px, py in zip(own, x, y, strict=True):
            name, epsilon = row[0]["defence"], row[0]["epsilon"]
            text = name if epsilon is None else f"{name}, eps {epsilon:.3g}"
            axes.annotate(text, (px, py), textcoords="offset points", xytext=(6, 4), fontsize=7)
    chance = 1 / result["settings"]["held_out"]
    axes.axhline(chance, color="0.5", linestyle=":", label="chance")
    axes.set(xlabel="utility: identity of what the honest prompt draws", ylim=(-0.02, 1.02))
    axes.set(ylabel="identity found by the best attack")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(out / "defences.png", dpi=110)
    plt.close(figure)
