"""What a generation stage writes, and the figures it shows, without a call: from rows and a ledger alone.

python -m pytest tests/test_outputs.py
"""

import contextlib
import errno
import json
from pathlib import Path

import pytest

from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.runtime.errors import StorageError
from nli.runtime.worklist import Worklist
from nli.task.prompts import TEACHER_PROMPTS
from nli.teacher import thoughts
from nli.teacher.estimate import estimate_run
from nli.teacher.progress import LiveProgress
from nli.teacher.requests import first_key
from nli.teacher.stage import Generation, _temporary_folder, _write_output
from nli.teacher.thoughts import GenerateThoughtsConfig

PROMPT = TEACHER_PROMPTS["initial_generation"]
CONFIG = GenerateThoughtsConfig(base_url="http://teacher.test", api_key_file="none")
GOOD = json.dumps({"choices": [{"message": {"content": '{"thought_process": "So.", "predicted_label": 1}'}}]}).encode()


def rows(number, **columns):
    return [
        {"id": str(index), "premise": f"Premise {index}.", "hypothesis": "So.", "true_label": 1, **columns}
        for index in range(number)
    ]


@contextlib.contextmanager
def filled(folder, pairs):
    with Worklist(folder / "rows.sqlite") as worklist:
        worklist.fill(((row, first_key(CONFIG, PROMPT, row)) for row in pairs), Path("rows.csv"))
        yield worklist


def make(folder, pairs, build_row):
    """Write the output of rows of which none was asked."""
    output = folder / "out/thoughts.jsonl"
    parts = {
        "read_rows": list,
        "build_row": build_row,
        "count_row": thoughts.count_answer,
        "find_fault": thoughts.find_fault,
    }
    work = Generation(stage="thoughts", config=CONFIG, prompt=PROMPT, source=Path("rows.csv"), output=output, **parts)
    with contextlib.closing(Ledger(folder / "ledger")) as ledger, filled(folder, pairs) as worklist:
        return _write_output(work, ledger, folder / "ledger", worklist)


def test_a_dead_letter_says_why_also_where_the_file_has_a_column_of_that_name(tmp_path):
    counts = make(
        tmp_path, rows(1, reason="annotator 3"), lambda row, outcome: thoughts.to_answer(row, outcome, CONFIG)
    )
    letter = json.loads((tmp_path / "out/thoughts.dead_letters.jsonl").read_text())
    assert (counts["dead_request_failed"], letter["reason"], letter["details"]) == (1, "request_failed", "not asked")
    assert json.loads((tmp_path / "out/thoughts.jsonl").read_text())["reason"] == "annotator 3"


def test_an_output_that_finds_no_space_leaves_nothing_behind(tmp_path):
    def fail(row, outcome):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        make(tmp_path, rows(1), fail)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_estimate_is_not_corrected_by_repairs_of_rows_that_another_output_asked(tmp_path):
    pairs = rows(60)
    repairs = [bytes([index]) * 16 for index in range(60)]
    with contextlib.closing(Ledger(tmp_path / "ledger")) as ledger, filled(tmp_path, pairs) as worklist:
        ledger.begin_run("mine", None)
        for row, repair in zip(pairs, repairs, strict=True):
            key = first_key(CONFIG, PROMPT, row)
            ledger.commit([("a", [("open", key, "other", "retry", None, 0)])])
            ledger.commit([("a", [("done", key, 1, GOOD, 10, 5, 0)])])
            ledger.commit([("a", [("open", repair, "mine", "retry", key, 0)])])
            ledger.commit([("a", [("done", repair, 1, GOOD, 10, 5, 0)])])
        estimate = estimate_run(CONFIG, PROMPT, worklist, tmp_path / "ledger", "mine", set)
    assert (estimate.num_rows, estimate.num_done, estimate.num_calls) == (60, 60, 0)


def test_the_live_line_ends_quietly_when_the_ledger_cannot_be_read(tmp_path, monkeypatch):
    Ledger(tmp_path).close()
    reader = LedgerReader(tmp_path)

    def fail(run):
        raise StorageError("ledger: cannot be read.")

    monkeypatch.setattr(reader, "read_totals", fail)
    progress = LiveProgress("thoughts", reader, "run", 3, has_price=False)
    progress._show()  # in this thread, where an error would show
    reader.close()


def test_no_room_for_temporary_files_is_said(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    with pytest.raises(StorageError, match="no temporary folder can be made .* or set TMPDIR"):
        _temporary_folder()
