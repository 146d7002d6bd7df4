"""Load a base as the config says, and put LoRA adapters on it.

model = load_base("mistralai/Mistral-7B-v0.3", quantization="nf4", compute_dtype="bf16", device="cuda:0")
model = add_lora(model, rank=32, alpha=64, dropout=0.05, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nli.models.adapter_files import ADAPTER_CONFIG, WEIGHTS, check_kind, find_weights, fit_adapter, read_shapes
from nli.models.out_of_memory import is_out_of_memory
from nli.models.tokenizer import first_line
from nli.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

Quantization = Literal["nf4", "int8", "none"]
ComputeDtype = Literal["bf16", "fp32"]

SPARE_BYTES = 8 * 2**30
"""room for keys and values that must be left on a GPU when NF4 weights are multiplied out"""


def torch_dtype(name: ComputeDtype) -> "torch.dtype":
    """The torch type of a config's `compute_dtype`."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def choose_attention(device: str) -> str:
    """FlashAttention 2 where its package imports and the device is a GPU, else torch's own scaled-dot-product attention."""
    if device.startswith("cuda"):
        try:
            import flash_attn  # noqa: F401  (only whether it imports matters)
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def quiet_libraries() -> None:
    """Leave the console to our own lines: no bars for weights that load in seconds, no notes on names that only the libraries can change."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for message, category in (
        (".*gradient_checkpointing", FutureWarning),
        (".*broadcast_buffers", FutureWarning),
        (r"barrier\(\)", UserWarning),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in ("bitsandbytes", "transformers.integrations.bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_base(
    path: str, quantization: Quantization, compute_dtype: ComputeDtype, device: str, attention: str = ""
) -> "PreTrainedModel":
    """A causal LM on `device` ("cpu", "cuda:0", …), its linear layers in NF4 with double quantisation, in 8 bits or unquantised. Raises ModelError.

    Weights that are missing are an error too: transformers would fill them with numbers of chance and go on.
    `attention` is a name that transformers knows; empty: the fastest for padded batches.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    quiet_libraries()
    dtype = torch_dtype(compute_dtype)
    quantized = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[quantization]
    attention = attention or choose_attention(device)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            quantization_config=quantized,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        cure = (
            f" The memory of {device} does not hold it: take a smaller precision, or end what else uses it."
            if is_out_of_memory(error)
            else ""
        )
        raise ModelError(f"{path}: the model cannot be loaded ({first_line(error)}).{cure}") from None
    if unfit := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        quantised_already = hasattr(AutoConfig.from_pretrained(path), "quantization_config")
        cure = (
            " They are quantised already: take nf4, or give the model that they were made of."
            if quantised_already
            else ""
        )
        raise ModelError(
            f"{path}: its files lack weights that fit its config.json for {len(unfit)} of its parts, such as {unfit[0]}.{cure}"
        )
    print(f"model: {path}, {quantization}, {compute_dtype}, attention {attention}, on {device}", flush=True)
    return model


def keep_weights_in_evaluations(model: "PreTrainedModel") -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU whenever the model is evaluated between training steps.

    Its packed form rounds the scales to bf16, and unpacking them quantises them anew: every evaluation would change the base a little, and a resumed run,
    whose base is fresh, would differ from an undisturbed one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def multiply_out(model: "PreTrainedModel", device: str) -> "PreTrainedModel":
    """Replace NF4 weights by what bitsandbytes makes of them in each forward pass, where a GPU has room for that. Raises ModelError if that room is lost."""
    import torch

    if device.startswith("cuda"):
        wanted = (
            sum(
                module.in_features * module.out_features
                for module in model.modules()
                if type(module).__name__ == "Linear4bit"
            )
            * model.dtype.itemsize
        )
        free = torch.cuda.mem_get_info(device)[0]
        if free < 1.1 * wanted + SPARE_BYTES:
            print(
                f"model: weights stay in NF4: multiplied out they need {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                flush=True,
            )
            return model
    try:
        return model.dequantize(model.dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"The memory of {device} does not hold the weights multiplied out of NF4 ({first_line(error)}); end what else uses it."
        ) from None


