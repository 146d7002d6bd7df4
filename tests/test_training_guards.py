"""Training and sweeps keep their promises when runs are killed, moved, mistaken or diverge."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from nli import sweep
from nli.models.checkpoints import describe_model, fingerprint_tokenizer, mark_complete
from nli.runtime.errors import ConfigError, DataError, ModelError, NLIError, ResumeError, StorageError
from nli.runtime.files import write_jsonl
from nli.sweep import SweepConfig
from nli.training import run as sft
from nli.training import tracking
from nli.training import worker as training
from nli.training.run import FitPlan, TrainConfig
from tests.conftest import TINY_BASE
from tests.test_stages import read_rows, train_config


def sft_row(split: str, index: int) -> dict:
    thought = "The premise names the same thing. " * (1 + index % 3)
    completion = json.dumps({"thought_process": thought, "predicted_label": index % 2})
    pair = {"premise": f"{split} dog {index} ran.", "hypothesis": f"Animal {index} moved."}
    prompt = f"[INST] Premise: {pair['premise']}\nHypothesis: {pair['hypothesis']} [/INST]"
    return {
        "id": str(index),
        **pair,
        "true_label": index % 2,
        "ablation": "reflected",
        "source": "teacher",
        "prompt": prompt,
        "completion": completion,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Training files of 40 and 8 short rows."""
    folder = tmp_path_factory.mktemp("rows")
    paths = {}
    for split, count in (("train", 40), ("dev", 8)):
        paths[f"reflected_{split}"] = str(folder / f"reflected_{split}.jsonl")
        write_jsonl(Path(paths[f"reflected_{split}"]), [sft_row(split, index) for index in range(count)])
    return paths


@pytest.fixture(scope="module")
def adapter(ray_cluster, files, tmp_path_factory) -> Path:
    """An undisturbed run of six steps over 40 rows: step 3 ends its first epoch's full batches."""
    return sft.run(train_config(files, tmp_path_factory.mktemp("models") / "run"))


def interrupt(finished: Path, folder: Path, *checkpoints: str) -> Path:
    """A copy of a finished run as a kill would have left it, with the named checkpoints only."""
    shutil.copytree(finished, folder)
    for name in ("adapter_model.safetensors", "result.json"):
        (folder / name).unlink()
    for path in folder.glob("checkpoint-*"):
        if path.name not in checkpoints:
            shutil.rmtree(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return folder


def losses_by_step(run_folder: Path, name: str = "loss") -> dict[int, float]:
    rows = [row for row in read_rows(run_folder / "log.jsonl") if name in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step stands twice in the log"
    return {row["step"]: row[name] for row in rows}


# without Ray


def test_a_tokeniser_and_its_files_decide_the_fingerprint(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    before = fingerprint_tokenizer(str(base))
    assert before == fingerprint_tokenizer(TINY_BASE)
    (base / "model.safetensors").write_bytes(b"other weights")
    assert fingerprint_tokenizer(str(base)) == before
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    assert fingerprint_tokenizer(str(base)) != before
    assert fingerprint_tokenizer("mistralai/Mistral-7B-v0.3") == "hub:mistralai/Mistral-7B-v0.3"


def test_a_base_without_a_tokeniser_is_refused_before_anything_starts(files, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(TINY_BASE) / name, base)
    with pytest.raises(ModelError, match=f"{base}: no tokenizer can be loaded"):
        sft.plan_fit(train_config(files, tmp_path / "run", base_model=str(base)))


def test_a_base_below_the_storage_root_is_found(files, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "root/models/base")
    config = train_config(files, tmp_path / "run", base_model="models/base", storage_root=str(tmp_path / "root"))
    assert sft.plan_fit(config).config.base_model == str(tmp_path / "root/models/base")


def test_a_run_on_another_base_or_tokeniser_is_refused_with_the_difference(files, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    config = train_config(files, tmp_path / "run", base_model=str(base))
    identity = json.loads(json.dumps(sft.plan_fit(config).identity))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.json").write_text(
        json.dumps({"status": "running", "identity": identity, "attempts": [], "counts": {}})
    )
    (tmp_path / "run/log.jsonl").write_text("")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    with pytest.raises(ResumeError, match=rf"tokenizer: '{identity['tokenizer']}' -> '[0-9a-f]+'\nChoose"):
        sft.run(config)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ResumeError, match=rf"base: '{identity['base']}' -> 'sampled:"):
        sft.run(config)


def test_tokenised_rows_take_their_place_whole_or_not_at_all(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str) -> Path:
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"line": [1, 2]}), tmp_path / name / "0.parquet")
        return tmp_path / name

    with pytest.raises(StorageError, match="2 tokenised rows instead of 3"):
        sft.move_tokenised(write("lost"), tmp_path / "rows", 3)
    assert not (tmp_path / "rows").exists()
    sft.move_tokenised(write("first"), tmp_path / "rows", 2)
    sft.move_tokenised(write("second"), tmp_path / "rows", 2)  # another run was faster
    assert pq.read_table(tmp_path / "rows").num_rows == 2


