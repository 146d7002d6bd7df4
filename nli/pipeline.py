"""All seven stages, from CSV files to a compared set of adapters.

In:   train.csv, dev.csv, test.csv, a teacher's address and a base
Out:  <output_dir>/data/ledger/                                      every request and raw reply of stages 1 and 2
      <output_dir>/data/original_thoughts/{train,dev,test}.jsonl     1 thoughts
      <output_dir>/data/reflected_thoughts/{train,dev}.jsonl         2 reflections
      <output_dir>/data/finetune/{ablation}_{train,dev}.jsonl        3 SFT data
      <output_dir>/models/{ablation}/                                4 SFT
      <output_dir>/sweep/sweep.json                                  5 sweep
      <output_dir>/results/{base,correct_only,…}.jsonl               6 inference
      <output_dir>/results/evaluation/{evaluation.json,report.html}  7 evaluation

Each stage takes up what it has finished, so the same command goes on after an interruption and repeats nothing.
"""

import itertools
import shutil
import time
from dataclasses import field, replace
from pathlib import Path

from nli import sweep
from nli.data import sft_rows as sft_data
from nli.data.pairs import read_examples, shared_premises
from nli.data.sft_rows import PrepareSFTDataConfig
from nli.evaluation import run as evaluation
from nli.evaluation.run import EvaluatePredictionsConfig
from nli.inference import run as inference
from nli.inference.run import InferenceConfig
from nli.models.load import check_base
from nli.runtime.cluster import check_gpu_choice, connected, own_error
from nli.runtime.config import Count, config_class
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import resolve_input, resolve_model, resolve_output
from nli.runtime.manifest import read_manifest
from nli.sweep import SweepConfig
from nli.task.records import ABLATIONS, Ablation
from nli.teacher import reflections, thoughts
from nli.teacher.reflections import GenerateReflectionsConfig
from nli.teacher.requests import check_teacher
from nli.teacher.thoughts import GenerateThoughtsConfig
from nli.training import run as sft
from nli.training.run import TrainConfig


