"""What one Ray Train worker does: train adapters with TRL's trainer from the newest good checkpoint, and save the best.

In:   a TrainConfig and a folder of tokenised rows (Parquet: split, line, input_ids, labels, num_tokens)
Out:  the run's folder: adapter_model.safetensors, adapter_config.json, tokenizer, nli.json, log.jsonl, result.json, checkpoint-N/
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nli.checkpoints import read_trainer_state, write_card
from nli.model import add_lora, keep_weights_in_evaluations, load_adapter_weights, load_base, quiet_libraries
from nli.recipe import TrainConfig
from nli.records import content_hash
from nli.saving import SealedCheckpoints, find_start, read_best, save_adapter
from nli.storage import dump_line, write_atomic
from nli.tokenization import load_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerCallback


def train_worker(job: dict) -> None:
    """What one Ray Train worker does: load the base, put adapters on it, train from the newest good checkpoint, save the best adapter."""
    quiet_libraries()
    import ray.train
    import torch
    from ray.train.v2._internal.execution.context import logger as report_logger
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState, set_seed
    from trl import SFTTrainer

    report_logger.setLevel(logging.WARNING)  # it prints each report, as our reporter does
    config, output = TrainConfig(**job["config"]), Path(job["output"])
    context = ray.train.get_context()
    device = f"cuda:{torch.cuda.current_device()}" if job["use_gpu"] else "cpu"
    checkpoint = _broadcast(find_start(output) if context.get_world_rank() == 0 else None)

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.base_model)
    model = load_base(config.base_model, config.quantization, config.compute_dtype, device)
    keep_weights_in_evaluations(model)
    model = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.target_modules)
    early_stopping = [EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else []

    class Trainer(SealedCheckpoints, SFTTrainer):
        keep_checkpoints = config.keep_checkpoints

    trainer = Trainer(
        model=model,
        args=build_arguments(config, output, job["use_gpu"], context.get_world_size()),
        train_dataset=read_split(job["tokenised"], "train", config.max_length),
        eval_dataset=read_split(job["tokenised"], "dev", config.max_length),
        processing_class=tokenizer,
        callbacks=[build_reporter(output), *early_stopping],
    )
    trainer.remove_callback(PrinterCallback)  # the reporter prints
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the trainer casts the adapters of a quantised base to bf16; small updates would be lost in it
    if context.get_world_rank() == 0:
        trainer.best_adapter = read_best(checkpoint)
    started = time.monotonic()
    if checkpoint is not None and is_at_end(read_trainer_state(checkpoint)):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        load_adapter_weights(trainer.model, str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    losses = [entry["eval_loss"] for entry in state.log_history if math.isfinite(entry.get("eval_loss", math.nan))]
    if context.get_world_rank() == 0:
        save_adapter(trainer, tokenizer, output, trainer.best_adapter)
        write_card(output, config.base_model, config.quantization, config.compute_dtype, config.max_length)
        result = {"steps": state.global_step, "epochs": round(state.epoch, 3), "eval_loss": min(losses, default=None)}
        best = f"checkpoint-{state.best_global_step}" if trainer.best_adapter is not None else None
        result |= {"train_seconds": round(time.monotonic() - started, 1), "best_checkpoint": best}
        result |= {"resumed_from": str(checkpoint or "")}
        write_atomic(output / "result.json", json.dumps(result) + "\n")
    torch.distributed.barrier()


def is_at_end(state: Mapping) -> bool:
    """Whether training had ended when a checkpoint's trainer_state.json was written: by its last step or by early stopping."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return state["global_step"] >= state["max_steps"] or control.get("should_training_stop", False)


def build_arguments(config: TrainConfig, output: Path, use_gpu: bool, world_size: int):
    """TRL's arguments for a config."""
    from trl import SFTConfig

    reports = ["tensorboard"]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    if config.wandb:
        reports.append("wandb")
        os.environ |= {"WANDB_PROJECT": config.wandb_project, "WANDB_DIR": str(output), "WANDB_RUN_ID": content_hash([str(output)]), "WANDB_RESUME": "allow"}
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")
    when = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": config.eval_steps, "save_steps": config.eval_steps}
    if not config.eval_steps:
        when = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    return SFTConfig(
        output_dir=str(output),
        run_name=output.name,
        per_device_train_batch_size=config.per_device_batch_size,
        per_device_eval_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.global_batch_size // (config.per_device_batch_size * world_size),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_fraction,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        bf16=config.compute_dtype == "bf16",
        use_cpu=not use_gpu,
        gradient_checkpointing=config.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.activation_checkpointing else None,
        **when,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.log_steps,
        report_to=reports,
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        max_length=None,  # `tokenise` has refused or dropped what is longer
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=use_gpu,
        ddp_find_unused_parameters=False,
    )


def read_split(folder: str, split: str, max_length: int) -> "datasets.Dataset":
    """Tokenised rows of one split in the file's order, those over max_length left out."""
    import datasets
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder, filters=(pc.field("split") == split) & (pc.field("num_tokens") <= max_length))
    return datasets.Dataset(table.sort_by("line").select(["input_ids", "labels"]).combine_chunks())


def build_reporter(output: Path) -> "TrainerCallback":
    """A callback that logs to log.jsonl and the console, and reports evaluations to Ray once their checkpoint is in its place."""
    import ray.train
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        evaluation: dict | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step and state.is_world_process_zero:
                with open(output / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(dump_line({"step": state.global_step, "resumed_from": f"checkpoint-{state.global_step}"}))
                print(f"sft {output.name}: goes on from checkpoint-{state.global_step}", flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero or logs is None:
                return
            with open(output / "log.jsonl", "a", encoding="utf-8") as file:
                finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()}
                file.write(dump_line({"step": state.global_step, **finite}))
            shown = {name: logs[name] for name in ("loss", "eval_loss", "grad_norm", "learning_rate") if name in logs}
            if shown:
                values = ", ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
                print(f"sft {output.name}: step {state.global_step}/{state.max_steps}, {values}", flush=True)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.evaluation = {"step": state.global_step, "epoch": state.epoch, "eval_loss": metrics["eval_loss"]}
            if not math.isfinite(metrics["eval_loss"]):
                metrics["eval_loss"] = math.inf  # a NaN would stay the best loss for ever: no number is below it

        def on_save(self, args, state, control, **kwargs):
            if self.evaluation is not None:
                ray.train.report(self.evaluation)
                self.evaluation = None

    return Reporter()


def _broadcast(value):
    """Rank 0's value on every rank."""
    import torch

    box = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
