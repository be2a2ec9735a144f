"""What LoRA adapters of a small diffusion model leak, and what protects: tables, JSON, figures.

    python -m benchmarks.leak --quick
    python -m benchmarks.leak --seeds=5
    python -m benchmarks.leak --again          # tables and figures of a former run
    python -m benchmarks.leak --again --docs   # the same, and into docs/leak.md and docs/leak
    python -m benchmarks.leak --quick --bank=bank --parts=attack

Every part of every seed is kept in ``--out`` as soon as it is known, and the same command goes on
with the others.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import tables
from benchmarks.leak import attacks, chain, defences, glyphs, report
from benchmarks.leak import byproducts as others
from benchmarks.leak.setting import Made, Scale, Setting, make, make_bank, tune
from benchmarks.leak.store import save_for_audit
from jdetune.leak import learning
from jdetune.leak.encoder import Reader
from jdetune.leak.learning import Lessons
from jdetune.leak.tuning import Private, Training, begin

PARTS = ("attack", "encoder", "ablation", "chain", "defences", "dp", "byproducts")
#: Without the encoder, whose training takes minutes.
QUICK_PARTS = ("attack", "chain", "defences", "dp", "byproducts")
_QUICK = flags.DEFINE_boolean("quick", False, "Smaller: one seed, fewer fine-tunes and rounds.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; 3, or 1 with --quick.", lower_bound=1)
_PARTS = flags.DEFINE_list("parts", None, "Which parts; all, or QUICK_PARTS with --quick.")
_OUT = flags.DEFINE_string("out", "leak-out", "Folder for leak.json and figures.")
_BANK = flags.DEFINE_string(
    "bank", None, "Also write the first seed's bank for jdetune leak audit."
)
_DOCS = flags.DEFINE_boolean("docs", False, "Put tables and figures into docs/leak.md.")
_AGAIN = flags.DEFINE_boolean("again", False, "Tables and figures of a former run.")

DOCS = Path(__file__).parent.parent.parent / "docs"
#: Steps after which fine-tunes are also looked at.
EARLY = (5, 10, 20)


def scale_of(quick: bool) -> tuple[Scale, Lessons, tuple[float, ...], int]:
    """Sizes: of the setting, of the encoder's training, DP's noises, fine-tunes for counting."""
    if quick:
        return Scale(), Lessons(rounds=40, side_by_side=16), (0.0, 0.3, 5.0), 192
    full = Scale(bank=4096, training=Training(steps=8000))
    return full, Lessons(rounds=400, side_by_side=64), defences.NOISES, 768


class Run:
    """One seed; what several parts need is made once, when it is first asked for."""

    def __init__(self, quick: bool, seed: int, say: Any, out: Path) -> None:
        """Nothing is computed yet."""
        self.out, self.cache = out, out / "models"
        self.scale, self.lessons, self.noises, self.counted = scale_of(quick)
        self.dp_bank = 256 if quick else self.scale.bank
        self.seed, self.say = seed, say
        self._made: dict[str, Any] = {}

    def _once(self, name: str, how: Any) -> Any:
        if name not in self._made:
            self._made[name] = how()
            self.say(f"seed {self.seed}: {name}")
        return self._made[name]

    @property
    def setting(self) -> Setting:
        """Base, judge and victims' data."""
        return self._once("setting", lambda: make(self.scale, self.seed, self.cache))

    def kept(self) -> tuple[Made, Any]:
        """Bank and victims after every number of steps in `EARLY` and the last."""
        steps = (*EARLY, self.scale.recipe.steps)

        def both() -> tuple[Made, Any]:
            made = make_bank(self.setting, self.scale.recipe, 0, steps)
            return made, tune(self.setting, self.scale.recipe, self.setting.victims, 1, steps)

        return self._once("fine-tunes", both)

    def last(self) -> tuple[Made, Any]:
        """Bank and victims as published."""
        made, lora = self.kept()
        made = dataclasses.replace(made, lora=jax.tree.map(lambda x: x[-1], made.lora))
        return made, jax.tree.map(lambda x: x[-1], lora)

    def part(self, name: str) -> Any:
        """Results of one part, as plain numbers."""
        s = self.setting
        match name:
            case "attack":
                found = attacks.pictures(s, *self.last())
                report.keep_pictures(self.out, self.seed, s, found)
                return {name: attacks.scored(s, pictures) for name, pictures in found.items()}
            case "encoder":
                return self.encoder("product")
            case "ablation":
                return self.encoder("factors")
            case "chain":
                return {dtype: chain.run(s, *self.last(), dtype) for dtype in chain.DTYPES}
            case "defences":
                rows = defences.after_release(s, *self.last(), self.say)
                made, lora = self.kept()
                return rows + defences.early(s, made, lora, EARLY)
            case "dp":
                return defences.private(s, self.noises, self.dp_bank, self.say)
            case "byproducts":
                return {
                    "counts": others.counts(s, self.counted),
                    "classes": others.classes(s, *self.last()),
                }
        raise app.UsageError(f"no part {name!r}; there are {', '.join(PARTS)}")

    def encoder(self, reads: Any) -> dict[str, Any]:
        """The paper's encoder, trained and used on the victims."""
        s, recipe = self.setting, self.scale.recipe
        reader = Reader(channels=recipe.rank, reads=reads)  # the paper's
        made, lora = self.last()
        private: Private = made.private
        weights, losses = learning.learn(
            self.lessons, reader, recipe, self.scale.size, s.params, s.public, private, s.key(30),
            lambda _, done, total: self.say(f"encoder of {reads}: round {done} of {total}"),
        )  # fmt: skip
        keys = jax.random.split(s.key(1), len(s.held))  # the victims' own, as in `fine_tune`
        start = jax.vmap(lambda k: begin(recipe, self.scale.size, jax.random.fold_in(k, 0))[0])(
            keys
        )
        given = start if reads == "factors" else None
        use = partial(attacks.encoded, s, reader, weights)
        other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), (lora, given))
        other = (other[0], recipe.steps, other[1])
        found = {
            "score": use(lora, recipe.steps, given),
            "swapped": use(*other, through=lora),
            "base": use(lora, recipe.steps, given, jax.tree.map(jnp.zeros_like, lora)),
        }
        self.say(f"encoder of {reads}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        return {
            **{name: attacks.scored(s, pictures) for name, pictures in found.items()},
            "losses": np.round(losses, 5).tolist(),
            "own_noise": attacks.own_noise(s, reader, weights, lora, recipe.steps, given),
        }


