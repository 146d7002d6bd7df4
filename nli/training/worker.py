"""What one Ray Train worker does: train adapters with TRL's trainer from the newest good checkpoint, and save the best.

In:   a TrainConfig and a folder of tokenised rows (Parquet: split, line, input_ids, labels, num_tokens)
Out:  the run's folder: adapter_model.safetensors, adapter_config.json, tokenizer, nli.json, log.jsonl, result.json, checkpoint-N/
"""

import gc
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nli.models.checkpoints import read_trainer_state, write_card
from nli.models.load import add_lora, keep_weights_in_evaluations, load_adapter_weights, load_base, quiet_libraries
from nli.models.tokenizer import load_tokenizer
from nli.runtime.errors import ConfigError
from nli.runtime.files import write_atomic
from nli.training.attention import name_packed_kernel, register_packed_attention
from nli.training.batches import GlobalBatches
from nli.training.config import TrainConfig
from nli.training.kernels import speed_up
from nli.training.memory import GIB, Choice, Shape, Workload, choose
from nli.training.saving import SealedCheckpoints, find_start, read_best, save_adapter, telling_of_a_full_disk
from nli.training.tracking import build_reporter, choose_trackers
from nli.training.trainer import build_trainer_class
from nli.training.watch_beside import WatchBeside
from nli.training.watching import WatchedEvaluations, read_watch

if TYPE_CHECKING:
    import datasets
    from trl import SFTTrainer

# Gradients and optimizer state are split over the workers; DeepSpeed keeps the adapters' fp32 masters and computes in bf16.
ZERO2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
}


def train_worker(job: dict) -> None:
    """What one Ray Train worker does: load the base, put adapters on it, train from the newest good checkpoint, save the best adapter."""
    quiet_libraries()
    import ray.train
    import torch
    from ray.train.v2._internal.execution.context import logger as report_logger
    from transformers import TrainerState

    report_logger.setLevel(logging.WARNING)  # it prints each report, as our reporter does
    config, output = TrainConfig(**job["config"]), Path(job["output"])
    context = ray.train.get_context()
    device = f"cuda:{torch.cuda.current_device()}" if job["use_gpu"] else "cpu"
    checkpoint = _broadcast(find_start(output) if context.get_world_rank() == 0 else None)

    os.environ["WANDB_RUN_ID"] = job["run_id"]  # the same after a restart, so that W&B draws one curve
    trainer = build_trainer(config, output, job["tokenised"], device)
    if config.watch_rows:
        trainer.watch = read_watch(
            job["tokenised"], trainer.processing_class, config.watch_rows, config.max_length, config.seed
        )
        if config.watch_beside is not False and config.best_by == "eval_loss":
            trainer.beside = WatchBeside(config, job["tokenised"], job["use_gpu"])
    if context.get_world_rank() == 0:
        trainer.best_adapter = read_best(checkpoint)
    started = time.monotonic()
    if checkpoint is not None and is_at_end(read_trainer_state(checkpoint)):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        load_adapter_weights(trainer.model, str(checkpoint))
    else:
        gc.collect()
        gc.freeze()  # the collector would go through every module and weight while the GPU waits for its next kernel
        with telling_of_a_full_disk(output):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.log_watched(wait=True)
    state = trainer.state
    if context.get_world_rank() == 0:
        save_adapter(trainer, trainer.processing_class, output, trainer.best_adapter)
        write_card(output, config.base_model, config.quantization, config.compute_dtype, config.max_length)
        best = next(
            (entry for entry in state.log_history if entry["step"] == state.best_global_step and "eval_loss" in entry),
            {},
        )
        result = {"steps": state.global_step, "epochs": round(state.epoch, 3), "eval_loss": best.get("eval_loss")}
        accuracy = best.get("eval_accuracy", (trainer.watched or {}).get(state.best_global_step, {}).get("accuracy"))
        result |= {"accuracy": accuracy} if accuracy is not None else {}
        result |= {
            "train_seconds": round(time.monotonic() - started, 1),
            "best_checkpoint": f"checkpoint-{best['step']}" if best else None,
        }
        result |= {"resumed_from": str(checkpoint or "")}
        write_atomic(output / "result.json", json.dumps(result) + "\n")
    torch.distributed.barrier()