def test_a_gpu_by_index_fits_one_worker_that_uses_a_gpu():
    with pytest.raises(ConfigError, match="gpu 0 is one GPU and num_workers 2 need one each"):
        TrainConfig(gpu=0, num_workers=2)
    with pytest.raises(ConfigError, match="gpu 0 picks a GPU and use_gpu=False trains without one"):
        TrainConfig(gpu=0, use_gpu=False)
    assert TrainConfig(gpu=0).num_workers == 1


@pytest.mark.parametrize(
    "name",
    [
        "output_dir",
        "wandb",
        "use_gpu",
        "gpu",
        "num_workers",
        "cpus_per_worker",
        "max_failures",
        "log_steps",
        "keep_checkpoints",
    ],
)
def test_a_sweep_axis_is_a_number_that_changes_the_result(name):
    with pytest.raises(ConfigError, match=f"sweep axis {name} cannot be swept over; axes are .*lora_dropout"):
        SweepConfig(extra_axes=(f"{name}=1,2",))


def test_numeric_fields_are_axes():
    config = SweepConfig(
        lora_rank=(8,), learning_rate=(1e-4,), ablation=("reflected",), extra_axes=("lora_dropout=0,0.1", "seed=1,2")
    )
    assert len(sweep.list_trials(config)) == 4


def plan_in(folder: Path, **identity) -> FitPlan:
    return FitPlan(TrainConfig(), folder, (Path("train"), Path("dev")), {"lora_rank": 8, **identity})


def write_manifest(folder: Path, status: str, counts: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(
        json.dumps({"status": status, "identity": {"lora_rank": 8}, "attempts": [], "counts": counts or {}})
    )


def test_a_folder_is_taken_only_from_a_run_that_made_nothing(tmp_path):
    write_manifest(tmp_path, "running")
    sft.check_folder(plan_in(tmp_path, max_length=64))
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ResumeError, match="max_length: None -> 64"):
        sft.check_folder(plan_in(tmp_path, max_length=64))
    sft.check_folder(plan_in(tmp_path))
    (tmp_path / "log.jsonl").unlink()
    write_manifest(tmp_path, "finished")
    with pytest.raises(ResumeError, match="max_length: None -> 64"):
        sft.check_folder(plan_in(tmp_path, max_length=64))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ResumeError, match="is not empty and holds no run of this project"):
        sft.check_folder(plan_in(tmp_path))


def test_the_end_of_training_is_read_from_its_state():
    control = {"stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": True}}}}
    assert training.is_at_end({"global_step": 6, "max_steps": 6})
    assert training.is_at_end({"global_step": 4, "max_steps": 6, **control})
    assert not training.is_at_end(
        {
            "global_step": 4,
            "max_steps": 6,
            "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": False}}},
        }
    )


def test_a_trial_whose_loss_was_never_finite_is_diverged_and_a_stopped_one_keeps_its_last_loss(tmp_path):
    name = "ablation=reflected,lora_rank=8"
    for loss in (None, math.nan):
        write_manifest(tmp_path, "finished", {"eval_loss": loss, "steps": 6, "train_seconds": 1.0})
        trial = sweep.describe_trial(name, plan_in(tmp_path))
        assert (trial["status"], trial["eval_loss"]) == ("diverged", None)
        json.dumps(trial, allow_nan=False)
    write_manifest(tmp_path, "running")
    assert sweep.describe_trial(name, plan_in(tmp_path))["status"] == "unfinished"
    sweep.write_stopped(plan_in(tmp_path), {"eval_loss": 0.75, "step": 4, "time_total_s": 2.04})
    trial = sweep.describe_trial(name, plan_in(tmp_path))
    assert (trial["status"], trial["eval_loss"], trial["steps"], trial["seconds"]) == ("stopped", 0.75, 4, 2.0)
    assert sweep.describe_trial(name, plan_in(tmp_path, lora_alpha=3))["status"] == "unfinished"
    assert sweep.describe_trial(name, plan_in(tmp_path), "no memory")["status"] == "failed"


