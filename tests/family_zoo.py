"""Families of small real models: PEFT adapters of random weights, merged and saved."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdetune import pipeline
from jdetune.checkpoint import TensorInfo, open_checkpoint, read_tensor
from jdetune.checkpoint.shapes import matrices, units, view_of
from tests import pico

#: Shares of a weight's largest element: a merge and its recovery each round once or twice.
NEAR = 4e-7


@contextlib.contextmanager
def quiet():
    """Other libraries' deprecations are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merge_family(folder: Path, make: Callable[[], Any], n_models: int = 3, **lora: Any):
    """Saves the base of a model class and models merged from it with PEFT.

    Args:
      folder: gets ``true`` and ``tune-0``, ``tune-1``, ...
      make: gives the base, the same each time.
      n_models: how many.
      lora: arguments of PEFT's ``LoraConfig``.

    Returns:
      Folders of the merged models.
    """
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    paths = []
    with quiet():
        make().save_pretrained(folder / "true")
        for index in range(n_models):
            model = make()
            torch.manual_seed(index + 1)
            config = peft.LoraConfig(**{"r": 2 + index % 2, "init_lora_weights": False, **lora})
            tuned = peft.get_peft_model(model, config)
            with torch.no_grad():
                for name, value in tuned.named_parameters():
                    if "lora_" in name:
                        value.normal_(0, 0.1)
                    elif "modules_to_save" in name:
                        value.add_(0.01 * torch.randn_like(value))
            paths.append(folder / f"tune-{index}")
            tuned.merge_and_unload().save_pretrained(paths[-1])
    return paths


def knows(true: Path) -> Callable[..., Any]:
    """A ``recover`` that knows the base in a folder."""
    base = open_checkpoint(true)
    found: dict[str, np.ndarray] = {}
    for name, info in base.tensors.items():
        view = view_of(info)
        if view is not None:
            parts = matrices(read_tensor(base, name), view)
            found.update(zip(units(info), parts, strict=True))
    return pico.truth_teller(found)


def round_trip(
    paths: list[Path], out: Path, auto: Any, recover: Any = None, rows: dict[str, int] | None = None
) -> dict[str, Any]:
    """Recovers, loads base and adapters with the real libraries and compares with the models.

    Args:
      paths: merged models.
      out: folder to write.
      auto: transformers' class to load with.
      recover: stands in for the solver.
      rows: models of larger vocabularies, as their adapters' cards say.

    Returns:
      The report.
    """
    peft = pytest.importorskip("peft")
    report = pipeline.run(paths, out, recover_fn=recover)
    for path in paths:
        with quiet():
            wanted = auto.from_pretrained(path).state_dict()
            model = auto.from_pretrained(out / "base")
            if path.name in (rows or {}):
                model.resize_token_embeddings((rows or {})[path.name], mean_resizing=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys.*")
                tuned = peft.PeftModel.from_pretrained(model, out / "adapters" / path.name)
            found = tuned.merge_and_unload().state_dict()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            expected = value.float().numpy()
            scale = np.abs(expected).max(initial=1e-6)
            error = np.abs(found[name].float().numpy() - expected).max(initial=0.0)
            assert error <= NEAR * scale, (path.name, name, error / scale)
    return report


def statuses(report: dict[str, Any]) -> dict[str, str]:
    """Status of every tensor of a report."""
    return {entry["name"]: entry["status"] for entry in report["tensors"]}


def entry(report: dict[str, Any], name: str) -> dict[str, Any]:
    """One tensor's entry."""
    return next(e for e in report["tensors"] if e["name"] == name)


def info(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    """Headers of one tensor."""
    return TensorInfo(name, "model.safetensors", dtype, shape)


def some_view(info):
    """``view_of`` a tensor that has matrices."""
    view = view_of(info)
    assert view is not None
    return view
