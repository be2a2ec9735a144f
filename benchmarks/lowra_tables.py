"""The paper's tables from the results, and docs/results.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import Check, checks_table
from jdetune.bench import summary
from jdetune.bench.methods import TITLES
from jdetune.bench.subsets import CONTRADICTIONS, MODELS, SUBSETS
from jdetune.bench.summary import markdown, number, plus_minus

Results = Mapping[str, Any]
#: Subsets of the paper's Tables 2 to 4, by what they stand beside.
_TABLES = {
    "table2": ("Table 2: image encoders and encoders", ("dinov2", "minilm")),
    "table3": ("Table 3: Stable Diffusion 1.5", ("sd15",)),
    "table4": ("Table 4: language models", ("smollm2", "mistral7b")),
}
#: What stands under every figure.
_SENTENCES = {
    "fig4": "Figure 4: how the W-errors of single layers are spread, by method.",
    "fig5": "Figure 5: the paper's algorithm in float32 as published, with and without its rank "
    "scheduler; mean and standard deviation over layers, and where jdetune ends without any step.",
    "fig6": "Figure 6: share of layers that end at or below a W-error.",
    "fig7": "Figure 7: number of models against W-error, with standard deviations over random "
    "subsets.",
    "fig8": "Figures 8 to 11: the same with the semantic metric of each subset. The sampled layers "
    "are replaced in the true base, all others are the base's own, for every method alike.",
    "fig12": "Figure 12: loss of the paper's solver against its W-error, all steps of all layers.",
    "fig13": "Figure 13: semantic metric against W-error, a point for every n and method.",
    "exposure": "Beyond the paper: the error that the certificate predicts without the base, and "
    "W-error over depth by type of layer.",
    "runtime": "Seconds a layer by method. Calls that compile are left out.",
}
PAPER = (
    "Figures of the paper's own data are not quoted: its weights and its tables could not be had "
    "offline. Its settings (n, steps, ranks, layers) are those of its published commands "
    "(github.com/eliahuhorwitz/Spectral-DeTuning). `jdetune bench lowra` runs its data as "
    "published."
)


def table1(results: Results) -> str:
    """Table 1: the published subsets, and those that stand beside them here."""
    published = [
        [s.name, "published", s.base, str(s.layers), str(MODELS), str(s.rank), str(s.n),
         str(s.steps)]
        for s in SUBSETS.values()
    ]  # fmt: skip
    own = [
        [
            name,
            "real" if subset["real"] else "stand-in",
            subset["title"],
            f"{subset['sampling']['layers']} of {subset['sampling']['layers_in_all']}",
            str(subset["sampling"]["models_in_all"]),
            _span(subset["ranks"]),
            ", ".join(map(str, subset["sampling"]["n"])),
            str(subset["settings"]["steps"]),
        ]
        for name, subset in results["subsets"].items()
    ]
    header = ["subset", "", "model", "layers", "LoRAs", "rank", "n", "steps of the paper's solver"]
    return markdown(header, [*published, *own])


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def methods_table(results: Results, starts: Sequence[str]) -> str | None:
    """Methods by metric, of the subsets whose names start so; None if there are none."""
    rows = []
    for name, subset in results["subsets"].items():
        if not name.startswith(tuple(starts)):
            continue
        sampled = {(r["n"], r["method"]): r for r in subset.get("sampled") or []}
        for row in subset["rows"]:
            said = sampled.get((row["n"], row["method"]), {})
            semantic = [
                f"{key.replace('_', ' ')} {value:.3g}"
                for key, value in said.items()
                if key not in ("n", "method", "log10", "prompts")
            ]
            rows.append(
                [
                    subset["title"],
                    str(row["n"]),
                    TITLES[row["method"]],
                    plus_minus(row["w_error"], row["w_error_std"]),
                    number(row["w_error_wide"]),
                    number(row["exact_fraction"], 3),
                    ", ".join(semantic) or "-",
                    f"{row['failed']} of {row['cells']}" if row["failed"] else "0",
                    number(row["seconds"], 3),
                ]
            )
    header = ["subset", "n", "method", "W-error", "before rounding", "exact", "semantic", "no base",
              "s a layer"]  # fmt: skip
    return markdown(header, rows) if rows else None


def equivalence_text(found: Mapping[str, Any]) -> str:
    """That the baseline's space changes nothing but rounding."""
    rows = [
        [one["run"], number(one["w_error"]), "-" if one["loss"] is None else f"{one['loss']:.3g}"]
        for one in found["runs"]
    ]
    n_models, row, col = found["shape"]
    return "\n".join(
        [
            f"One real layer, {row} x {col}, n = {n_models}, rank {found['rank']}, "
            f"{found['steps']} steps, a core of {' x '.join(map(str, found['core_width']))}. With "
            "the same sketches the base of core space differs from that of full space by "
            f"{found['base_difference']:.1e} of the update, and the ranks of all steps are "
            f"{'the same' if found['same_ranks'] else 'NOT the same'}. So the baseline of all "
            "tables is the published algorithm without float32's rounding: no worse than as "
            "published, and faster.",
            "",
            markdown(["run", "W-error", "last loss"], rows),
        ]
    )


