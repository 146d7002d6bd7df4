"""Inference as a whole, with an engine that notes what it is asked: kills, poison rows, resuming, several models, and the files.

python -m pytest tests/test_inference.py
"""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nli import inference
from nli.adapter_files import WEIGHTS
from nli.checkpoints import write_card
from nli.errors import ConfigError, DataError, ModelError, ResumeError, StorageError
from nli.evaluation import EvaluatePredictionsConfig
from nli.evaluation import run as evaluate
from nli.inference import InferenceConfig
from tests.conftest import REPOSITORY, TINY_BASE
from tests.fake_engine import FakeSettings, build_fake_engine

needs_ray = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_ROWS = 150


class Asked:
    """What the fake engine was asked, as it noted it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[tuple[str, str]]:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [tuple(line.split(" ", 1)) for line in text.splitlines()]

    def count(self) -> Counter:
        return Counter(premise for _, premise in self.lines())

    def processes(self) -> set[int]:
        return {int(process) for process, _ in self.lines()}

    def wait(self, number: int, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while len(self.lines()) < number:
            assert time.monotonic() < until, f"only {len(self.lines())} of {number} rows were asked"
            time.sleep(0.02)


@pytest.fixture
def asked(tmp_path) -> Asked:
    return Asked(tmp_path / "asked.txt")


@pytest.fixture
def fake(monkeypatch, asked):
    """Put the fake engine in the place of the real ones, with other settings whenever it is called."""

    def choose(**settings) -> None:
        monkeypatch.setattr(inference, "build_engine", functools.partial(build_fake_engine, FakeSettings(log=str(asked.path), **settings)))

    choose()
    return choose


@pytest.fixture
def config(tmp_path) -> InferenceConfig:
    """A run of 150 labelled rows by two workers that hold some 50 rows each."""
    write_pairs(tmp_path / "pairs.csv")
    results = {"results_dir": str(tmp_path / "results"), "run_name": "run"}
    return InferenceConfig(model=TINY_BASE, data=str(tmp_path / "pairs.csv"), use_gpu=False, num_workers=2, batch_size=8, **results)


def write_pairs(path: Path, special: dict[int, str] | None = None, labelled: bool = True, **columns: list) -> None:
    """Rows "pair 0", "pair 1", …; some of them with a word that the fake engine knows."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["premise", "hypothesis", *(["label"] if labelled else []), *columns])
        for index in range(NUM_ROWS):
            premise = f"pair {index} {(special or {}).get(index, '')}".strip()
            writer.writerow([premise, "so it is", *([len(premise) % 2] if labelled else []), *(values[index] for values in columns.values())])


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_complete(path: Path) -> list[dict]:
    rows = read_rows(path)
    assert [row["id"] for row in rows] == [str(index) for index in range(NUM_ROWS)]
    return rows


