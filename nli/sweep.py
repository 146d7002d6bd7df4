"""Stage 5: search LoRA rank x learning rate x ablation (and other fields of the training config) with Ray Tune.

In:   SweepConfig(lora_rank=(8, 32), learning_rate=(1e-4, 2e-4), ablation=("correct_only", "reflected"))
Out:  sweeps/<name>/sweep.json
      {"trials": [{"name": "ablation=reflected,lora_rank=8,learning_rate=0.0001", "ablation": "reflected", "lora_rank": 8, "learning_rate": 0.0001,
                   "status": "finished", "eval_loss": 0.41, "steps": 1670, "seconds": 812.0, "adapter": "…"}, …], "best": {…}}
      sweeps/<name>/<trial's name>/  each trial's run, as train_sft makes it

Every trial's eval loss is over the same dev file, so that ablations can be compared. All trials are checked before the first one starts.
"""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from nli.cluster import check_gpu_choice, connected, own_error
from nli.config import Count, CountOrZero, Positive, config_class, field_names, nearest
from nli.errors import ConfigError, NLIError
from nli.records import Ablation
from nli.runs import start_run
from nli.sft import FitPlan, TrainConfig, fit, plan_fit, read_finished, worker_resources
from nli.storage import resolve_output, write_atomic


@config_class
class SweepConfig:
    """Train one adapter for each combination of the axes. The default sweeps over sample rows."""

    output_dir: str = "sweeps/sample"
    """folder of the sweep: sweep.json and a run for each trial"""
    train_files: str = "data/finetune/sample_{ablation}_train.jsonl"
    """training rows of stage 3; {ablation} stands for the trial's ablation"""
    lora_rank: tuple[Count, ...] = (8, 16, 32)
    """axis: rank of the adapters; lora_alpha keeps its ratio to it"""
    learning_rate: tuple[Positive, ...] = (1e-4, 2e-4)
    """axis: peak learning rate"""
    ablation: tuple[Ablation, ...] = ("correct_only", "reflected", "unmodified")
    """axis: training data"""
    extra_axes: tuple[str, ...] = ()
    """more axes over numeric fields of the training config, each as name=value,value: lora_dropout=0,0.05"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """what the trials share; its dev_file measures them all"""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials whose eval loss is behind at the same step; none runs all to their end"""
    grace_evaluations: Count = 2
    """evaluations before asha may stop a trial"""
    max_concurrent_trials: CountOrZero = 0
    """trials at once; 0: as many as the cluster's GPUs (or CPUs) carry"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        parse_extra_axes(self.extra_axes)
        if not (self.lora_rank and self.learning_rate and self.ablation):
            raise ConfigError("every axis needs at least one value.")


def parse_extra_axes(texts: tuple[str, ...]) -> dict[str, tuple]:
    """{'lora_dropout': (0.0, 0.05)} from ('lora_dropout=0,0.05',). Raises ConfigError for a name that is no field or a value that is no number."""
    axes: dict[str, tuple] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in field_names(TrainConfig):
            raise ConfigError(f"sweep axis {name!r} is not a field of the training config.{nearest(name, field_names(TrainConfig))}")
        if name in ("lora_rank", "learning_rate") or name in axes:
            raise ConfigError(f"sweep axis {name} is given twice.")
        try:
            axes[name] = tuple(int(value) if value.strip().lstrip("-").isdigit() else float(value) for value in values.split(","))
        except ValueError:
            raise ConfigError(f"sweep axis {text!r} needs numbers: {name}=0,0.05.") from None
    return axes


def list_trials(config: SweepConfig) -> dict[str, TrainConfig]:
    """The training config of every trial by the trial's name, which spells out its axes. Raises ConfigError for a value out of range."""
    axes = {"ablation": config.ablation, "lora_rank": config.lora_rank, "learning_rate": config.learning_rate, **parse_extra_axes(config.extra_axes)}
    alpha_per_rank = config.train.lora_alpha / config.train.lora_rank
    trials = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in chosen.items())
        ablation = chosen.pop("ablation")
        chosen.setdefault("lora_alpha", max(1, round(alpha_per_rank * chosen["lora_rank"])))
        chosen["train_file"] = config.train_files.replace("{ablation}", ablation)
        trials[name] = replace(config.train, **chosen, output_dir=f"{config.output_dir}/{name}", storage_root=config.storage_root)
    return trials