def read_longest(model: "PreTrainedModel") -> int | None:
    """How many tokens the model can attend to at once; None: no limit is known."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((limit for limit in limits if limit), default=None)


def add_lora(
    model: "PreTrainedModel", rank: int, alpha: int, dropout: float, target_modules: tuple[str, ...]
) -> "PeftModel":
    """Put fresh adapters on the named modules. Raises ModelError if the model has none of them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"no adapters can be put on {', '.join(target_modules)}: {first_line(error)}") from None


def load_adapter(model: "PreTrainedModel | PeftModel", folder: str, name: str = "default") -> "PeftModel":
    """The base with the adapter of a folder, for inference, beside those that it has already under other names. Raises ModelError.

    The base keeps its vocabulary: rows that an adapter's embeddings have beyond it are left out (`nli.models.adapter_files`), so nothing is generated from them.
    """
    import tempfile
    import warnings

    from peft import PeftModel
    from safetensors import SafetensorError

    others = " beside the others; give it in a run of its own" if isinstance(model, PeftModel) else ""
    try:
        check_kind(Path(folder))
        with tempfile.TemporaryDirectory(prefix="nli-adapter-") as aside, warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message="Found missing adapter keys"
            )  # the layers without weights would answer as the base does
            source = fit_adapter(model, folder, aside)
            if isinstance(model, PeftModel):
                model.load_adapter(source, name, torch_device=str(model.device))
            else:
                model = PeftModel.from_pretrained(model, source, adapter_name=name, torch_device=str(model.device))
            _check_all_used(model, source, name)
            return model
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError, UserWarning, ModelError) as error:
        raise ModelError(
            f"{folder}: the adapter cannot be put on this base{others} ({first_line(error).removesuffix('.')})."
        ) from None


def _check_all_used(model: "PeftModel", folder: str, name: str) -> None:
    """Raise ModelError if an adapter has weights for modules that its own config does not name: PEFT passes over them in silence."""
    from peft import get_peft_model_state_dict

    used = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if unused := sorted(set(read_shapes(find_weights(Path(folder)))) - set(used)):
        raise ModelError(f"{ADAPTER_CONFIG} names no place for {len(unused)} of its weights, such as {unused[0]}")


def load_with_adapters(
    base: str, folders: Sequence[str], precision: str, compute_dtype: ComputeDtype, device: str
) -> "tuple[PreTrainedModel | PeftModel, dict[str | None, str]]":
    """The base for inference with all these adapters on it, and their names by folder, None standing for the base alone. Raises ModelError.

    `precision` is "nf4", "int8", "bf16" or "fp32"; the last two need no `compute_dtype`.
    """
    if precision not in ("nf4", "int8", "bf16", "fp32"):
        raise ModelError(f"The precision {precision} needs engine vllm. Take nf4 or bf16 with engine transformers.")
    quantised = precision in ("nf4", "int8")
    model = load_base(
        base, precision if quantised else "none", compute_dtype if quantised else precision, device, "sdpa"
    )
    if precision == "nf4":
        model = multiply_out(model, device)
    names: dict[str | None, str] = {None: ""}
    for index, folder in enumerate(folders):
        names[folder] = f"adapter_{index}"
        model = load_adapter(model, folder, names[folder])
    return model.eval(), names


def load_adapter_weights(model: "PeftModel", folder: str) -> None:
    """Put the weights that a checkpoint's folder holds into the adapters that the model has already. Raises ModelError."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        outcome = set_peft_model_state_dict(model, load_file(Path(folder) / WEIGHTS))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be put on this base ({first_line(error)}).") from None
    if outcome.unexpected_keys:
        raise ModelError(
            f"{folder}: the adapter has weights that this model has no place for, such as {outcome.unexpected_keys[0]}."
        )


def check_base(path: str) -> None:
    """Raise ModelError if `path` is neither a model folder nor a hub name whose config can be read (from the cache or the hub)."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        cure = "Give a model folder, or a hub name with access to the hub (HF_TOKEN if it is gated)."
        raise ModelError(f"{path}: no model there ({first_line(error)}). {cure}") from None
