"""Stage 6: a base, adapter or checkpoint answers a set of pairs, spread over actors by Ray Data.

In:   a CSV of pairs, labelled or not (the file tells), and a model: a hub name, a model folder, an adapter folder or its checkpoint-N
Out:  results/{run_name}.jsonl   Answers in input order, what evaluate_predictions reads
      results/{run_name}.csv     id, premise, hypothesis, true_label, predicted_label, parse_status
      results/{run_name}.json    configuration, counts, accuracy if labelled, timing, and the rows

Without --run-name the files are called {model}-{dataset}-{timestamp}; an interrupted run of the same model, data and settings is taken up again.
"""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from nli.checkpoints import describe_model, fingerprint_model
from nli.cluster import check_gpu_choice, connected, spread
from nli.config import Count, CountOrZero, config_class
from nli.engines import Decoding, EngineSettings, Generation, Request, answer_all
from nli.errors import DataError
from nli.examples import is_labelled, read_examples
from nli.model import check_base
from nli.parsing import ParseStatus, parse_answer
from nli.prompts import STUDENT_PROMPT_NAME, render_student_prompt, student_prompt_sha256
from nli.records import is_correct, row_key
from nli.runs import is_in_use, read_manifest, start_run
from nli.storage import RowFile, resolve_input, resolve_output, sha256_file, write_atomic, write_csv
from nli.transformers_engine import TransformersEngine

CSV_COLUMNS = ("id", "premise", "hypothesis", "true_label", "predicted_label", "parse_status")


