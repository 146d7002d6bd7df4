"""Stage 4: QLoRA SFT with TRL's trainer inside Ray Train.

In:   {"id": "0", "prompt": "[INST] Premise: …[/INST]", "completion": "{\"thought_process\": …}", …}   one line of data/finetune/reflected_train.jsonl
Out:  models/reflected/  adapter_model.safetensors, adapter_config.json, tokenizer, nli.json, log.jsonl, manifest.json, checkpoint-N/

Ray Data tokenises the rows into Parquet; every worker reads that and trains under DDP on the same global batch, whatever their number. A killed worker or
driver goes on from the newest checkpoint whose files verify.
"""

import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nli import tokenization
from nli.checkpoints import (
    check_best,
    find_best,
    find_newest_complete,
    fingerprint_model,
    fingerprint_tokenizer,
    has_work,
    mark_complete,
    read_trainer_state,
    write_card,
)
from nli.cluster import check_gpu_choice, connected, own_error, quiet_ray_data
from nli.config import Count, CountOrZero, Fraction, NonNegative, Positive, as_dict, config_class
from nli.errors import ConfigError, DataError, ResumeError, StorageError
from nli.examples import shared_premises
from nli.model import add_lora, check_base, keep_weights_in_evaluations, load_adapter_weights, load_base, quiet_libraries
from nli.prompts import student_prompt_sha256
from nli.records import SFTExample, content_hash
from nli.runs import describe_differences, read_manifest, start_run
from nli.storage import dump_line, read_jsonl, resolve_input, resolve_output, sha256_file, summarise_faults, write_atomic
from nli.tokenization import encode_example, load_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerCallback


@config_class
class TrainConfig:
    """Train LoRA adapters on a 4-bit base. The default trains on sample rows and writes a sample model."""

    base_model: str = "mistralai/Mistral-7B-v0.3"
    """causal LM: a folder or a hub name"""
    train_file: str = "data/finetune/sample_reflected_train.jsonl"
    """training rows of stage 3, JSON Lines"""
    dev_file: str = "data/finetune/sample_reflected_dev.jsonl"
    """rows for the eval loss, JSON Lines; none of them may be in the training file"""
    output_dir: str = "models/sample-reflected"
    """folder of the adapter, its checkpoints and logs"""

    quantization: Literal["nf4", "none"] = "nf4"
    """base weights: NF4 with double quantisation, or as they are"""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """type that matrix products run in; adapters keep fp32 master weights"""
    lora_rank: Count = 32
    """rank of the adapters"""
    lora_alpha: Count = 64
    """scale of the adapters: their product is multiplied by lora_alpha / lora_rank"""
    lora_dropout: Fraction = 0.05
    """dropout before the adapters, 0 to below 1"""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """linear layers that get adapters"""

    learning_rate: Positive = 2e-4
    """peak learning rate"""
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """course of the learning rate after warm-up"""
    warmup_fraction: Fraction = 0.03
    """share of all steps in which the rate rises from 0, 0 to below 1"""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay"""
    max_grad_norm: NonNegative = 1.0
    """gradients are scaled down to this norm; 0: never"""
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW in fp32, or with 8-bit state"""
    epochs: Positive = 5.0
    """passes over the training rows; early stopping may end sooner"""
    max_steps: CountOrZero = 0
    """end after so many optimizer steps; 0: by epochs"""
    global_batch_size: Count = 64
    """rows per optimizer step over all workers"""
    per_device_batch_size: Count = 16
    """rows per forward pass of one worker; the accumulation follows"""
    max_length: Count = 512
    """most tokens of prompt, completion, BOS and EOS together"""
    drop_overlong: bool = False
    """leave out rows over max_length, with a message, instead of refusing the file"""
    activation_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, slower"""

    eval_steps: CountOrZero = 0
    """optimizer steps between evaluations (and checkpoints); 0: once per epoch"""
    early_stopping_patience: CountOrZero = 3
    """evaluations without a better eval loss before training ends; 0: never"""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """checkpoints kept, the best one always among them"""
    log_steps: Count = 10
    """optimizer steps between log lines"""
    seed: CountOrZero = 42
    """seed of adapters, order and dropout"""

    num_workers: Count = 1
    """training workers, one GPU each; they share the global batch"""
    cpus_per_worker: Count = 1
    """CPU cores of one worker"""
    use_gpu: bool | None = None
    """train on GPUs; None: if the cluster has any"""
    gpu: CountOrZero | None = None
    """index of the GPU to use on this machine, by one worker; refused on a cluster"""
    max_failures: CountOrZero = 3
    """times that lost workers are started again"""
    wandb: bool = True
    """log to Weights & Biases, offline without WANDB_API_KEY"""
    wandb_project: str = "mistral-nli"
    """project of the W&B run"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        rows = self.num_workers * self.per_device_batch_size
        if self.global_batch_size % rows:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is no multiple of num_workers x per_device_batch_size "
                f"({self.num_workers} x {self.per_device_batch_size} = {rows}); change one of the three."
            )
        if self.gpu is not None and self.num_workers > 1:
            raise ConfigError(f"gpu {self.gpu} is one GPU and num_workers {self.num_workers} need one each; leave gpu out, or train with one worker.")
        if self.gpu is not None and self.use_gpu is False:
            raise ConfigError(f"gpu {self.gpu} picks a GPU and use_gpu=False trains without one; leave one of the two out.")


