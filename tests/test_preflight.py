"""Preflight finds all faults of a run's rows at once, before any model is loaded, and says what the run will be like."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nli.runtime.errors import ConfigError, DataError, ResumeError, StorageError
from nli.runtime.files import write_jsonl
from nli.sweep import SweepConfig
from nli.training import preflight, preflight_report
from nli.training import run as sft
from nli.training.config import TrainConfig
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_stages import train_config
from tests.test_training_guards import sft_row


def write_split(folder: Path, split: str, count: int) -> Path:
    path = folder / f"{split}.jsonl"
    write_jsonl(path, [sft_row(split, index) for index in range(count)])
    return path


def config_of(folder: Path, **values) -> TrainConfig:
    files = {f"reflected_{split}": str(folder / f"{split}.jsonl") for split in ("train", "dev")}
    return train_config(files, folder / "run", **({"preflight": True, "use_gpu": False} | values))


@pytest.fixture
def good(tmp_path) -> Path:
    """Forty training rows and eight dev rows."""
    write_split(tmp_path, "train", 40)
    write_split(tmp_path, "dev", 8)
    return tmp_path


@pytest.fixture
def faulty(good) -> Path:
    """The same with five kinds of faults, one a line, after the good rows."""
    train, dev = good / "train.jsonl", good / "dev.jsonl"
    row = sft_row("train", 90)
    lines = [
        '{"id": "41", "premise": ',
        json.dumps({name: value for name, value in row.items() if name != "hypothesis"}),
        json.dumps(row | {"premise": "Another.", "completion": "  "}),
        json.dumps(row | {"premise": "A third.", "completion": "so " * 200}),
    ]
    with open(train, "a") as file:
        file.write("\n" + "\n".join(lines) + "\n")  # a blank line first: line numbers are the file's
    with open(dev, "a") as file:
        file.write(json.dumps(sft_row("train", 6)) + "\n")
    return good


FAULTS = [
    r"train.jsonl:42: not JSON \(Expecting value",
    r"train.jsonl:43: hypothesis: field required",
    r"train.jsonl:44: completion: empty, so there is nothing to learn",
    r"train.jsonl:45: \d+ tokens, over max_length 90",
    r"dev.jsonl:9: the pair stands in .*train.jsonl:7 too",
]


@pytest.mark.parametrize("preflight_only", [True, False])
def test_all_faults_are_named_in_one_pass_with_file_and_line_before_any_model_is_loaded(
    faulty, monkeypatch, preflight_only
):
    monkeypatch.setattr("nli.models.load.load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(DataError) as caught:
        sft.run(config_of(faulty, max_length=90, preflight=preflight_only))
    for fault in FAULTS:
        caught.match(fault)
    assert str(caught.value).count(".jsonl:") == len(FAULTS) + 1  # the dev row's fault names both files
    assert sorted(path.name for path in faulty.iterdir()) == ["dev.jsonl", "train.jsonl"]


def test_the_faults_of_a_file_are_told_though_the_tokenizer_is_missing(faulty, tmp_path):
    with pytest.raises(DataError, match="train.jsonl:42: not JSON"):
        preflight.check_splits((faulty / "train.jsonl", faulty / "dev.jsonl"), str(tmp_path), 90, False)


def test_the_job_reports_and_starts_and_writes_nothing(good):
    """As a user calls it: without a terminal there are no escape codes; Ray could not start in it."""
    path = good / "config.py"
    path.write_text(
        f"from nli.training.run import TrainConfig\n\nconfig = TrainConfig(**{config_of(good).__dict__!r})\n"
    )
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "ray_jobs.train_sft", "--config", str(path), "--preflight"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "rows      train 40, dev 8; over max_length 512 and refused: 0"
    assert lines[1] == "labels    train 20 of 1 and 20 of 0; dev 4 of 1 and 4 of 0"
    assert any(
        line.startswith("steps     6 of 16 rows, 3 an epoch; evaluated and saved every 3 steps") for line in lines
    )
    assert any(line.startswith("time      unknown: no run of this base on this machine") for line in lines)
    assert any(line.startswith("memory    trained on the CPU") for line in lines)
    assert any(line.startswith("leakage   no pair and no premise stands in both files") for line in lines)
    assert lines[-1].startswith("preflight: nothing stands in the way of")
    assert "\033" not in done.stdout
    assert sorted(path.name for path in good.iterdir()) == ["config.py", "dev.jsonl", "train.jsonl"]


def describe(folder: Path, colour: bool = False, **values) -> preflight_report.Report:
    config = config_of(folder, **values)
    splits = preflight.read_splits((folder / "train.jsonl", folder / "dev.jsonl"))
    return preflight_report.describe_run(
        config, splits, preflight.tokenise_here(splits, TINY_BASE), folder / "run", colour
    )


def test_the_preview_parts_what_is_masked_from_what_is_learnt(good):
    place, masked, learnt = describe(good).sections["preview"]
    assert place == "train.jsonl:1, 26 masked and 19 learnt tokens"
    assert masked.startswith("masked: <s>|[INST]| Premise|:|") and masked.endswith("[/INST]")
    assert learnt.startswith('learnt:  {"thought_process": "|') and learnt.endswith("|0|}|</s>")
    assert learnt.count("|") == 18
    _, dim, bright = describe(good, colour=True).sections["preview"]
    assert dim.startswith("\033[2m<s>|") and bright.startswith("\033[1;32m {") and bright.endswith("</s>\033[0m")


def test_a_file_is_coloured_for_a_terminal_only(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preflight_report.wants_colour(Terminal()) and not preflight_report.wants_colour(open(os.devnull))  # noqa: SIM115
    monkeypatch.setenv("NO_COLOR", "1")
    assert not preflight_report.wants_colour(Terminal())


def test_rows_that_would_be_cut_are_counted_and_named(good):
    report = describe(good, max_length=70, drop_overlong=True)
    long = report.sections["long rows"]
    assert report.sections["rows"] == [f"train {40 - len(long)}, dev 8; over max_length 70 and left out: {len(long)}"]
    assert long and all("71 tokens, over max_length 70" in text for text in long)


def test_labels_are_those_that_are_taught_and_wrong_ones_are_counted(good):
    rows = [sft_row("train", index) | {"true_label": 1} for index in range(6)]
    write_jsonl(good / "train.jsonl", [*rows, sft_row("train", 7) | {"completion": "no label"}])
    assert describe(good).sections["labels"] == [
        "train 3 of 1 and 3 of 0, 1 unreadable (3 not the true one); dev 4 of 1 and 4 of 0"
    ]


def test_the_histogram_counts_every_row_once():
    lines = preflight_report.draw_histogram([3, 4, 9, 10, 10, 27])
    assert [line.split("|")[0].strip() for line in lines] == ["0–4", "5–9", "10–14", "15–19", "20–24", "25–29"]
    assert lines[0].endswith(" 2") and lines[3].endswith(" 0")
    assert sum(int(line.split()[-1]) for line in lines) == 6
    assert max(line.count("#") for line in lines) == 40
    assert preflight_report.draw_histogram([]) == []


def test_shared_premises_are_reported_and_not_refused(good):
    row = sft_row("dev", 3) | {"premise": sft_row("train", 3)["premise"]}
    write_jsonl(good / "dev.jsonl", [row])
    assert describe(good).sections["leakage"] == [
        "no pair stands in both files, 1 premises do: the eval loss is a little too good"
    ]


@pytest.mark.parametrize(
    ("values", "steps"),
    [({"max_steps": 0, "epochs": 2.0}, "6 of 16 rows"), ({"max_steps": 0, "epochs": 0.5}, "2 of 16 rows")],
)
def test_steps_follow_from_rows_batch_and_epochs(good, values, steps):
    assert describe(good, **values).sections["steps"][0].startswith(steps)
    assert "never evaluated" in describe(good, max_steps=2).sections["steps"][0]


def test_time_is_told_by_a_measured_rate_only(good):
    other = good / "earlier"
    other.mkdir()
    config = config_of(good)
    identity = sft.plan_fit(config).identity
    manifest = {"status": "finished", "identity": identity, "hardware": {"gpus": []}, "attempts": [], "counts": {}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "log.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "tokens_per_second": rate}) + "\n" for step, rate in ((1, 10), (2, 50), (3, 60))
        )
    )
    text = describe(good).sections["time"][0]
    assert text.startswith("about 2 min of training") and text.endswith(
        f"at 50 tokens/s a worker, as measured in {other}"
    )
    (other / "manifest.json").write_text(json.dumps(manifest | {"hardware": {"gpus": ["NVIDIA H200, 143771 MiB"]}}))
    assert describe(good).sections["time"][0].startswith("unknown")


def test_memory_is_held_against_the_gpu_or_the_limit_given(good, monkeypatch):
    monkeypatch.setattr(preflight_report, "list_gpus", lambda: ["NVIDIA RTX 4090, 24564 MiB"])
    text = describe(good, use_gpu=None).sections["memory"][0]
    assert " of 24.0 GiB (NVIDIA RTX 4090, 24564 MiB): micro-batches of up to" in text and "does not fit" not in text
    text = describe(good, use_gpu=None, memory_limit_gb=0.1).sections["memory"][0]
    assert " of 0.1 GiB (memory_limit_gb)" in text and "does not fit" in text


def test_a_disk_too_small_for_the_checkpoints_is_refused(good, monkeypatch):
    monkeypatch.setattr(preflight_report, "free_bytes", lambda _: 1_000_000)
    with pytest.raises(StorageError, match=r"a run needs 0\.\d\d GB and 0\.00 GB are free"):
        sft.run(config_of(good))


def test_a_folder_that_holds_another_run_is_refused(good):
    (good / "run").mkdir()
    (good / "run/thesis.txt").write_text("mine")
    with pytest.raises(ResumeError, match="is not empty and holds no run of this project"):
        sft.run(config_of(good))


def test_a_sweep_and_a_pipeline_send_a_preflight_to_its_job(good):
    from nli.pipeline import PipelineConfig

    with pytest.raises(ConfigError, match="use train_sft --preflight"):
        SweepConfig(train=config_of(good))
    with pytest.raises(ConfigError, match="use train_sft --preflight"):
        replace(PipelineConfig(), train=config_of(good))
