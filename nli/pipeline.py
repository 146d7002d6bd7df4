"""All seven stages, from CSV files to a compared set of adapters.

In:   train.csv, dev.csv, test.csv, a teacher's address and a base
Out:  <output_dir>/data/original_thoughts/{train,dev,test}.jsonl     1 thoughts
      <output_dir>/data/reflected_thoughts/{train,dev}.jsonl         2 reflections
      <output_dir>/data/finetune/{ablation}_{train,dev}.jsonl        3 SFT data
      <output_dir>/models/{ablation}/                                4 SFT
      <output_dir>/sweep/sweep.json                                  5 sweep
      <output_dir>/results/{base,correct_only,…}.jsonl               6 inference
      <output_dir>/results/evaluation/{evaluation.json,report.html}  7 evaluation

Each stage takes up what it has finished, so the same command goes on after an interruption and repeats nothing.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from pathlib import Path

from nli import evaluation, inference, reflections, sft, sft_data, sweep, thoughts
from nli.cluster import connected, own_error
from nli.config import Count, config_class
from nli.errors import ConfigError
from nli.evaluation import EvaluatePredictionsConfig
from nli.inference import InferenceConfig
from nli.records import ABLATIONS, Ablation
from nli.reflections import GenerateReflectionsConfig
from nli.sft import TrainConfig
from nli.sft_data import PrepareSFTDataConfig
from nli.storage import resolve_output
from nli.sweep import SweepConfig
from nli.teacher import check_teacher
from nli.thoughts import GenerateThoughtsConfig


@config_class
class PipelineConfig:
    """Run all stages. Files of the stages' own configs are replaced by the pipeline's; every other field of theirs counts."""

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
    """trainings, and then inference runs, at the same time"""
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


def run(config: PipelineConfig) -> Path:
    """Run what is not finished; returns the evaluation's folder."""
    started = time.monotonic()
    root = resolve_output(config.output_dir, config.storage_root)
    check_teacher(replace(config.thoughts, base_url=config.base_url))
    with connected(config.train.gpu):
        generate(config, root)
        prepare(config, root)
        _heading("4 SFT")
        runs = [replace(config.train, **_sft_files(root, ablation), output_dir=str(root / "models" / ablation), gpu=None) for ablation in config.ablations]
        _side_by_side(sft.run, runs, config.concurrent_runs)
        if config.run_sweep:
            _heading("5 sweep")
            sweep.run(plan_sweep(config, root))
        _heading("6 inference")
        _side_by_side(inference.run, plan_inference(config, root), config.concurrent_runs)
    _heading("7 evaluation")
    folder = evaluation.run(plan_evaluation(config, root))
    print(f"pipeline: {time.monotonic() - started:.0f} s", flush=True)
    return folder


def generate(config: PipelineConfig, root: Path) -> None:
    """Stages 1 and 2 for every split."""
    for split, csv in (("train", config.train_csv), ("dev", config.dev_csv), ("test", config.test_csv)):
        _heading(f"1 thoughts: {split}")
        answers = str(root / "data" / "original_thoughts" / f"{split}.jsonl")
        thoughts.run(replace(config.thoughts, input_csv=csv, output_jsonl=answers, base_url=config.base_url))
    for split in ("train", "dev"):
        _heading(f"2 reflections: {split}")
        answers, reflected = (str(root / "data" / folder / f"{split}.jsonl") for folder in ("original_thoughts", "reflected_thoughts"))
        reflections.run(replace(config.reflections, thoughts=answers, output_jsonl=reflected, base_url=config.base_url))


def prepare(config: PipelineConfig, root: Path) -> None:
    """Stage 3 for every ablation and split."""
    _heading("3 SFT data")
    for ablation in config.ablations:
        for split in ("train", "dev"):
            answers, reflected = (str(root / "data" / folder / f"{split}.jsonl") for folder in ("original_thoughts", "reflected_thoughts"))
            sft_data.run(
                PrepareSFTDataConfig(
                    thoughts=answers,
                    reflections=reflected if ablation == "reflected" else "",
                    ablation=ablation,
                    output_jsonl=_sft_files(root, ablation)[f"{split}_file"],
                )
            )


def plan_sweep(config: PipelineConfig, root: Path) -> SweepConfig:
    """The sweep's config on the pipeline's files; all its trials are measured on the dev rows with true labels where there are any."""
    measured_on = "reflected" if "reflected" in config.ablations else config.ablations[0]
    shared = replace(config.sweep.train, dev_file=_sft_files(root, measured_on)["dev_file"], base_model=config.train.base_model, gpu=None)
    ablations = tuple(ablation for ablation in config.sweep.ablation if ablation in config.ablations)
    return replace(config.sweep, train=shared, ablation=ablations, train_files=_sft_files(root, "{ablation}")["train_file"], output_dir=str(root / "sweep"))


def plan_inference(config: PipelineConfig, root: Path) -> list[InferenceConfig]:
    """The base and every adapter on the test rows."""
    models = {"base": config.train.base_model} | {ablation: str(root / "models" / ablation) for ablation in config.ablations}
    common = {"data": config.test_csv, "results_dir": str(root / "results"), "gpu": None}
    return [replace(config.inference, model=model, run_name=name, **common) for name, model in models.items()]


def plan_evaluation(config: PipelineConfig, root: Path) -> EvaluatePredictionsConfig:
    """Teacher, base and adapters on the same rows."""
    names = ("base", *config.ablations)
    manifests = sorted([*root.glob("data/*/*.manifest.json"), *root.glob("models/*/manifest.json"), *root.glob("sweep/manifest.json")])
    return replace(
        config.evaluation,
        predictions=(str(root / "data" / "original_thoughts" / "test.jsonl"), *(str(root / "results" / f"{name}.jsonl") for name in names)),
        names=("teacher", *names),
        output_dir=str(root / "results" / "evaluation"),
        sweep_json=str(root / "sweep" / "sweep.json") if config.run_sweep else "",
        stages=tuple(str(path) for path in [*manifests, *sorted(root.glob("results/*.manifest.json"))]),
    )


def _sft_files(root: Path, ablation: str) -> dict[str, str]:
    return {f"{split}_file": str(root / "data" / "finetune" / f"{ablation}_{split}.jsonl") for split in ("train", "dev")}


def _side_by_side(stage: Callable, configs: Sequence, at_once: int) -> None:
    """Run a stage for several configs, `at_once` at a time, each driven from a Ray task of its own."""
    import ray

    if at_once == 1:
        for config in configs:
            stage(config)
        return
    drive = ray.remote(num_cpus=0, max_retries=0)(stage)
    running, waiting = [], list(configs)
    try:
        while running or waiting:
            while waiting and len(running) < at_once:
                running.append(drive.remote(waiting.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            ray.get(done)
    except ray.exceptions.RayError as error:
        for task in running:
            ray.cancel(task)
        raise own_error(error) or error from None


def _heading(text: str) -> None:
    width = min(80, shutil.get_terminal_size().columns)
    print(f"\n== {text} {'=' * max(0, width - len(text) - 4)}", flush=True)
