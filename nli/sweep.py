"""Stage 5: search LoRA rank x learning rate x ablation (and other fields of the training config) with Ray Tune.

In:   SweepConfig(lora_rank=(8, 32), learning_rate=(1e-4, 2e-4), ablation=("correct_only", "reflected"))
Out:  sweeps/<name>/sweep.json
      {"trials": [{"name": "ablation=reflected,lora_rank=8,learning_rate=0.0001", "ablation": "reflected", "lora_rank": 8, "learning_rate": 0.0001,
                   "status": "finished", "eval_loss": 0.41, "steps": 1670, "seconds": 812.0, "adapter": "…"}, …], "best": {…}}
      sweeps/<name>/<trial's name>/  each trial's run, as train_sft makes it

Every trial's eval loss is over the same dev file, so that ablations can be compared. All trials are checked before the first one starts.
A trial's status is `finished`, `stopped` (by the scheduler, which leaves `stopped.json` in its folder), `diverged` (no eval loss was finite), `failed`
(with its reason) or `unfinished`; the same command goes on with the last two only.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Literal, get_type_hints

from nli.models.checkpoints import has_work
from nli.runtime.cluster import check_gpu_choice, connected, keeping_interrupts, own_error
from nli.runtime.config import Count, CountOrZero, Positive, config_class, field_names, nearest
from nli.runtime.errors import ConfigError, NLIError
from nli.runtime.files import resolve_output, write_atomic
from nli.runtime.manifest import start_run
from nli.task.records import Ablation
from nli.training.run import (
    FitPlan,
    TrainConfig,
    check_folder,
    check_room,
    fit,
    plan_fit,
    read_finished,
    worker_resources,
)

STOPPED = "stopped.json"
TRIAL_CPUS = 0.01  # a trial only drives its training workers, which reserve their own
_NO_AXES = {
    "num_workers",
    "cpus_per_worker",
    "gpu",
    "max_failures",
    "log_steps",
    "keep_checkpoints",
    "watch_rows",
}  # they change no result


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
        if self.train.preflight:
            raise ConfigError(
                "preflight looks at one training run: use train_sft --preflight. A sweep checks all its trials before the first one starts."
            )
        if not (self.lora_rank and self.learning_rate and self.ablation):
            raise ConfigError("every axis needs at least one value.")


def parse_extra_axes(texts: tuple[str, ...]) -> dict[str, tuple]:
    """{'lora_dropout': (0.0, 0.05)} from ('lora_dropout=0,0.05',).

    Raises ConfigError for a name that is no numeric field, or one that changes no result, and for a value that is no number.
    """
    numeric = [
        name for name, kind in get_type_hints(TrainConfig).items() if kind in (int, float) and name not in _NO_AXES
    ]
    axes: dict[str, tuple] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in field_names(TrainConfig):
            raise ConfigError(
                f"sweep axis {name!r} is not a field of the training config.{nearest(name, field_names(TrainConfig))}"
            )
        if name in ("lora_rank", "learning_rate") or name in axes:
            raise ConfigError(f"sweep axis {name} is given twice.")
        if name not in numeric:
            raise ConfigError(f"sweep axis {name} cannot be swept over; axes are {', '.join(numeric)}.")
        try:
            axes[name] = tuple(
                int(value) if value.strip().lstrip("-").isdigit() else float(value) for value in values.split(",")
            )
        except ValueError:
            raise ConfigError(f"sweep axis {text!r} needs numbers: {name}=0,0.05.") from None
    return axes


def list_trials(config: SweepConfig) -> dict[str, TrainConfig]:
    """The training config of every trial by the trial's name, which spells out its axes. Raises ConfigError for a value out of range."""
    axes = {
        "ablation": config.ablation,
        "lora_rank": config.lora_rank,
        "learning_rate": config.learning_rate,
        **parse_extra_axes(config.extra_axes),
    }
    alpha_per_rank = config.train.lora_alpha / config.train.lora_rank
    trials = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in chosen.items())
        ablation = chosen.pop("ablation")
        chosen.setdefault("lora_alpha", max(1, round(alpha_per_rank * chosen["lora_rank"])))
        chosen["train_file"] = config.train_files.replace("{ablation}", ablation)
        trials[name] = replace(
            config.train, **chosen, output_dir=f"{config.output_dir}/{name}", storage_root=config.storage_root
        )
    return trials


