"""Model cards of what a recovery or an extraction wrote: how it was made, how good it is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.checkpoint.adapters import NOTES_HEAD
from jdetune.checkpoint.peft_layout import task_type
from jdetune.pages import markdown as md
from jdetune.pages import words
from jdetune.pages.numbers import factor, fixed, mean, percent, several, span
from jdetune.pages.view import View

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_LIMITS = (
    "> [!WARNING]\n"
    "> These weights are computed from published fine-tunes, not published by the base's owner.\n"
    f"> {words.SHARED}\n"
)
_RESPONSIBLE = (
    "The licence of the original base and of the fine-tunes still holds. Use this for research, "
    "audit and repair of models that you have the right to examine; recovering a base that its "
    "owner withheld may break a licence or the law.\n"
)
_MATRICES = ("matrix", "matrices")


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """What a card says of one adapter.

    Attributes:
      name: its folder's name.
      ranks: of its matrices.
      match: share of the weights of these matrices that merging gives back bit for bit.
      ratio: worst rms of what is left over, in units of the rounding error.
      clearance: least singular value over the noise edge.
      missing: tensors in which the model differs from the base and that it cannot hold.
      notes: what to do beyond loading, as the adapter's writer says it.
    """

    name: str
    ranks: Sequence[int]
    match: float | None
    ratio: float | None
    clearance: float | None = None
    missing: Sequence[str] = ()
    notes: str = ""


def base_card(view: View, config: Mapping[str, Any] | None) -> str:
    """README.md of a recovered base.

    Args:
      view: the report.
      config: the base's config.json, None where there is none.
    """
    models = [model.name for model in view.solved_models]
    solved, lacking = view.solved, [t for t in view.tensors if t.fate in _LACKING]
    doubtful = [t.name for t in view.tensors if t.fate == "doubtful"]
    voted = [t.name for t in view.tensors if t.fate == "consensus"]
    head = md.front_matter(
        {
            "library_name": "transformers" if config is not None else None,
            "license": "unknown",
            "tags": ["jdetune", "recovered-base", "safetensors"],
        }
    )
    error = mean([t.error for t in solved])
    rows = [
        ("verdict", md.plain(words.headline(view))),
        ("matrices recovered", f"{view.count('recovered')} of {len(view.differing)} that differ"),
        ("other tensors, equal in all models", f"{view.count('identical'):,}"),
        ("weights exact to the last bit (estimate)", percent(mean([t.exact for t in solved]))),
        ("log10 of the mean squared error (estimate)", fixed(error)),
        (
            "largest of one matrix (estimate)",
            fixed(max((t.error or -40 for t in solved), default=None)),
        ),
        ("dtype of recovered matrices", md.plain(view.said("base", "dtype") or "-")),
    ]
    parts = [
        head,
        f"# Recovered base of {md.names(models, 4)}\n",
        f"The common base of {several(len(models), 'merged LoRA fine-tune')}, computed from them "
        "alone; its own name is not known.\n",
        _LIMITS,
        "## How good it is\n",
        md.table(("figure", "value"), rows),
        "Estimates come from the models alone: no true base was used. `report.html` beside this "
        "folder shows every tensor.\n",
    ]
    if lacking:
        parts += ["## What is missing\n", f"{several(len(lacking), 'tensor')} of the models "]
        parts[-1] += f"{'is' if len(lacking) == 1 else 'are'} not in it: {_each(lacking)}.\n"
    if doubtful:
        parts.append(f"Doubtful, better not used: {md.names(doubtful)}.\n")
    if voted:
        parts.append(f"Copied from the majority of the models, which differ: {md.names(voted)}.\n")
    if view.warnings:
        parts += ["## Warnings\n", "".join(f"- {md.plain(text)}\n" for text in view.warnings)]
    if config is not None:
        auto = auto_class(config)
        parts += ["## Load\n"]
        lines = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("OUT/base")'
        parts += [md.code_block(lines, "python")]
    parts += ["## How it was made\n", _made(view.raw, models), "## Responsible use\n", _RESPONSIBLE]
    return "\n".join(parts)


def adapter_card(
    facts: AdapterFacts,
    config: Mapping[str, Any],
    base: str,
    base_config: Mapping[str, Any] | None,
    report: Mapping[str, Any],
    models: Sequence[str],
) -> str:
    """README.md of one adapter.

    Args:
      facts: what is known of it.
      config: its adapter_config.json.
      base: the base as ``base_model`` names it.
      base_config: the base's config.json, None where there is none.
      report: where command and version are from.
      models: names of the models that it was found with.
    """
    recovered = not report.get("kind")
    where = "OUT/base" if recovered else base
    auto = auto_class(base_config or {})
    rank_text = span([rank for rank in facts.ranks if rank])
    saved = [str(name) for name in config.get("modules_to_save") or ()]
    rows = [
        ("matrices with an update", f"{sum(rank > 0 for rank in facts.ranks):,}"),
        ("ranks, found from the weights", rank_text),
        (
            "weights of these matrices given back bit for bit when merged again",
            percent(facts.match),
        ),
        ("rms left over, in units of the rounding error (worst matrix)", fixed(facts.ratio)),
    ]
    if facts.clearance is not None:
        rows.append(("smallest singular value, in noise edges", factor(facts.clearance)))
    load = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n"
        f"model = PeftModel.from_pretrained({auto}.from_pretrained({_python(where)}), "
        f"{_python('OUT/adapters/' + facts.name)})"
    )
    from_what = (
        "the base that was recovered with it" if recovered else "the base it was compared with"
    )
    parts = [
        md.front_matter(
            {
                "library_name": "peft",
                "base_model": base,
                "license": "unknown",
                "tags": ["lora", "jdetune", "base_model:adapter"],
            }
        ),
        f"# LoRA adapter of {md.code(facts.name)}\n",
        f"LoRA factors that jdetune took out of a merged model, for {from_what}.\n",
        md.code_block(load, "python"),
        *([f"{NOTES_HEAD}\n", f"{facts.notes}\n"] if facts.notes else []),
        "## How good it is\n",
        md.table(("figure", "value"), rows),
        "The rest is off by an ulp or so: a matrix product rounds differently in every order of "
        "its sums. The scale of LoRA cannot be known from merged weights, so `lora_alpha` equals "
        "the rank in every layer.\n",
    ]
    if saved:
        parts.append(f"Kept whole (`modules_to_save`): {md.names(saved)}.\n")
    if facts.missing:
        parts.append(f"Not in it, although the model differs there: {md.names(facts.missing)}.\n")
    if recovered:
        parts.append(f"> [!NOTE]\n> {words.SHARED}\n")
    parts += ["## How it was made\n", _made(report, models), "## Responsible use\n", _RESPONSIBLE]
    return "\n".join(parts)


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model."""
    return _AUTO.get(task_type(config) or "", "AutoModel")


_LACKING = {"per_model": "differ in most models", "failed": "failed", "skipped": "skipped"}


def _each(tensors: Sequence[Any]) -> str:
    groups = {why: [t.name for t in tensors if t.fate == fate] for fate, why in _LACKING.items()}
    return "; ".join(f"{why}: {md.names(found)}" for why, found in groups.items() if found)


def _made(report: Mapping[str, Any], models: Sequence[str]) -> str:
    version = md.plain(report.get("jdetune_version") or "")
    text = f"By jdetune {version} from {several(len(models), 'model')} ({md.names(models)}):\n\n"
    return text + md.code_block(str(report.get("command") or ""), "sh")


def _python(text: str) -> str:
    """A Python string."""
    return '"' + repr(text)[1:-1].replace('"', '\\"').replace("\\'", "'") + '"'
