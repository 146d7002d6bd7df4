"""Inference as a whole, with an engine that notes what it is asked: kills, poison rows, resuming, several models, and the files.

python -m pytest tests/test_inference.py
"""

import asyncio
import contextlib
import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nli.evaluation.run import EvaluatePredictionsConfig
from nli.evaluation.run import run as evaluate
from nli.inference import run as inference
from nli.inference.answers import to_failed
from nli.inference.result_files import describe_figures
from nli.inference.result_sets import describe_models, find_interrupted, open_results
from nli.inference.run import InferenceConfig
from nli.inference.worker import Student
from nli.models.adapter_files import WEIGHTS
from nli.models.checkpoints import write_card
from nli.runtime.errors import ConfigError, DataError, ModelError, ResumeError, StorageError
from nli.runtime.manifest import lock_output
from nli.runtime.worklist import Worklist
from nli.task.records import row_key
from tests.conftest import REPOSITORY, TINY_BASE
from tests.fake_engine import FakeSettings, build_fake_engine

needs_ray = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_ROWS = 150
LAST_ROWS_WAIT = dict.fromkeys(range(NUM_ROWS - 30, NUM_ROWS), "wait")
RUN = {"run_name": "run", "use_gpu": False, "num_workers": 2, "batch_size": 8}


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

    def wait(self, number: int, seconds: float = 180) -> None:
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
        monkeypatch.setattr(
            inference,
            "build_engine",
            functools.partial(build_fake_engine, FakeSettings(log=str(asked.path), **settings)),
        )

    choose()
    return choose


@pytest.fixture
def config(tmp_path) -> InferenceConfig:
    """A run of 150 labelled rows by two workers that hold some 50 rows each."""
    write_pairs(tmp_path / "pairs.csv")
    return InferenceConfig(
        model=TINY_BASE, data=str(tmp_path / "pairs.csv"), results_dir=str(tmp_path / "results"), **RUN
    )


@pytest.fixture(scope="class")
def finished_once(tmp_path_factory, ray_cluster) -> tuple[InferenceConfig, str]:
    """A run that is finished, made once for all tests that look at it or go on from it, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    write_pairs(folder / "pairs.csv")
    config = InferenceConfig(
        model=TINY_BASE, data=str(folder / "pairs.csv"), results_dir=str(folder / "results"), **RUN
    )
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(
            inference, "build_engine", functools.partial(build_fake_engine, FakeSettings(log=str(folder / "asked.txt")))
        )
        inference.run(config)
    return config, said.getvalue()


@pytest.fixture
def finished(finished_once, config, asked, fake) -> Path:
    """The JSON Lines of a copy of that run: of this test's config."""
    source = Path(finished_once[0].results_dir)
    shutil.copytree(source, config.results_dir)
    shutil.copy(source.parent / "asked.txt", asked.path)
    return Path(config.results_dir) / "run.jsonl"


