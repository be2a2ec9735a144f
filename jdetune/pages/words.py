"""The verdict in words: what is back, how exact it is, and what to do about the rest."""

from collections.abc import Collection, Iterator

from jdetune.pages.charts import noise_level, total_steps
from jdetune.pages.markup import Html, breakable, escape, join, tag
from jdetune.pages.numbers import largest, mean, percent, power, several, span
from jdetune.pages.view import Tensor, View

SHARED = (
    "Whatever all models have in common, such as an earlier fine-tune that was merged before, is "
    "part of the recovered base. Nothing in the weights can tell it apart."
)
#: Numbers below this share of the weights count as a base that is exact but for a few.
_NEARLY_ALL = 0.999
_MATRICES = ("matrix", "matrices")


def tone(view: View) -> str:
    """``good``, ``part`` or ``bad``: how the run went."""
    return {0: "good", 5: "part"}.get(view.said("summary", "exit_code"), "bad")


def headline(view: View) -> str:
    """The verdict in a few words."""
    exact = view.said("summary", "exact_fraction_est")
    solved, wanted = len(view.solved), len(view.differing)
    if tone(view) == "good":
        if not wanted:
            return "The models differ in no matrix: the base is what they share"
        if isinstance(exact, int | float) and exact >= _NEARLY_ALL:
            return (
                "The base is back, bit for bit"
                if exact >= 1 - 1e-9
                else ("The base is back, bit for bit but for a few weights")
            )
        return "The base is back"
    if tone(view) == "part":
        most = view.count("recovered") > wanted / 2
        return "Most of the base is back" if most else "A part of the base is back"
    if solved:
        return "A base was written, but do not trust it"
    return "The base could not be recovered"


def paragraphs(view: View) -> Iterator[Html]:
    """What was recovered and how exact it is."""
    models, wanted = len(view.solved_models), len(view.differing)
    good, same = view.count("recovered"), view.count("identical")
    if wanted:
        text = (
            f"{good:,} of {several(wanted, *_MATRICES)} in which the {several(models, 'model')} "
            f"differ {'was' if good == 1 else 'were'} recovered"
        )
        ranks = [rank for t in view.solved for rank in t.ranks]
        text += f", with updates of rank {span(ranks)}." if ranks else "."
    else:
        text = f"No matrix that could be recovered differs between the {several(models, 'model')}."
    text += f" {several(same, 'other tensor')} {_are(same)} equal in all of them." if same else ""
    yield escape(text)
    exact, error = mean([t.exact for t in view.solved]), mean([t.error for t in view.solved])
    noise = noise_level(view)
    if exact is not None:
        said = (
            f"An estimated <strong>{percent(exact)}</strong> of the recovered weights equal the "
            f"base's to the last bit"
        )
        if error is not None and error > -39:
            said += f"; the predicted mean squared error is <strong>{power(error)}</strong>"
            said += (
                "" if noise is None else f", where rounding alone gives one model {power(noise)}"
            )
        yield Html(f"{said}. No true base was used: both are estimates from the models alone.")
    steps = total_steps(view.solved)
    total = sum(steps.values()) - steps.get("not finite", 0)
    if total > 0:
        equal, near = steps.get("0", 0), sum(steps.get(step, 0) for step in ("-1", "0", "1"))
        yield escape(
            "Merging the adapters into the base again gives back "
            f"{percent(equal / total)} of the models' weights in these matrices bit for "
            f"bit, and {percent(near / total)} to within one ulp."
        )


def cautions(view: View) -> Html:
    """Warnings of the report, if there are any."""
    if not view.warnings:
        return Html("")
    names = _names(view)
    items = join(tag("li", escape(_sentence(text, names))) for text in view.warnings)
    return tag("aside", f"<h2>Warnings</h2>{tag('ul', items)}", class_="warn")


def to_do(view: View) -> Html:
    """Every distinct reason of what is not recovered, with how many tensors it holds for."""
    reasons: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in view.tensors:
        if tensor.fate in ("doubtful", "failed", "skipped", "per_model", "consensus"):
            reasons.setdefault((tensor.fate, tensor.reason or "no reason given"), []).append(tensor)
    if not reasons:
        return Html("")
    order = ("failed", "doubtful", "skipped", "per_model", "consensus")
    items = []
    for (fate, reason), members in sorted(reasons.items(), key=lambda r: order.index(r[0][0])):
        names = ", ".join(f"<code>{breakable(t.name)}</code>" for t in members[:3])
        more = f" and {len(members) - 3:,} more" if len(members) > 3 else ""
        head = f"<strong>{_FATE_WORDS[fate]}: {several(len(members), 'tensor')}</strong>"
        items.append(
            tag(
                "li",
                f"{head} {names}{more}.<br>{escape(_sentence(reason, _names(view)))}",
                class_=fate,
            )
        )
    return tag(
        "section",
        f"<h2>What is not recovered, and what to do</h2>{tag('ul', join(items), class_='todo')}",
    )


def worst(view: View) -> Tensor | None:
    """The matrix with the largest predicted error."""
    top = largest([t.error for t in view.solved])
    return next((t for t in view.solved if t.error == top and top is not None), None)


_FATE_WORDS = {
    "failed": "Failed",
    "doubtful": "Recovered, but doubtful",
    "skipped": "Skipped",
    "per_model": "Kept with each adapter",
    "consensus": "Majority's copy",
}


def _names(view: View) -> set[str]:
    return {model.name for model in view.models}


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _sentence(text: str, names: Collection[str]) -> str:
    """With a capital, unless it begins with a model's name, and a full stop."""
    said = text.strip()
    first = said.partition(" ")[0]
    if first.isalpha() and first.islower() and first not in names:
        said = said[:1].upper() + said[1:]
    return said if said.endswith((".", "!", "?")) else f"{said}."
