"""A merged model is the adapter and its base in one folder, held against the adapter row by row before it gets its name."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nli import export
from nli.data.pairs import read_examples
from nli.data.sft_rows import build_sft_row
from nli.export import ExportConfig
from nli.models.checkpoints import describe_model, write_card
from nli.runtime.errors import ConfigError, DataError, ModelError, ResumeError, StorageError
from nli.runtime.files import sha256_file, write_jsonl
from nli.runtime.manifest import lock_output
from nli.task.prompts import render_completion
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_models import to_bin


def make_adapter(folder: Path, quantization: str, scale: float = 0.02) -> Path:
    """An adapter with weights of chance, which changes what the tiny base says."""
    import torch

    from nli.models.load import add_lora, load_base

    torch.manual_seed(3)
    model = add_lora(load_base(TINY_BASE, "none", "fp32", "cpu"), 8, 16, 0.0, ("q_proj", "v_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    write_card(folder, TINY_BASE, quantization, "fp32", 512)
    return folder


@pytest.fixture(scope="module")
def dev_file(tmp_path_factory) -> str:
    """Sixty rows of the sample's dev file with a completion."""
    path = tmp_path_factory.mktemp("rows") / "dev.jsonl"
    rows = read_examples(REPOSITORY / "data/sample/dev.csv")[:60]
    write_jsonl(
        path, [build_sft_row(row, "reflected", "teacher", "Both say the same.", row["true_label"]) for row in rows]
    )
    return str(path)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {quantization: make_adapter(folder / quantization, quantization) for quantization in ("nf4", "none")}


def config_of(adapter: Path, output: Path, dev_file: str, **values) -> ExportConfig:
    settings = {"check_rows": 12, "max_new_tokens": 48, "batch_size": 6, "use_gpu": False}
    return ExportConfig(model=str(adapter), output_dir=str(output), dev_file=dev_file, **(settings | values))


@pytest.fixture(scope="module")
def merged(adapters, dev_file, tmp_path_factory) -> dict[str, Path]:
    """Both forms of the NF4-trained adapter, made in this process as the job's worker makes them."""
    folder = tmp_path_factory.mktemp("merged")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "connected", lambda gpu: contextlib.nullcontext())
        patch.setattr(export, "run_worker", lambda job, config: export.export_worker(job | {"device": "cpu"}))
        for form in ("merged_bf16", "merged_nf4"):
            made[form] = export.run(config_of(adapters["nf4"], folder / form, dev_file, form=form))
        made["unquantised"] = export.run(config_of(adapters["none"], folder / "unquantised", dev_file))
    return made


@pytest.mark.parametrize("form", ["merged_bf16", "merged_nf4"])
def test_the_folder_is_a_whole_model_in_bf16_that_says_what_it_was_made_of(merged, adapters, form):
    folder = merged[form]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "nli.json", "export.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    card = json.loads((folder / "nli.json").read_text())
    assert (card["merged"], card["precision"], card["quantization"]) == (form, "bf16", "nf4")
    assert card["adapter_sha256"] == sha256_file(adapters["nf4"] / "adapter_model.safetensors")
    assert card["base_fingerprint"].startswith("sampled:") and card["prompt_template"].startswith("[INST]")
    assert describe_model(str(folder), "") == (str(folder), None)


def read_weights(folder: Path | str) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def test_merged_bf16_is_the_original_weight_and_the_adapters_product_rounded_once(merged, adapters):
    import torch
    from safetensors.torch import load_file

    base, found, lora = (
        read_weights(TINY_BASE),
        read_weights(merged["merged_bf16"]),
        load_file(adapters["nf4"] / "adapter_model.safetensors"),
    )
    name = "model.layers.0.self_attn.q_proj"
    product = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"] * (16 / 8)
    expected = (base[f"{name}.weight"].bfloat16().float() + product).bfloat16()
    assert torch.equal(found[f"{name}.weight"], expected)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[untouched], base[untouched].bfloat16())


