"""Generation as a whole, against a teacher in another process that counts what it charges.

python -m pytest tests/test_generation.py
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.callers import make_row
from benchmarks.ray_run import write_rows
from benchmarks.teacher_server import start_teacher_server
from nli.api.ledger_file import LedgerReader
from nli.runtime.errors import ResumeError, TeacherError
from nli.task.parsing import Parsed, ParseStatus
from nli.teacher import thoughts
from nli.teacher.thoughts import GenerateThoughtsConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

KEY = "the-key-that-nothing-may-show-7f3a9c"
NUM_ROWS = 120
PRICE = {"price_input_per_million": 10.0, "price_output_per_million": 10.0}


@pytest.fixture(scope="module")
def server():
    with start_teacher_server({"content_rate": 0.1}, seed=3) as server:
        yield server


@pytest.fixture
def config(server, tmp_path):
    """A run of 120 rows with a key of its own; the server's bill starts at nothing."""
    server.reset_bill()
    server.change(key="", refuse_after=None, faults={"content_rate": 0.1}, latency_seconds=0.0)
    write_rows(tmp_path / "rows.csv", NUM_ROWS)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text(KEY)
    files = {
        "input_csv": str(tmp_path / "rows.csv"),
        "output_jsonl": str(tmp_path / "out/thoughts.jsonl"),
        "ledger_dir": str(tmp_path / "out/ledger"),
    }
    return GenerateThoughtsConfig(
        base_url=server.base_url, workers=2, api_key_file=str(tmp_path / "secret/key"), **files, **PRICE
    )


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_finished_work_costs_no_call_whatever_becomes_of_parser_labels_and_outputs(
    server, config, tmp_path, monkeypatch
):
    output = thoughts.run(config)
    first, bill = output.read_bytes(), server.bill()
    assert [row["id"] for row in read_rows(output)] == [str(index) for index in range(NUM_ROWS)]
    assert bill["billed"] == bill["distinct"] > NUM_ROWS  # contents that do not fit were asked for once more
    assert thoughts.run(config).read_bytes() == first
    copy = replace(config, output_jsonl=str(tmp_path / "out/again.jsonl"))
    assert thoughts.run(copy).read_bytes() == first
    monkeypatch.setattr(
        "nli.teacher.requests.parse_reply", lambda *_: Parsed(ParseStatus.BAD_LABEL, None, "a stricter parser")
    )
    assert {row["parse_status"] for row in read_rows(thoughts.run(config))} == {"bad_label"}
    assert server.bill()["requests"] == bill["requests"]


def test_an_output_is_not_paid_again_because_its_ledger_is_elsewhere(server, config, tmp_path):
    output = thoughts.run(config)
    first, bill = output.read_bytes(), server.bill()
    for _ in range(2):
        with pytest.raises(
            ResumeError,
            match=rf"holds {NUM_ROWS} replies of which the ledger in .*elsewhere knows none, so all would be asked and paid again",
        ):
            thoughts.run(replace(config, ledger_dir=str(tmp_path / "elsewhere")))
    assert (output.read_bytes(), server.bill()["requests"]) == (first, bill["requests"])
    assert thoughts.run(config).read_bytes() == first
    with open(config.input_csv, "a", encoding="utf-8") as file:
        file.write('new,"One more.","It is one.",1\n')
    assert len(read_rows(thoughts.run(config))) == NUM_ROWS + 1


def test_a_row_does_not_depend_on_time_attempts_or_workers(server, config, tmp_path):
    first = thoughts.run(config).read_bytes()
    server.reset_bill()
    server.change(faults={"content_rate": 0.1, "rate": 0.3, "kinds": ["500", "reset_after", "429_bare"]})
    other = replace(
        config,
        workers=1,
        output_jsonl=str(tmp_path / "other/thoughts.jsonl"),
        ledger_dir=str(tmp_path / "other/ledger"),
    )
    assert thoughts.run(other).read_bytes() == first
    bill = server.bill()
    reader = LedgerReader(tmp_path / "other/ledger")
    totals = reader.read_totals(other.output_jsonl)
    reader.close()
    assert bill["repeated"] == totals.ambiguous_sends > 0
    manifest = json.loads((tmp_path / "other/thoughts.jsonl.manifest.json").read_text())
    assert manifest["counts"]["spent"]["ambiguous_sends"] == totals.ambiguous_sends