def build_trainer(config: TrainConfig, output: Path, tokenised: str, device: str) -> "SFTTrainer":
    """Everything that a worker trains with."""
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.base_model)
    train, dev = (read_split(tokenised, split, config.max_length) for split in ("train", "dev"))
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = build_arguments(
        config, output, device.startswith("cuda"), world_size
    )  # first: DeepSpeed must be known of before the model is loaded
    model = load_base(config.base_model, config.quantization, config.compute_dtype, device, register_packed_attention())
    keep_weights_in_evaluations(model)
    model = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.target_modules)
    fused = speed_up(model)
    longest, step_tokens = max(map(len, train["input_ids"])), math.ceil(_mean_step_tokens(train, config) / world_size)
    choice = _broadcast(plan_memory(config, Shape.of(model.config), device, longest, step_tokens))
    recompute_layers(model, choice.recomputed_layers)
    train_batches, dev_batches = (
        GlobalBatches(
            rows,
            config.global_batch_size,
            arguments.process_index,
            world_size,
            choice.micro_batch_tokens,
            config.per_device_batch_size,
            seed,
        )
        for rows, seed in ((train, config.seed), (dev, None))
    )
    if arguments.process_index == 0:
        needed = f"{choice.estimate.total / GIB:.1f} GiB estimated" if device.startswith("cuda") else "on the CPU"
        shown = f"micro-batches of up to {choice.micro_batch_tokens} tokens, {choice.recomputed_layers} layers recomputed, {needed}"
        print(
            f"sft {output.name}: {shown}; fused: {', '.join(fused) or 'nothing'}; attention: {name_packed_kernel(device)}",
            flush=True,
        )
    early_stopping = [EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else []

    class Trainer(SealedCheckpoints, WatchedEvaluations, build_trainer_class()):
        keep_checkpoints = config.keep_checkpoints

    trainer = Trainer(
        model=model,
        batches=train_batches,
        eval_batches=dev_batches,
        args=arguments,
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
        callbacks=[build_reporter(output), *early_stopping],
    )
    trainer.remove_callback(PrinterCallback)  # the reporter prints
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data.float()
            )  # the trainer casts the adapters of a quantised base to bf16; small updates would be lost in it
    return trainer


def read_workload(config: TrainConfig, shape: Shape) -> Workload:
    """What the memory estimate needs to know of a config."""
    return Workload(
        shape,
        config.quantization,
        shape.adapter_parameters(config.lora_rank, config.target_modules),
        dropout=config.lora_dropout > 0,
        bytes_per_value=2 if config.compute_dtype == "bf16" else 4,
        optimizer_bytes=2 if "8bit" in config.optimizer else 8,
    )


def plan_memory(config: TrainConfig, shape: Shape, device: str, longest: int, step_tokens: int) -> Choice:
    """The micro-batch and recompute for a device; on a CPU memory is no limit."""
    import torch

    limit = config.memory_limit_gb * GIB
    if not limit:
        limit = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else 1024 * GIB
    return choose(
        read_workload(config, shape),
        limit,
        longest,
        step_tokens,
        config.activation_checkpointing,
        config.micro_batch_tokens,
    )


def _mean_step_tokens(rows: "datasets.Dataset", config: TrainConfig) -> float:
    return sum(map(len, rows["input_ids"])) / len(rows) * config.global_batch_size


def recompute_layers(model, count: int) -> None:
    """Recompute the activations of the first `count` decoder layers in the backward pass, and keep those of the others."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not count:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[count:]:
        layer.gradient_checkpointing = False


def is_at_end(state: Mapping) -> bool:
    """Whether training had ended when a checkpoint's trainer_state.json was written: by its last step or by early stopping."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return state["global_step"] >= state["max_steps"] or control.get("should_training_stop", False)


def build_arguments(config: TrainConfig, output: Path, use_gpu: bool, world_size: int):
    """TRL's arguments for a config. Raises ConfigError if it asks for DeepSpeed and there is none."""
    from trl import SFTConfig

    if config.parallel == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel zero2 needs DeepSpeed, which is not installed where the worker runs: pip install '.[zero]', or use parallel ddp."
        )

    when = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": config.eval_steps,
        "save_steps": config.eval_steps,
    }
    if not config.eval_steps:
        when = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    return SFTConfig(
        output_dir=str(output),
        run_name=output.name,
        per_device_train_batch_size=config.global_batch_size
        // world_size,  # a step's rows; `nli.training.batches` deals them into micro-batches
        gradient_accumulation_steps=1,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_fraction,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        bf16=config.parallel
        == "zero2",  # otherwise no autocast: the base is in its compute type, and the adapters follow it
        use_cpu=not use_gpu,
        gradient_checkpointing=False,  # `recompute_layers` has chosen
        deepspeed=ZERO2 if config.parallel == "zero2" else None,
        **when,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss" if config.best_by == "eval_loss" else "eval_accuracy",
        greater_is_better=config.best_by == "accuracy",
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.log_steps,
        report_to=choose_trackers(config, output),
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        max_length=None,  # `tokenise` has refused or dropped what is longer
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=use_gpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants
    )


def read_split(folder: str, split: str, max_length: int) -> "datasets.Dataset":
    """Tokenised rows of one split in the file's order, those over max_length left out."""
    import datasets
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder, filters=(pc.field("split") == split) & (pc.field("num_tokens") <= max_length))
    return datasets.Dataset(table.sort_by("line").select(["input_ids", "labels"]).combine_chunks())


def _broadcast(value):
    """Rank 0's value on every rank."""
    import torch

    box = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