def test_too_small_a_cluster_is_refused_where_it_cannot_grow(monkeypatch, tmp_path, capsys):
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    sft.check_room(TrainConfig(num_workers=2, use_gpu=False))
    with pytest.raises(ConfigError, match="num_workers 2 need 2 GPUs and the cluster has 0"):
        sft.check_room(TrainConfig(num_workers=2, use_gpu=True))
    with pytest.raises(ConfigError, match="need 2.01 CPUs and the cluster has 2"):
        sft.check_room(TrainConfig(num_workers=2, use_gpu=False), extra_cpus=0.01)
    (tmp_path / "ray_bootstrap_config.yaml").write_text("")
    sft.check_room(TrainConfig(num_workers=2, use_gpu=True))
    assert "waiting for 2 GPUs; the cluster has 0 now" in capsys.readouterr().out


def test_an_adapter_is_refused_with_its_fault_and_a_local_base_becomes_absolute(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="the adapter has no adapter_model.safetensors"):
        describe_model(str(folder), "")
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((1, 192), np.float32)},
        folder / "adapter_model.safetensors",
    )
    mark_complete(folder)
    monkeypatch.chdir(Path(TINY_BASE).parent)
    assert describe_model(str(folder), "tiny-mistral") == (TINY_BASE, str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"wei")
    with pytest.raises(
        ModelError, match=r"adapter_model.safetensors has 3 bytes instead of \d+; take another checkpoint"
    ):
        describe_model(str(folder), "tiny-mistral")


def test_torn_weights_are_an_error_of_ours(tmp_path):
    from nli.models.load import load_adapter, load_base

    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_base(str(base), "none", "fp32", "cpu")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(ModelError, match="the adapter cannot be put on this base"):
        load_adapter(load_base(TINY_BASE, "none", "fp32", "cpu"), str(adapter))


def test_a_diverged_evaluation_is_null_in_the_log_and_never_the_best(tmp_path, monkeypatch):
    import ray.train

    reported = []
    monkeypatch.setattr(ray.train, "report", reported.append)
    reporter = tracking.build_reporter(tmp_path)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=6, epoch=1.0)
    reporter.on_log(None, state, None, logs={"eval_loss": math.nan, "eval_runtime": 1.5})
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 3, "eval_loss": None, "eval_runtime": 1.5}]
    metrics = {"eval_loss": math.nan}
    reporter.on_evaluate(None, state, None, metrics=metrics)
    assert reported == [] and metrics["eval_loss"] == math.inf
    reporter.on_save(None, state, None)
    reporter.on_save(None, state, None)  # one without an evaluation before it
    assert len(reported) == 1 and math.isnan(reported[0]["eval_loss"])


# with Ray


@pytest.mark.ray
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(files, adapter, tmp_path):
    resumed = sft.run(train_config(files, interrupt(adapter, tmp_path / "run", "checkpoint-3")))
    assert json.loads((resumed / "result.json").read_text())["resumed_from"].endswith("checkpoint-3")
    for name in ("loss", "eval_loss", "grad_norm"):
        assert losses_by_step(resumed, name) == losses_by_step(adapter, name)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.ray
@pytest.mark.fault
def test_a_run_resumed_with_another_number_of_workers_makes_the_same_steps(files, ray_cluster, tmp_path):
    two = sft.run(train_config(files, tmp_path / "two", num_workers=2, lora_dropout=0.0))
    one = sft.run(
        train_config(files, interrupt(two, tmp_path / "one", "checkpoint-3"), num_workers=1, lora_dropout=0.0)
    )
    assert json.loads((one / "result.json").read_text())["resumed_from"].endswith("checkpoint-3")
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses_by_step(one, name) == pytest.approx(losses_by_step(two, name), rel=1e-3)


