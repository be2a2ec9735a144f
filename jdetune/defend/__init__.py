"""Defences against recovery, and the counter-attacks that say what they are worth.

A publisher of merged LoRA models can change the numbers of a release (`dense_noise`,
`lower_precision`, `rank_residual`, `common_direction`) or its coordinates (`change_coordinates`),
which costs nothing in what the model computes. `align`, `without_common` and `coarse` are what an
attacker does about it. docs/defend.md says what came of each.
"""

from jdetune.defend.align import Aligned, align, match
from jdetune.defend.blocks import Fit, fit_blocks
from jdetune.defend.common import Across, without_common
from jdetune.defend.coordinates import (
    KINDS,
    Change,
    change_coordinates,
    draw,
    inverse,
    moved,
    output_change,
)
from jdetune.defend.places import Axis, Place, places
from jdetune.defend.release import common_direction, dense_noise, lower_precision, rank_residual
from jdetune.defend.rounding import Coarse, coarse, residual_rms, rounding_rms

__all__ = [
    "KINDS",
    "Across",
    "Aligned",
    "Axis",
    "Change",
    "Coarse",
    "Fit",
    "Place",
    "align",
    "change_coordinates",
    "coarse",
    "common_direction",
    "dense_noise",
    "draw",
    "fit_blocks",
    "inverse",
    "lower_precision",
    "match",
    "moved",
    "output_change",
    "places",
    "rank_residual",
    "residual_rms",
    "rounding_rms",
    "without_common",
]
