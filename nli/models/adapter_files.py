"""The files of a LoRA adapter, by this project or another: what they hold, whether they fit a base, and a form that fits it.

    find_weights(Path("models/reflected"))            -> models/reflected/adapter_model.safetensors
    check_shapes(folder, "models/Mistral-7B-v0.3")    ModelError: … lora_A of model.layers.0.self_attn.q_proj takes 192 numbers, and the base gives 4096.

Training code that adds a `[PAD]` token resizes the base's embeddings, and PEFT then saves `embed_tokens` and `lm_head` whole, with a row for the new token.
That row is never read, because padding is masked, and never written, because no target held it: `fit_adapter` leaves it out.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nli.models.tokenizer import first_line
from nli.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_FILES = ["adapter_*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "nli.json"]
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")


def is_adapter(path: str) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def find_weights(folder: Path) -> Path | None:
    """The file of an adapter's weights, None where there is none."""
    return next((folder / name for name in (WEIGHTS, PICKLED_WEIGHTS) if (folder / name).is_file()), None)


def find_hub_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, from the cache or the hub; None if it has no such file or cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, HfHubHTTPError, HFValidationError):  # what cannot be reached from the cache is an OSError too
        return None


def fetch_adapter(name: str) -> str | None:
    """The local folder of an adapter with a hub name, None if the name is not an adapter's. Raises ModelError if only a part of it can be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if find_hub_file(name, ADAPTER_CONFIG) is None:
        return None
    try:
        return snapshot_download(name, allow_patterns=_HUB_FILES)
    except (OSError, HfHubHTTPError) as error:
        raise ModelError(f"{name}: the adapter cannot be fetched ({first_line(error)}).") from None


def read_adapter_config(folder: Path) -> dict:
    """An adapter's adapter_config.json. Raises ModelError."""
    return _read_json(folder / ADAPTER_CONFIG)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: no JSON object.")
    return value


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a weight file, from its header alone. Raises ModelError if it is torn."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as weights:
                return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118  (not a dict)
        import torch

        return {
            name: tuple(tensor.shape)
            for name, tensor in torch.load(path, map_location="meta", weights_only=True).items()
        }
    except (
        OSError,
        SafetensorError,
        ValueError,
        RuntimeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise ModelError(f"{path}: the weights cannot be read ({type(error).__name__}: {first_line(error)}).") from None


def load_weights(path: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a weight file, on the CPU."""
    import torch
    from safetensors.torch import load_file

    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def check_shapes(folder: Path, base: str) -> None:
    """Raise ModelError if an adapter's weights do not fit a base: another rank than its config says, a layer that the base lacks or has in another size.

    The base's sizes are read from the headers of its safetensors; a base that has none here, or whose weights are quantised already, is not compared.
    """
    found = read_shapes(find_weights(folder))
    lora = {name: shape for name, shape in found.items() if ".lora_" in name and not name.endswith(".bias")}
    _check_ranks(folder, lora)
    sizes = _read_base_shapes(base)
    if not sizes:
        return
    for name, shape in found.items():
        module, part = _split_name(name)
        if part not in ("lora_A", "lora_B", "weight"):
            continue
        size = sizes.get(module) or (sizes.get("model.embed_tokens") if module == "lm_head" else None)
        if size is None:
            raise ModelError(f"{folder}: the adapter has weights for {module}, which {base} does not have. {_CURE}")
        if part == "weight":
            resized = module.rsplit(".", 1)[-1] in _EMBEDDINGS
            fits = shape == size or (resized and shape[1:] == size[1:] and shape[0] > size[0])
            if not fits:
                raise ModelError(
                    f"{folder}: the adapter's {module} has the shape {list(shape)}, and {base}'s has {list(size)}. {_CURE}"
                )
        elif (own := shape[1] if part == "lora_A" else shape[0]) != (its := size[1] if part == "lora_A" else size[0]):
            verb = "takes" if part == "lora_A" else "gives"
            raise ModelError(
                f"{folder}: the adapter's {part} of {module} {verb} {own} numbers, and {base}'s {its}. {_CURE}"
            )


_CURE = "Give the base that it was trained on by --base-model."


def check_kind(folder: Path) -> None:
    """Raise ModelError if an adapter is not plain LoRA: what works on the prompt, not in the layers, would be passed over by the engines."""
    config = read_adapter_config(folder)
    kind = config.get("peft_type", "LORA")
    if kind == "LORA" and config.get("alora_invocation_tokens"):
        kind = "activated LoRA"
    if kind != "LORA":
        raise ModelError(f"{folder}: {ADAPTER_CONFIG} says that this is {kind}, and only LoRA adapters are served.")


def _check_ranks(folder: Path, lora: Mapping[str, tuple[int, ...]]) -> None:
    check_kind(folder)
    config = read_adapter_config(folder)
    if not lora:
        raise ModelError(f"{folder}: {find_weights(folder).name} holds no LoRA weights.")
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for name, shape in lora.items():
        part = _split_name(name)[1]
        rank = {
            "lora_A": shape[0],
            "lora_B": shape[-1],
            "lora_embedding_A": shape[0],
            "lora_embedding_B": shape[-1],
        }.get(part)
        if rank is not None and None not in ranks and rank not in ranks:
            raise ModelError(
                f"{folder}: {name} has the rank {rank}, and {ADAPTER_CONFIG} says {config['r']}: they are not of one adapter."
            )


def _split_name(name: str) -> tuple[str, str]:
    """("model.layers.0.self_attn.q_proj", "lora_A") of the name of an adapter's tensor."""
    parts = name.removeprefix(_PREFIX).replace(".base_layer.", ".").split(".")
    at = next((index for index, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return ".".join(parts[:at]), parts[at]


def _read_base_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each of a base's modules, empty if they cannot be told from its files."""
    config = Path(base) / "config.json" if Path(base).is_dir() else find_hub_file(base, "config.json")
    if config is None or not config.is_file() or "quantization_config" in _read_json(config):
        return {}
    index = config.with_name("model.safetensors.index.json")
    if index.is_file() and not all(
        (index.parent / shard).is_file() for shard in set(_read_json(index).get("weight_map", {}).values())
    ):
        return {}  # a part of it is still on the hub
    shapes = {}
    for path in config.parent.glob("*.safetensors"):
        shapes |= {
            name.removesuffix(".weight"): shape for name, shape in read_shapes(path).items() if name.endswith(".weight")
        }
    return shapes


def fit_adapter(model: "PreTrainedModel", folder: str, into: str) -> str:
    """The folder to load an adapter from: its own, or one below `into` whose embeddings have the base's rows, or none where they equal the base's.

    Embeddings that were trained stay the adapter's own, as PEFT's `modules_to_save`: other adapters on the same base, and the base itself, keep theirs.
    """
    source = Path(folder)
    weights = find_weights(source)
    if weights is None:
        raise ModelError(f"{folder}: no {WEIGHTS} there.")
    whole = [name for name in read_shapes(weights) if _role(name)]
    if not whole:
        return folder
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in load_weights(weights).items()}
    config = read_adapter_config(source)
    kept = {name for name in config.get("modules_to_save") or () if name not in _EMBEDDINGS}
    for name in whole:
        own, saved = _read_embedding(model, _role(name)), tensors.pop(name)
        if saved.shape[1:] != own.shape[1:] or len(saved) < len(own):
            raise ModelError(
                f"{folder}: the adapter's {_role(name)} has the shape {list(saved.shape)}, and the base's has {list(own.shape)}."
            )
        saved = saved[: len(own)]
        if not _is_same(saved, own):
            tensors[name] = saved.clone()
            kept.add(_role(name))
    aside = Path(into)
    save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    (aside / ADAPTER_CONFIG).write_text(
        json.dumps(config | {"modules_to_save": sorted(kept) or None}, indent=2), encoding="utf-8"
    )
    return into


def _role(name: str) -> str | None:
    module, part = _split_name(name)
    leaf = module.rsplit(".", 1)[-1]
    return leaf if part == "weight" and leaf in _EMBEDDINGS else None


def _read_embedding(model: "PreTrainedModel", role: str) -> "torch.Tensor":
    """The base's own weight, whatever adapters are on it already."""
    module = model.get_input_embeddings() if role == "embed_tokens" else model.get_output_embeddings()
    while hasattr(module, "original_module") or hasattr(module, "base_layer"):
        module = module.original_module if hasattr(module, "original_module") else module.base_layer
    return module.weight.detach().cpu()


def _is_same(saved: "torch.Tensor", own: "torch.Tensor") -> bool:
    """Whether two weights are one, in the coarser of their types: the base's may have been saved in another type than it is loaded in."""
    import torch

    return torch.equal(saved.to(own.dtype), own) or torch.equal(saved, own.to(saved.dtype))