def run(config: SweepConfig) -> Path:
    """Run every trial that is neither finished nor stopped; returns the path of sweep.json.

    Raises ConfigError, DataError, ModelError, ResumeError or StorageError before the first trial. A trial that fails is listed with its reason; the others
    go on. Raises NLIError if no trial ends with a finite eval loss.
    """
    check_gpu_choice(config.train.gpu, config.train.use_gpu)
    output = resolve_output(config.output_dir, config.storage_root)
    plans = {name: plan_fit(train) for name, train in list_trials(config).items()}
    identity = {"trials": {name: plan.identity for name, plan in plans.items()}, "scheduler": config.scheduler}
    for plan in plans.values():
        check_folder(plan)
    inputs = sorted({path for plan in plans.values() for path in plan.inputs})
    record = start_run(
        output / "manifest.json",
        "sweep",
        identity,
        config,
        inputs,
        has_work=any(has_work(folder) for folder in output.glob("*/")),
    )
    outcomes = {name: describe_trial(name, plan) for name, plan in plans.items()}
    pending = {name: plan for name, plan in plans.items() if outcomes[name]["status"] == "unfinished"}
    num_stopped = sum(trial["status"] == "stopped" for trial in outcomes.values())
    stopped = f", {num_stopped} stopped by the scheduler" if num_stopped else ""
    print(
        f"sweep: {len(plans)} trials, {len(plans) - len(pending) - num_stopped} finished already{stopped}", flush=True
    )
    if pending:
        with connected(config.train.gpu):
            reasons = run_trials(pending, config, output)
        outcomes |= {name: describe_trial(name, plan, reasons.get(name)) for name, plan in pending.items()}
    trials = list(outcomes.values())
    finished = [trial for trial in trials if trial["status"] == "finished"]
    if not finished:
        found = ", ".join(f"{trial['name']}: {trial['reason'] or trial['status']}" for trial in trials[:3])
        raise NLIError(
            f"no trial of the sweep finished with a finite eval loss ({found}); try a lower learning_rate if they diverged."
        )
    best = min(finished, key=lambda trial: trial["eval_loss"])
    write_atomic(output / "sweep.json", json.dumps({"trials": trials, "best": best}, indent=2, allow_nan=False) + "\n")
    record.finish(
        {"trials": len(plans), "finished": len(finished), "best": best["name"], "best_eval_loss": best["eval_loss"]}
    )
    print(
        f"sweep: best is {best['name']} with eval loss {best['eval_loss']:.4f} -> {output / 'sweep.json'}", flush=True
    )
    return output / "sweep.json"


def describe_trial(name: str, plan: FitPlan, reason: str | None = None) -> dict:
    """One trial's line in sweep.json, from what lies in its folder; `reason` says why it failed just now."""
    axes = dict(part.split("=", 1) for part in name.split(","))
    values = {axis: getattr(plan.config, axis, text) for axis, text in axes.items()}
    outcome = {
        "status": "unfinished" if reason is None else "failed",
        "eval_loss": None,
        "steps": None,
        "seconds": None,
    }
    if (result := read_finished(plan)) is not None:
        loss = _finite(result["eval_loss"])
        outcome = {
            "status": "diverged" if loss is None else "finished",
            "eval_loss": loss,
            "steps": result["steps"],
            "seconds": result["train_seconds"],
        }
    elif reason is None and (stopped := read_stopped(plan)) is not None:
        outcome = {
            "status": "stopped",
            "eval_loss": stopped["eval_loss"],
            "steps": stopped["steps"],
            "seconds": stopped["seconds"],
        }
    return {"name": name, **values, **outcome, "reason": reason, "adapter": str(plan.output)}


def write_stopped(plan: FitPlan, result: Mapping) -> None:
    """Record that the scheduler has stopped a trial, with what the trial reported last."""
    values = {
        "eval_loss": _finite(result["eval_loss"]),
        "steps": result["step"],
        "seconds": round(result["time_total_s"], 1),
    }
    write_atomic(plan.output / STOPPED, json.dumps({"identity": plan.identity, **values}, indent=2) + "\n")


def read_stopped(plan: FitPlan) -> dict | None:
    """What `write_stopped` wrote about this very trial, or None."""
    try:
        stopped = json.loads((plan.output / STOPPED).read_text(encoding="utf-8"))
        return stopped if stopped["identity"] == json.loads(json.dumps(plan.identity)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a trial without a readable record is run again, from its newest checkpoint


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def run_trials(plans: Mapping[str, FitPlan], config: SweepConfig, output: Path) -> dict[str, str]:
    """Run trials by Ray Tune; returns the reason of each that failed. Raises ConfigError if the cluster has no room for one."""
    import ray
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler

    class RecordingASHA(ASHAScheduler):
        def on_trial_result(self, tune_controller, trial, result):
            decision = super().on_trial_result(tune_controller, trial, result)
            if decision == self.STOP:
                write_stopped(plans[trial.config["name"]], result)
            return decision

    def trial(parameters: dict) -> None:
        fit(plans[parameters["name"]], callbacks=[TuneReportCallback()])

    resources = ray.cluster_resources()
    use_gpu = check_room(config.train, TRIAL_CPUS)
    needed = worker_resources(config.train, use_gpu)
    room = min(resources.get(name, 0) / (amount * config.train.num_workers) for name, amount in needed.items())
    concurrent = config.max_concurrent_trials or max(1, int(room))
    clock = {
        "time_attr": "step" if config.train.eval_steps else "epoch",
        "grace_period": config.grace_evaluations * max(1, config.train.eval_steps),
    }
    asha = RecordingASHA(**clock, max_t=10**9)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": TRIAL_CPUS}),
        param_space={"name": tune.grid_search(list(plans))},
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            max_concurrent_trials=concurrent,
            scheduler=asha if config.scheduler == "asha" else None,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(name="ray_tune", storage_path=str(output), verbose=0),
    )
    with keeping_interrupts():
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