def write_pairs(path: Path, special: dict[int, str] | None = None, labelled: bool = True, **columns: list) -> None:
    """Rows "pair 0", "pair 1", …; some of them with a word that the fake engine knows."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["premise", "hypothesis", *(["label"] if labelled else []), *columns])
        for index in range(NUM_ROWS):
            premise = f"pair {index} {(special or {}).get(index, '')}".strip()
            writer.writerow(
                [
                    premise,
                    "so it is",
                    *([len(premise) % 2] if labelled else []),
                    *(values[index] for values in columns.values()),
                ]
            )


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_complete(path: Path) -> list[dict]:
    rows = read_rows(path)
    assert [row["id"] for row in rows] == [str(index) for index in range(NUM_ROWS)]
    return rows


class TestWithRay:
    pytestmark = needs_ray

    def test_the_files_hold_configuration_metrics_timing_and_every_row(self, finished_once, finished, asked):
        path, shown = finished, finished_once[1]
        rows = check_complete(path)
        assert asked.count().most_common(1)[0][1] == 1
        written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert written["rows"] == rows
        assert (
            written["status"] == "finished"
            and written["counts"] == json.loads(path.with_name("run.manifest.json").read_text())["counts"]
        )
        assert written["config"]["precision"] == "nf4" and written["identity"]["engine"] == "transformers"
        assert (written["counts"]["rows"], written["counts"]["unparsed"], written["counts"]["accuracy"]) == (
            150,
            0,
            1.0,
        )
        assert written["metrics"]["macro_f1"] == 1.0 and written["metrics"]["parsed_accuracy"] == 1.0
        assert written["metrics"]["confusion"][0][0] + written["metrics"]["confusion"][1][1] == 150
        timing = written["timing"]
        assert (
            timing["rows_computed"] == 150
            and 0 < timing["row_seconds"] < timing["seconds"]
            and timing["rows_per_second"] > 0
        )
        assert {engine["engine"] for engine in timing["engines"]} == {"fake 1.0"}
        assert {(row["engine"], row["precision"], row["label_forced"], row["votes"]) for row in rows} == {
            ("transformers", "nf4", False, None)
        }
        assert {row["label_probability"] for row in rows} == {0.25, 0.75}
        with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == [
            *(
                "id",
                "premise",
                "hypothesis",
                "true_label",
                "predicted_label",
                "label_probability",
                "thought_process",
                "raw_text",
            ),
            *("parse_status", "num_prompt_tokens", "num_completion_tokens"),
        ]
        assert [row["thought_process"] for row in table] == [f"base: pair {index}" for index in range(150)]
        assert "inference: run: 150 labelled rows, 0 answered already, 150 to do" in shown
        assert "inference: run: 0 of 150 unparsed, 150 of 150 right (1.000)" in shown
        assert " rows/s, " in shown and "load 0.0 s, rows " in shown

    def test_a_second_run_asks_nothing_and_an_edited_label_or_row_costs_only_what_is_new(self, config, finished, asked):
        first = finished.read_bytes()
        timing = json.loads(finished.with_suffix(".json").read_text())["timing"]
        assert inference.run(config).read_bytes() == first
        assert len(asked.lines()) == 150
        again = json.loads(finished.with_suffix(".json").read_text())
        assert again["timing"] == again["attempts"][0]["timing"] == timing and again["counts"]["rows_computed"] == 0
        source = Path(config.data)
        source.write_text(
            source.read_text().replace("pair 3,so it is,0", "pair 3,so it is,1").replace("pair 4,", "another 4,")
        )
        rows = check_complete(inference.run(config))
        assert (rows[3]["true_label"], rows[4]["thought_process"]) == (1, "base: another 4")
        assert len(asked.lines()) == 151

    def test_without_its_store_a_finished_output_is_read_in_and_nothing_is_asked_again(self, config, finished, asked):
        path, first = finished, finished.read_bytes()
        path.with_name("run.answers.sqlite").unlink()
        assert inference.run(config).read_bytes() == first
        assert len(asked.lines()) == 150
        path.with_name("run.answers.sqlite").write_bytes(b"no database at all" * 300)
        with pytest.raises(StorageError, match=r"run\.answers\.sqlite: damaged"):
            inference.run(config)
        assert path.read_bytes() == first

    def test_another_model_precision_prompt_or_decoding_is_refused_for_the_same_name(self, config, finished):
        path, before = finished, finished.read_bytes()
        for change, message in (
            ({"precision": "bf16"}, "precision: 'nf4' -> 'bf16'"),
            ({"temperature": 0.5}, "temperature: 0.0 -> 0.5"),
            ({"no_cot": True}, "no_cot: False -> True"),
            ({"max_new_tokens": 7}, "max_new_tokens: 512 -> 7"),
        ):
            with pytest.raises(ResumeError, match=message):
                inference.run(replace(config, **change))
        assert path.read_bytes() == before

    def test_a_row_that_breaks_anything_becomes_a_failed_row_that_the_next_run_asks_again(
        self, config, fake, asked, capsys
    ):
        write_pairs(Path(config.data), special={7: "raise", 9: "half", 147: "kill", 149: "dead"})
        fake(seconds=0.002)
        rows = check_complete(inference.run(replace(config, num_workers=1)))
        failed = {row["id"]: row["problem"] for row in rows if row["parse_status"] != "ok"}
        assert set(failed) == {"7", "9", "147", "149"}
        assert failed["147"].endswith("with no other: its process ended without a word") and failed["149"].endswith(
            "the device is gone"
        )
        assert failed["7"] == "ValueError: no such token" and failed["9"].endswith("surrogates not allowed")
        assert {name.split()[1] for name in asked.count()} == {str(index) for index in range(NUM_ROWS)} - set(failed)
        assert "4 of 150 unparsed (4 failed; the same command asks them again)" in capsys.readouterr().out
        fake(is_healthy=True)
        assert {row["parse_status"] for row in check_complete(inference.run(replace(config, num_workers=1)))} == {"ok"}
        assert "146 answered already, 4 to do" in capsys.readouterr().out
        assert [asked.count()[name] for name in ("pair 7 raise", "pair 9 half", "pair 147 kill", "pair 149 dead")] == [
            1,
            1,
            1,
            1,
        ]

    def test_an_engine_that_dies_while_it_loads_is_one_clear_error(self, config, fake, asked):
        fake(dies_when_loading=True)
        with pytest.raises(
            ModelError,
            match=r"The engine transformers cannot work: 3 starts in a row ended before a row was finished.* Its log: /.*\.err on ",
        ):
            inference.run(replace(config, num_workers=1))
        with contextlib.ExitStack() as stack:  # nothing was made that way, so another way is free to take the name
            base, models = describe_models(config)
            assert (
                open_results(
                    replace(config, compute_dtype="fp32"), stack, Path(config.data), "transformers", base, models[0]
                ).name
                == "run"
            )

    def test_a_worker_that_gets_no_engine_leaves_all_rows_to_the_others(self, config, fake, asked, tmp_path):
        fake(seconds=0.02, refused=str(tmp_path / "refused"))
        path = inference.run(config)
        check_complete(path)
        assert len(asked.processes()) == 1 and max(asked.count().values()) == 1
        assert json.loads(path.with_suffix(".json").read_text())["timing"]["worker_deaths"] == 1

    def test_a_killed_worker_costs_at_most_the_rows_in_its_hands(self, config, fake, asked):
        write_pairs(Path(config.data), special=LAST_ROWS_WAIT)
        gate = asked.path.with_name("gate")
        fake(seconds=0.2, gate=str(gate))  # long enough that what a busy machine stores late is a row or two
        killed = []

        def kill() -> None:
            asked.wait(40)
            killed.append(min(asked.processes()))
            os.kill(killed[0], signal.SIGKILL)
            gate.touch()

        killer = threading.Thread(target=kill)
        killer.start()
        path = inference.run(config)
        killer.join()
        check_complete(path)
        counts = asked.count()
        repeated = sum(count - 1 for count in counts.values())
        assert len(counts) == NUM_ROWS and max(counts.values()) <= 2
        assert repeated <= 8  # what the dead engine had answered and was not stored yet
        assert asked.processes() - set(killed)  # whoever was quicker: the other worker, or the next start of this one
        assert json.loads(path.with_suffix(".json").read_text())["timing"]["worker_deaths"] == 1

    def test_a_killed_desk_costs_at_most_the_rows_in_flight(self, config, fake, asked):
        import psutil

        write_pairs(Path(config.data), special=LAST_ROWS_WAIT)
        gate = asked.path.with_name("gate")
        fake(seconds=0.2, gate=str(gate))
        killed = []

        def kill() -> None:
            asked.wait(40)
            found = [
                process
                for process in psutil.process_iter(["cmdline"])
                if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::Desk")
            ]
            for desk in found:
                desk.kill()
            killed.extend(found)
            gate.touch()

        killer = threading.Thread(target=kill)
        killer.start()
        check_complete(inference.run(config))
        killer.join()
        assert len(killed) == 1
        counts = asked.count()
        assert len(counts) == NUM_ROWS
        assert sum(count - 1 for count in counts.values()) <= 2 * 13 * 3  # what two workers hold

    def test_both_workers_have_their_share(self, config, fake, asked):
        fake(seconds=0.2, company=2)  # both begin before either is ready, as on two GPUs of a machine
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
        both_answers = tuple(str(path.with_name(f"run-{name}.jsonl")) for name in ("one", "two"))
        evaluated = evaluate(
            EvaluatePredictionsConfig(
                predictions=both_answers, output_dir=str(tmp_path / "evaluation"), bootstrap_draws=100
            )
        )
        report = json.loads(evaluated.with_name("evaluation.json").read_text())
        assert [(run["run"], run["n"], run["accuracy"]) for run in report["runs"]] == [
            ("run-one", NUM_ROWS, 1.0),
            ("run-two", NUM_ROWS, 1.0),
        ]
        path.with_name("run-two.answers.sqlite").unlink()
        path.with_name("run-two.jsonl").unlink()
        path.with_name("run-two.manifest.json").unlink()
        with contextlib.ExitStack() as stack:  # of the two, only what is gone is to do again
            base, models = describe_models(both)
            again = [open_results(both, stack, Path(config.data), "transformers", base, model) for model in models]
            assert [each.store.count() for each in again] == [NUM_ROWS, 0]
        inference.run(both)
        engines = [
            json.loads(path.with_name(f"run-{name}.json").read_text())["timing"]["engines"] for name in ("one", "two")
        ]
        assert [[engine["num_adapters"] for engine in each] for each in engines] == [
            [2],
            [1],
        ]  # no adapter is loaded for nothing
        path.with_name("run-two.answers.sqlite").unlink()
        path.with_name("run-two.jsonl").unlink()
        path.with_name("run-two.manifest.json").unlink()
        fake(dies_when_loading=True)
        with pytest.raises(ModelError, match="3 starts in a row ended"):
            inference.run(both)
        manifests = [json.loads(path.with_name(f"run-{name}.manifest.json").read_text()) for name in ("one", "two")]
        assert [(manifest["status"], len(manifest["attempts"])) for manifest in manifests] == [
            ("finished", 4),
            ("running", 1),
        ]  # one of them was only opened

    def test_results_of_one_pass_can_be_named_each_by_itself_also_those_of_a_base_called_as_its_adapter(
        self, config, fake, asked, tmp_path
    ):
        base, adapter = tmp_path / "bases/one", tmp_path / "one"
        shutil.copytree(TINY_BASE, base)
        make_adapter(adapter)
        named = replace(
            config, model=str(base), adapters=(str(adapter),), run_name="", run_names=("base", "tuned"), num_workers=1
        )
        path = inference.run(named)
        thoughts = [check_complete(path.with_name(f"{name}.jsonl"))[3]["thought_process"] for name in ("base", "tuned")]
        assert path.name == "base.jsonl" and thoughts == ["base: pair 3", "one: pair 3"]
        assert len(asked.processes()) == 1
        inference.run(
            replace(config, model=str(adapter), base_model=str(base), run_name="tuned", num_workers=1)
        )  # alone, the same run
        assert set(asked.count().values()) == {2}

    def test_samples_of_unlabelled_pairs_have_seeds_of_their_own_vote_and_are_as_long_as_a_column_says(
        self, config, fake, asked
    ):
        write_pairs(Path(config.data), labelled=False, tokens=[index + 1 for index in range(NUM_ROWS)])
        path = inference.run(
            replace(config, num_workers=1, num_samples=5, temperature=0.7, completion_length_column="tokens")
        )
        rows = check_complete(path)
        assert set(asked.count().values()) == {5}
        assert all(sum(row["votes"]) == 5 and row["predicted_label"] == (row["votes"][1] > 2) for row in rows)
        assert len({tuple(row["votes"]) for row in rows}) >= 4
        assert [row["num_completion_tokens"] for row in rows] == [5 * (index + 1) for index in range(NUM_ROWS)]
        written = json.loads(path.with_suffix(".json").read_text())
        assert written["metrics"] is None and written["counts"]["accuracy"] is None

    def test_after_a_killed_driver_the_same_command_asks_only_for_what_was_in_flight(self, config, fake, asked):
        import ray

        fake(seconds=0.1)
        settings = {name: getattr(config, name) for name in ("model", "data", "results_dir", *RUN)}
        command = [
            sys.executable,
            "-m",
            "tests.inference_driver",
            json.dumps(settings),
            json.dumps({"log": str(asked.path), "seconds": 0.1}),
        ]
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        driver = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        asked.wait(30)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        check_complete(inference.run(config))
        counts = asked.count()
        assert len(counts) == NUM_ROWS and max(counts.values()) <= 2
        assert sum(count - 1 for count in counts.values()) <= 2 * (
            2 * 8 + 4
        )  # two engines of eight rows, not stored yet, and again until Ray notices


def make_adapter(folder: Path) -> None:
    """An adapter of the tiny base, by its files: no engine of these tests loads it."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": TINY_BASE, "r": 4}))
    part = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {
            f"{part}A.weight": np.full((4, 192), len(folder.name), np.float32),
            f"{part}B.weight": np.ones((192, 4), np.float32),
        },
        folder / WEIGHTS,
    )
    write_card(folder, TINY_BASE, "nf4", "fp32", 128)