class TestWithRay:
    pytestmark = needs_ray

    def test_the_files_hold_configuration_metrics_timing_and_every_row(self, config, fake, asked, capsys):
        path = inference.run(config)
        rows = check_complete(path)
        assert asked.count().most_common(1)[0][1] == 1
        written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert written["rows"] == rows
        assert written["config"]["precision"] == "nf4" and written["identity"]["engine"] == "transformers"
        assert (written["counts"]["rows"], written["counts"]["unparsed"], written["counts"]["accuracy"]) == (150, 0, 1.0)
        assert written["metrics"]["macro_f1"] == 1.0 and written["metrics"]["parsed_accuracy"] == 1.0
        assert written["metrics"]["confusion"][0][0] + written["metrics"]["confusion"][1][1] == 150
        timing = written["timing"]
        assert timing["rows_computed"] == 150 and 0 < timing["row_seconds"] < timing["seconds"] and timing["rows_per_second"] > 0
        assert {engine["engine"] for engine in timing["engines"]} == {"fake 1.0"}
        assert {(row["engine"], row["precision"], row["label_forced"], row["votes"]) for row in rows} == {("transformers", "nf4", False, None)}
        assert {row["label_probability"] for row in rows} == {0.25, 0.75}
        with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == [
            *("id", "premise", "hypothesis", "true_label", "predicted_label", "label_probability", "thought_process", "raw_text"),
            *("parse_status", "num_prompt_tokens", "num_completion_tokens"),
        ]
        assert [row["thought_process"] for row in table] == [f"base: pair {index}" for index in range(150)]
        shown = capsys.readouterr().out
        assert "inference: run: 150 labelled rows, 0 answered already, 150 to do" in shown
        assert "inference: run: 0 of 150 unparsed, 150 of 150 right (1.000)" in shown
        assert " rows/s, " in shown and "load 0.0 s, rows " in shown
        report = evaluate(EvaluatePredictionsConfig(predictions=(str(path),), output_dir=str(path.parent / "evaluation")))
        assert report.exists()

    def test_a_second_run_asks_nothing_and_an_edited_label_or_row_costs_only_what_is_new(self, config, fake, asked, capsys):
        first = inference.run(config).read_bytes()
        assert inference.run(config).read_bytes() == first
        assert len(asked.lines()) == 150
        source = Path(config.data)
        source.write_text(source.read_text().replace("pair 3,so it is,0", "pair 3,so it is,1").replace("pair 4,", "another 4,"))
        rows = check_complete(inference.run(config))
        assert (rows[3]["true_label"], rows[4]["thought_process"]) == (1, "base: another 4")
        assert len(asked.lines()) == 151

    def test_without_its_store_a_finished_output_is_read_in_and_nothing_is_asked_again(self, config, fake, asked):
        path = inference.run(config)
        first = path.read_bytes()
        path.with_name("run.answers.sqlite").unlink()
        assert inference.run(config).read_bytes() == first
        assert len(asked.lines()) == 150
        path.with_name("run.answers.sqlite").write_bytes(b"no database at all" * 300)
        with pytest.raises(StorageError, match=r"run\.answers\.sqlite: damaged"):
            inference.run(config)
        assert path.read_bytes() == first

    def test_another_model_precision_prompt_or_decoding_is_refused_for_the_same_name(self, config, fake):
        path = inference.run(replace(config, max_rows=4))
        before = path.read_bytes()
        for change, message in (
            ({"precision": "bf16"}, "precision: 'nf4' -> 'bf16'"),
            ({"temperature": 0.5}, "temperature: 0.0 -> 0.5"),
            ({"no_cot": True}, "no_cot: False -> True"),
            ({"max_new_tokens": 7}, "max_new_tokens: 512 -> 7"),
        ):
            with pytest.raises(ResumeError, match=message):
                inference.run(replace(config, **change))
        assert path.read_bytes() == before

    def test_a_row_that_raises_becomes_a_failed_row_that_the_next_run_asks_again(self, config, fake, asked, capsys):
        write_pairs(Path(config.data), special={7: "raise"})
        rows = check_complete(inference.run(config))
        assert [(row["id"], row["problem"]) for row in rows if row["parse_status"] != "ok"] == [("7", "ValueError: no such token")]
        assert "1 of 150 unparsed (1 failed; the same command asks them again)" in capsys.readouterr().out
        inference.run(config)
        assert "149 answered already, 1 to do" in capsys.readouterr().out
        assert len(asked.lines()) == 149

    def test_a_row_that_ends_its_process_or_its_engine_becomes_a_failed_row_and_all_others_are_answered(self, config, fake, asked):
        write_pairs(Path(config.data), special={2: "kill", 149: "dead"})
        fake(seconds=0.002)
        rows = check_complete(inference.run(replace(config, num_workers=1)))
        failed = {row["id"]: row["problem"] for row in rows if row["parse_status"] != "ok"}
        assert set(failed) == {"2", "149"}
        assert failed["2"].endswith("with no other: its process ended without a word") and failed["149"].endswith("the device is gone")
        assert set(asked.count()) == {f"pair {index}" for index in range(NUM_ROWS)} - {"pair 2", "pair 149"}

    def test_an_engine_that_dies_while_it_loads_is_one_clear_error(self, config, fake, asked):
        fake(dies_when_loading=True)
        with pytest.raises(ModelError, match=r"The engine transformers cannot work: 3 starts in a row ended before a row was finished.* Its log: /.*\.err on "):
            inference.run(replace(config, num_workers=1))
        fake()
        check_complete(inference.run(replace(config, compute_dtype="fp32")))  # nothing was made the other way

    def test_a_killed_worker_costs_at_most_the_rows_in_its_hands(self, config, fake, asked):
        fake(seconds=0.05)
        killed = []

        def kill() -> None:
            asked.wait(40)
            killed.append(min(asked.processes()))
            os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        path = inference.run(config)
        killer.join()
        check_complete(path)
        counts = asked.count()
        repeated = sum(count - 1 for count in counts.values())
        assert len(counts) == NUM_ROWS and max(counts.values()) <= 2
        assert repeated <= 8  # what the dead engine had answered and was not stored yet
        assert len(asked.processes()) == 3
        assert json.loads(path.with_suffix(".json").read_text())["timing"]["worker_deaths"] == 1

    def test_a_killed_desk_costs_at_most_the_rows_in_flight(self, config, fake, asked):
        import psutil

        fake(seconds=0.05)

        def kill() -> None:
            asked.wait(40)
            desks = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::Desk")]
            assert len(desks) == 1
            desks[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        check_complete(inference.run(config))
        killer.join()
        counts = asked.count()
        assert len(counts) == NUM_ROWS
        assert sum(count - 1 for count in counts.values()) <= 2 * 13 * 3  # what two workers hold

    def test_both_workers_have_their_share(self, config, fake, asked):
        fake(seconds=0.05, load_seconds=2.0)  # both begin before either is ready, as on two GPUs of a machine
        inference.run(config)
        shares = Counter(process for process, _ in asked.lines()).values()
        assert len(shares) == 2 and min(shares) >= 0.35 * NUM_ROWS

    def test_adapters_of_one_base_are_answered_in_one_pass_with_files_of_their_own(self, config, fake, asked, tmp_path):
        for name in ("one", "two"):
            make_adapter(tmp_path / name)
        both = replace(config, model=str(tmp_path / "one"), adapters=(str(tmp_path / "two"),), num_workers=1)
        path = inference.run(both)
        assert path.name == "run-one.jsonl"
        for name in ("one", "two"):
            rows = check_complete(path.with_name(f"run-{name}.jsonl"))
            assert {row["answered_by"] for row in rows} == {name}
            assert rows[3]["thought_process"] == f"{name}: pair 3"
            assert json.loads(path.with_name(f"run-{name}.json").read_text())["timing"]["rows_computed"] == NUM_ROWS
        assert len(asked.processes()) == 1
        path.with_name("run-two.answers.sqlite").unlink()
        path.with_name("run-two.jsonl").unlink()
        path.with_name("run-two.manifest.json").unlink()
        inference.run(both)
        assert len(asked.lines()) == 3 * NUM_ROWS

    def test_samples_are_drawn_with_seeds_of_their_own_and_vote(self, config, fake, asked):
        rows = check_complete(inference.run(replace(config, num_samples=5, temperature=0.7)))
        assert set(asked.count().values()) == {5}
        assert all(sum(row["votes"]) == 5 and row["predicted_label"] == (row["votes"][1] > 2) for row in rows)
        assert len({tuple(row["votes"]) for row in rows}) >= 4

    def test_unlabelled_pairs_with_lengths_are_written_as_long_as_they_say(self, config, fake, asked):
        write_pairs(Path(config.data), labelled=False, tokens=[index + 1 for index in range(NUM_ROWS)])
        path = inference.run(replace(config, completion_length_column="tokens"))
        rows = check_complete(path)
        assert [row["num_completion_tokens"] for row in rows] == [index + 1 for index in range(NUM_ROWS)]
        written = json.loads(path.with_suffix(".json").read_text())
        assert written["metrics"] is None and written["counts"]["accuracy"] is None


def make_adapter(folder: Path) -> None:
    """An adapter of the tiny base, by its files: no engine of these tests loads it."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": TINY_BASE, "r": 4}))
    part = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{part}A.weight": np.full((4, 192), len(folder.name), np.float32), f"{part}B.weight": np.ones((192, 4), np.float32)}, folder / WEIGHTS)
    write_card(folder, TINY_BASE, "nf4", "fp32", 128)


@pytest.mark.ray
@pytest.mark.own_cluster
def test_after_a_killed_driver_the_same_command_asks_only_for_what_was_in_flight(config, asked, no_ray):
    settings = {name: getattr(config, name) for name in ("model", "data", "results_dir", "run_name", "use_gpu", "num_workers", "batch_size")}
    command = [sys.executable, "-m", "tests.inference_driver", json.dumps(settings), json.dumps({"log": str(asked.path), "seconds": 0.1})]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    asked.wait(40)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    check_complete(Path(config.results_dir) / "run.jsonl")
    counts = asked.count()
    assert len(counts) == NUM_ROWS and max(counts.values()) <= 2
    assert sum(count - 1 for count in counts.values()) <= 2 * 8 + 4  # two engines of eight rows, and what was not stored yet


CONFLICTS = {
    "samples that are all the same": ({"num_samples": 3}, "num_samples over 1 needs temperature above 0"),
    "no thought, but samples": ({"no_cot": True, "num_samples": 2, "temperature": 0.5}, "no_cot lets nothing be written"),
    "no thought, but a forced label": ({"no_cot": True, "force_label": True}, "no_cot lets nothing be written"),
    "fp8 without vllm": ({"precision": "fp8", "engine": "transformers"}, "precision fp8 is not for engine transformers"),
    "fp32 with vllm": ({"precision": "fp32", "engine": "vllm"}, "precision fp32 is not for engine vllm"),
    "fewer workers at most than at least": ({"num_workers": 4, "max_workers": 2}, "max_workers 2 is below num_workers 4"),
}


@pytest.mark.parametrize(("values", "message"), CONFLICTS.values(), ids=list(CONFLICTS))
def test_settings_that_conflict_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        InferenceConfig(**values)


def test_lengths_that_are_no_numbers_are_named_with_their_lines(config):
    write_pairs(Path(config.data), tokens=[*["5"] * (NUM_ROWS - 2), "many", "0"])
    with pytest.raises(DataError, match=r"pairs.csv:150: tokens 'many' is no whole number from 1\n.*pairs.csv:151: tokens '0'"):
        inference.run(replace(config, completion_length_column="tokens"))
    with pytest.raises(DataError, match=r"pairs.csv:1: no column tokns; .* Did you mean tokens\?"):
        inference.run(replace(config, completion_length_column="tokns"))


def test_models_of_several_bases_or_of_one_name_are_refused(config, tmp_path):
    for name in ("a/one", "b/one", "other"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_adapter(tmp_path / name)
    (tmp_path / "other/nli.json").write_text(json.dumps({"base_model": "elsewhere", "base_fingerprint": "sampled:0", "prompt_sha256": "0"}))
    with pytest.raises(ModelError, match=r"trained on elsewhere"):
        inference.run(replace(config, adapters=(str(tmp_path / "other"),)))
    with pytest.raises(ModelError, match="a model of its own, not an adapter"):
        inference.run(replace(config, adapters=(TINY_BASE,)))
    with pytest.raises(ConfigError, match="two of the models are called one"):
        inference.run(replace(config, adapters=(str(tmp_path / "a/one"), str(tmp_path / "b/one"))))
    assert not (tmp_path / "results").exists()