def scheduler_table(results: Results) -> str | None:
    """The rank scheduler's three effects and the loss's correlation, by subset."""
    rows = []
    for subset in results["subsets"].values():
        if not subset.get("traces"):
            continue
        effects, found = subset["traces"]["effects"], subset["traces"]["correlation"]
        rows.append(
            [
                subset["title"],
                str(effects["layers"]),
                f"{effects['median_step_on']:.0f} / {effects['median_step_off']:.0f}",
                f"{effects['std_on']:.2f} / {effects['std_off']:.2f}",
                f"{effects['mean_on']:.2f} / {effects['mean_off']:.2f}",
                number(subset["traces"]["ours"]),
                number(found["curve"], 4),
                number(found["pooled"], 4),
                number(found["least_layer"], 4),
            ]
        )
    header = ["subset", "layers", "median step to the target, on / off", "spread, on / off"]
    header += [
        "W-error, on / off",
        "jdetune",
        "r of loss and W-error",
        "pooled",
        "least of a layer",
    ]
    return markdown(header, rows) if rows else None


def exposure_table(results: Results) -> str:
    """What goes with the W-error of single layers, by subset."""
    rows, names = [], []
    for subset in results["subsets"].values():
        found = subset.get("exposure")
        if found:
            names = list(found["correlation"])
            gap = found["predicted_less_true"]
            rows.append(
                [
                    subset["title"],
                    *(number(found["correlation"][name]) for name in names),
                    number(gap["median"], 2),
                    f"{100 * gap['within_0.3']:.0f} %",
                ]
            )
    header = ["subset", *names, "predicted less true, median", "within 0.3"]
    return markdown(header, rows)


def whole_table(whole: Mapping[str, Any]) -> str:
    """The whole model recovered from three models: W-error and answers."""
    rows = [
        [
            TITLES[method].replace("LoRA FT", "one of the models"),
            number(row["w_error"]),
            f"{row['without_base']} of {row['layers']}",
            f"{row['equal']} of {row['answers']}",
            number(row["log_cosine"]),
            number(row["perplexity"], 4),
            number(row["seconds"], 1),
        ]
        for method, row in whole["methods"].items()
    ]
    rows.append(["base", "-", "-", "-", "-", number(whole["base_perplexity"], 4), "-"])
    header = ["method", "W-error", "layers without a base", "answers equal to the base's"]
    header += ["SBERT log10(1 - cosine)", "perplexity", "s in all"]
    return markdown(header, rows)


def figure2(whole: Mapping[str, Any], count: int = 4) -> str:
    """Figure 2: what base, fine-tuned, mean and recovered models answer; differing ones first."""
    texts = sorted(whole["texts"], key=lambda row: row["base"] == row["lora-ft"])[:count]
    names = {"base": "base", "lora-ft": "fine-tuned", "mean-lora": "mean of 3",
             "paper": "Spectral DeTuning", "jdetune": "jdetune"}  # fmt: skip
    rows = [[_flat(text["prompt"]), *(_flat(text[name]) for name in names)] for text in texts]
    return markdown(["prompt", *names.values()], rows)


