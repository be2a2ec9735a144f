"""What else adapters tell: how many pictures they were trained on, and of what class."""

from typing import Any

import numpy as np

from benchmarks.leak.setting import PLACES, Made, Setting, private_sets, tune
from jdetune.leak import byproducts
from jdetune.leak.denoiser import Adapter
from jdetune.leak.updates import products


def counts(setting: Setting, tunes: int) -> dict[str, Any]:
    """Errors of the estimated number of pictures, 1 to 6, for unseen identities."""
    rng = np.random.default_rng((setting.seed, 4))
    found = []
    for number, (source, total) in enumerate(((setting.known, tunes), (setting.held, None))):
        total = len(source) if total is None else total
        truth = 1 + np.arange(total) % PLACES
        identities = rng.permutation(len(source))[:total]
        private, _ = private_sets(setting.scale, source, identities, rng, truth)
        lora = tune(setting, setting.scale.recipe, private, 300 + number)
        rank = setting.scale.recipe.rank
        found.append((byproducts.spectra(np.asarray(products(lora)), rank), truth))
    (known, known_counts), (unseen, truth) = found
    guess = byproducts.vote(byproducts.Spectra(known, known_counts), unseen)
    median = float(np.median(known_counts))
    return {
        "error": np.abs(guess - truth).astype(float).tolist(),
        "median_error": np.abs(median - truth).astype(float).tolist(),
        "right": (guess == truth).astype(float).tolist(),
    }


def classes(setting: Setting, made: Made, lora: Adapter) -> dict[str, Any]:
    """Whether the class of the private pictures is read from the update."""
    own = setting.known.classes[made.identities]
    count = int(max(own.max(), setting.held.classes.max())) + 1
    fitted = byproducts.fit_classes(np.asarray(products(made.lora)), own, count)
    guess = byproducts.classify(fitted, np.asarray(products(lora)))
    commonest = int(np.bincount(own).argmax())
    return {
        "right": (guess == setting.held.classes).astype(float).tolist(),
        "commonest": (setting.held.classes == commonest).astype(float).tolist(),
    }
