"""Merges a PEFT adapter into its base by a chosen rounding, and writes a checkpoint like the base.

Bit for bit what PEFT does, with one GEMM: another sums the products of BA in another order. How
many elements that can change is known from the bound on such a sum, and reported.
"""

import dataclasses
import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune import metrics, outfolder, report
from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.adapter_reader import Adapter, LoraUpdate, merge_peft, read_adapter
from jdetune.checkpoint.index import FLOATS, Checkpoint, open_checkpoint
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.shapes import view_of
from jdetune.checkpoint.sidefiles import code_note
from jdetune.checkpoint.writer import save_json, save_like
from jdetune.errors import InputError
from jdetune.noise import ROUNDINGS
from jdetune.pipeline import version
from jdetune.solving import Progress

#: Settings of an adapter that change what merging means: name to the values that do not.
_PLAIN: Mapping[str, tuple] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the base.

    Attributes:
      update: factors to merge, if any.
      saved: the copy that replaces the base's tensor, if any.
      rounding: rule of the merge; embeddings follow R2 at least, as in PEFT.
    """

    update: LoraUpdate | None = None
    saved: np.ndarray | None = None
    rounding: str = "R1"


def run(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    rounding: str = "R1",
    overwrite: bool = False,
    command: str = "jdetune.merging.run",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes OUT/merged, a checkpoint with the base's shards, and OUT/report.json.

    Args:
      base: folder or ``.safetensors`` file of the base.
      adapter: PEFT adapter folder.
      out: folder to write.
      rounding: R1, R2 or R3 (``jdetune.noise.ROUNDINGS``).
      overwrite: replace a former output.
      command: what to name in the report as the command.
      progress: told of every tensor.
      trust_remote_code: also copy the base's Python files, and config that makes transformers run
        them.

    Returns:
      The report.

    Raises:
      InputError: base or adapter cannot be read or do not fit, or the adapter is no plain LoRA.
      OutputError: OUT cannot be used; nothing is put in place.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    started, begin, out = datetime.datetime.now(datetime.UTC), time.monotonic(), Path(out)
    known = open_checkpoint(base, trust_remote_code)
    outfolder.check_out(out, [known.path, Path(adapter)], overwrite)
    changes = plan_changes(known, read_adapter(adapter, known), rounding)
    entries: dict[str, dict[str, Any]] = {}
    stage = outfolder.start_stage(out, overwrite=overwrite)

    def get_tensor(name: str) -> np.ndarray:
        array, entries[name] = _merged(known, name, changes.get(name))
        if progress is not None:
            progress("merge", len(entries), len(known.tensors))
        return array

    save_like(known, stage / "merged", get_tensor)
    status = [entry["status"] for entry in entries.values()]
    content = {
        **report.top_level(
            command=command,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - begin,
            device="cpu",
            version=version(),
        ),
        "kind": "merge",
        "base_path": report.source_text(report.source_entry(known)),
        "adapter_path": str(Path(adapter).resolve()),
        "rounding": rounding,
        "notes": []
        if trust_remote_code
        else code_note(known.name, known.root, known.side_files, "the merged model"),
        "summary": {
            **{word: status.count(word) for word in ("merged", "replaced", "copied")},
            "sensitive_fraction": _share(list(entries.values())),
            "max_ulp": max((e["max_ulp"] or 0 for e in entries.values()), default=0),
            "base_written": False,
            "exit_code": 0,
        },
        "tensors": [entries[name] for name in known.tensors],
    }
    save_json(stage / "report.json", content)
    outfolder.place(out, stage)
    return content


def plan_changes(base: Checkpoint, adapter: Adapter, rounding: str) -> dict[str, Change]:
    """Which tensors of the base an adapter changes, and how.

    Raises:
      InputError: something in the adapter is not understood or does not fit the base.
    """
    for key, plain in _PLAIN.items():
        if adapter.config.get(key) not in plain:
            raise InputError(
                f"the adapter has {key}={adapter.config[key]!r}: its merge is not the base plus "
                "scaling * B @ A. Merge it with PEFT."
            )
    changes: dict[str, Change] = {}
    for key, array in adapter.saved.items():
        if "lora_" in key or ".token_adapter." in key:
            raise InputError(f"the adapter holds {key}, which is not understood. Merge with PEFT.")
        name = _find(base, key.replace(".base_layer.", "."))
        wanted = base.tensors[name]
        if array.shape != wanted.shape or not {str(array.dtype), wanted.dtype} <= set(FLOATS):
            raise InputError(
                f"{name}: {array.dtype} {list(array.shape)} in the adapter, {wanted.dtype} "
                f"{list(wanted.shape)} in the base. Give the adapter's own base."
            )
        changes[name] = Change(saved=array)
    for key, update in adapter.updates.items():
        name = _find(base, key)
        module = layout.module_of(key)
        fitted = _oriented(name, update, base, bool(adapter.config.get("fan_in_fan_out")))
        embedding = layout.kind_of(module, base.config) is layout.Kind.EMBEDDING
        rule = "R2" if embedding and ROUNDINGS[rounding] == 0 else rounding
        saved = changes.get(name, Change()).saved
        changes[name] = Change(fitted, saved, rule)
    return changes


def sensitive(base: np.ndarray, update: LoraUpdate, rounding: str) -> tuple[np.ndarray, int]:
    r"""Elements whose merged value depends on the order in which a GEMM sums.

    A float32 sum of r products errs by :math:`(r + 1)\,2^{-24}\,|B||A|` at most, and the merge is
    monotone in it, so the values at both ends enclose those of every GEMM (not of TF32).

    Args:
      base: W.
      update: factors and scaling.
      rounding: rule of the merge.

    Returns:
      A mask, and the greatest distance of the two ends in ulps.
    """
    left, right = update.left.astype(np.float64), update.right.astype(np.float64)
    middle = np.matmul(left, right)
    reach = (left.shape[1] + 1) * 2.0**-24 * np.matmul(np.abs(left), np.abs(right))
    ends = []
    for sum_ in (middle - reach, middle + reach):
        given = sum_.astype(np.float32)
        options: dict[str, Any] = {"rounding": rounding, "product": lambda b, a, given=given: given}
        ends.append(merge_peft(base, update.left, update.right, update.scaling, **options))
    distance = metrics.ulp_distance(*ends)
    return distance > 0, int(np.max(distance, initial=0))


def _merged(
    base: Checkpoint, name: str, change: Change | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """A tensor after the change, and its entry in the report."""
    array = read_tensor(base, name)
    entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
    entry |= {"status": "copied", "rank": None, "scaling": None, "rounding": None}
    entry |= {"sensitive_fraction": None, "max_ulp": None}
    if change is None:
        return array, entry
    if change.saved is not None:
        array, entry["status"] = change.saved.astype(array.dtype), "replaced"
    update = change.update
    if update is not None:
        factors = (update.left, update.right, update.scaling)
        shape, array = array.shape, array.reshape(len(update.left), -1)
        mask, far = sensitive(array, update, change.rounding)
        entry |= {"status": "merged", "rank": update.left.shape[1], "scaling": update.scaling}
        entry |= {"rounding": change.rounding, "max_ulp": far}
        entry["sensitive_fraction"] = float(np.mean(mask))
        array = merge_peft(array, *factors, rounding=change.rounding).reshape(shape)
    if not np.isfinite(array.astype(np.float32)).all():
        raise InputError(
            f"{name}: NaN or infinity after the merge. Check base and adapter, or choose a base in "
            "a wider dtype."
        )
    return array, entry


def _find(base: Checkpoint, key: str) -> str:
    """The base's tensor that an adapter's key means: equal, or with or without a prefix."""
    if key in base.tensors:
        return key
    near = [n for n in base.tensors if n.endswith(f".{key}") or key.endswith(f".{n}")]
    if len(near) != 1:
        raise InputError(
            f"{key}: the adapter changes it, but the base has no such tensor (tied weights are "
            "stored once). Give the adapter's own base."
        )
    return near[0]


def _oriented(name: str, update: LoraUpdate, base: Checkpoint, transposed: bool) -> LoraUpdate:
    """The update in the base's orientation: Conv1D modules store [in, out]."""
    info = base.tensors[name]
    shape = (len(update.left), update.right.shape[1])
    view = view_of(info)
    if view is not None and view.kind == "conv" and shape == (view.row, view.col):
        return update
    module = layout.module_of(name)
    turned = LoraUpdate(update.right.T, update.left.T, update.scaling)
    if not info.is_matrix or info.shape not in (shape, shape[::-1]):
        raise InputError(
            f"{name}: an update of {list(shape)} in the adapter, {info.dtype} {list(info.shape)} "
            "in the base. Give the adapter's own base."
        )
    if info.shape != shape and transposed:
        return turned
    unclear = transposed and shape[0] == shape[1] and layout.leaf_of(module) not in layout.CONV1D
    if info.shape != shape or (unclear and layout.kind_of(module, {}) is layout.Kind.LINEAR):
        raise InputError(
            f"{name}: fan_in_fan_out={transposed} does not say how this module stores its "
            f"{list(info.shape)} weight. Merge with PEFT."
        )
    return update


def _share(entries: list[dict[str, Any]]) -> float:
    """Share of sensitive elements in all that were merged."""
    merged = [e for e in entries if e["sensitive_fraction"] is not None]
    sizes = [float(np.prod(e["shape"])) for e in merged]
    count = sum(e["sensitive_fraction"] * size for e, size in zip(merged, sizes, strict=True))
    return count / sum(sizes) if merged else 0.0