def _flat(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def breakdown(subset: Mapping[str, Any], field: str) -> str:
    """Ours and the paper's by type or depth, at n = 5 or the largest n."""
    counts = sorted({cell["n"] for cell in subset["cells"]})
    n = 5 if 5 in counts else counts[-1]
    own = [c for c in subset["cells"] if c["n"] == n and c["method"] in ("paper", "jdetune")]
    return summary.breakdown_table(own, field, field)


def _made(results: Mapping[str, Any]) -> str:
    """How many of the cells this run made."""
    made, every = results["cells_made"], results["cells_in_all"]
    if made == every:
        return f"all {every} cells were made in this run"
    return f"{made} of {every} cells were made in this run, the others in earlier ones"


def document(results: Results, checks: Sequence[Check], made: Mapping[str, Sequence[str]]) -> str:
    """The page: every table and figure, each with what is real in it."""
    machine = results["machine"]
    lines = [
        "# LoWRA Bench: results",
        "",
        f"Made by `{results['command']}` on {machine['processor']}, {machine['cores']} cores, load "
        f"{machine['load']:.1f} before, {machine['date']}, jdetune {machine['jdetune']}; it took "
        f"{results['seconds'] / 60:.1f} minutes ({_made(results)}).",
        "",
        "W-error is the mean over layers of log10 MSE (Eq. 8) of the base as it is stored, ± the "
        "standard deviation over random subsets; lower is better, -40 is exact. jdetune is given "
        "neither ranks nor steps; the paper's solver is given the true rank.",
        "",
        PAPER,
        "",
        *(f"- {line}" for line in CONTRADICTIONS),
        "",
        "## What was sampled, what is real",
        "",
    ]
    for subset in results["subsets"].values():
        sampling = subset["sampling"]
        like = subset.get("like")
        of = f" Made like {like['subset']}." if like else ""
        lines.append(
            f"- **{subset['title']}**: {subset['about']}{of} {sampling['layers']} of "
            f"{sampling['layers_in_all']} layers, n in {{{', '.join(map(str, sampling['n']))}}}, "
            f"{sampling['repeats']} random subsets (one where n is all {sampling['models_in_all']} "
            "models)."
        )
    lines += [f"- **{name}**: not run. {why}" for name, why in results["missing"].items()]
    lines += ["", "## Checks", "", checks_table(checks), "", "## Table 1: subsets", "",
              table1(results), ""]  # fmt: skip
    for title, starts in _TABLES.values():
        table = methods_table(results, starts)
        if table:
            lines += [f"## {title}", "", _realness(results, starts), "", table, ""]
    if results.get("equivalence"):
        lines += ["## The baseline in core space is the published algorithm", "",
                  equivalence_text(results["equivalence"]), ""]  # fmt: skip
    for subset in results["subsets"].values():
        if subset.get("whole"):
            whole = subset["whole"]
            lines += [
                f"## Figure 2: {subset['title']}, recovered whole from {whole['n']} models",
                "",
                f"Real model, all {whole['methods']['jdetune']['layers']} fine-tuned layers, "
                f"greedy answers of at most {whole['new_tokens']} tokens to "
                f"{whole['methods']['jdetune']['answers']} prompts that were not trained on. The "
                "paper shows Mistral-7B's texts; these are SmolLM2's.",
                "",
                whole_table(whole),
                "",
                figure2(whole),
                "",
            ]
    scheduler = scheduler_table(results)
    if scheduler:
        said = (
            "Real models; PyTorch, float32, whole matrices, as published. The target is the median "
            "layer's last W-error without the scheduler."
        )
        lines += ["## Rank scheduler, and loss against W-error", "", said, "", scheduler, ""]
    said = (
        "Correlations of figures with jdetune's W-error over all cells (layer, n, random subset). "
        "The certificate needs no base."
    )
    lines += ["## What exposes a layer", "", said, "", exposure_table(results), ""]
    for subset in results["subsets"].values():
        if subset["real"]:
            lines += [f"### {subset['title']}: by type and depth", "", breakdown(subset, "kind"),
                      "", breakdown(subset, "depth"), ""]  # fmt: skip
    lines += ["## Figures", ""]
    for key, files in made.items():
        lines += [_SENTENCES[key] + " " + _realness(results, ("",)), ""]
        lines += [f"![{file}](results/{file})" for file in files] + [""]
    return "\n".join(lines) + "\n"


def _realness(results: Results, starts: Sequence[str]) -> str:
    own = [s for n, s in results["subsets"].items() if n.startswith(tuple(starts))]
    real = ", ".join(s["title"] for s in own if s["real"])
    made = ", ".join(s["title"] for s in own if not s["real"])
    parts = ([f"Real: {real}."] if real else []) + ([f"Stand-ins: {made}."] if made else [])
    return " ".join(parts)