# What may differ between two attempts at the same run: places, hardware, and how much is logged or kept.
_FREE_FIELDS = {
    *("base_model", "train_file", "dev_file", "output_dir", "storage_root", "num_workers", "cpus_per_worker", "use_gpu", "gpu", "max_failures", "wandb"),
    *("wandb_project", "log_steps", "keep_checkpoints", "per_device_batch_size", "activation_checkpointing"),
}


@dataclass(frozen=True)
class FitPlan:
    """A checked training run: absolute paths and tokenised rows."""

    config: TrainConfig
    output: Path
    inputs: tuple[Path, Path]
    identity: dict


def run(config: TrainConfig) -> Path:
    """Train, or go on with a run that was interrupted; returns the adapter's folder.

    Raises ConfigError, DataError, ModelError or StorageError before any GPU is used, and ResumeError if the folder holds another run.
    """
    check_gpu_choice(config.gpu, config.use_gpu)
    plan = plan_fit(config)
    if (finished := read_finished(plan)) is not None:
        print(f"sft: {plan.output} is finished already (eval loss {show_loss(finished['eval_loss'])})", flush=True)
        return plan.output
    check_folder(plan)
    with connected(config.gpu):
        fit(plan)
    return plan.output


def plan_fit(config: TrainConfig) -> FitPlan:
    """Resolve paths and check base, tokenizer, rows and splits, without Ray and without loading weights."""
    train, dev = resolve_input(config.train_file, config.storage_root), resolve_input(config.dev_file, config.storage_root)
    output = resolve_output(config.output_dir, config.storage_root)
    check_splits(train, dev, read_jsonl(train, SFTExample), read_jsonl(dev, SFTExample))
    base = config.base_model
    if (local := Path(os.path.abspath(base))).is_dir():
        base = str(local)
    check_base(base)
    load_tokenizer(base)
    settled = {name: value for name, value in as_dict(config).items() if name not in _FREE_FIELDS}
    identity = {
        "base": fingerprint_model(base),
        "train_sha256": sha256_file(train),
        "dev_sha256": sha256_file(dev),
        "student_prompt_sha256": student_prompt_sha256(),
        **settled,
    }
    return FitPlan(TrainConfig(**(as_dict(config) | {"base_model": base})), output, (train, dev), identity)


