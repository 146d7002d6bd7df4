"""Where a training run can be followed: log.jsonl and TensorBoard always, W&B unless it is turned off, Ray for a sweep's scheduler.

{"step": 250, "loss": 0.412, "grad_norm": 0.83, "learning_rate": 0.00017, "tokens_per_second": 16511.0, …}       a line of log.jsonl
{"step": 250, "eval_loss": 0.398, "eval_accuracy": 0.906, "eval_unparsed_rate": 0.0, …}
{"step": 250, "resumed_from": "checkpoint-250"}
"""

import math
import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nli.runtime.files import dump_line
from nli.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

_SHOWN = (
    "loss",
    "eval_loss",
    "watch_step",
    "eval_accuracy",
    "eval_unparsed_rate",
    "eval_eos_rate",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
"""what the console shows of a log line"""


def choose_trackers(config: TrainConfig, output: Path) -> list[str]:
    """What the trainer reports to, with the variables that they read set. W&B is offline without a key; its run id, WANDB_RUN_ID, comes with the job."""
    reports = ["tensorboard"]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    if config.wandb:
        reports.append("wandb")
        os.environ |= {"WANDB_PROJECT": config.wandb_project, "WANDB_DIR": str(output), "WANDB_RESUME": "allow"}
        if not has_wandb_key():
            os.environ.setdefault("WANDB_MODE", "offline")
    return reports


def has_wandb_key() -> bool:
    """Whether this machine may log to W&B online: a key in the environment, or from `wandb login`."""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def build_reporter(output: Path) -> "TrainerCallback":
    """A callback that logs to log.jsonl and the console, and reports evaluations to Ray once their checkpoint is in its place."""
    import ray.train
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        evaluation: dict | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step and state.is_world_process_zero:
                with open(output / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(
                        dump_line({"step": state.global_step, "resumed_from": f"checkpoint-{state.global_step}"})
                    )
                print(f"sft {output.name}: goes on from checkpoint-{state.global_step}", flush=True)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero or logs is None:
                return
            with open(output / "log.jsonl", "a", encoding="utf-8") as file:
                finite = {
                    name: None if isinstance(value, float) and not math.isfinite(value) else value
                    for name, value in logs.items()
                }
                file.write(dump_line({"step": state.global_step, **finite}))
            shown = {name: logs[name] for name in _SHOWN if name in logs}
            if shown:
                values = ", ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
                print(f"sft {output.name}: step {state.global_step}/{state.max_steps}, {values}", flush=True)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.evaluation = {"step": state.global_step, "epoch": state.epoch, "eval_loss": metrics["eval_loss"]}
            self.evaluation |= {"eval_accuracy": metrics["eval_accuracy"]} if "eval_accuracy" in metrics else {}
            if not math.isfinite(metrics["eval_loss"]):
                metrics["eval_loss"] = math.inf  # a NaN would stay the best loss for ever: no number is below it

        def on_save(self, args, state, control, **kwargs):
            if self.evaluation is not None:
                ray.train.report(self.evaluation)
                self.evaluation = None

    return Reporter()