@config_class
class PipelineConfig:
    """Run all stages.

    The pipeline sets the stages' files, ledger, base_url, base_model, storage_root and gpu (from train); every other field of their own configs counts.
    """

    output_dir: str = "results/sample-pipeline"
    """folder that everything goes below"""
    train_csv: str = "data/sample/train.csv"
    """labelled pairs to train on"""
    dev_csv: str = "data/sample/dev.csv"
    """labelled pairs for eval loss and early stopping"""
    test_csv: str = "data/sample/test.csv"
    """labelled pairs that all models are compared on"""
    base_url: str = "https://api.mistral.ai"
    """the teacher's server, for thoughts and reflections"""
    ablations: tuple[Ablation, ...] = ABLATIONS
    """training data to compare"""
    run_sweep: bool = True
    """whether to run the sweep"""
    concurrent_runs: Count = 1
    """trainings at the same time"""
    thoughts: GenerateThoughtsConfig = field(default_factory=GenerateThoughtsConfig)
    reflections: GenerateReflectionsConfig = field(default_factory=GenerateReflectionsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    evaluation: EvaluatePredictionsConfig = field(default_factory=EvaluatePredictionsConfig)
    storage_root: str = ""
    """folder that a relative output_dir goes below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        if not self.ablations or len(set(self.ablations)) != len(self.ablations):
            raise ConfigError("ablations needs at least one, each once.")
        if self.train.preflight:
            raise ConfigError("preflight looks at one training run: use train_sft --preflight.")
        if self.thoughts.dry_run or self.reflections.dry_run:
            raise ConfigError(
                "dry_run is for generate_thoughts and generate_reflections; a pipeline goes on with what they make."
            )
        if self.thoughts.max_rows != self.inference.max_rows:
            raise ConfigError(
                f"thoughts.max_rows {self.thoughts.max_rows} and inference.max_rows {self.inference.max_rows} differ, "
                "so that teacher and student would answer different test rows."
            )


def run(config: PipelineConfig) -> Path:
    """Run what is not finished; returns the path of the report. All inputs of all stages are checked before the first call is paid for."""
    started = time.monotonic()
    root = resolve_output(config.output_dir, config.storage_root)
    config = settle(config)
    check(config, root)
    with connected(config.train.gpu):
        check_room(config, root)
        generate(config, root)
        prepare(config, root)
        _heading("4 SFT")
        train(config, root)
        if config.run_sweep:
            _heading("5 sweep")
            sweep.run(plan_sweep(config, root))
        _heading("6 inference")
        inference.run(plan_inference(config, root))
    _heading("7 evaluation")
    report = evaluation.run(plan_evaluation(config, root))
    print(f"pipeline: {time.monotonic() - started:.0f} s", flush=True)
    return report


def settle(config: PipelineConfig) -> PipelineConfig:
    """The config with absolute paths of its inputs. Raises DataError for a file that is not there."""
    files = {
        name: str(resolve_input(getattr(config, name), config.storage_root))
        for name in ("train_csv", "dev_csv", "test_csv")
    }
    return replace(
        config,
        **files,
        train=replace(config.train, base_model=resolve_model(config.train.base_model, config.storage_root)),
    )


def check(config: PipelineConfig, root: Path) -> None:
    """Raise what a later stage would raise for its inputs: keys, files, splits, base, GPU, sweep."""
    for stage in (config.thoughts, config.reflections):
        check_teacher(replace(stage, base_url=config.base_url))
    check_gpu_choice(config.train.gpu, config.train.use_gpu)
    check_base(config.train.base_model)
    if config.run_sweep:
        plan_sweep(config, root)
    splits = {
        name: read_examples(Path(getattr(config, f"{name}_csv")), config.thoughts.max_rows, need_labels=name != "test")
        for name in ("train", "dev", "test")
    }
    for left, right in itertools.combinations(splits, 2):
        pairs = {(row["premise"], row["hypothesis"]) for row in splits[left]}
        shared = [row for row in splits[right] if (row["premise"], row["hypothesis"]) in pairs]
        if shared:
            first = f"{shared[0]['premise']!r}, {shared[0]['hypothesis']!r}"
            raise DataError(
                f"{len(shared)} pairs stand in both the {left} and the {right} file, the first: {first}. Remove them from one of the two."
            )
        if premises := shared_premises(splits[left], splits[right]):
            print(
                f"pipeline: warning: {len(premises)} premises stand in both the {left} and the {right} file", flush=True
            )


def check_room(config: PipelineConfig, root: Path) -> None:
    """Raise ConfigError if the workers of a later stage that is not finished have no room on this cluster."""

    def is_open(*outputs: str) -> bool:
        return any(
            (manifest := read_manifest(root / f"{output}manifest.json")) is None or manifest["status"] != "finished"
            for output in outputs
        )

    if is_open(*(f"models/{ablation}/" for ablation in config.ablations)):
        sft.check_room(config.train, is_next=False)
    if config.run_sweep and is_open("sweep/"):
        sft.check_room(config.sweep.train, sweep.TRIAL_CPUS, is_next=False)
    answering = plan_inference(config, root)
    if is_open(*(f"results/{name}." for name in answering.run_names)):
        inference.plan_workers(answering, inference.choose_device(answering), is_next=False)


def generate(config: PipelineConfig, root: Path) -> None:
    """Stages 1 and 2 for every split."""
    shared = {"base_url": config.base_url, "ledger_dir": str(root / "data" / "ledger")}
    for split, csv in (("train", config.train_csv), ("dev", config.dev_csv), ("test", config.test_csv)):
        _heading(f"1 thoughts: {split}")
        answers = str(root / "data" / "original_thoughts" / f"{split}.jsonl")
        thoughts.run(replace(config.thoughts, input_csv=csv, output_jsonl=answers, **shared))
    for split in ("train", "dev"):
        _heading(f"2 reflections: {split}")
        answers, reflected = (
            str(root / "data" / folder / f"{split}.jsonl") for folder in ("original_thoughts", "reflected_thoughts")
        )
        reflections.run(replace(config.reflections, thoughts=answers, output_jsonl=reflected, **shared))


def prepare(config: PipelineConfig, root: Path) -> None:
    """Stage 3 for every ablation and split."""
    _heading("3 SFT data")
    for ablation in config.ablations:
        for split in ("train", "dev"):
            answers, reflected = (
                str(root / "data" / folder / f"{split}.jsonl") for folder in ("original_thoughts", "reflected_thoughts")
            )
            sft_data.run(
                PrepareSFTDataConfig(
                    thoughts=answers,
                    reflections=reflected if ablation == "reflected" else "",
                    ablation=ablation,
                    output_jsonl=_sft_files(root, ablation)[f"{split}_file"],
                )
            )


def train(config: PipelineConfig, root: Path) -> None:
    """Stage 4 for every ablation, `concurrent_runs` at a time, each then driven from a Ray task of its own."""
    import ray

    waiting = [
        replace(config.train, **_sft_files(root, ablation), output_dir=str(root / "models" / ablation), gpu=None)
        for ablation in config.ablations
    ]
    if config.concurrent_runs == 1:
        for each in waiting:
            sft.run(each)
        return
    drive = ray.remote(num_cpus=0, max_retries=0)(sft.run)
    running = []
    try:
        while running or waiting:
            while waiting and len(running) < config.concurrent_runs:
                running.append(drive.remote(waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            ray.get(done)
    except ray.exceptions.RayError as error:
        for task in running:
            ray.cancel(task)
        raise own_error(error) or error from None


def plan_sweep(config: PipelineConfig, root: Path) -> SweepConfig:
    """The sweep's config on the pipeline's files; all its trials are measured on the dev rows with true labels where there are any."""
    measured_on = "reflected" if "reflected" in config.ablations else config.ablations[0]
    shared = replace(
        config.sweep.train,
        dev_file=_sft_files(root, measured_on)["dev_file"],
        base_model=config.train.base_model,
        gpu=None,
    )
    ablations = tuple(ablation for ablation in config.sweep.ablation if ablation in config.ablations)
    if not ablations:
        raise ConfigError(
            f"sweep.ablation {config.sweep.ablation} has none of the pipeline's ablations {config.ablations}; name one, or use --no-run-sweep."
        )
    return replace(
        config.sweep,
        train=shared,
        ablation=ablations,
        train_files=_sft_files(root, "{ablation}")["train_file"],
        output_dir=str(root / "sweep"),
    )


def plan_inference(config: PipelineConfig, root: Path) -> InferenceConfig:
    """The base and every adapter on the test rows, in one pass of one engine a worker."""
    return replace(
        config.inference,
        model=config.train.base_model,
        adapters=tuple(str(root / "models" / ablation) for ablation in config.ablations),
        base_model="",
        run_name="",
        run_names=("base", *config.ablations),
        data=config.test_csv,
        results_dir=str(root / "results"),
        gpu=None,
    )


def plan_evaluation(config: PipelineConfig, root: Path) -> EvaluatePredictionsConfig:
    """Teacher, base and adapters on the same rows."""
    names = ("base", *config.ablations)
    manifests = sorted(
        [*root.glob("data/*/*.manifest.json"), *root.glob("models/*/manifest.json"), *root.glob("sweep/manifest.json")]
    )
    return replace(
        config.evaluation,
        predictions=(
            str(root / "data" / "original_thoughts" / "test.jsonl"),
            *(str(root / "results" / f"{name}.jsonl") for name in names),
        ),
        names=("teacher", *names),
        output_dir=str(root / "results" / "evaluation"),
        sweep_json=str(root / "sweep" / "sweep.json") if config.run_sweep else "",
        stages=tuple(str(path) for path in [*manifests, *sorted(root.glob("results/*.manifest.json"))]),
    )


def _sft_files(root: Path, ablation: str) -> dict[str, str]:
    return {
        f"{split}_file": str(root / "data" / "finetune" / f"{ablation}_{split}.jsonl") for split in ("train", "dev")
    }


def _heading(text: str) -> None:
    width = min(80, shutil.get_terminal_size().columns)
    print(f"\n== {text} {'=' * max(0, width - len(text) - 4)}", flush=True)
