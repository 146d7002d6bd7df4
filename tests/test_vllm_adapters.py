"""What vLLM is given of an adapter says the same as the adapter, in the one form that vLLM reads rightly."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nli.engines.vllm.adapters import AdapterShape, describe_adapter, prepare_adapter
from nli.runtime.errors import ModelError
from tests.conftest import TINY_BASE


def read_changes(folder: str) -> dict[str, torch.Tensor]:
    """What vLLM adds to each layer's weights: B A, times one scale that it reads in the config."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    weights = load_file(f"{folder}/adapter_model.safetensors")
    modules = {name.split(".lora_")[0] for name in weights}
    return {
        module: scale * weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"] for module in modules
    }


@pytest.mark.parametrize("stabilised", [False, True])
def test_layers_with_ranks_and_scales_of_their_own_keep_them(tmp_path, stabilised):
    from peft import LoraConfig, get_peft_model

    from nli.models.load import load_base

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 4, "layers.2.self_attn.v_proj": 24},
        alpha_pattern={"q_proj": 64, "^model.layers.1.mlp.down_proj": 3},
        use_rslora=stabilised,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(TINY_BASE, "none", "fp32", "cpu"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "a")
    copy = prepare_adapter(str(tmp_path / "a"), TINY_BASE, str(tmp_path / "copies"))
    assert describe_adapter(copy) == AdapterShape(24, ("down_proj", "q_proj", "v_proj"))
    changes = read_changes(copy)
    assert len(changes) == 12
    for name, change in changes.items():
        torch.testing.assert_close(change, model.get_submodule(name).get_delta_weight("default"))


def test_pickled_weights_become_safetensors_and_torn_ones_are_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.rand(shape)
        for part, shape in (("A", (8, 192)), ("B", (192, 8)))
    }
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match=r"a: no adapter_model\.safetensors there"):
        prepare_adapter(str(folder), TINY_BASE, str(tmp_path / "copies"))
    torch.save(weights, folder / "adapter_model.bin")
    copy = prepare_adapter(str(folder), TINY_BASE, str(tmp_path / "copies"))
    assert describe_adapter(copy) == describe_adapter(str(folder)) == AdapterShape(8, ("q_proj",))
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(f"{copy}/adapter_model.safetensors").items()
    )
    (folder / "adapter_model.bin").write_bytes((folder / "adapter_model.bin").read_bytes()[:500])
    with pytest.raises(ModelError, match=r"adapter_model\.bin: the weights cannot be read"):
        prepare_adapter(str(folder), TINY_BASE, str(tmp_path / "others"))


def test_an_even_adapter_in_safetensors_is_given_as_it_is(tmp_path):
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.rand(8, 192)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {}, "alpha_pattern": {}}))
    assert prepare_adapter(str(tmp_path), TINY_BASE, str(tmp_path / "copies")) == str(tmp_path)