def check_splits(train: Path, dev: Path, train_rows: Sequence[Mapping], dev_rows: Sequence[Mapping]) -> None:
    """Raise DataError if a pair stands in both files; say how many premises do."""
    lines = {(row["premise"], row["hypothesis"]): number for number, row in enumerate(train_rows, start=1)}
    faults = [
        f"{dev}:{number}: the pair stands in {train}:{lines[pair]} too"
        for number, row in enumerate(dev_rows, start=1)
        if (pair := (row["premise"], row["hypothesis"])) in lines
    ]
    if faults:
        raise DataError(summarise_faults(faults, "a dev row that was trained on measures nothing; remove these rows from one of the files"))
    shared = shared_premises(train_rows, dev_rows)
    if shared:
        print(f"sft: warning: {len(shared)} premises stand in both {train.name} and {dev.name}; the eval loss is a little too good", flush=True)


def read_finished(plan: FitPlan) -> dict | None:
    """The counts of a finished run in the plan's folder, None if it is unfinished or not begun. Raises ResumeError if it is another run."""
    manifest = read_manifest(plan.output / "manifest.json")
    if manifest is None or manifest["status"] != "finished" or manifest["identity"] != json.loads(json.dumps(plan.identity)):
        return None  # check_folder refuses another identity, with the difference
    return manifest["counts"]


def check_folder(plan: FitPlan) -> None:
    """Raise ResumeError if the plan's folder holds another run, or files that are no run's. A run that made nothing yet is in nobody's way."""
    manifest = read_manifest(plan.output / "manifest.json")
    if manifest is None:
        if plan.output.exists() and any(not path.name.startswith(".") for path in plan.output.iterdir()):
            raise ResumeError(f"{plan.output} is not empty and holds no run of this project; choose another output_dir.")
        return
    differences = describe_differences(manifest["identity"], json.loads(json.dumps(plan.identity)))
    if differences and (manifest["status"] == "finished" or has_work(plan.output)):
        cure = "Choose another output_dir, or move the earlier run away; nothing was changed."
        raise ResumeError(f"{plan.output} holds a run that was made another way:\n  " + "\n  ".join(differences) + f"\n{cure}")


def check_room(config: TrainConfig, use_gpu: bool, extra_cpus: float = 0.0) -> None:
    """Raise ConfigError if the connected cluster has less CPUs or GPUs than the workers reserve, for Ray would wait for more without end.

    Whether a cluster grows cannot be asked of Ray. One that is this machine alone does not, unless `ray up` made it (its ~/ray_bootstrap_config.yaml is
    there) or it runs in Kubernetes. Where it may grow, a line says what is waited for. `extra_cpus` is what the caller reserves beside the workers.
    """
    import ray

    have = ray.cluster_resources()
    needed = {name: amount * config.num_workers for name, amount in worker_resources(config, use_gpu).items()}
    needed["CPU"] += extra_cpus
    short = [name for name, amount in needed.items() if have.get(name, 0) < amount]
    if not short:
        return
    alone = sum(node["Alive"] for node in ray.nodes()) <= 1
    grows = not alone or Path("~/ray_bootstrap_config.yaml").expanduser().exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    for name in short:
        if grows:
            print(f"sft: waiting for {needed[name]:g} {name}s; the cluster has {have.get(name, 0):g} now", flush=True)
        else:
            raise ConfigError(
                f"num_workers {config.num_workers} need {needed[name]:g} {name}s and the cluster has {have.get(name, 0):g}. "
                "Take fewer workers (num_workers, cpus_per_worker), or join a larger cluster."
            )


def show_loss(loss: float | None) -> str:
    """A loss for the console; None stands for one that was never finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def fit(plan: FitPlan, callbacks: Sequence = ()) -> dict:
    """Train by Ray Train; returns the result, which is in the manifest too. `callbacks` are Ray Train's (a sweep passes its reporter)."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = plan.config
    check_folder(plan)
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    check_room(config, use_gpu)
    tokenised, num_dropped = tokenise(plan)  # before the manifest: what it refuses can be mended by another config
    record = start_run(plan.output / "manifest.json", "sft", plan.identity, config, plan.inputs, has_work=has_work(plan.output))
    state = plan.output / "ray_train"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": as_dict(config), "output": str(plan.output), "tokenised": str(tokenised), "use_gpu": use_gpu},
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=worker_resources(config, use_gpu)),
        # A name of its own for each attempt: Ray would otherwise take up its own record of the last one, and one bad byte in that ends the run.
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(state),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise own_error(error) or error from None
    shutil.rmtree(state, ignore_errors=True)
    result = json.loads((plan.output / "result.json").read_text(encoding="utf-8")) | {"dropped_overlong": num_dropped}
    record.finish(result)
    print(f"sft: {plan.output}: eval loss {show_loss(result['eval_loss'])} after {result['steps']} steps ({result['train_seconds']:.0f} s)", flush=True)
    return result


