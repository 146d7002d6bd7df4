"""Stage 4: QLoRA SFT with TRL's trainer inside Ray Train.

In:   {"id": "0", "prompt": "[INST] Premise: …[/INST]", "completion": "{\"thought_process\": …}", …}   one line of data/finetune/reflected_train.jsonl
Out:  models/reflected/  adapter_model.safetensors, adapter_config.json, tokenizer, nli.json, log.jsonl, manifest.json, checkpoint-N/

Ray Data tokenises the rows into Parquet; every worker reads that and trains under DDP on the same global batch, whatever their number (`nli.training`). A
killed worker or driver goes on from the newest checkpoint whose files verify. The config is `nli.recipe`'s.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nli import tokenization
from nli.checkpoints import fingerprint_model, fingerprint_tokenizer, has_work
from nli.cluster import check_gpu_choice, connected, own_error, quiet_ray_data
from nli.config import as_dict
from nli.errors import ConfigError, DataError, ResumeError, StorageError
from nli.examples import shared_premises
from nli.model import check_base
from nli.prompts import student_prompt_sha256
from nli.recipe import FREE_FIELDS, TrainConfig
from nli.records import SFTExample, content_hash
from nli.runs import describe_differences, read_manifest, start_run
from nli.storage import read_jsonl, resolve_input, resolve_output, sha256_file, summarise_faults
from nli.tokenization import encode_example, load_tokenizer
from nli.training import train_worker


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
    settled = {name: value for name, value in as_dict(config).items() if name not in FREE_FIELDS}
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
