"""A base or an adapter that would answer otherwise than it was trained, or not at all, is refused with its reason; every kind of LoRA is served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nli.models.adapter_files import check_shapes
from nli.models.checkpoints import read_template
from nli.models.load import load_adapter, load_base, load_with_adapters, multiply_out
from nli.runtime.errors import ModelError
from nli.task.prompts import STUDENT_TEMPLATE
from tests.conftest import TINY_BASE

IDS = torch.arange(100, 160)[None]


def make_adapter(folder: Path, config) -> "torch.nn.Module":
    """Save an adapter of this config, its weights by chance, and return the model that plain peft made."""
    from peft import get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(load_base(TINY_BASE, "none", "fp32", "cpu"), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.03)
    model.save_pretrained(folder)
    return model.eval()


def lora(**values):
    from peft import LoraConfig

    return LoraConfig(
        **({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | values)
    )


def change_config(folder: Path, file: str = "config.json", **values) -> str:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return str(folder)


def change_base(folder: Path, change=lambda name: True, **values) -> str:
    """A copy of the tiny base with those of its weights whose names pass, and with these values in its config."""
    shutil.copytree(TINY_BASE, folder)
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if change(name)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return change_config(folder, **values)


KINDS = {
    "DoRA": {"use_dora": True},
    "stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 64}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and norm": {"target_modules": ["o_proj", "lm_head"], "modules_to_save": ["norm"]},
    "biases": {"lora_bias": True},
    "new tokens": {"trainable_token_indices": [110, 120]},
}


@pytest.mark.filterwarnings("ignore")  # peft's, on biases and on embeddings that it saves
def test_every_kind_of_lora_answers_as_plain_peft_does_alone_and_beside_others(tmp_path):
    expected, kept = {}, [kind for kind in KINDS if kind != "new tokens"]
    with torch.inference_mode():
        for kind, values in KINDS.items():
            expected[kind] = make_adapter(tmp_path / kind, lora(**values))(input_ids=IDS).logits
            check_shapes(tmp_path / kind, TINY_BASE)
            assert torch.equal(
                load_with_adapters(TINY_BASE, [str(tmp_path / kind)], "fp32", "fp32", "cpu")[0](input_ids=IDS).logits,
                expected[kind],
            )
        together, names = load_with_adapters(TINY_BASE, [str(tmp_path / kind) for kind in kept], "fp32", "fp32", "cpu")
        for kind in kept:
            together.set_adapter(names[str(tmp_path / kind)])
            assert torch.equal(together(input_ids=IDS).logits, expected[kind])
    with pytest.raises(
        ModelError,
        match="new tokens: the adapter cannot be put on this base beside the others; give it in a run of its own",
    ):
        load_adapter(together, str(tmp_path / "new tokens"), "more")


def test_what_is_not_lora_is_refused(tmp_path):
    from peft import PromptTuningConfig

    make_adapter(tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    make_adapter(tmp_path / "activated", lora())
    change_config(tmp_path / "activated", "adapter_config.json", alora_invocation_tokens=[110])
    for folder, kind in ((tmp_path / "prompt", "PROMPT_TUNING"), (tmp_path / "activated", "activated LoRA")):
        with pytest.raises(ModelError, match=f"this is {kind}, and only LoRA"):
            check_shapes(folder, TINY_BASE)
        with pytest.raises(ModelError, match=f"this is {kind}, and only LoRA"):
            load_adapter(load_base(TINY_BASE, "none", "fp32", "cpu"), str(folder))


def test_weights_that_the_adapters_config_has_no_place_for_are_refused(tmp_path):
    make_adapter(tmp_path, lora())
    change_config(tmp_path, "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"names no place for 8 of its weights, such as .*v_proj\.lora_A"):
        load_adapter(load_base(TINY_BASE, "none", "fp32", "cpu"), str(tmp_path))


def test_a_base_whose_weights_do_not_fill_it_is_refused(tmp_path):
    lacking = {
        "head": (
            change_base(tmp_path / "head", lambda name: name != "lm_head.weight"),
            r"for 1 of its parts, such as lm_head\.weight",
        ),
        "layer": (
            change_base(tmp_path / "layer", lambda name: "layers.3" not in name),
            r"for 9 of its parts, such as model\.layers\.3",
        ),
        "size": (
            change_base(tmp_path / "size", intermediate_size=512),
            r"for 12 of its parts, such as model\.layers\.0\.mlp",
        ),
    }
    for folder, message in lacking.values():
        for quantization in ("none", "nf4") if "layer" in folder else ("none",):
            with pytest.raises(ModelError, match=message):
                load_base(folder, quantization, "bf16", "cpu")


def test_a_base_that_is_quantised_already_is_loaded_as_nf4_only(tmp_path):
    quantised = load_base(TINY_BASE, "nf4", "bf16", "cpu").eval()
    quantised.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(
            load_base(str(tmp_path), "nf4", "bf16", "cpu").eval()(input_ids=IDS).logits, quantised(input_ids=IDS).logits
        )
    with pytest.raises(ModelError, match="They are quantised already: take nf4"):
        load_base(str(tmp_path), "none", "bf16", "cpu")


def test_a_base_that_the_memory_does_not_hold_is_told(monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB.")

    quantised = load_base(TINY_BASE, "nf4", "bf16", "cpu")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(quantised, "dequantize", fail)
    with pytest.raises(
        ModelError, match=r"CUDA out of memory.*The memory of cpu does not hold it: take a smaller precision"
    ):
        load_base(TINY_BASE, "none", "bf16", "cpu")
    with pytest.raises(
        ModelError, match=r"The memory of cpu does not hold the weights multiplied out of NF4 \(CUDA out of memory"
    ):
        multiply_out(quantised, "cpu")


def test_a_base_of_which_a_part_is_elsewhere_is_not_compared_and_a_torn_config_is_told(tmp_path):
    make_adapter(tmp_path / "adapter", lora())
    base = tmp_path / "base"
    change_base(base, lambda name: "layers.0" not in name)
    with pytest.raises(ModelError, match="has weights for model.layers.0.self_attn.q_proj, which"):
        check_shapes(tmp_path / "adapter", str(base))
    index = {
        "weight_map": {
            "lm_head.weight": "model.safetensors",
            "model.layers.0.mlp.up_proj.weight": "model-00002-of-00002.safetensors",
        }
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check_shapes(tmp_path / "adapter", str(base))
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        check_shapes(tmp_path / "adapter", str(base))


def test_a_template_from_an_editor_that_marks_the_byte_order_is_the_same_template(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + STUDENT_TEMPLATE.replace("\n", "\r\n").encode() + b"\r\n")
    assert read_template(str(tmp_path / "prompt.txt")) == STUDENT_TEMPLATE
