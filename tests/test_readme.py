"""The README's commands: each block says which test runs it or what it needs, and every flag in it exists."""

import re
import shlex

import pytest

from nli.runtime.config import parse_config
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (run by|needs): (.+?) -->\n)?```bash\n(.*?)```", README, flags=re.S)
COMMANDS = sorted({line.split("#")[0].strip() for *_, block in BLOCKS for line in block.splitlines() if line.strip()})
JOBS = sorted({re.search(r"python -m ray_jobs\..*", command)[0] for command in COMMANDS if "-m ray_jobs." in command})


def test_every_block_of_commands_says_who_runs_it_or_what_it_needs():
    assert len(BLOCKS) >= 6
    for kind, what, block in BLOCKS:
        assert kind, f"no marker before:\n{block}"
        if kind == "run by" and what.startswith("tests/"):
            assert (REPOSITORY / what).is_file()


@pytest.mark.parametrize("command", JOBS)
def test_a_job_in_the_readme_parses_as_written(command, repository):
    from importlib import import_module

    words = shlex.split(
        command.replace("$ablation", "unmodified").replace("${ablation}", "unmodified").replace("$split", "dev")
    )
    if "--help" in words:
        return
    stage = {
        "generate_thoughts": "teacher.thoughts.GenerateThoughtsConfig",
        "generate_reflections": "teacher.reflections.GenerateReflectionsConfig",
        "prepare_sft_data": "data.sft_rows.PrepareSFTDataConfig",
        "train_sft": "training.run.TrainConfig",
        "sweep_lora": "sweep.SweepConfig",
        "export_model": "export.ExportConfig",
        "run_inference": "inference.run.InferenceConfig",
        "evaluate_predictions": "evaluation.run.EvaluatePredictionsConfig",
        "account": "api.account.AccountConfig",
        "check_data": "data.check.CheckDataConfig",
        "pipeline": "pipeline.PipelineConfig",
    }[words[2].removeprefix("ray_jobs.")]
    module, name = stage.rsplit(".", 1)
    cls = getattr(import_module(f"nli.{module}"), name)
    assert isinstance(parse_config(cls, words[3:], prog="test"), cls)


def test_every_file_that_the_readme_names_is_there():
    for path in re.findall(r"`((?:configs|data/sample|kuberay|docs|tests)[\w/.-]*\.(?:py|yaml|md))`", README):
        assert (REPOSITORY / path).is_file(), path


def test_every_job_stands_in_the_readmes_table():
    for path in (REPOSITORY / "ray_jobs").glob("*.py"):
        assert path.stem == "__init__" or f"| `{path.stem}` |" in README


def test_the_commands_for_the_other_ablations_run_as_written(tmp_path):
    """The block is run by a shell in a folder with answers of both splits."""
    import json
    import os
    import subprocess
    import sys
    from pathlib import Path

    answer = {
        "id": "1",
        "premise": "p",
        "hypothesis": "h",
        "true_label": 1,
        "answered_by": "m",
        "prompt_name": "initial_generation",
        "prompt_sha256": "0",
    }
    answer |= {"raw_text": "{}", "thought_process": "T", "predicted_label": 1, "parse_status": "ok"}
    (tmp_path / "data/original_thoughts").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / f"data/original_thoughts/{split}.jsonl").write_text(json.dumps(answer) + "\n")
    block = next(block for kind, what, block in BLOCKS if what == "tests/test_readme.py")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data/finetune").glob("*.jsonl")) == [
        "correct_only_dev.jsonl",
        "correct_only_train.jsonl",
        "unmodified_dev.jsonl",
        "unmodified_train.jsonl",
    ]