CONFLICTS = {
    "samples that are all the same": ({"num_samples": 3}, "num_samples over 1 needs temperature above 0"),
    "no thought, but samples": (
        {"no_cot": True, "num_samples": 2, "temperature": 0.5},
        "no_cot lets nothing be written",
    ),
    "no thought, but a forced label": ({"no_cot": True, "force_label": True}, "no_cot lets nothing be written"),
    "fp8 without vllm": (
        {"precision": "fp8", "engine": "transformers"},
        "precision fp8 is not for engine transformers",
    ),
    "fp32 with vllm": ({"precision": "fp32", "engine": "vllm"}, "precision fp32 is not for engine vllm"),
    "a KV cache in fp8 without vllm": (
        {"kv_cache_dtype": "fp8", "engine": "transformers"},
        "kv_cache_dtype fp8 is not for engine transformers",
    ),
    "no model": ({"model": ""}, "model or one of the adapters is empty"),
    "no adapter": ({"adapters": ("models/a", "")}, "model or one of the adapters is empty"),
    "names for other models": (
        {"run_names": ("a", "b")},
        "run_names takes the place of run_name, with a name of its own for each of the 1 models",
    ),
    "one name twice": (
        {"run_name": "", "adapters": ("b",), "run_names": ("a", "a")},
        "with a name of its own for each of the 2 models",
    ),
    "a list of names with a folder": ({"run_name": "", "run_names": ("a/b",)}, "run_name 'a/b' is no file name"),
    "an empty name in a list": ({"run_name": "", "run_names": ("",)}, "run_name '' is no file name"),
    "a name with a folder": ({"run_name": "a/b"}, "run_name 'a/b' is no file name; name the folder by results_dir"),
    "a name of dots": ({"run_name": ".."}, "run_name '..' is no file name"),
    "a name that no file can have": ({"run_name": "a\0b"}, "is no file name"),
    "an endless temperature": ({"temperature": float("inf")}, "temperature is endless"),
    "one GPU for two workers": ({"gpu": 0, "num_workers": 2}, "gpu picks one GPU of this machine, for one worker"),
    "a GPU for a run without": ({"gpu": 0, "use_gpu": False}, "gpu picks one GPU of this machine"),
    "fewer workers at most than at least": (
        {"num_workers": 4, "max_workers": 2},
        "max_workers 2 is below num_workers 4",
    ),
}


