"""A run's manifest, and the guard that no two configs mix in one output.

python -m pytest tests/test_runs.py
"""

import json
import subprocess

import pytest

from nli.runtime.config import config_class
from nli.runtime.errors import ResumeError, StorageError
from nli.runtime.manifest import (
    describe_differences,
    manifest_beside,
    read_commit,
    read_hardware,
    read_manifest,
    read_versions,
    start_run,
)


@config_class
class ToyConfig:
    """A stage's config."""

    model: str = "ministral-8b-2512"
    """teacher"""
    workers: int = 4
    """actors"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "thoughts.jsonl.manifest.json"


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_bytes(b"abc")
    return file


def start(path, model="ministral-8b-2512", **options):
    return start_run(path, "thoughts", {"model": model, "temperature": 0.0}, ToyConfig(), **options)


def test_a_manifest_says_what_was_made_from_what_by_which_code_on_which_machine(path, pairs):
    run = start(path, inputs=[pairs])
    assert not run.was_finished
    running = json.loads(path.read_text())
    assert running["status"] == "running"
    assert running["attempts"][0]["seconds"] is None
    run.finish({"rows": 3, "correct": 2})
    manifest = json.loads(path.read_text())
    assert list(manifest) == [
        "stage",
        "status",
        "identity",
        "config",
        "inputs",
        "commit",
        "versions",
        "hardware",
        "attempts",
        "counts",
    ]
    assert manifest["stage"] == "thoughts"
    assert manifest["status"] == "finished"
    assert manifest["identity"] == {"model": "ministral-8b-2512", "temperature": 0.0}
    assert manifest["config"] == {"model": "ministral-8b-2512", "workers": 4}
    assert manifest["inputs"] == {
        str(pairs): {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "bytes": 3}
    }
    assert manifest["counts"] == {"rows": 3, "correct": 2}
    assert manifest["versions"]["ray"].startswith("2.60.")
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["attempts"][0]["seconds"] >= 0
    assert manifest["attempts"][0]["started"].endswith("+00:00")


def test_another_config_is_refused_with_each_difference_and_nothing_is_changed(path):
    start(path).finish({"rows": 3})
    before = path.read_bytes()
    with pytest.raises(ResumeError) as caught:
        start_run(path, "thoughts", {"model": "mistral-large-2512", "temperature": 0.0, "max_tokens": 64}, ToyConfig())
    assert str(caught.value).splitlines() == [
        f"{path.parent} holds thoughts made another way (thoughts.jsonl.manifest.json):",
        "  model: 'ministral-8b-2512' -> 'mistral-large-2512'",
        "  max_tokens: None -> 64",
        "Choose another output, or move the earlier one away; nothing was changed.",
    ]
    assert path.read_bytes() == before


def test_another_config_starts_anew_where_the_outputs_are_gone(path):
    start(path).finish({"rows": 3})
    run = start(path, model="mistral-large-2512", has_work=False)
    assert not run.was_finished
    manifest = json.loads(path.read_text())
    assert (manifest["identity"]["model"], len(manifest["attempts"]), manifest["counts"]) == (
        "mistral-large-2512",
        1,
        {},
    )


def test_what_does_not_decide_the_output_may_change(path):
    start_run(path, "thoughts", {"model": "m"}, ToyConfig(workers=4)).finish({})
    assert start_run(path, "thoughts", {"model": "m"}, ToyConfig(workers=8)).was_finished
    assert json.loads(path.read_text())["config"]["workers"] == 8


def test_attempts_add_up_and_counts_stay_until_the_next_ones(path):
    start(path).stop({"rows": 1})
    assert json.loads(path.read_text())["status"] == "running"
    second = start(path)
    assert not second.was_finished
    assert json.loads(path.read_text())["counts"] == {"rows": 1}
    second.finish({"rows": 3})
    third = start(path)
    assert third.was_finished
    third.finish({"rows": 3})
    manifest = json.loads(path.read_text())
    assert len(manifest["attempts"]) == 3
    assert all(attempt["seconds"] is not None for attempt in manifest["attempts"])


def test_an_attempt_that_was_killed_stays_without_seconds(path):
    start(path)
    start(path).finish({})
    assert [attempt["seconds"] is None for attempt in json.loads(path.read_text())["attempts"]] == [True, False]


def test_an_identity_compares_as_it_is_written(path):
    start_run(path, "sweep", {"ranks": (8, 16), "rate": 1e-4}, ToyConfig()).finish({})
    assert start_run(path, "sweep", {"ranks": [8, 16], "rate": 0.0001}, ToyConfig()).was_finished


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": {}}', '"text"', "null"])
def test_a_file_that_is_no_manifest_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(ResumeError, match=r"not a manifest of this project; move it and the output beside it away\.$"):
        start(path)
    assert path.read_text() == text


def test_a_manifest_lies_beside_its_output(tmp_path):
    assert manifest_beside(tmp_path / "a.jsonl") == tmp_path / "a.jsonl.manifest.json"
    assert read_manifest(tmp_path / "nothing.json") is None


def test_differences_are_shown_by_name():
    assert describe_differences({"a": 1, "b": "x"}, {"a": 1, "b": "y", "c": None}) == ["b: 'x' -> 'y'"]
    assert describe_differences({"a": 1}, {"b": 2}) == ["a: 1 -> None", "b: None -> 2"]


def test_versions_and_hardware_are_of_this_machine():
    assert {"python", "ray", "torch", "transformers", "trl", "peft"} <= set(read_versions())
    hardware = read_hardware()
    assert set(hardware) == {"processor", "cpus", "memory_gb", "gpus"}
    assert hardware["processor"]
    assert hardware["memory_gb"] > 0


def test_the_commit_tells_of_uncommitted_changes(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    monkeypatch.setattr("nli.runtime.manifest.__file__", str(tmp_path / "runs.py"))
    assert read_commit() is None
    (tmp_path / "runs.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit = read_commit()
    assert len(commit) == 40
    (tmp_path / "runs.py").write_text("changed")
    assert read_commit() == commit + "+changes"


def test_an_output_without_its_manifest_is_refused(path):
    with pytest.raises(ResumeError, match=r"manifest.json: missing, and the output that it belongs to is there"):
        start(path, has_work=True)


def test_two_processes_cannot_work_on_one_output(path):
    from nli.runtime.manifest import is_in_use

    run = start(path)
    assert is_in_use(path)
    with pytest.raises(
        ResumeError, match=r"process \d+ on .* is at work on thoughts.jsonl; wait for it, or choose another output"
    ):
        start(path)
    run.finish({})
    assert not is_in_use(path)
    assert start(path).was_finished


@pytest.mark.parametrize("place", ["file/thoughts.jsonl", "o" * 240 + ".jsonl"])
def test_a_place_that_nothing_can_be_written_to_is_said_before_work_begins(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        StorageError, match=r"nothing can be written there \(.+\)\. Free space or choose another output"
    ):
        start(manifest_beside(tmp_path / place))
