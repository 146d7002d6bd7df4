"""Stage 4: QLoRA SFT with TRL's trainer inside Ray Train.

In:   {"id": "0", "prompt": "[INST] Premise: …[/INST]", "completion": "{\"thought_process\": …}", …}   one line of data/finetune/reflected_train.jsonl
Out:  models/reflected/  adapter_model.safetensors, adapter_config.json, tokenizer, nli.json, log.jsonl, manifest.json, checkpoint-N/

Ray Data tokenises the rows into Parquet; every worker reads that and trains under DDP on the same global batch, whatever their number (`nli.training.worker`). A
killed worker or driver goes on from the newest checkpoint whose files verify. The config is `nli.training.config`'s.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nli.models import tokenizer as tokenization
from nli.models.checkpoints import fingerprint_model, fingerprint_tokenizer, has_work
from nli.models.load import check_base
from nli.models.tokenizer import load_tokenizer
from nli.runtime.cluster import (
    check_gpu_choice,
    check_workers_fit,
    connected,
    keeping_interrupts,
    own_error,
    quiet_ray_data,
)
from nli.runtime.config import as_dict
from nli.runtime.errors import ResumeError, StorageError
from nli.runtime.files import resolve_input, resolve_model, resolve_output, sha256_file, write_atomic
from nli.runtime.manifest import describe_differences, read_manifest, start_run
from nli.task.prompts import student_prompt_sha256
from nli.task.records import content_hash
from nli.training import preflight
from nli.training.config import FREE_FIELDS, TrainConfig
from nli.training.preflight import (
    Splits,
    check_splits,
    describe_overlong,
    find_token_faults,
    list_items,
    raise_faults,
    read_splits,
    tokenise_batch,
    tokenise_here,
)
from nli.training.preflight_report import check_disk, describe_run, wants_colour
from nli.training.worker import train_worker

_SHOWN = ("rows", "steps", "time", "memory", "leakage")  # of the preflight's report, where a run starts


@dataclass(frozen=True)
class FitPlan:
    """A checked training run: absolute paths, and what decides its result."""

    config: TrainConfig
    output: Path
    inputs: tuple[Path, Path]
    identity: dict


def run(config: TrainConfig) -> Path:
    """Train, or go on with a run that was interrupted; returns the adapter's folder. With `preflight`, only say what the run will be like.

    Raises ConfigError, DataError, ModelError or StorageError before any GPU is used, and ResumeError if the folder holds another run.
    """
    check_gpu_choice(config.gpu, config.use_gpu)
    plan = plan_fit(config)
    if config.preflight:
        show_preflight(plan)
        return plan.output
    if (finished := read_finished(plan)) is not None:
        print(f"sft: {plan.output} is finished already (eval loss {show_loss(finished['eval_loss'])})", flush=True)
        return plan.output
    check_folder(plan)
    with connected(config.gpu):
        fit(plan)
    return plan.output


def plan_fit(config: TrainConfig) -> FitPlan:
    """Resolve paths and check base, tokenizer, rows and splits, without Ray and without loading weights."""
    train, dev = (
        resolve_input(config.train_file, config.storage_root),
        resolve_input(config.dev_file, config.storage_root),
    )
    output = resolve_output(config.output_dir, config.storage_root)
    base = resolve_model(config.base_model, config.storage_root)
    check_splits((train, dev), base, config.max_length, config.drop_overlong)
    check_base(base)
    load_tokenizer(base)
    free = FREE_FIELDS | ({"watch_rows"} if config.best_by == "eval_loss" else set())
    settled = {name: value for name, value in as_dict(config).items() if name not in free}
    identity = {
        "base": fingerprint_model(base),
        "tokenizer": fingerprint_tokenizer(base),
        "train_sha256": sha256_file(train),
        "dev_sha256": sha256_file(dev),
        "student_prompt_sha256": student_prompt_sha256(),
        **settled,
    }
    return FitPlan(TrainConfig(**(as_dict(config) | {"base_model": base})), output, (train, dev), identity)


def read_finished(plan: FitPlan) -> dict | None:
    """The counts of a finished run in the plan's folder, None if it is unfinished or not begun. Raises ResumeError if it is another run."""
    manifest = read_manifest(plan.output / "manifest.json")
    if (
        manifest is None
        or manifest["status"] != "finished"
        or manifest["identity"] != json.loads(json.dumps(plan.identity))
    ):
        return None  # check_folder refuses another identity, with the difference
    return manifest["counts"]


def check_folder(plan: FitPlan) -> None:
    """Raise ResumeError if the plan's folder holds another run, or files that are no run's. A run that made nothing yet is in nobody's way."""
    manifest = read_manifest(plan.output / "manifest.json")
    if manifest is None:
        if plan.output.exists() and any(not path.name.startswith(".") for path in plan.output.iterdir()):
            raise ResumeError(
                f"{plan.output} is not empty and holds no run of this project; choose another output_dir."
            )
        return
    differences = describe_differences(manifest["identity"], json.loads(json.dumps(plan.identity)))
    if differences and (manifest["status"] == "finished" or has_work(plan.output)):
        cure = "Choose another output_dir, or move the earlier run away; nothing was changed."
        raise ResumeError(
            f"{plan.output} holds a run that was made another way:\n  " + "\n  ".join(differences) + f"\n{cure}"
        )


