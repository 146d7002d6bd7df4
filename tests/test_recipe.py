"""The recipe that configs/train/ promises, value by value, and that the demo changes only what a CPU makes it change."""

from dataclasses import asdict
from pathlib import Path

import pytest

from nli.runtime.config import load_config
from nli.runtime.errors import ConfigError
from nli.training.config import TrainConfig
from nli.training.worker import build_arguments
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _in_repository(repository):
    pass


def load(name: str) -> TrainConfig:
    return load_config(REPOSITORY / "configs" / "train" / f"{name}.py", TrainConfig)


def test_default_is_the_recipe():
    config = load("default")
    assert config.base_model == "mistralai/Mistral-7B-v0.3"
    assert (config.quantization, config.compute_dtype) == ("nf4", "bf16")
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)
    assert config.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.learning_rate, config.lr_scheduler, config.warmup_fraction, config.weight_decay) == (
        2e-4,
        "linear",
        0.03,
        0.01,
    )
    assert 3 <= config.epochs <= 5
    assert config.early_stopping_patience == 3
    assert (config.global_batch_size, config.max_length) == (64, 512)
    assert config.optimizer.startswith("adamw")


def test_the_dataclass_alone_is_the_recipe_too():
    places = {"train_file", "dev_file", "output_dir", "eval_steps", "use_gpu"}
    config, bare = asdict(load("default")), asdict(TrainConfig())
    assert {name: value for name, value in bare.items() if name not in places} == {
        name: value for name, value in config.items() if name not in places
    }


@pytest.mark.parametrize(
    ("name", "ablation"), [("ablation1", "correct_only"), ("ablation2", "reflected"), ("ablation3", "unmodified")]
)
def test_ablations_differ_from_the_default_in_their_data_only(name, ablation):
    config = load(name)
    assert config.train_file == f"data/finetune/{ablation}_train.jsonl"
    assert config.dev_file == f"data/finetune/{ablation}_dev.jsonl"
    changed = {field for field, value in asdict(load("default")).items() if asdict(config)[field] != value}
    assert changed <= {"train_file", "dev_file", "output_dir"}


def test_initial_test_run_is_the_recipe_cut_short():
    changed = {
        field for field, value in asdict(load("default")).items() if asdict(load("initial_test_run"))[field] != value
    }
    assert changed == {"output_dir", "max_steps", "eval_steps", "log_steps", "wandb"}


def test_the_demo_keeps_the_recipe_but_for_what_a_cpu_and_a_tiny_model_need():
    from nli.pipeline import PipelineConfig

    demo = load_config(REPOSITORY / "configs/demo/pipeline.py", PipelineConfig).train
    changed = {field for field, value in asdict(load("default")).items() if asdict(demo)[field] != value}
    needs = {
        "base_model",
        "compute_dtype",
        "learning_rate",
        "epochs",
        "eval_steps",
        "per_device_batch_size",
        "max_length",
        "wandb",
    }
    needs |= {"activation_checkpointing", "use_gpu"}
    assert changed <= needs


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_the_global_batch_is_the_same_for_any_number_of_workers(tmp_path: Path, num_workers):
    arguments = build_arguments(
        TrainConfig(num_workers=num_workers, compute_dtype="fp32", wandb=False),
        tmp_path,
        use_gpu=False,
        world_size=num_workers,
    )
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_workers == 64


def test_a_number_of_workers_that_cannot_divide_the_global_batch_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size 64 is no multiple of num_workers 3"):
        TrainConfig(num_workers=3)


@pytest.mark.parametrize(
    ("parallel", "reason"), [("fsdp2", "corrupts them"), ("zero3", "loads the whole quantised base on every GPU first")]
)
def test_ways_to_split_a_4_bit_base_are_refused_with_the_reason(parallel, reason):
    with pytest.raises(ConfigError, match=f"parallel {parallel} is not offered: .*{reason}.* Use ddp"):
        TrainConfig(parallel=parallel)


def test_zero2_without_deepspeed_is_refused_with_the_cure(tmp_path: Path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"parallel zero2 needs DeepSpeed.*pip install '\.\[zero\]'"):
        build_arguments(TrainConfig(parallel="zero2", wandb=False), tmp_path, use_gpu=False, world_size=1)
    with pytest.raises(ConfigError, match="parallel zero2 computes in bf16"):
        TrainConfig(parallel="zero2", compute_dtype="fp32")


def test_arguments_reach_the_trainer_as_the_config_says(tmp_path: Path):
    arguments = build_arguments(
        load("default").__class__(compute_dtype="fp32", wandb=False), tmp_path, use_gpu=False, world_size=1
    )
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.warmup_steps, arguments.weight_decay) == (
        2e-4,
        "linear",
        0.03,
        0.01,
    )
    assert (arguments.load_best_model_at_end, arguments.metric_for_best_model, arguments.greater_is_better) == (
        True,
        "eval_loss",
        False,
    )
    assert arguments.optim == "adamw_torch_fused"