def test_merged_nf4_adds_to_what_nf4_makes_of_the_weights(merged):
    import bitsandbytes.functional as bnb
    import torch

    base, found = read_weights(TINY_BASE), read_weights(merged["merged_nf4"])
    name = "model.layers.0.mlp.up_proj.weight"  # no adapter sits there
    quantised, state = bnb.quantize_4bit(base[name].float(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(found[name], bnb.dequantize_4bit(quantised, state).bfloat16())
    assert not torch.equal(found[name], base[name].bfloat16())
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16())


def test_answers_before_and_after_are_compared_by_labels_texts_and_logits(merged):
    reports = {form: export.read_export(folder) for form, folder in merged.items()}
    for report in reports.values():
        check = report["check"]
        assert check["rows"] == 12 and check["labels_changed"] == len(check["changed"])
        assert 0 <= check["unparsed_before"] <= 12 and 0 <= check["unparsed_after"] <= 12
        assert check["first_token_logits"]["positions"] == check["label_token_logits"]["positions"] == 12
        assert 0 < check["first_token_logits"]["mean"] < check["first_token_logits"]["max"]
    nf4, bf16, plain = (
        reports[name]["check"]["label_token_logits"]["mean"] for name in ("merged_nf4", "merged_bf16", "unquantised")
    )
    assert nf4 < bf16  # an adapter that was trained on NF4 is nearer to itself on NF4's weights
    assert plain < bf16  # and one that was not needs none of that
    assert reports["merged_nf4"]["trained_on"] == {"quantization": "nf4", "compute_dtype": "fp32"}


def test_an_adapter_in_a_pickled_file_is_merged_too(merged, adapters, dev_file, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "connected", lambda gpu: contextlib.nullcontext())
    monkeypatch.setattr(export, "run_worker", lambda job, config: export.export_worker(job | {"device": "cpu"}))
    pickled = to_bin(adapters["none"], tmp_path / "pickled")
    folder = export.run(config_of(pickled, tmp_path / "merged", dev_file, check_rows=1, max_new_tokens=2))
    assert sha256_file(folder / "model.safetensors") == sha256_file(merged["unquantised"] / "model.safetensors")


def test_a_merged_model_that_answered_otherwise_is_told_so():
    generations = [
        export.Generation(text, "stop", 1, 1)
        for text in (render_completion("a", 1), render_completion("b", 0), "no JSON", render_completion("d", 1))
    ]
    others = [
        export.Generation(text, "stop", 1, 1)
        for text in (render_completion("a", 0), render_completion("other", 0), render_completion("c", 1), "nothing")
    ]
    rows = [{"id": str(index), "true_label": 1} for index in range(4)]
    check = export.compare_answers(rows, (generations, [], []), (others, [], []))
    assert [(row["id"], row["before"], row["after"]) for row in check["changed"]] == [
        ("0", 1, 0),
        ("2", None, 1),
        ("3", 1, None),
    ]
    assert (check["labels_changed"], check["texts_changed"], check["unparsed_before"], check["unparsed_after"]) == (
        3,
        4,
        1,
        1,
    )
    assert (check["accuracy_before"], check["accuracy_after"], check["first_token_logits"]) == (0.5, 0.25, None)


def test_a_folder_with_other_things_is_refused_and_the_same_export_is_not_made_again(
    merged, adapters, dev_file, capsys
):
    before = (merged["merged_bf16"] / "model.safetensors").stat().st_mtime_ns
    assert export.run(config_of(adapters["nf4"], merged["merged_bf16"], dev_file)) == merged["merged_bf16"]
    assert "holds this very model already" in capsys.readouterr().out
    with pytest.raises(ResumeError, match="is not empty and holds another model"):
        export.run(config_of(adapters["nf4"], merged["merged_bf16"], dev_file, form="merged_nf4"))
    assert (merged["merged_bf16"] / "model.safetensors").stat().st_mtime_ns == before


def test_what_cannot_be_merged_is_refused_before_a_model_is_loaded(adapters, dev_file, tmp_path):
    with pytest.raises(
        ConfigError, match="form merged_nf4 is for adapters trained on an NF4 base; this one's was none"
    ):
        export.run(config_of(adapters["none"], tmp_path / "out", dev_file, form="merged_nf4"))
    with pytest.raises(ModelError, match="a whole model, and no adapter to merge"):
        export.run(config_of(Path(TINY_BASE), tmp_path / "out", dev_file))
    with pytest.raises(
        DataError, match="its run's dev file is not known or not there any more; give rows of stage 3 by --dev-file"
    ):
        export.run(config_of(adapters["nf4"], tmp_path / "out", ""))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((adapters["nf4"] / name).read_bytes())
    with pytest.raises(ModelError, match="nobody knows the base precision"):
        export.run(config_of(bare, tmp_path / "out", dev_file))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_or_is_being_made_is_refused_before_a_model_is_loaded(
    adapters, dev_file, tmp_path
):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: nothing can be written there \("):
        export.run(config_of(adapters["nf4"], tmp_path / "file/out", dev_file))
    with (
        lock_output(tmp_path / "out"),
        pytest.raises(ResumeError, match=rf"process {os.getpid()} on .* is at work on out; wait for it"),
    ):
        export.run(config_of(adapters["nf4"], tmp_path / "out", dev_file))


def test_a_disk_without_room_for_the_merged_model_is_named_and_no_part_of_it_stays(tmp_path):
    from safetensors import SafetensorError

    def save_pretrained(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match=r"partial: cannot be written \(.*No space left on device"):
        export.save_merged(SimpleNamespace(save_pretrained=save_pretrained), TINY_BASE, tmp_path / "partial")
    assert not (tmp_path / "partial").exists()


def test_an_adapter_that_diverged_is_refused_by_name(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "none", scale=float("inf"))
    with pytest.raises(
        ModelError, match=r"merging makes model.layers.0.self_attn.q_proj.weight infinite or not a number"
    ):
        export.merge(TINY_BASE, str(adapter), "merged_bf16", "fp32", "cpu")


def test_a_merged_model_of_another_prompt_is_refused(merged, tmp_path):
    import shutil

    folder = tmp_path / "merged"
    shutil.copytree(merged["merged_bf16"], folder)
    card = json.loads((folder / "nli.json").read_text())
    (folder / "nli.json").write_text(json.dumps(card | {"prompt_sha256": "0"}))
    with pytest.raises(ModelError, match="was trained with another prompt"):
        describe_model(str(folder), "")


@pytest.mark.fault
@pytest.mark.own_cluster
def test_the_job_merges_and_leaves_no_half_made_folder(no_ray, adapters, dev_file, tmp_path):
    output = tmp_path / "merged"
    (tmp_path / ".merged.partial").mkdir()  # as a kill leaves it
    settings = [
        "--model",
        str(adapters["nf4"]),
        "--dev-file",
        dev_file,
        "--output-dir",
        str(output),
        "--form",
        "merged_nf4",
        "--check-rows",
        "4",
    ]
    command = [sys.executable, "-m", "ray_jobs.export_model", *settings, "--max-new-tokens", "16", "--use-gpu", "False"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 4 labels and" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.lock", "merged"]