def worker_resources(config: TrainConfig, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for one training worker."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})


def tokenise(plan: FitPlan) -> tuple[Path, int]:
    """Tokenise both files by Ray Data into a folder of Parquet; returns it and how many overlong rows were left out.

    The folder is kept for runs of the same rows, tokenizer and code. Raises DataError that names the rows that cannot be encoded, or are longer than
    max_length where they may not be dropped, and StorageError if rows were lost on their way to the disk.
    """
    import pyarrow.parquet as pq
    import ray
    import transformers

    config = plan.config
    code = Path(tokenization.__file__).read_text(encoding="utf-8")
    tokenizer = [fingerprint_tokenizer(config.base_model), code, transformers.__version__]
    parts = [plan.identity["train_sha256"], plan.identity["dev_sha256"], plan.identity["base"], *tokenizer]
    folder = plan.output.parent / ".tokenised" / content_hash(parts)
    if not folder.exists():
        items = [
            {"split": split, "line": line, "prompt": row["prompt"], "completion": row["completion"]}
            for split, path in zip(("train", "dev"), plan.inputs, strict=True)
            for line, row in enumerate(read_jsonl(path, SFTExample), start=1)
        ]
        quiet_ray_data()
        blocks = max(1, min(64, len(items) // 1000))
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")  # write_parquet adds to a folder that is there
        dataset = ray.data.from_items(items, override_num_blocks=blocks)
        try:
            dataset.map_batches(tokenise_batch, fn_kwargs={"tokenizer_path": config.base_model}, batch_format="pyarrow").write_parquet(str(aside))
            move_tokenised(aside, folder, len(items))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    table = pq.read_table(folder, columns=["split", "line", "num_tokens", "problem"])
    paths = dict(zip(("train", "dev"), plan.inputs, strict=True))
    rows = sorted(table.to_pylist(), key=lambda row: (row["split"], row["line"]))
    faults = [f"{paths[row['split']]}:{row['line']}: {row['problem']}" for row in rows if row["problem"]]
    overlong = [row for row in rows if row["num_tokens"] > config.max_length]
    if overlong and not config.drop_overlong:
        faults += [f"{paths[row['split']]}:{row['line']}: {row['num_tokens']} tokens, over max_length {config.max_length}" for row in overlong]
    if faults:
        raise DataError(summarise_faults(faults, "mend the rows, raise max_length, or leave long rows out with --drop-overlong"))
    for row in overlong:
        print(f"sft: {paths[row['split']]}:{row['line']}: {row['num_tokens']} tokens, over max_length {config.max_length}: left out", flush=True)
    return folder, len(overlong)


def move_tokenised(aside: Path, folder: Path, num_rows: int) -> None:
    """Give a finished folder of Parquet its name; one that another run made meanwhile stays. Raises StorageError if it has not `num_rows` rows."""
    import pyarrow.parquet as pq

    found = pq.read_table(aside, columns=["line"]).num_rows
    if found != num_rows:
        raise StorageError(f"{aside}: {found} tokenised rows instead of {num_rows} are on the disk; run the command again.")
    try:
        aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise StorageError(f"{folder}: cannot be written ({error.strerror}).") from error


def tokenise_batch(table, tokenizer_path: str):
    """Columns prompt and completion of a pyarrow table become input_ids, labels, num_tokens and problem ('' when the row is good)."""
    import pyarrow as pa

    tokenizer = load_tokenizer(tokenizer_path)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "num_tokens": [], "problem": []}
    for prompt, completion in zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True):
        try:
            example = encode_example(tokenizer, prompt, completion)
            values = (example.input_ids, example.labels, len(example.input_ids), "")
        except DataError as error:
            values = ([], [], 0, str(error))
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    ids = pa.list_(pa.int32())
    arrays = [pa.array(columns["input_ids"], ids), pa.array(columns["labels"], ids), pa.array(columns["num_tokens"]), pa.array(columns["problem"])]
    return pa.table([table["split"], table["line"], *arrays], names=["split", "line", *columns])


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
    checkpoint, best = find_start(output) if context.get_world_rank() == 0 else (None, None)
    checkpoint, best = _broadcast((checkpoint, best))

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.base_model)
    model = load_base(config.base_model, config.quantization, config.compute_dtype, device)
    keep_weights_in_evaluations(model)
    model = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.target_modules)
    early_stopping = [EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else []
    trainer = SFTTrainer(
        model=model,
        args=build_arguments(config, output, job["use_gpu"], context.get_world_size()),
        train_dataset=read_split(job["tokenised"], "train", config.max_length),
        eval_dataset=read_split(job["tokenised"], "dev", config.max_length),
        processing_class=tokenizer,
        callbacks=[build_reporter(output, best), *early_stopping],
    )
    trainer.remove_callback(PrinterCallback)  # the reporter prints
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the trainer casts the adapters of a quantised base to bf16; small updates would be lost in it
    started = time.monotonic()
    if checkpoint is not None and is_at_end(read_trainer_state(checkpoint)):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        load_adapter_weights(trainer.model, str(best or checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        best = Path(trainer.state.best_model_checkpoint) if trainer.state.best_model_checkpoint else None
    state = trainer.state
    losses = [entry["eval_loss"] for entry in state.log_history if math.isfinite(entry.get("eval_loss", math.nan))]
    if context.get_world_rank() == 0:
        if best is not None:
            check_best(best)
            load_adapter_weights(trainer.model, str(best))
        trainer.save_model(str(output))
        tokenizer.save_pretrained(str(output))
        write_card(output, config.base_model, config.quantization, config.compute_dtype, config.max_length)
        result = {"steps": state.global_step, "epochs": round(state.epoch, 3), "eval_loss": min(losses, default=None)}
        result |= {"train_seconds": round(time.monotonic() - started, 1), "best_checkpoint": best.name if best else None}
        result |= {"resumed_from": str(checkpoint or "")}
        write_atomic(output / "result.json", json.dumps(result) + "\n")
    torch.distributed.barrier()


def find_start(output: Path) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from and the best one of those before it. Log lines of steps that will be made again go.

    Raises ModelError if the best one is missing or damaged.
    """
    checkpoint = find_newest_complete(output)
    best = find_best(output, checkpoint) if checkpoint else None
    log = output / "log.jsonl"
    if log.exists():
        last = read_trainer_state(checkpoint)["global_step"] if checkpoint else -1
        lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]  # a kill may cut the last one
        write_atomic(log, "".join(line for line in lines if json.loads(line)["step"] <= last))
    return checkpoint, best


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
        save_total_limit=config.keep_checkpoints,
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


def build_reporter(output: Path, best: Path | None) -> "TrainerCallback":
    """A callback that logs to log.jsonl and the console, seals checkpoints and reports evaluations to Ray.

    `best` is the best checkpoint of the run that is resumed, where it lies now: the one that the trainer's state names may have lain elsewhere.
    """
    import ray.train
    import torch
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.best_model_checkpoint = str(best) if best else None

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

        def on_save(self, args, state, control, **kwargs):
            torch.distributed.barrier()  # every rank has written its part
            if state.is_world_process_zero:
                mark_complete(output / f"checkpoint-{state.global_step}")

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            ray.train.report({"step": state.global_step, "epoch": state.epoch, "eval_loss": metrics["eval_loss"]})
            if not math.isfinite(metrics["eval_loss"]):
                metrics["eval_loss"] = math.inf  # a NaN would stay the best loss for ever: no number is below it

    return Reporter()


def _broadcast(value):
    """Rank 0's value on every rank."""
    import torch

    box = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
