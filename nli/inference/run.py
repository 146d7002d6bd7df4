"""Stage 6: a base, adapter or checkpoint answers a set of pairs, spread over the GPUs of the cluster by Ray Data.

In:   a CSV of pairs, labelled or not (the file tells), and a model: a hub name, a model folder, an adapter folder or its checkpoint-N
Out:  results/{run_name}.jsonl            Answers in input order, what evaluate_predictions reads
      results/{run_name}.csv              id, premise, hypothesis, true_label, predicted_label, label_probability, thought_process, raw_text, …
      results/{run_name}.json             configuration, metrics if labelled, timing, engine, and the rows
      results/{run_name}.answers.sqlite   the answers as they finished

Without --run-name the files are called {model}-{precision}-{dataset}-{timestamp}. The same command goes on with an interrupted run: of the same model,
precision, prompt, decoding and data. Further adapters of the same base are answered in the same pass, each with result files of its own.

    1  the rows are read once, checked, and put into a worklist on disk
    2  rows without an answer are given to workers with an engine each, which store every answer as it finishes
    3  the files are written from worklist and store: a pure step, repeated on every run
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from nli.data.pairs import iterate_examples
from nli.engines.interface import (
    CacheType,
    Decoding,
    EngineName,
    EngineSettings,
    Precision,
    build_engine,
    choose_engine,
)
from nli.inference.answer_store import AnswerStore
from nli.inference.coordinator import ask_now, start_desk
from nli.inference.result_files import describe_figures, summarise, write_answers, write_report, write_table
from nli.inference.result_sets import ResultSet, describe_models, open_results
from nli.inference.worker import TICKETS_AT_ONCE, Asking, Student, plan_ticket
from nli.runtime.cluster import check_gpu_choice, check_workers_fit, connected, finds_cluster, progress_bar, spread
from nli.runtime.config import Count, CountOrZero, NonNegative, config_class
from nli.runtime.errors import ClusterError, ConfigError
from nli.runtime.files import resolve_input
from nli.runtime.manifest import list_gpus
from nli.runtime.worklist import Worklist
from nli.task.records import row_key


@config_class
class InferenceConfig:
    """Answer every pair of a CSV with a model. The default answers the sample's test rows with the sample model."""

    model: str = "models/sample-reflected"
    """hub name, model folder, adapter folder or checkpoint-N"""
    adapters: tuple[str, ...] = ()
    """further adapter folders on the same base, answered in the same pass"""
    base_model: str = ""
    """base of an adapter; empty: the one that it names"""
    data: str = "data/sample/test.csv"
    """pairs: CSV with premise,hypothesis[,label]"""
    results_dir: str = "results"
    """folder of the results"""
    run_name: str = ""
    """stem of the result files, with -{model} where there are several; empty: {model}-{precision}-{dataset}-{timestamp}"""
    run_names: tuple[str, ...] = ()
    """instead of run_name: a stem for model and for each of the adapters, in their order"""
    engine: EngineName = "auto"
    """what runs the model; auto: vllm where it is installed and there is a GPU, else transformers"""
    precision: Precision = "nf4"
    """of the base's weights; fp8 in vllm only, fp32 in transformers only"""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """type that matrix products run in where the weights are nf4"""
    kv_cache_dtype: CacheType = "bf16"
    """of the cache of keys and values; fp8 in vllm only: half the memory of a row, and other answers"""
    batch_size: CountOrZero = 0
    """rows that an engine works on at once; 0: its own choice"""
    max_new_tokens: Count = 512
    """most tokens of one answer"""
    temperature: NonNegative = 0.0
    """0: the likeliest token each time"""
    num_samples: Count = 1
    """answers drawn for each row, which vote on its label"""
    no_cot: bool = False
    """read the label without letting the model write a thought"""
    force_label: bool = False
    """complete an answer that cannot be parsed by the likelier of the two labels"""
    label_probability: bool = True
    """read the probability of label 1 in each answer"""
    prompt_template: str = ""
    """file with {premise} and {hypothesis}; empty: the prompt that the model was trained with"""
    completion_length_column: str = ""
    """column of the CSV with the number of tokens to write for each row, for benchmarks"""
    max_rows: CountOrZero = 0
    """read only so many rows; 0: all"""
    num_workers: CountOrZero = 0
    """workers, each with a copy of the model; 0: one per GPU of the cluster, or one"""
    max_workers: CountOrZero = 0
    """workers that may be added as the cluster grows; 0: none"""
    cpus_per_worker: Count = 1
    """CPU cores of one worker"""
    use_gpu: bool | None = None
    """run on GPUs; None: if the cluster has any"""
    gpu: CountOrZero | None = None
    """index of the GPU to use on this machine; refused on a cluster"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        if not self.model or not all(self.adapters):
            raise ConfigError("model or one of the adapters is empty; give a hub name or a folder.")
        for name in self.run_names or filter(None, [self.run_name]):
            if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
                raise ConfigError(f"run_name {name!r} is no file name; name the folder by results_dir.")
        if self.run_names and (
            self.run_name
            or len(set(self.run_names)) != len(self.run_names)
            or len(self.run_names) != 1 + len(self.adapters)
        ):
            raise ConfigError(
                f"run_names takes the place of run_name, with a name of its own for each of the {1 + len(self.adapters)} models."
            )
        if self.temperature == float("inf"):
            raise ConfigError("temperature is endless; 0 to 2 is usual.")
        if self.num_samples > 1 and not self.temperature:
            raise ConfigError("num_samples over 1 needs temperature above 0: at 0 all samples are the same.")
        if self.no_cot and (
            self.num_samples > 1 or self.force_label or self.temperature or self.completion_length_column
        ):
            raise ConfigError(
                "no_cot lets nothing be written: leave num_samples, temperature, force_label and completion_length_column as they are."
            )
        if (self.precision, self.engine) in (("fp8", "transformers"), ("fp32", "vllm")):
            raise ConfigError(f"precision {self.precision} is not for engine {self.engine}.")
        if (self.kv_cache_dtype, self.engine) == ("fp8", "transformers"):
            raise ConfigError("kv_cache_dtype fp8 is not for engine transformers.")
        if self.gpu is not None and (self.use_gpu is False or self.num_workers > 1 or self.max_workers > 1):
            raise ConfigError(
                "gpu picks one GPU of this machine, for one worker: leave use_gpu, num_workers and max_workers as they are."
            )
        if self.max_workers and self.max_workers < self.num_workers:
            raise ConfigError(f"max_workers {self.max_workers} is below num_workers {self.num_workers}.")

    def named_precision(self) -> str:
        """What results are told apart by: "nf4", or "nf4-kv_fp8" where the KV cache is not bf16."""
        return self.precision if self.kv_cache_dtype == "bf16" else f"{self.precision}-kv_{self.kv_cache_dtype}"

    def decoding(self) -> Decoding:
        """How the engine writes answers."""
        return Decoding(self.max_new_tokens, self.temperature, self.no_cot, self.force_label, self.label_probability)


def run(config: InferenceConfig) -> Path:
    """Answer every row that has no answer yet; returns the path of the (first model's) JSON Lines.

    Raises ConfigError, DataError, ModelError, StorageError or ResumeError before a GPU is taken.
    """
    started = time.monotonic()
    check_gpu_choice(config.gpu, config.use_gpu)
    source = resolve_input(config.data, config.storage_root)
    examples = iterate_examples(source, config.max_rows, count_column=config.completion_length_column)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="nli-rows-"))
        worklist = stack.enter_context(Worklist(Path(place) / "rows.sqlite"))
        labelled: set[bool] = set()
        num_rows = worklist.fill(((row, row_key(row).encode()) for row in _noting_labels(examples, labelled)), source)
        base, models = describe_models(config)
        if finds_cluster():
            stack.enter_context(connected(config.gpu))
        device = choose_device(config)
        engine = choose_engine(config.engine, config.precision, device, config.compute_dtype, config.kv_cache_dtype)
        sets = [open_results(config, stack, source, engine, base, model) for model in models]
        rows = f"{num_rows} {'labelled' if True in labelled else 'unlabelled'} rows"
        for index, each in enumerate(sets):
            each.num_pending = worklist.list_pending(_finding_done(each.store), index)
            print(
                f"inference: {each.name}: {rows}, {num_rows - each.num_pending} answered already, {each.num_pending} to do",
                flush=True,
            )
        for each in sets:
            if not each.num_pending:  # is complete, whatever becomes of the others
                write_results(each, worklist, describe_figures({}, 0, time.monotonic() - started))
        if any(each.num_pending for each in sets):
            stack.enter_context(connected(config.gpu))
            settings = EngineSettings(
                base=base,
                adapters=tuple(each.target.adapter for each in sets if each.target.adapter and each.num_pending),
                precision=config.precision,
                compute_dtype=config.compute_dtype,
                decoding=config.decoding(),
                batch_size=config.batch_size,
                device=device,
                kv_cache_dtype=config.kv_cache_dtype,
            )
            figures = answer(config, engine, settings, sets, worklist)
            for index, each in enumerate(sets):
                if each.num_pending:
                    write_results(each, worklist, describe_figures(figures, index, time.monotonic() - started))
    return sets[0].files["jsonl"]


def choose_device(config: InferenceConfig) -> str:
    """What engines of this run work on: "cuda:0", a worker's only one, or "cpu"."""
    return "cuda:0" if (has_gpus() if config.use_gpu is None else config.use_gpu) else "cpu"


def plan_workers(config: InferenceConfig, device: str, is_next: bool = True) -> tuple[int, dict[str, float]]:
    """How many workers, and what each reserves. Raises ConfigError if the connected cluster has no room for them and does not grow."""
    import ray

    num_gpus = int(
        ray.cluster_resources().get("GPU", 0)
    )  # of one machine, perhaps fewer than it has: --gpu and CUDA_VISIBLE_DEVICES choose
    num_workers = config.num_workers or max(1, num_gpus if device != "cpu" else 1)
    resources = {"CPU": config.cpus_per_worker} | ({} if device == "cpu" else {"GPU": 1})
    check_workers_fit(num_workers, resources, "inference", is_next=is_next)
    return num_workers, resources


def has_gpus() -> bool:
    """Whether the cluster that this process is in, or else this machine, has GPUs."""
    import ray

    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    return bool(list_gpus()) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def answer(
    config: InferenceConfig, engine: str, settings: EngineSettings, sets: Sequence[ResultSet], worklist: Worklist
) -> dict:
    """Have all pending rows answered and stored; returns what the desk and the engines tell of it."""
    import ray

    num_workers, resources = plan_workers(config, settings.device)
    num_pending = sum(each.num_pending for each in sets)
    size, most_held = plan_ticket(engine, settings, config.num_samples, num_pending)
    desk = start_desk(
        worklist.path, [each.store.path for each in sets], most_held, [each.target.frame for each in sets], num_workers
    )
    # More tickets than rows: a worker that is ready late, or comes to a cluster that grows, finds some. Without rows they end at once.
    spare = max(num_workers, config.max_workers) * (TICKETS_AT_ONCE + 2)
    tickets = [{"num_rows": size}] * (-(-num_pending // size) + spare)
    asking = Asking(tuple(each.target for each in sets), config.num_samples, config.completion_length_column)
    workers = f"{num_workers} {'worker' if num_workers == 1 else 'workers'}"
    print(f"inference: engine {engine}, {config.named_precision()}, {workers} on {settings.device}", flush=True)
    batches = spread(
        tickets,
        Student,
        (desk, build_engine, engine, settings, asking),
        num_workers=num_workers,
        max_workers=config.max_workers,
        calls_at_once=TICKETS_AT_ONCE,
        batch_size=1,
        label="inference",
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
    )
    try:
        with contextlib.closing(batches), progress_bar(num_pending, "inference") as progress:
            for batch in batches:
                progress.update(sum(ticket["num_rows"] for ticket in batch))
            figures = ask_now(desk.describe.remote())
            ask_now(desk.close.remote())
            left = sum(
                worklist.list_pending(_finding_done(each.store, since=each.store.started_at), index)
                for index, each in enumerate(sets)
            )
            progress.update(num_pending - left - progress.n)  # what the tickets of dead workers were worth
    finally:
        ray.kill(desk)
    if left:
        raise ClusterError(
            f"{left} of {num_pending} rows were not answered: the workers ended before. The same command goes on with them."
        )
    return figures


def write_results(results: ResultSet, worklist: Worklist, timing: Mapping) -> None:
    """Write a model's files, finish its manifest and say how it went. A run that computes nothing leaves the figures of the last one that did."""
    record = results.record
    tally = write_answers(worklist, results.store, results.files["jsonl"])
    write_table(results.files["jsonl"])
    counts = tally.counts() | {
        name: timing[name] for name in ("rows_computed", "rows_in_pass", "seconds", "rows_per_second")
    }
    attempts = record.manifest["attempts"]
    attempts[-1] |= {"seconds": timing["seconds"]} | ({"timing": dict(timing)} if timing["rows_computed"] else {})
    latest = next((attempt["timing"] for attempt in reversed(attempts) if "timing" in attempt), timing)
    write_report(
        results.files["jsonl"],
        {**record.manifest, "status": "finished", "counts": counts, "metrics": tally.metrics, "timing": latest},
    )
    record.finish(counts)  # last: a run whose files could not be written is one to go on with
    print(summarise(results.name, counts, timing, results.cure) + f"\n  -> {results.files['jsonl']}", flush=True)


def _noting_labels(rows: Iterable[dict], labelled: set[bool]) -> Iterator[dict]:
    for row in rows:
        labelled.add(row["true_label"] is not None)
        yield row


def _finding_done(store: AnswerStore, since: float | None = None):
    return lambda keys: {key.encode() for key in store.find_done([key.decode() for key in keys], since)}
