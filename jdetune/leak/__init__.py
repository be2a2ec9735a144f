"""What a LoRA adapter leaks of its training pictures, and what protects them.

After "Risks When Sharing LoRA Fine-Tuned Diffusion Model Weights" (Yao, arXiv 2409.08482), on a
small diffusion model that is trained here. Modules: `denoiser` and `diffusion` (the model),
`tuning` (fine-tunes, hundreds at once), `ridge`, `encoder` and `learning` (attacks), `recogniser`
and `scoring` (the judge), `defences` and `privacy`, `byproducts`, `bank` and `audit`.
"""

from jdetune.leak.audit import Audit, audit, load_for, load_pictures
from jdetune.leak.bank import Bank, load_bank, save_adapter, save_bank
from jdetune.leak.denoiser import Adapter, Size
from jdetune.leak.encoder import Reader
from jdetune.leak.learning import Lessons, learn, reconstruct
from jdetune.leak.privacy import epsilon, noise_for
from jdetune.leak.ridge import Ridge
from jdetune.leak.scoring import Interval, Score, interval, score
from jdetune.leak.tuning import Private, Public, Recipe, Training, fine_tune, pretrain
from jdetune.leak.updates import products

__all__ = [
    "Adapter",
    "Audit",
    "Bank",
    "Interval",
    "Lessons",
    "Private",
    "Public",
    "Reader",
    "Recipe",
    "Ridge",
    "Score",
    "Size",
    "Training",
    "audit",
    "epsilon",
    "fine_tune",
    "interval",
    "learn",
    "load_bank",
    "load_for",
    "load_pictures",
    "noise_for",
    "pretrain",
    "products",
    "reconstruct",
    "save_adapter",
    "save_bank",
    "score",
]
