"""Watch a fine-tune from its weights: directions it added, a monitor, steering, an audit.

After "Watch the Weights" (Zhong and Raghunathan, arXiv 2508.00161). Works on the models of
`jdetune.models`, and through arrays of activations on those of any framework.
"""

from jdetune.watch.audit import Finding, Leaders, findings, lead, no_leaders, precision_at
from jdetune.watch.baselines import (
    Mahalanobis,
    auroc,
    distances,
    fit_mahalanobis,
    pca_directions,
    random_directions,
)
from jdetune.watch.carried import carried
from jdetune.watch.directions import Directions, difference, directions
from jdetune.watch.monitor import (
    Extremes,
    Monitor,
    excess,
    extremes,
    flag,
    new_monitor,
    observe,
    pooled,
)
from jdetune.watch.names import writer
from jdetune.watch.rates import Calibration, Rate, bound, calibrate, clopper_pearson, fit, measured
from jdetune.watch.recording import Firing, firings, model_extremes, natural_place, record
from jdetune.watch.steering import Steer, project_out, steer, steered
from jdetune.watch.store import load_monitor, save_monitor

__all__ = [
    "Calibration",
    "Directions",
    "Extremes",
    "Finding",
    "Firing",
    "Leaders",
    "Mahalanobis",
    "Monitor",
    "Rate",
    "Steer",
    "auroc",
    "bound",
    "calibrate",
    "carried",
    "clopper_pearson",
    "difference",
    "directions",
    "distances",
    "excess",
    "extremes",
    "findings",
    "firings",
    "fit",
    "fit_mahalanobis",
    "flag",
    "lead",
    "load_monitor",
    "measured",
    "model_extremes",
    "natural_place",
    "new_monitor",
    "no_leaders",
    "observe",
    "pca_directions",
    "pooled",
    "precision_at",
    "project_out",
    "random_directions",
    "record",
    "save_monitor",
    "steer",
    "steered",
    "writer",
]
