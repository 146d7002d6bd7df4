"""A random-weight Mistral for measuring engines: the base in Mistral-7B-v0.3's shape, adapters for it, and merged copies.

build_base(Path("/tmp/b/base"), "7b")                             config, weights in bf16, Mistral's v3 tokenizer
build_adapter(Path("/tmp/b/base"), Path("/tmp/b/adapter-1"), 1)   r = 32 on q, k, v and o, with a card as a trained one has it
merge(Path("/tmp/b/base"), Path("/tmp/b/adapter-1"), Path("/tmp/b/merged-1"))
"""

import json
from pathlib import Path

from benchmarks.mistral_v3 import copy_tokenizer, save_tokenizer

COMMON = {
    "vocab_size": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "7b": COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    | {"head_dim": 128, "max_position_embeddings": 32768},
    "tiny": COMMON
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    | {"head_dim": 32, "max_position_embeddings": 2048},
}
RANK, ALPHA = 32, 64
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def choose_device() -> str:
    """The GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build_base(folder: Path, shape: str, tokenizer: Path | None = None) -> None:
    """Make a base unless it is there: normal weights of deviation 0.02, the same for the same shape and device."""
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    if (folder / "generation_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(SHAPES[shape])
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(choose_device()):
            model = MistralForCausalLM(MistralConfig(initializer_range=0.02, **values))
    finally:
        torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder) if tokenizer else save_tokenizer(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)  # last: it says that the folder is whole


def build_adapter(base: Path, folder: Path, seed: int) -> None:
    """Make an adapter unless it is there, of random A and small random B, so that it changes what is written."""
    import torch
    from safetensors.torch import save_file

    from nli.models.checkpoints import WEIGHTS, write_card

    if (folder / WEIGHTS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    width = config["hidden_size"]
    inner, narrow = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    sizes = {"q_proj": (width, inner), "k_proj": (width, narrow), "v_proj": (width, narrow), "o_proj": (inner, width)}
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, into, generator=chance) / into**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=chance) * 0.005
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
    }
    adapter_config |= {"bias": "none", "target_modules": list(TARGETS), "inference_mode": True, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
    write_card(folder, str(base), "none", "bf16", 512)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Make a merged model unless it is there."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (folder / "generation_config.json").exists():
        return
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": choose_device()})
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    copy_tokenizer(base, folder)