def test_a_key_that_is_refused_on_the_way_stops_at_once_and_the_next_run_pays_only_for_the_rest(server, config):
    server.change(refuse_after=40, latency_seconds=0.02)
    with pytest.raises(TeacherError, match=r"refuses the API key \(HTTP 401"):
        thoughts.run(config)
    assert server.bill()["billed"] == 40
    assert server.bill()["requests"] <= 40 + 2 * config.max_in_flight  # those under way
    server.change(refuse_after=None)
    assert len(read_rows(thoughts.run(config))) == NUM_ROWS
    assert (server.bill()["billed"], server.bill()["repeated"]) == (server.bill()["distinct"], 0)


def test_a_server_that_is_not_there_is_said_before_anything_is_sent(config):
    with pytest.raises(TeacherError, match=r"no connection to http://127.0.0.1:9 .*nothing was sent"):
        thoughts.run(replace(config, base_url="http://127.0.0.1:9"))
    thoughts.run(config)
    with pytest.raises(
        ResumeError,
        match="server: 'http://127.0.0.1:.*/v1/chat/completions' -> 'http://127.0.0.1:9/v1/chat/completions'",
    ):
        thoughts.run(replace(config, base_url="http://127.0.0.1:9"))


def test_a_budget_that_is_used_up_says_so_and_a_larger_one_goes_on(server, config):
    with pytest.raises(TeacherError, match=r"--max-cost 0.3 is used up.*a larger --max-cost goes on"):
        thoughts.run(replace(config, max_cost=0.3))
    bill = server.bill()
    charged = (bill["prompt_tokens"] + bill["completion_tokens"]) * 10 / 1e6
    assert 0.1 < charged <= 0.3
    thoughts.run(replace(config, max_cost=50.0))
    assert server.bill()["repeated"] == 0


def test_the_key_is_in_no_file_log_or_answer_of_the_dashboard(server, config, tmp_path, capfd):
    import ray
    from ray.util import state

    thoughts.run(config)
    server.change(key="another")
    with pytest.raises(TeacherError) as caught:
        thoughts.run(replace(config, output_jsonl=str(tmp_path / "out/refused.jsonl"), sample_index=1))
    shown = [*capfd.readouterr(), str(caught.value), repr(caught.value.__dict__)]
    here = {"address": ray.get_runtime_context().gcs_address}
    listers = (
        state.list_actors,
        state.list_tasks,
        state.list_workers,
        state.list_jobs,
        state.list_runtime_envs,
        state.list_nodes,
    )
    listings = [lister(detail=True, limit=1000, **here) for lister in listers]
    assert any("LedgerService" in str(listing) for listing in listings)
    shown += [str(listing) for listing in listings]
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    places = [
        Path(folder) / name
        for place in (tmp_path / "out", session)
        for folder, _, names in os.walk(place)
        for name in names
    ]
    files = [path for path in places if path.is_file() and not path.is_socket()]
    assert len(files) > 20 and any(path.name == "ledger.sqlite" for path in files)
    assert [path for path in files if KEY.encode() in read_if_there(path)] == []
    assert [text for text in shown if KEY in text] == []
    assert make_row(0)["premise"].encode() not in b"".join(
        read_if_there(path) for path in files if path.suffix == ".log"
    )


def read_if_there(path: Path) -> bytes:
    """A file's bytes; none if it has gone: Ray tidies up its session meanwhile."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
