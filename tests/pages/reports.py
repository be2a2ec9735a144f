"""Reports made up for tests: as large, broken or hostile as need be."""

from typing import Any

import numpy as np

from jdetune.metrics import ULP_STEPS

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TYPES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MODELS = ("tune-a", "tune-b", "tune-c", "tune-d")
#: Names that would be markup, leave their attribute, turn text around or steer a terminal.
HOSTILE = (
    "<script>alert(1)</script>.weight",
    '"><img src=x onerror=alert(2)>.weight',
    "a' onmouseover='alert(3).weight",
    "</style></title></svg><b>.weight",
    "esc\x1b[2J\x00\x07bell.weight",
    "turned\u202egnp.weight",
    "lone\ud800half.weight",
    "line\nbreak\r\n| cell | `code` [x](http://evil.example).weight",
    "&lt;already&gt;.weight",
    "\U0001f600.\u00e4\u00f6.weight",
)


def solved(name: str, rng: np.random.Generator, ranks=(8, 8, 8, 8), **change: Any) -> dict:
    """An entry of a matrix that was recovered."""
    values = [
        sorted((float(f"{v:.4g}") for v in rng.lognormal(-3, 0.7, r)), reverse=True) for r in ranks
    ]
    counts = rng.multinomial(len(ranks) * 64 * 48, [0.005, 0.005, 0.05, 0.88, 0.05, 0.005, 0.005])
    return {
        **copied(name),
        "status": "recovered",
        "code": "OK",
        "method": "SubspaceIntersection",
        "ranks": list(ranks),
        "iterations": 40,
        "noise_rms_expected": 2e-10 * float(rng.lognormal(0, 0.3)),
        "residual_ratio": float(rng.normal(1, 0.002)),
        "rank_gap": 1e5,
        "predicted_error": float(rng.normal(-20.4, 0.4)),
        "exact_fraction_est": float(rng.uniform(0.93, 0.99)),
        "ambiguous_fraction": 0.09,
        "certain_fraction": 0.91,
        "amplification": float(rng.uniform(1.05, 1.9)),
        "verdict": "at the floor",
        "detection_floor": 1e-6,
        "remerge_match": [float(rng.uniform(0.85, 0.92)) for _ in ranks],
        "ulp_histogram": {**dict(zip(ULP_STEPS, counts.tolist(), strict=True)), "not finite": 0},
        "singular_values": values,
        "noise_edge": [1.7e-7 for _ in ranks],
        "seconds": 0.4,
        **change,
    }


def copied(name: str, **change: Any) -> dict:
    """An entry of a tensor that was not solved."""
    unknown = ("code", "method", "ranks", "iterations", "residual_rms", "noise_rms_expected")
    unknown += ("residual_ratio", "rank_gap", "predicted_error", "exact_fraction_est")
    unknown += ("ambiguous_fraction", "certain_fraction", "amplification", "verdict")
    unknown += ("detection_floor", "remerge_match", "ulp_histogram", "singular_values")
    unknown += ("noise_edge", "seconds", "reason")
    return {
        "name": name,
        "shape": [64, 48],
        "dtype": "float32",
        "base_dtype": "float32",
        "status": "identical",
        **dict.fromkeys(unknown),
        "left_out": [],
        **change,
    }


def failed(name: str, reason: str, code: str = "NOT_LOW_RANK", **change: Any) -> dict:
    """An entry of a matrix without a base."""
    bad = {"status": "failed", "code": code, "reason": reason, "verdict": "failed"}
    return copied(name, **{**bad, "base_dtype": None, **change})


def report(tensors: list[dict], models=MODELS, **change: Any) -> dict[str, Any]:
    """A whole report of these tensors."""
    count = {
        s: sum(t["status"] == s for t in tensors) for s in ("recovered", "failed", "identical")
    }
    good = [t for t in tensors if t["code"] == "OK"]
    bad = [t for t in tensors if t["code"] not in (None, "OK")]
    code = 0 if not bad else 5 if good else 4
    exact = [t["exact_fraction_est"] for t in good]
    return {
        "schema": "jdetune.report/1",
        "jdetune_version": "0.1.0",
        "command": f"jdetune recover {' '.join(models)} --out=recovered",
        "started_at": "2026-01-02T03:04:05+00:00",
        "seconds": 754.3,
        "device": "cpu",
        "timing": {"processes": 1, "compare": 60.1, "recover": 600.0, "write": 94.2}
        | {"solve": 590.0, "not_in_solve": 0.2},
        "inputs": [
            {"name": name, "path": f"/models/{name}", "dtype": "float32", "sha256": None}
            | {"duplicate_of": None, "ranks": {}, "left_out": None}
            for name in models
        ],
        "base": {"dtype": "float32", "grid": "float32", "n_parameters": 3072 * len(tensors)},
        "summary": {
            "tensors": len(tensors),
            "recovered": count["recovered"],
            "copied": count["identical"],
            **dict.fromkeys(("consensus", "per_model", "skipped"), 0),
            "failed": count["failed"],
            "exact_fraction_est": sum(exact) / len(exact) if exact else None,
            "predicted_error": -20.4 if good else None,
            "max_ulp_est": None,
            "verdict": {0: "recovered", 5: "partial"}.get(code, "failed"),
            "base_written": bool(good) or code == 0,
            "exit_code": code,
            "note": "",
        },
        "warnings": [],
        "tensors": tensors,
        **change,
    }


def decoder(n_layers: int, n_models: int = 4, seed: int = 0) -> dict[str, Any]:
    """A decoder in which every linear layer was tuned, with mixed ranks."""
    rng = np.random.default_rng(seed)
    models = [f"tune-{chr(97 + i)}" for i in range(n_models)]
    tensors = [copied("model.embed_tokens.weight", shape=[49152, 576])]
    for layer in range(n_layers):
        root = f"model.layers.{layer}"
        tensors += [copied(f"{root}.input_layernorm.weight", shape=[576])]
        for kind in TYPES:
            ranks = [int(r) for r in rng.choice([4, 8, 16, 32], n_models, p=[0.1, 0.2, 0.5, 0.2])]
            error = float(rng.normal(-20.4 + 0.8 * layer / n_layers, 0.25))
            tensors.append(
                solved(f"{root}.{kind}.weight", rng, ranks, predicted_error=error, shape=[576, 576])
            )
        tensors += [copied(f"{root}.post_attention_layernorm.weight", shape=[576])]
    return report([*tensors, copied("model.norm.weight", shape=[576])], models)


def hostile() -> dict[str, Any]:
    """A report in which every text is an attack."""
    rng = np.random.default_rng(0)
    names = [text.removesuffix(".weight") for text in HOSTILE[:4]]
    tensors = [solved(name, rng) for name in HOSTILE[:5]]
    tensors += [failed(name, f"reason of {name}") for name in HOSTILE[5:8]]
    tensors += [copied(name, reason=name) for name in HOSTILE[8:]]
    tensors[0] |= {"verdict": HOSTILE[0], "method": HOSTILE[1], "dtype": HOSTILE[2]}
    made = report(tensors, names, command=HOSTILE[7], device=HOSTILE[0], started_at=HOSTILE[1])
    made["jdetune_version"] = HOSTILE[3]
    made["warnings"] = list(HOSTILE)
    made["base"]["dtype"] = HOSTILE[0]
    made["inputs"][1]["path"] = HOSTILE[1]
    made["inputs"].append({**made["inputs"][0], "name": HOSTILE[4], "duplicate_of": HOSTILE[0]})
    made["inputs"].append({**made["inputs"][0], "name": HOSTILE[6], "left_out": HOSTILE[1]})
    return made