@pytest.mark.ray
def test_a_run_killed_after_its_last_step_only_saves_its_best_adapter(files, adapter, tmp_path):
    folder = interrupt(adapter, tmp_path / "run", "checkpoint-3", "checkpoint-6")
    log = (folder / "log.jsonl").read_text()
    saved = sft.run(train_config(files, folder))
    result, undisturbed = (json.loads((run / "result.json").read_text()) for run in (saved, adapter))
    assert result["resumed_from"].endswith("checkpoint-6")
    assert {name: result[name] for name in ("steps", "epochs", "eval_loss", "best_checkpoint")} == {
        name: undisturbed[name] for name in ("steps", "epochs", "eval_loss", "best_checkpoint")
    }
    assert (saved / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert (saved / "log.jsonl").read_text() == log


@pytest.mark.ray
def test_a_run_that_early_stopping_had_ended_takes_no_further_step_when_resumed(files, ray_cluster, tmp_path):
    config = train_config(
        files,
        tmp_path / "first",
        learning_rate=5.0,
        max_steps=6,
        eval_steps=1,
        early_stopping_patience=1,
        warmup_fraction=0.0,
    )
    stopped = sft.run(config)
    before = json.loads((stopped / "result.json").read_text())
    assert before["steps"] < 6 and before["best_checkpoint"] != f"checkpoint-{before['steps']}"
    names = [path.name for path in stopped.glob("checkpoint-*")]
    resumed = sft.run(replace(config, output_dir=str(interrupt(stopped, tmp_path / "second", *names))))
    after = json.loads((resumed / "result.json").read_text())
    assert (after["steps"], after["best_checkpoint"], after["eval_loss"]) == (
        before["steps"],
        before["best_checkpoint"],
        before["eval_loss"],
    )
    best = (stopped / before["best_checkpoint"] / "adapter_model.safetensors").read_bytes()
    assert (resumed / "adapter_model.safetensors").read_bytes() == best


@pytest.mark.ray
def test_the_cure_for_a_row_too_long_works_in_the_same_folder(files, ray_cluster, tmp_path):
    with pytest.raises(DataError, match="raise max_length"):
        sft.run(train_config(files, tmp_path / "run", max_length=40, max_steps=1, eval_steps=1))
    sft.run(train_config(files, tmp_path / "run", max_steps=1, eval_steps=1))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["max_length"] == 512


@pytest.mark.ray
def test_asha_stops_a_trial_once_and_for_all(files, ray_cluster, tmp_path, capsys):
    base = train_config(
        files, tmp_path / "unused", max_steps=3, eval_steps=1, early_stopping_patience=0, warmup_fraction=0.0
    )
    config = SweepConfig(
        output_dir=str(tmp_path / "sweep"),
        train_files=files["reflected_train"].replace("reflected", "{ablation}"),
        lora_rank=(4,),
        learning_rate=(3e-3, 1e-6),
        ablation=("reflected",),
        train=base,
        scheduler="asha",
        grace_evaluations=1,
        max_concurrent_trials=1,
    )
    path = sweep.run(config)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    good, behind = found["trials"]
    assert (good["status"], behind["status"]) == ("finished", "stopped")
    assert behind["steps"] == 1 and behind["eval_loss"] > good["eval_loss"]
    assert found["best"] == good
    capsys.readouterr()
    path.unlink()
    assert json.loads(sweep.run(config).read_text()) == found
    assert "2 trials, 1 finished already, 1 stopped by the scheduler" in capsys.readouterr().out


@pytest.mark.ray
def test_a_sweep_names_the_best_of_the_finite_losses_and_refuses_to_name_one_where_all_diverged(
    files, ray_cluster, tmp_path
):
    base = train_config(
        files, tmp_path / "unused", max_steps=1, eval_steps=1, warmup_fraction=0.0, max_grad_norm=0.0, weight_decay=0.0
    )
    config = SweepConfig(
        output_dir=str(tmp_path / "sweep"),
        train_files=files["reflected_train"].replace("reflected", "{ablation}"),
        lora_rank=(4,),
        learning_rate=(1e30, 1e-3),
        ablation=("reflected",),
        train=base,
    )
    found = json.loads(sweep.run(config).read_text(), parse_constant=pytest.fail)
    assert [trial["status"] for trial in found["trials"]] == ["diverged", "finished"]
    assert found["trials"][0]["eval_loss"] is None and found["best"] == found["trials"][1]
    manifest = Path(found["best"]["adapter"]) / "manifest.json"
    written = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(written | {"counts": written["counts"] | {"eval_loss": None}}))
    with pytest.raises(NLIError, match="no trial of the sweep finished with a finite eval loss .*: diverged"):
        sweep.run(config)
