"""LoRA adapters as vLLM takes them: their rank, the modules that they change, and no copies of the base's embeddings.

describe_adapter("models/a")                                  ->  AdapterShape(rank=32, modules=("k_proj", "o_proj", "q_proj", "v_proj"))
prepare_adapter("models/published", "models/base", "/tmp/x")  ->  "/tmp/x/published", a copy without embed_tokens and lm_head
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nli.checkpoints import WEIGHTS
from nli.errors import ModelError
from nli.storage import write_atomic

if TYPE_CHECKING:
    import torch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM's kernels know
CONFIG = "adapter_config.json"
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
    config = _read_config(folder)
    modules = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in _list_weights(folder) if ".lora_" in key}
    return AdapterShape(max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()]), tuple(sorted(modules)))


def smallest_rank(ranks: Iterable[int]) -> int:
    """The least rank of vLLM's that holds all of `ranks`. Raises ModelError where there is none."""
    most = max(ranks)
    fitting = [rank for rank in RANKS if rank >= most]
    if not fitting:
        raise ModelError(f"an adapter of rank {most} is more than vLLM takes ({RANKS[-1]}). {_ELSEWHERE}")
    return fitting[0]


def prepare_adapter(folder: str, base: str, into: str) -> str:
    """The folder to give to vLLM: the adapter's own, or a copy below `into` without embeddings that PEFT saved along with it.

    vLLM refuses an adapter with such weights. PEFT saves them when a vocabulary was resized, trained or not; only if the rows of the base's tokens equal the
    base's is nothing lost by leaving them out. Raises ModelError otherwise.
    """
    extra = [key for key in _list_weights(folder) if ".lora_" not in key]
    if not extra:
        return folder
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(Path(folder) / WEIGHTS, framework="pt") as weights:
        for key in extra:
            role = next((role for role in _EMBEDDINGS if f".{role}." in key), None)
            if role is None:
                raise ModelError(f"{folder}: the adapter holds {key}, a full weight that vLLM cannot put on the base. {_ELSEWHERE}")
            if not _has_rows_of(weights.get_tensor(key), read_embedding(base, role)):
                raise ModelError(f"{folder}: the adapter's {role} differs from the base's: it was trained, and vLLM cannot put it on the base. {_ELSEWHERE}")
        kept = {key: weights.get_tensor(key) for key in weights.keys() if ".lora_" in key}  # noqa: SIM118  (not a dict)
    copy = Path(into) / Path(folder).resolve().name
    copy.mkdir(parents=True)
    save_file(kept, copy / WEIGHTS, metadata={"format": "pt"})
    write_atomic(copy / CONFIG, json.dumps(_read_config(folder) | {"modules_to_save": None}, indent=2) + "\n")
    return str(copy)


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
        raise ModelError(f"{base}: its {role} cannot be read, so that it cannot be compared with an adapter's. {_ELSEWHERE}") from None


def _has_rows_of(saved: "torch.Tensor", own: "torch.Tensor") -> bool:
    """Whether the rows of the base's tokens are the base's, in the type that the adapter was saved in."""
    import torch

    rows = min(len(saved), len(own))
    return saved.shape[1:] == own.shape[1:] and torch.equal(saved[:rows], own[:rows].to(saved.dtype))


def _list_weights(folder: str) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter's {WEIGHTS} cannot be read ({error}).") from None


def _read_config(folder: str) -> dict:
    try:
        return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter's {CONFIG} cannot be read ({error}).") from None