def check_room(config: TrainConfig, extra_cpus: float = 0.0, is_next: bool = True) -> bool:
    """`check_workers_fit` for the workers of a training; returns whether they use GPUs. `extra_cpus` is what the caller reserves beside them."""
    import ray

    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    check_workers_fit(config.num_workers, worker_resources(config, use_gpu), "sft", extra_cpus, is_next)
    return use_gpu


def show_preflight(plan: FitPlan) -> None:
    """Print the whole report of a run and start nothing. Raises what `fit` would raise: for a row that cannot be trained on, a disk too small, another run."""
    config = plan.config
    splits = read_splits(plan.inputs)
    table = tokenise_here(splits, config.base_model)
    report = describe_run(config, splits, table, plan.output, colour=wants_colour(sys.stdout))
    print(report.render(), flush=True)
    raise_faults(splits, find_token_faults(splits, table, config.max_length, config.drop_overlong))
    check_disk(report, plan.output)
    check_folder(plan)
    print(f"preflight: nothing stands in the way of {plan.output}", flush=True)


def show_loss(loss: float | None) -> str:
    """A loss for the console; None stands for one that was never finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def fit(plan: FitPlan, callbacks: Sequence = ()) -> dict:
    """Train by Ray Train; returns the result, which is in the manifest too. `callbacks` are Ray Train's (a sweep passes its reporter)."""
    import pyarrow.parquet as pq
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = plan.config
    check_folder(plan)
    use_gpu = check_room(config)
    splits = read_splits(plan.inputs)
    tokenised, num_dropped = tokenise(
        plan, splits
    )  # before the manifest: what it refuses can be mended by another config
    report = describe_run(config, splits, pq.read_table(tokenised), plan.output, on_cpu=not use_gpu)
    check_disk(report, plan.output)
    record = start_run(
        plan.output / "manifest.json", "sft", plan.identity, config, plan.inputs, has_work=has_work(plan.output)
    )
    write_atomic(plan.output / "preflight.txt", report.render() + "\n")
    for line in report.render(_SHOWN).splitlines():
        print(f"sft {plan.output.name}: {line}", flush=True)
    run_id = content_hash([str(plan.output), record.manifest["attempts"][0]["started"]])
    state = plan.output / "ray_train"
    os.environ.setdefault(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
    )  # each report, so each save, waits for Ray's next look: 2 s by default
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": as_dict(config),
            "output": str(plan.output),
            "tokenised": str(tokenised),
            "use_gpu": use_gpu,
            "run_id": run_id,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=worker_resources(config, use_gpu)
        ),
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
        with keeping_interrupts():
            trainer.fit()
    except Exception as error:
        raise own_error(error) or error from None
    shutil.rmtree(state, ignore_errors=True)
    result = json.loads((plan.output / "result.json").read_text(encoding="utf-8")) | {"dropped_overlong": num_dropped}
    record.finish(result)
    print(
        f"sft: {plan.output}: eval loss {show_loss(result['eval_loss'])} after {result['steps']} steps ({result['train_seconds']:.0f} s)",
        flush=True,
    )
    return result


def worker_resources(config: TrainConfig, use_gpu: bool) -> dict[str, float]:
    """What Ray reserves for one training worker."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})


def tokenise(plan: FitPlan, splits: Splits) -> tuple[Path, int]:
    """Tokenise both files by Ray Data into a folder of Parquet; returns it and how many overlong rows were left out.

    The folder is kept for runs of the same rows, tokenizer and code. Raises DataError that names the rows that cannot be encoded, or are longer than
    max_length where they may not be dropped, and StorageError if rows were lost on their way to the disk.
    """
    import pyarrow.parquet as pq
    import ray
    import transformers

    config = plan.config
    code = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (tokenization, preflight))
    tokenizer = [fingerprint_tokenizer(config.base_model), code, transformers.__version__]
    parts = [plan.identity["train_sha256"], plan.identity["dev_sha256"], plan.identity["base"], *tokenizer]
    folder = plan.output.parent / ".tokenised" / content_hash(parts)
    if not folder.exists():
        items = list_items(splits)
        quiet_ray_data()
        blocks = max(1, min(64, len(items) // 1000))
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")  # write_parquet adds to a folder that is there
        dataset = ray.data.from_items(items, override_num_blocks=blocks)
        try:
            dataset.map_batches(
                tokenise_batch, fn_kwargs={"tokenizer_path": config.base_model}, batch_format="pyarrow"
            ).write_parquet(str(aside))
            move_tokenised(aside, folder, len(items))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    table = pq.read_table(folder, columns=["split", "line", "num_tokens", "problem"])
    raise_faults(splits, find_token_faults(splits, table, config.max_length, config.drop_overlong))
    overlong = describe_overlong(splits, table, config.max_length)
    for text in overlong:
        print(f"sft: {text}: left out", flush=True)
    return folder, len(overlong)


def move_tokenised(aside: Path, folder: Path, num_rows: int) -> None:
    """Give a finished folder of Parquet its name; one that another run made meanwhile stays. Raises StorageError if it has not `num_rows` rows."""
    import pyarrow.parquet as pq

    found = pq.read_table(aside, columns=["line"]).num_rows
    if found != num_rows:
        raise StorageError(
            f"{aside}: {found} tokenised rows instead of {num_rows} are on the disk; run the command again."
        )
    try:
        aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise StorageError(f"{folder}: cannot be written ({error.strerror}).") from error
