"""Where files go, and that they are written whole or not at all.

python -m pytest tests/test_storage.py
"""

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from nli.runtime.errors import DataError, StorageError
from nli.runtime.files import (
    dump_line,
    iterate_jsonl,
    read_jsonl,
    resolve_input,
    resolve_model,
    resolve_output,
    sha256_file,
    write_atomic,
    write_csv,
    write_jsonl,
)
from nli.task.records import Example

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, outside a job and without a storage root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.delenv("NLI_STORAGE_ROOT", raising=False)
    return tmp_path


def example(number, premise="Two dogs ran."):
    return {"id": str(number), "premise": premise, "hypothesis": "Animals moved.", "true_label": 1}


def fail_with(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_output_is_absolute_or_below_the_storage_root_or_below_the_current_folder(here, monkeypatch):
    assert resolve_output("results/a.jsonl", "") == here / "results/a.jsonl"
    assert resolve_output("results/../a.jsonl", "") == here / "a.jsonl"
    assert resolve_output("a.jsonl", "root") == here / "root/a.jsonl"
    assert resolve_output("a.jsonl", "/storage") == Path("/storage/a.jsonl")
    assert resolve_output("/elsewhere/a.jsonl", "/storage") == Path("/elsewhere/a.jsonl")
    monkeypatch.setenv("NLI_STORAGE_ROOT", "/mnt/nli")
    assert resolve_output("a.jsonl", "") == Path("/mnt/nli/a.jsonl")
    assert resolve_output("a.jsonl", "/storage") == Path("/storage/a.jsonl")


def test_a_relative_output_is_refused_under_a_submitted_job(monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(
        StorageError,
        match=r"^results/a\.jsonl: a submitted job runs in a temporary copy .* --storage-root \(or set NLI_STORAGE_ROOT\)",
    ):
        resolve_output("results/a.jsonl", "")
    with pytest.raises(StorageError, match="a submitted job runs in a temporary copy"):
        resolve_output("a.jsonl", "relative/root")
    assert resolve_output("a.jsonl", "/storage") == Path("/storage/a.jsonl")
    assert resolve_output("/storage/a.jsonl", "") == Path("/storage/a.jsonl")
    monkeypatch.setenv("NLI_STORAGE_ROOT", "/mnt/nli")
    assert resolve_output("a.jsonl", "") == Path("/mnt/nli/a.jsonl")


@pytest.mark.parametrize(
    ("path", "root"), [("s3://bucket/a.jsonl", ""), ("gs://bucket/a", "/storage"), ("a.jsonl", "s3://bucket")]
)
def test_object_storage_is_refused(path, root):
    with pytest.raises(
        StorageError, match=r"^(s3|gs)://bucket.*: object storage is not supported; give a folder that all nodes mount"
    ):
        resolve_output(path, root)


def test_an_input_is_looked_for_below_the_storage_root_and_then_below_the_current_folder(here):
    (here / "root").mkdir()
    (here / "a.csv").write_text("here")
    assert resolve_input("a.csv", "root") == here / "a.csv"
    (here / "root" / "a.csv").write_text("root")
    assert resolve_input("a.csv", "root") == here / "root" / "a.csv"
    assert resolve_input(str(here / "a.csv"), "root") == here / "a.csv"


def test_a_model_is_looked_for_like_an_input_and_a_name_that_is_no_folder_stays_a_hub_name(here):
    for folder in ("root/models/base", "models/base", "org/model"):
        (here / folder).mkdir(parents=True)
    assert resolve_model("models/base", "root") == str(here / "root/models/base")
    assert resolve_model("org/model", "root") == str(here / "org/model")
    assert resolve_model("mistralai/Mistral-7B-v0.3", "root") == "mistralai/Mistral-7B-v0.3"
    assert resolve_model("", "root") == ""
    (here / "org/weights.bin").write_bytes(b"")
    assert resolve_model("org/weights.bin", "root") == str(
        here / "org/weights.bin"
    )  # and not a name that the hub is asked for


def test_a_missing_input_says_where_it_was_looked_for():
    with pytest.raises(DataError, match=r"^b\.csv: no such file; looked for /storage/b\.csv or b\.csv\.$"):
        resolve_input("b.csv", "/storage")
    with pytest.raises(DataError, match=r"^b\.csv: no such file; looked for b\.csv\.$"):
        resolve_input("b.csv", "")
    with pytest.raises(DataError, match=r"^\(no path\): no such file"):
        resolve_input("", "")


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(here):
    write_atomic(here / "a/b/c.txt", "text\r\n – 犬")
    assert (here / "a/b/c.txt").read_bytes() == "text\r\n – 犬".encode()
    assert files_in(here / "a/b") == ["c.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(here):
    write_atomic(here / "a.txt", "old")

    def write_half(aside):
        aside.write_text("ne")
        raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        write_atomic(here / "a.txt", write_half)
    assert (here / "a.txt").read_text() == "old"
    assert files_in(here) == ["a.txt"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_message_and_the_old_file_stays(here, monkeypatch, step):
    write_jsonl(here / "a.jsonl", [{"old": 1}])
    if step == "write":
        monkeypatch.setattr("nli.runtime.files.dump_line", fail_with(errno.ENOSPC))
    else:
        monkeypatch.setattr(f"nli.runtime.files.os.{step}", fail_with(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        write_jsonl(here / "a.jsonl", [{"new": 1}])
    path = here / "a.jsonl"
    assert (
        str(caught.value)
        == f"{path}: cannot be written (No space left on device). Free space or choose another output; what was there is untouched."
    )
    assert path.read_text() == '{"old": 1}\n'
    assert files_in(here) == ["a.jsonl"]


def test_an_output_whose_folder_is_a_file_is_refused_in_words(here):
    (here / "results").write_text("a file")
    with pytest.raises(StorageError, match=r"results/a\.txt: cannot be written"):
        write_atomic(here / "results/a.txt", "text")


def test_a_hash_is_of_the_file_s_bytes(here):
    (here / "a").write_bytes(b"abc")
    assert sha256_file(here / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_lines_keep_every_character_on_one_line_each(here):
    rows = [
        example(0, "a\nb\r\nc\rd"),
        example(1, "a\u2028b\u2029c\x85d\x0be"),
        example(2, "🐕 \x00 \ufeff"),
        example(3, " n/a "),
    ]
    write_jsonl(here / "a.jsonl", rows)
    assert (here / "a.jsonl").read_bytes().count(b"\n") == 4
    assert "\u2028" in (here / "a.jsonl").read_text(encoding="utf-8")
    assert read_jsonl(here / "a.jsonl", Example) == rows


def test_json_lines_are_read_with_a_byte_order_mark_and_blank_lines(here):
    (here / "a.jsonl").write_text("\ufeff" + dump_line(example(0)) + "\n\n" + dump_line(example(1)), encoding="utf-8")
    assert [row["id"] for row in read_jsonl(here / "a.jsonl", Example)] == ["0", "1"]


def test_faulty_lines_are_all_named_and_missing_empty_or_foreign_files_are_refused(here):
    path = here / "a.jsonl"
    path.write_text(
        '{"id": "0"\n'
        + dump_line(example(1))
        + dump_line(example(2) | {"true_label": 2})
        + '["a"]\n'
        + '{"id": "3", "premise": "a"}\n'
    )
    with pytest.raises(DataError) as caught:
        read_jsonl(path, Example)
    lines = str(caught.value).replace(str(path), "a.jsonl").splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "a.jsonl:4",
        "a.jsonl:5",
        "Each line must be a JSON object with the fields of Example.",
    ]
    assert "not JSON" in lines[0]
    assert "true_label" in lines[1]
    assert "hypothesis: field required" in lines[3]
    with pytest.raises(DataError, match=r"b\.jsonl: no such file\.$"):
        read_jsonl(here / "b.jsonl", Example)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"the file is empty; the stage before it has made nothing\.$"):
        read_jsonl(path, Example)
    path.write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(DataError, match=r"not UTF-8 at byte 0; save it as UTF-8\.$"):
        read_jsonl(path, Example)


def test_csv_cells_keep_every_character_and_none_is_an_empty_cell(here):
    rows = [example(0, 'a "b", c\nd\re\r\n ') | {"true_label": None}, example(1, "  n/a\t")]
    write_csv(here / "a.csv", rows, ["id", "premise", "true_label", "no_such_column"])
    with open(here / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "premise", "true_label", "no_such_column"],
            ["0", 'a "b", c\nd\re\r\n ', "", ""],
            ["1", "  n/a\t", "1", ""],
        ]


def test_rows_before_a_faulty_line_are_given_and_none_after_it(here):
    (here / "rows.jsonl").write_text(dump_line(example(0)) + "[1]\n" + dump_line(example(2)) + "not JSON\n")
    given = []
    with pytest.raises(DataError) as caught:
        given.extend(row["id"] for row in iterate_jsonl(here / "rows.jsonl", Example))
    assert given == ["0"]
    assert ":2: the line: " in str(caught.value) and ":4: not JSON" in str(caught.value)


def test_half_of_a_surrogate_pair_is_refused_with_its_line(here):
    (here / "rows.jsonl").write_text(
        json.dumps(example(0, "whole 🐕 犬")) + "\n" + json.dumps(example(1) | {"note": "half \ud83d"}) + "\n"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:2: half of a surrogate pair"):
        read_jsonl(here / "rows.jsonl", Example)


def test_a_line_nested_too_deeply_is_named(here):
    (here / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl:1: nested too deeply"):
        read_jsonl(here / "deep.jsonl", Example)