def run(config: SweepConfig) -> Path:
    """Run every trial that is not finished; returns the path of sweep.json.

    Raises ConfigError, DataError, ModelError or StorageError before the first trial. A trial that fails is listed with its reason; the others go on.
    """
    check_gpu_choice(config.train.gpu, config.train.use_gpu)
    output = resolve_output(config.output_dir, config.storage_root)
    plans = {name: plan_fit(train) for name, train in list_trials(config).items()}
    identity = {"trials": {name: plan.identity for name, plan in plans.items()}, "scheduler": config.scheduler}
    record = start_run(output / "manifest.json", "sweep", identity, config, sorted({path for plan in plans.values() for path in plan.inputs}))
    finished = {name: result for name, plan in plans.items() if (result := read_finished(plan)) is not None}
    print(f"sweep: {len(plans)} trials, {len(finished)} finished already", flush=True)
    reasons: dict[str, str] = {}
    if len(finished) < len(plans):
        with connected(config.train.gpu):
            reasons = run_trials({name: plan for name, plan in plans.items() if name not in finished}, config, output)
        finished = {name: result for name, plan in plans.items() if (result := read_finished(plan)) is not None}
    trials = [describe_trial(name, plan, finished.get(name), reasons.get(name)) for name, plan in plans.items()]
    if not finished:
        raise NLIError(f"every trial of the sweep failed, the first with: {next(iter(reasons.values()), 'no reason given')}")
    best = min((trial for trial in trials if trial["status"] == "finished"), key=lambda trial: trial["eval_loss"])
    write_atomic(output / "sweep.json", json.dumps({"trials": trials, "best": best}, indent=2) + "\n")
    record.finish({"trials": len(plans), "finished": len(finished), "best": best["name"], "best_eval_loss": best["eval_loss"]})
    print(f"sweep: best is {best['name']} with eval loss {best['eval_loss']:.4f} -> {output / 'sweep.json'}", flush=True)
    return output / "sweep.json"


def describe_trial(name: str, plan: FitPlan, result: Mapping | None, reason: str | None) -> dict:
    """One trial's line in sweep.json."""
    axes = dict(part.split("=", 1) for part in name.split(","))
    values = {axis: getattr(plan.config, axis, text) for axis, text in axes.items()}
    outcome = {"eval_loss": None, "steps": None, "seconds": None}
    if result is not None:
        outcome = {"eval_loss": result["eval_loss"], "steps": result["steps"], "seconds": result["train_seconds"]}
    status = "finished" if result else "stopped" if reason is None else "failed"
    return {"name": name, **values, "status": status, **outcome, "reason": reason, "adapter": str(plan.output)}


def run_trials(plans: Mapping[str, FitPlan], config: SweepConfig, output: Path) -> dict[str, str]:
    """Run trials by Ray Tune; returns the reason of each that failed."""
    import ray
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler

    def trial(parameters: dict) -> None:
        fit(plans[parameters["name"]], callbacks=[TuneReportCallback()])

    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0 if config.train.use_gpu is None else config.train.use_gpu
    needed = worker_resources(config.train, use_gpu)
    room = min(resources.get(name, 0) / (amount * config.train.num_workers) for name, amount in needed.items())
    concurrent = config.max_concurrent_trials or max(1, int(room))
    asha = ASHAScheduler(time_attr="step", grace_period=max(1, config.grace_evaluations * (config.train.eval_steps or 1)), max_t=10**9)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.01}),  # the trial only drives its training workers, which reserve their own
        param_space={"name": tune.grid_search(list(plans))},
        tune_config=tune.TuneConfig(
            metric="eval_loss", mode="min", max_concurrent_trials=concurrent, scheduler=asha if config.scheduler == "asha" else None, reuse_actors=False
        ),
        run_config=tune.RunConfig(name="ray_tune", storage_path=str(output), verbose=0),
    )
    grid = tuner.fit()
    reasons = {}
    for name, result in zip(plans, _in_order(grid, list(plans)), strict=True):
        if result is not None and result.error is not None:
            reasons[name] = str(own_error(result.error) or result.error).strip().splitlines()[-1]
            print(f"sweep: trial {name} failed: {reasons[name]}", flush=True)
    return reasons


def _in_order(grid, names: list[str]) -> list:
    by_name = {result.config["name"]: result for result in grid if result.config}
    return [by_name.get(name) for name in names]