@config_class
class InferenceConfig:
    """Answer every pair of a CSV with a model. The default answers the sample's test rows with the sample model."""

    model: str = "models/sample-reflected"
    """hub name, model folder, adapter folder or checkpoint-N"""
    base_model: str = ""
    """base of an adapter; empty: the one that it names"""
    data: str = "data/sample/test.csv"
    """pairs: CSV with premise,hypothesis[,label]"""
    results_dir: str = "results"
    """folder of the results"""
    run_name: str = ""
    """stem of the result files; empty: {model}-{dataset}-{timestamp}"""
    quantization: Literal["nf4", "none"] = "nf4"
    """base weights: NF4 with double quantisation, or as they are"""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """type that matrix products run in"""
    batch_size: Count = 32
    """prompts in one forward pass"""
    max_new_tokens: Count = 512
    """most tokens of one answer"""
    max_rows: CountOrZero = 0
    """read only so many rows; 0: all"""
    num_workers: CountOrZero = 0
    """actors, each with a copy of the model; 0: one per GPU of the cluster, or one"""
    cpus_per_worker: Count = 1
    """CPU cores of one actor"""
    use_gpu: bool | None = None
    """run on GPUs; None: if the cluster has any"""
    gpu: CountOrZero | None = None
    """index of the GPU to use on this machine; refused on a cluster"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""


def to_answer(row: Mapping, generation: Generation, answered_by: str) -> dict:
    """The Answer that a generation makes of an Example."""
    if generation.text is None:
        status, fields, problem = ParseStatus.REQUEST_FAILED, {}, generation.problem
    else:
        parsed = parse_answer(generation.text, generation.finish_reason)
        status, fields, problem = parsed.status, parsed.fields or {}, parsed.problem
    return {
        **row,
        "answered_by": answered_by,
        "prompt_name": STUDENT_PROMPT_NAME,
        "prompt_sha256": student_prompt_sha256(),
        "raw_text": generation.text or "",
        "thought_process": fields.get("thought_process"),
        "predicted_label": fields.get("predicted_label"),
        "parse_status": status,
        "problem": problem,
        "finish_reason": generation.finish_reason,
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_completion_tokens": generation.num_completion_tokens,
    }


class Student:
    """Ray Data actor: Examples in, Answers out; loads its model once."""

    def __init__(self, base: str, adapter: str | None, answered_by: str, config: InferenceConfig, use_gpu: bool) -> None:
        self.answered_by = answered_by
        self.adapter = adapter
        precision = "nf4" if config.quantization == "nf4" else config.compute_dtype
        decoding = Decoding(max_new_tokens=config.max_new_tokens, label_probability=False)
        device = "cuda:0" if use_gpu else "cpu"
        adapters = (adapter,) if adapter else ()
        self.engine = TransformersEngine(EngineSettings(base, adapters, precision, config.compute_dtype, decoding, config.batch_size, device))

    def __call__(self, rows: list[dict]) -> list[dict]:
        requests = [Request(render_student_prompt(row["premise"], row["hypothesis"]), self.adapter) for row in rows]
        generations = answer_all(self.engine, requests)
        return [to_answer(row, generation, self.answered_by) for row, generation in zip(rows, generations, strict=True)]


def run(config: InferenceConfig) -> Path:
    """Answer every row that has no answer yet; returns the path of the JSON Lines.

    Raises DataError, ModelError, StorageError or ResumeError before a GPU is taken.
    """
    check_gpu_choice(config.gpu, config.use_gpu)
    source = resolve_input(config.data, config.storage_root)
    rows = read_examples(source, config.max_rows)
    model = str(local) if (local := _existing(config.model, config.storage_root)) else config.model
    base, adapter = describe_model(model, config.base_model)
    check_base(base)
    identity = {
        "base": fingerprint_model(base),
        "adapter": sha256_file(Path(adapter) / "adapter_model.safetensors") if adapter else None,
        "quantization": config.quantization,
        "compute_dtype": config.compute_dtype,
        "max_new_tokens": config.max_new_tokens,
        "prompt_sha256": student_prompt_sha256(),
        "decoding": "greedy",
    }
    folder = resolve_output(config.results_dir, config.storage_root)
    name = config.run_name or find_interrupted(folder, identity, source) or name_results(model, source)
    output = RowFile(folder / f"{name}.jsonl")
    record = start_run(folder / f"{name}.manifest.json", "inference", identity, config, [source], has_work=output.exists())

    current = {row_key(row): row for row in rows}
    answers = {key: row for key, row in output.read_finished().items() if key in current and row["parse_status"] != ParseStatus.REQUEST_FAILED}
    pending = [row for key, row in current.items() if key not in answers]
    labelled = "labelled" if is_labelled(rows) else "unlabelled"
    print(f"inference: {name}: {len(rows)} {labelled} rows, {len(rows) - len(pending)} answered already, {len(pending)} to do", flush=True)
    started = time.monotonic()
    if pending:
        with connected(config.gpu):
            for batch in _answer(pending, base, adapter, answered_by=Path(model).name if adapter is None else _adapter_name(Path(adapter)), config=config):
                output.append(batch)
                answers |= {row_key(row): row for row in batch}
    seconds = time.monotonic() - started
    finished = [answers[key] | row for key, row in current.items()]
    output.finish(finished)
    write_csv(folder / f"{name}.csv", finished, CSV_COLUMNS)
    counts = count_rows(finished, len(pending), seconds)
    record.finish(counts)
    write_atomic(folder / f"{name}.json", json.dumps({**record.manifest, "rows": finished}, ensure_ascii=False, indent=1) + "\n")
    accuracy = f", {counts['correct']} of {counts['labelled']} right ({counts['accuracy']:.3f})" if counts["labelled"] else ""
    unparsed = f"{counts['unparsed']} of {counts['rows']} unparsed"
    print(f"inference: {name}: {unparsed}{accuracy}, {counts['rows_per_second']:.1f} rows/s -> {output.path}", flush=True)
    return output.path


def _answer(pending: list[dict], base: str, adapter: str | None, answered_by: str, config: InferenceConfig):
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    return spread(
        pending,
        Student,
        (base, adapter, answered_by, config, use_gpu),
        num_workers=config.num_workers or (max(1, gpus) if use_gpu else 1),
        batch_size=4 * config.batch_size,  # enough to sort by length, little enough to lose
        label=f"inference {answered_by}",
        num_cpus=config.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
    )


def find_interrupted(folder: Path, identity: Mapping, source: Path) -> str | None:
    """The name of an unfinished run of the same model, settings and data in the results folder."""
    for path in sorted(folder.glob("*.manifest.json"), reverse=True):
        manifest = read_manifest(path)
        same = manifest is not None and manifest["identity"] == dict(identity) and str(source) in manifest["inputs"]
        if same and manifest["status"] == "running" and not is_in_use(path):
            return path.name.removesuffix(".manifest.json")
    return None


def name_results(model: str, source: Path) -> str:
    """{model}-{dataset}-{timestamp}, a checkpoint with its run's name."""
    return f"{_adapter_name(Path(model))}-{source.stem}-{datetime.now(UTC).strftime('%Y%m%d_%H%M%S')}"


def _adapter_name(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def _existing(model: str, storage_root: str) -> Path | None:
    try:
        return resolve_input(model, storage_root)
    except DataError:
        return None


def count_rows(answers: list[dict], num_computed: int, seconds: float) -> dict:
    """Rows, unparsed rows, accuracy over all labelled rows, tokens and speed of this attempt."""
    labelled = [row for row in answers if row["true_label"] is not None]
    correct = sum(is_correct(row) for row in labelled)
    return {
        "rows": len(answers),
        "unparsed": sum(row["parse_status"] != ParseStatus.OK for row in answers),
        "labelled": len(labelled),
        "correct": correct,
        "accuracy": correct / len(labelled) if labelled else None,
        "completion_tokens": sum(row["num_completion_tokens"] or 0 for row in answers),
        "rows_computed": num_computed,
        "seconds": round(seconds, 2),
        "rows_per_second": round(num_computed / seconds, 2) if seconds else 0.0,
    }
