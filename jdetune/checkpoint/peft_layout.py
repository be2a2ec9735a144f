"""Names and orientations by which PEFT finds LoRA factors: modules, leaves, transposes."""

import enum
from collections.abc import Collection, Mapping
from typing import Any

from jdetune.checkpoint.index import Checkpoint

PREFIX = "base_model.model."
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: Models whose stacked experts are [expert, in, out] (``is_transposed`` in transformers).
_TRANSPOSED_MODELS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
#: Parameters of one module of experts, in the order in which transformers defines them.
PARAMETER_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
#: Last words of the modules that embed tokens.
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings")
TOKEN_EMBEDDINGS += ("embed_in", "token_embedding", "tokens_embed")
_EMBEDDING_LEAVES = ("wte", "wpe", "shared")
#: A head, and linear maps of latents and text features into a diffusion transformer.
_NOT_EMBEDDINGS = ("embed_out", "x_embedder", "context_embedder")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


_ATTENTION = tuple(
    (f"attention.attention.{old}", f"attention.{new}_proj")
    for old, new in (("query", "q"), ("key", "k"), ("value", "v"))
) + (("attention.output.dense", "attention.o_proj"),)
#: What transformers 5 calls modules that are stored under the names of transformers 4.
_RENAMED = {
    "dinov2": _ATTENTION,
    "dinov2_with_registers": _ATTENTION,
    "vit": (
        *(("encoder.layer.", "layers."), *_ATTENTION),
        *(("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")),
    ),
}
#: Heads over the vocabulary by the ending of the architecture's name, and by model type.
_LM_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MASKED_HEADS = {"bert": "cls.predictions.decoder", "electra": "generator_lm_head"}


class Kind(enum.Enum):
    """How a module stores its weight."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


def loaded_name(name: str, config: Mapping[str, Any]) -> str:
    """Name by which transformers holds a module or tensor in memory, and PEFT looks for it.

    Transformers 5 renames modules of some models as it loads them. The version that a model was
    saved with tells which names its adapters are to have.

    Args:
      name: as in the checkpoint.
      config: contents of config.json.

    Example:
      >>> saved = {"model_type": "vit", "transformers_version": "5.2.0"}
      >>> loaded_name("vit.encoder.layer.0.attention.attention.query", saved)
      'vit.layers.0.attention.q_proj'
    """
    major = str(config.get("transformers_version") or "").partition(".")[0]
    if major.isdigit() and int(major) >= 5:
        for old, new in _RENAMED.get(str(config.get("model_type")), ()):
            name = name.replace(old, new)
    return name


def module_of(tensor: str) -> str:
    """Module path of a tensor name.

    Example:
      >>> module_of("encoder.layer.0.query.weight")
      'encoder.layer.0.query'
    """
    return tensor.rpartition(".")[0]


def leaf_of(module: str) -> str:
    """Last word of a module path."""
    return module.rpartition(".")[2]


def is_targetable(tensor: str) -> bool:
    """Whether PEFT can put LoRA factors on a tensor: it must be some module's ``weight``."""
    return tensor.endswith(".weight") and bool(module_of(tensor))


def uses_conv1d(config: Mapping[str, Any]) -> bool:
    """Whether a model stores linear weights as [in, out], as GPT-2 does."""
    return config.get("model_type") in _CONV1D_MODELS


def is_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model stores stacked experts as [expert, in, out]."""
    return config.get("model_type") in _TRANSPOSED_MODELS


def kind_of(module: str, config: Mapping[str, Any]) -> Kind:
    """Kind of a module, by the last word of its path.

    Example:
      >>> kind_of("embeddings.word_embeddings", {}), kind_of("h.0.c_attn", {"model_type": "gpt2"})
      (<Kind.EMBEDDING: 'embedding'>, <Kind.CONV1D: 'conv1d'>)
    """
    leaf = leaf_of(module)
    if uses_conv1d(config) and leaf in CONV1D:
        return Kind.CONV1D
    named = "embed" in leaf and "proj" not in leaf and leaf not in _NOT_EMBEDDINGS
    return Kind.EMBEDDING if named or leaf in _EMBEDDING_LEAVES else Kind.LINEAR


def head_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that turn hidden states into tokens, as the architecture's name tells.

    Example:
      >>> head_modules({"architectures": ["LlamaForCausalLM"]}), head_modules({})
      (('lm_head',), ())
    """
    names = [str(name) for name in config.get("architectures") or ()]
    kind = str(config.get("model_type"))
    found = [
        "embed_out" if kind == "gpt_neox" else "lm_head" for n in names if n.endswith(_LM_HEADS)
    ]
    if any(name.endswith("ForMaskedLM") for name in names):
        found.append(_MASKED_HEADS.get(kind, "lm_head.decoder"))
    return tuple(dict.fromkeys(found))


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type from the architecture's name, None where it has none."""
    for architecture in config.get("architectures") or ():
        for ending, task in _TASKS.items():
            if str(architecture).endswith(ending):
                return task
    return None


def all_modules(checkpoint: Checkpoint) -> set[str]:
    """Paths of all modules and containers that hold a tensor."""
    modules: set[str] = set()
    for tensor in checkpoint.tensors:
        parts = module_of(tensor).split(".")
        modules.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return modules - {""}


def target_modules(targets: Collection[str], modules: Collection[str]) -> list[str]:
    """Shortest list that makes PEFT target exactly these modules.

    Leaf names where every module of that leaf is targeted, whole paths otherwise; also for modules
    of a sequence, whose neighbours may hold no weights.

    Example:
      >>> target_modules(["a.q", "b.q", "a.k"], ["a", "b", "a.q", "b.q", "a.k", "b.k"])
      ['a.k', 'q']
    """
    chosen = set(targets)
    by_leaf: dict[str, set[str]] = {}
    for module in modules:
        by_leaf.setdefault(leaf_of(module), set()).add(module)
    names: set[str] = set()
    for module in chosen:
        leaf = leaf_of(module)
        alone = by_leaf.get(leaf, set()) <= chosen and not leaf.isdigit()
        names.add(leaf if alone else module)
    return sorted(names)


def pattern_key(module: str, modules: Collection[str]) -> str:
    """Key of ``rank_pattern``: the path, anchored where it also ends another module's path."""
    ambiguous = any(other.endswith("." + module) for other in modules)
    return f"^{module}" if ambiguous else module