@pytest.mark.parametrize(("values", "message"), CONFLICTS.values(), ids=list(CONFLICTS))
def test_settings_that_conflict_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        InferenceConfig(**values)


def test_lengths_that_are_no_numbers_are_named_with_their_lines(config):
    write_pairs(Path(config.data), tokens=[*["5"] * (NUM_ROWS - 2), "many", "0"])
    with pytest.raises(
        DataError, match=r"pairs.csv:150: tokens 'many' is no whole number from 1\n.*pairs.csv:151: tokens '0'"
    ):
        inference.run(replace(config, completion_length_column="tokens"))
    with pytest.raises(DataError, match=r"pairs.csv:1: no column tokns; .* Did you mean tokens\?"):
        inference.run(replace(config, completion_length_column="tokns"))


def test_models_of_several_bases_or_of_one_name_are_refused(config, tmp_path):
    for name in ("a/one", "b/one", "other"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_adapter(tmp_path / name)
    (tmp_path / "other/nli.json").write_text(
        json.dumps({"base_model": "elsewhere", "base_fingerprint": "sampled:0", "prompt_sha256": "0"})
    )
    with pytest.raises(ModelError, match=r"trained on elsewhere"):
        inference.run(replace(config, adapters=(str(tmp_path / "other"),)))
    with pytest.raises(ModelError, match="a model of its own, not an adapter"):
        inference.run(replace(config, adapters=(TINY_BASE,)))
    with pytest.raises(ModelError, match="^models/nowhere: no such adapter folder, and no adapter that the hub has"):
        inference.run(replace(config, adapters=("models/nowhere",)))
    with pytest.raises(ConfigError, match="two of the models are called one"):
        inference.run(replace(config, adapters=(str(tmp_path / "a/one"), str(tmp_path / "b/one"))))
    assert not (tmp_path / "results").exists()


def test_a_refused_model_leaves_the_finished_results_of_the_others_as_they_were(config, tmp_path):
    for name in ("one", "two"):
        make_adapter(tmp_path / name)
    both = replace(config, model=str(tmp_path / "one"), adapters=(str(tmp_path / "two"),))
    with contextlib.ExitStack() as stack:
        base, models = describe_models(both)
        for model in models:
            each = open_results(both, stack, Path(config.data), "transformers", base, model)
            each.store.put([("0:9c", False, "{}")])
            each.record.finish({"rows": 1})
    manifests = [Path(config.results_dir) / f"run-{name}.manifest.json" for name in ("one", "two")]
    assert json.loads(manifests[1].read_text())["config"]["model"] == str(tmp_path / "two")
    before = [path.read_bytes() for path in manifests]
    shutil.rmtree(tmp_path / "two")
    (tmp_path / "other").mkdir()
    make_adapter(tmp_path / "other/again")
    (tmp_path / "other/again").rename(tmp_path / "two")
    unnamed = replace(both, run_name="")
    with contextlib.ExitStack() as stack:
        cures = [
            open_results(unnamed, stack, Path(config.data), "transformers", base, model).cure
            for model in describe_models(unnamed)[1]
        ]
    assert cures == ["--run-names, with the names of these files, asks them again"] * 2
    with pytest.raises(ResumeError, match="made another way .run-two.manifest.json.:\n  adapter: "):
        inference.run(both)
    assert [path.read_bytes() for path in manifests] == before


def test_an_adapter_of_unknown_training_that_names_another_base_is_told_of(config, tmp_path, capsys):
    make_adapter(tmp_path / "one")
    (tmp_path / "one/nli.json").unlink()
    (tmp_path / "prompt.txt").write_text("P: {premise} H: {hypothesis}")
    foreign = replace(config, adapters=(str(tmp_path / "one"),), prompt_template=str(tmp_path / "prompt.txt"))
    describe_models(foreign)
    assert capsys.readouterr().out == ""
    named = tmp_path / "one/adapter_config.json"
    named.write_text(named.read_text().replace(TINY_BASE, "mistralai/Mistral-7B-Instruct-v0.3"))
    describe_models(foreign)
    assert (
        f"one names mistralai/Mistral-7B-Instruct-v0.3 as its base and is asked on {TINY_BASE}"
        in capsys.readouterr().out
    )


def test_what_ends_a_run_is_told_though_the_manifest_cannot_be_written_any_more(config, monkeypatch):
    base, (model,) = describe_models(config)

    def fill_disk(path: Path, write: object) -> None:
        raise StorageError(f"{path}: cannot be written")

    def open_run(stack):
        return open_results(config, stack, Path(config.data), "transformers", base, model)

    def fail() -> None:
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            open_run(stack)
            patch.setattr("nli.runtime.manifest.write_atomic", fill_disk)
            raise ModelError("no GPU")

    with pytest.raises(ModelError, match="no GPU"):
        fail()
    with contextlib.ExitStack() as stack:
        assert open_run(stack).name == "run"  # it is let go


def test_the_type_of_the_kv_cache_is_part_of_a_results_name(config):
    config = replace(config, run_name="", kv_cache_dtype="fp8")
    base, (model,) = describe_models(config)
    with contextlib.ExitStack() as stack:
        results = open_results(config, stack, Path(config.data), "vllm", base, model)
        assert "-nf4-kv_fp8-pairs-" in results.name and results.target.frame["precision"] == "nf4-kv_fp8"


def test_a_run_without_a_name_goes_on_with_an_interrupted_one_of_the_same_kind(config, monkeypatch):
    config = replace(config, run_name="")
    source = Path(config.data)

    def open_run(stack, config=config):
        base, (model,) = describe_models(config)
        return open_results(config, stack, source, "transformers", base, model)

    stopped = contextlib.ExitStack()
    first = open_run(stopped)
    first.store.put([("0:9c", False, "{}")])
    stopped.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    (first.files["jsonl"].parent / "zz.manifest.json").write_text("{")  # another run's, cut short
    monkeypatch.setattr("nli.inference.result_sets.name_results", lambda model, precision, source: "new")
    with contextlib.ExitStack() as stack:
        again = open_run(stack)
        assert (again.name, again.store.count()) == (first.name, 1)
        assert again.cure == f"--run-name {first.name} asks them again"
        assert (
            find_interrupted(Path(config.results_dir), again.record.manifest["identity"], source) is None
        )  # it is at work
        with pytest.raises(ResumeError, match=f"process {os.getpid()} on .* is at work on {first.name}"):
            open_run(stack, replace(config, run_name=first.name))
        assert open_run(stack, replace(config, max_new_tokens=7)).name == "new"
        again.record.finish({})
    with contextlib.ExitStack() as stack:
        assert open_run(stack).name == "new"


def test_of_two_runs_of_one_name_that_start_at_once_the_second_is_told_of_the_first_before_it_opens_a_file(config):
    base, (model,) = describe_models(config)
    folder = Path(config.results_dir)
    with contextlib.ExitStack() as stack:
        with contextlib.closing(lock_output(folder / "run.manifest.json")):
            with pytest.raises(ResumeError, match=f"process {os.getpid()} on .* is at work on run; wait for it"):
                open_results(config, stack, Path(config.data), "transformers", base, model)
            assert not list(folder.glob("*.sqlite*"))
        assert open_results(config, stack, Path(config.data), "transformers", base, model).store.count() == 0


def test_rows_of_another_file_are_refused_for_the_same_name(config, tmp_path):
    base, (model,) = describe_models(config)
    other = tmp_path / "dev.csv"
    write_pairs(other)
    with contextlib.ExitStack() as stack:
        first = open_results(config, stack, Path(config.data), "transformers", base, model)
        first.store.put([("0:9c", False, "{}")])
        first.record.finish({})
        with pytest.raises(ResumeError, match=f"data: '{Path(config.data).name}' -> 'dev.csv'"):
            open_results(config, stack, other, "transformers", base, model)


@pytest.mark.parametrize(
    "template", ["[INST] P: {premise} H: {hypothesis}[/INST] ", "P: {premise} [INST] H: {hypothesis}"]
)
def test_a_prompt_template_that_cannot_be_encoded_is_named(config, tmp_path, template):
    file = tmp_path / "template.txt"
    file.write_text(template)
    with pytest.raises(DataError, match=rf"{file}: the text holds '\[INST\]'.* at a prompt's two ends only"):
        describe_models(replace(config, prompt_template=str(file)))


def test_a_base_below_the_storage_root_is_found_like_a_model(config, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "root" / "models" / "base")
    make_adapter(tmp_path / "adapter")
    base, _ = describe_models(
        replace(config, model=str(tmp_path / "adapter"), base_model="models/base", storage_root=str(tmp_path / "root"))
    )
    assert base == str(tmp_path / "root" / "models" / "base")


def test_a_run_whose_files_cannot_all_be_written_is_not_finished(config, monkeypatch, tmp_path):
    rows = [{"id": "0", "premise": "pair 0", "hypothesis": "so it is", "true_label": 0}]
    base, (model,) = describe_models(config)
    with Worklist(tmp_path / "rows.sqlite") as worklist, contextlib.ExitStack() as stack:
        worklist.fill(((row, row_key(row).encode()) for row in rows), tmp_path / "pairs.csv")
        results = open_results(config, stack, Path(config.data), "transformers", base, model)
        results.store.put([(row_key(rows[0]), True, json.dumps(to_failed(results.target.frame, "gone")))])
        timing = describe_figures({}, 0, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "write_report", lambda *_: (_ for _ in ()).throw(StorageError("no space")))
            with pytest.raises(StorageError):
                inference.write_results(results, worklist, timing)
        assert json.loads(results.files["manifest.json"].read_text())["status"] == "running"
        inference.write_results(results, worklist, timing)
        manifest, report = (json.loads(results.files[kind].read_text()) for kind in ("manifest.json", "json"))
        assert report["status"] == manifest["status"] == "finished" and report["counts"] == manifest["counts"]
        assert report["attempts"][0]["seconds"] == 1.0


def test_an_engine_s_death_is_told_once_however_many_rows_it_had(monkeypatch, capsys):
    student, exits = object.__new__(Student), []
    student._is_dying, student._worker = False, "worker"
    student._desk = SimpleNamespace(bury=SimpleNamespace(remote=lambda *_: asyncio.sleep(0)))
    monkeypatch.setattr("nli.inference.worker.os._exit", exits.append)

    async def die() -> None:
        deaths = [asyncio.create_task(student._die("the device is gone")) for _ in range(3)]
        await asyncio.wait(deaths, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        for death in deaths:
            death.cancel()

    asyncio.run(die())
    assert exits == [1]
    assert capsys.readouterr().out == "inference: the engine is dead (the device is gone); this worker starts again\n"


@pytest.mark.parametrize("turns", range(4))
def test_a_worker_s_loop_ends_when_it_is_cancelled_just_as_a_row_ends(turns, monkeypatch):
    monkeypatch.setattr("nli.inference.worker.ASK_AGAIN_SECONDS", 60.0)  # it waits, however slow the machine is
    student = object.__new__(Student)
    student._desk = SimpleNamespace(take=SimpleNamespace(remote=lambda *_: asyncio.sleep(0, [])))
    student._worker, student._start, student._num_running = "worker", "start", 1
    student._tickets = deque([SimpleNamespace(num_left=9)])

    async def pass_turns(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    async def cancel() -> bool:
        student._changed = asyncio.Event()
        feeder = asyncio.create_task(student._feed())
        await pass_turns(20)
        student._changed.set()
        await pass_turns(turns)
        feeder.cancel()
        await pass_turns(20)
        is_ended = feeder.done() and feeder.cancelled()
        student._tickets.clear()  # else one that goes on would hold up the loop's end
        student._changed.set()
        return is_ended

    assert asyncio.run(cancel())


def test_tickets_that_come_while_the_desk_answers_get_their_rows_at_once():
    student, asked = object.__new__(Student), []
    student._worker, student._start, student._num_running, student._tasks = "worker", "start", 0, set()
    student._tickets, student._feeder, student._engine, student._problem = deque(), None, object(), ""
    student._answer = lambda work: asyncio.Event().wait()

    async def come() -> None:
        second_came, all_asked = asyncio.Event(), asyncio.Event()

        async def take(worker: str, room: int, *_) -> list:
            asked.append(room)
            if len(asked) == 2:
                all_asked.set()
            await second_came.wait()
            return [(number, 0, str(number), {}) for number in range(room)]

        student._desk, student._changed = SimpleNamespace(take=SimpleNamespace(remote=take)), asyncio.Event()
        tasks = [asyncio.create_task(student([{"num_rows": 5}]))]
        while not asked:
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(student([{"num_rows": 7}])))
        while len(student._tickets) < 2:
            await asyncio.sleep(0)
        second_came.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await all_asked.wait()

    asyncio.run(come())
    assert asked == [5, 7]


def test_rows_are_stored_though_an_engine_cannot_tell_its_figures():
    student, stored = object.__new__(Student), []
    student._worker, student._num_running, student._figures, student._figures_at = "worker", 1, {}, 0.0
    student._engine = SimpleNamespace(description="fake 1.0", figures=lambda: 1 / 0)
    student._desk = SimpleNamespace(
        put=SimpleNamespace(remote=lambda worker, rows, figures: asyncio.sleep(0, stored.extend(rows)))
    )
    assert asyncio.run(student._put([("row",)])) == [None] and stored == [("row",)]


def test_a_worker_with_a_dead_engine_ends_though_the_desk_does_not_answer(monkeypatch):
    student, exits = object.__new__(Student), []
    student._is_dying, student._worker = False, "worker"
    student._desk = SimpleNamespace(bury=SimpleNamespace(remote=lambda *_: asyncio.sleep(60)))
    monkeypatch.setattr("nli.inference.worker.os._exit", exits.append)
    monkeypatch.setattr("nli.inference.worker.BURY_SECONDS", 0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(student._die("the device is gone"))
    assert exits == [1]


def test_a_gpu_that_this_machine_does_not_have_is_refused(config, monkeypatch):
    monkeypatch.setattr("nli.runtime.cluster.finds_cluster", lambda: False)
    monkeypatch.setattr("nli.runtime.cluster.list_gpus", lambda: ["NVIDIA H100", "NVIDIA H100"])
    with pytest.raises(ConfigError, match="--gpu 2: this machine has 2 GPUs, counted from 0"):
        inference.run(replace(config, gpu=2, num_workers=0, use_gpu=None))


def test_gpus_that_are_hidden_from_this_process_are_not_counted_on(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(inference, "list_gpus", lambda: ["NVIDIA H100"])
    assert inference.has_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not inference.has_gpus()