def main(argv: list[str]) -> int:
    """Runs what is missing; 1 if a check fails."""
    if len(argv) > 1:
        raise app.UsageError("no arguments are expected")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    out, quick = Path(_OUT.value), _QUICK.value
    out.mkdir(parents=True, exist_ok=True)
    path = out / "leak.json"
    scale, lessons, _, _ = scale_of(quick)
    settings = {
        "quick": quick, "data": f"{len(glyphs.glyphs())} glyphs of {glyphs.versions()}",
        **dataclasses.asdict(scale), "lessons": dataclasses.asdict(lessons),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    result: dict[str, Any] = {"settings": settings, "seeds": {}, "seconds": 0}
    if path.exists():
        former = json.loads(path.read_text())
        if _AGAIN.value or former["settings"] == settings:
            result = former
    if not _AGAIN.value:
        begin_, before = time.perf_counter(), result["seconds"]

        def say(text: str) -> None:
            print(f"{time.perf_counter() - begin_:6.0f} s  {text}", file=sys.stderr, flush=True)

        for seed in range(_SEEDS.value or (1 if quick else 3)):
            run, done = (
                Run(quick, seed, say, out),
                result["seeds"].setdefault(str(seed), {}),
            )
            for part in _PARTS.value or (QUICK_PARTS if quick else PARTS):
                if part not in done:
                    done[part] = run.part(part)
                    result["seconds"] = round(before + time.perf_counter() - begin_)
                    result["machine"] = (
                        f"{jax.default_backend()}, {os.cpu_count()} cores, "
                        f"load {os.getloadavg()[0]:.1f}"
                    )
                    path.write_text(json.dumps(result, allow_nan=False) + "\n")
            if seed == 0 and _BANK.value:
                save_for_audit(Path(_BANK.value), run.setting, *run.last(), done)
    return show(result, out)


def show(result: dict[str, Any], out: Path) -> int:
    """Prints tables and checks, and draws figures."""
    count, machine = len(result["seeds"]), result.get("machine")
    said = f"{count} seeds, {result['seconds']} s on {machine}. Settings: "
    parts = [f"{said}`{json.dumps(result['settings'])}`"]
    parts += [
        f"### {title}\n\n{tables.table(header, rows)}"
        for title, (header, rows) in report.tables(result).items()
    ]
    text = "\n\n".join(parts)
    print(text)
    report.draw(result, out)
    if _DOCS.value:
        page = DOCS / "leak.md"
        page.write_text(tables.put_between(page.read_text(), "measured", text))
        for figure in out.glob("*.png"):
            shutil.copy(figure, DOCS / "leak")
    found = report.checks(result)
    print(f"\n{tables.checks_table(found)}")
    return tables.exit_code(found)


if __name__ == "__main__":
    app.run(main)
