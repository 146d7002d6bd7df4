"""LoRA adapters as vLLM takes them: in safetensors, of one rank and scale, and with no copies of the base's embeddings.

describe_adapter("models/a")                                  ->  AdapterShape(rank=32, modules=("k_proj", "o_proj", "q_proj", "v_proj"))
prepare_adapter("models/published", "models/base", "/tmp/x")  ->  "/tmp/x/published", a copy without embed_tokens and lm_head
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nli.models.adapter_files import (
    ADAPTER_CONFIG,
    WEIGHTS,
    find_weights,
    load_weights,
    read_adapter_config,
    read_shapes,
)
from nli.runtime.errors import ModelError
from nli.runtime.files import write_atomic

if TYPE_CHECKING:
    import torch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM's kernels know
_ELSEWHERE = "Take engine transformers, or merge the adapter with export and run what comes out."
_EMBEDDINGS = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


@dataclass(frozen=True)
class AdapterShape:
    """What vLLM must make room for."""

    rank: int
    """LoRA's r"""
    modules: tuple[str, ...]
    """last names of the layers that the adapter has weights for, sorted"""


def describe_adapter(folder: str) -> AdapterShape:
    """Rank and modules of an adapter. Raises ModelError if its files cannot be read."""
    config = read_adapter_config(Path(folder))
    modules = {
        key.split(".lora_")[0].rsplit(".", 1)[-1] for key in read_shapes(_find_weights(folder)) if ".lora_" in key
    }
    return AdapterShape(max(_list_ranks(config)), tuple(sorted(modules)))


def smallest_rank(ranks: Iterable[int]) -> int:
    """The least rank of vLLM's that holds all of `ranks`. Raises ModelError where there is none."""
    most = max(ranks)
    fitting = [rank for rank in RANKS if rank >= most]
    if not fitting:
        raise ModelError(f"an adapter of rank {most} is more than vLLM takes ({RANKS[-1]}). {_ELSEWHERE}")
    return fitting[0]


def prepare_adapter(folder: str, base: str, into: str) -> str:
    """The folder to give to vLLM: the adapter's own, or a copy below `into` that says the same in the one form that vLLM reads rightly.

    vLLM refuses embeddings that PEFT saved along with an adapter, as it does when a vocabulary was resized; where the rows of the base's tokens equal the
    base's, nothing is lost by leaving them out. And it scales all layers alike, whatever `rank_pattern` and `alpha_pattern` say, so that their scale has to go
    into the weights. Raises ModelError where no such copy can be made.
    """
    source, config = _find_weights(folder), read_adapter_config(Path(folder))
    names = list(read_shapes(source))
    extra = [name for name in names if ".lora_" not in name]
    uneven = bool(config.get("rank_pattern") or config.get("alpha_pattern"))
    if not extra and not uneven and source.name == WEIGHTS:
        return folder
    from safetensors.torch import save_file

    tensors = load_weights(source)
    for name in extra:
        role = next((role for role in _EMBEDDINGS if f".{role}." in name), None)
        if role is None:
            raise ModelError(
                f"{folder}: the adapter holds {name}, a full weight that vLLM cannot put on the base. {_ELSEWHERE}"
            )
        if not _has_rows_of(tensors.pop(name), read_embedding(base, role)):
            raise ModelError(
                f"{folder}: the adapter's {role} differs from the base's: it was trained, and vLLM cannot put it on the base. {_ELSEWHERE}"
            )
    config = config | {"modules_to_save": None}
    if uneven:
        tensors, config = _even_out(tensors, config)
    copy = Path(into) / Path(folder).resolve().name
    copy.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, copy / WEIGHTS, metadata={"format": "pt"}
    )
    write_atomic(copy / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    return str(copy)


def _even_out(tensors: Mapping[str, "torch.Tensor"], config: dict) -> tuple[dict, dict]:
    """The same adapter with one scale for all layers: each layer's own, as far as it differs, is multiplied into its B."""
    from peft.utils.other import get_pattern_key

    rank, alpha, alphas = max(_list_ranks(config)), config["lora_alpha"], config.get("alpha_pattern") or {}
    root = math.sqrt if config.get("use_rslora") else float
    evened = {}
    for name, tensor in tensors.items():
        module, part = name.removeprefix("base_model.model.").split(".lora_", 1)
        own = alphas.get(get_pattern_key(alphas, module), alpha) / root(tensor.shape[-1])
        evened[name] = (
            (tensor.float() * (own / (alpha / root(rank)))).to(tensor.dtype) if part.startswith("B.") else tensor
        )
    return evened, config | {"r": rank, "rank_pattern": {}, "alpha_pattern": {}}


def _list_ranks(config: dict) -> list[int]:
    return [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]


def _find_weights(folder: str) -> Path:
    if (weights := find_weights(Path(folder))) is None:
        raise ModelError(f"{folder}: no {WEIGHTS} there.")
    return weights


def read_embedding(base: str, role: str) -> "torch.Tensor":
    """`embed_tokens` or `lm_head` of a base in safetensors, by folder or hub name. Raises ModelError if it cannot be found."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    try:
        index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
        names = [_EMBEDDINGS[role], _EMBEDDINGS["embed_tokens"]]  # a base with tied weights has no lm_head of its own
        file = next((shards[name] for name in names if name in shards), "model.safetensors")
        with safe_open(cached_file(base, file), framework="pt") as weights:
            found = set(weights.keys())
            return weights.get_tensor(next(name for name in names if name in found))
    except (OSError, ValueError, StopIteration):
        raise ModelError(
            f"{base}: its {role} cannot be read, so that it cannot be compared with an adapter's. {_ELSEWHERE}"
        ) from None


def _has_rows_of(saved: "torch.Tensor", own: "torch.Tensor") -> bool:
    """Whether the rows of the base's tokens are the base's, in the type that the adapter was saved in."""
    import torch

    rows = min(len(saved), len(own))
    return saved.shape[1:] == own.shape[1:] and torch.equal(saved[:rows], own[:rows].to(saved.dtype))
