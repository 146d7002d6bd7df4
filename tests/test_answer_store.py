"""The store of finished rows, who works on which rows, and the vote: without Ray and without a model.

python -m pytest tests/test_answer_store.py
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nli.engines.interface import Generation
from nli.inference.answer_store import AnswerStore
from nli.inference.answers import derive_seed, to_answer, to_failed, vote
from nli.inference.coordinator import Desk, ask, list_ended
from nli.inference.leases import COHORTS, FIRST_ROWS, MOST_EXCUSED, MOST_STARTS, Leases
from nli.inference.result_files import Tally, describe_figures, summarise, write_answers, write_report, write_table
from nli.runtime.errors import DataError, StorageError
from nli.runtime.files import read_jsonl
from nli.runtime.worklist import Worklist, read_pending_work
from nli.task.prompts import render_completion
from nli.task.records import Answer, row_key

ODD = "two\r\ndogs\u2028 \x00 'quoted' \"n/a\" 犬 🐕"
FRAME = {
    "answered_by": "m",
    "prompt_name": "student",
    "prompt_sha256": "0",
    "precision": "nf4",
    "engine": "transformers",
}


@pytest.fixture
def store(tmp_path):
    store = AnswerStore(tmp_path / "results/run.answers.sqlite")
    yield store
    store.close()


def entry(key, text="", failed=False):
    return key, failed, json.dumps({"raw_text": text}, ensure_ascii=False)


def example(number, premise="Two dogs ran.", label: int | None = 1):
    return {"id": str(number), "premise": premise, "hypothesis": "Animals moved.", "true_label": label}


def said(label, thought="T", probability=None, tokens=5):
    return Generation(render_completion(thought, label), "stop", 60, tokens, probability=probability)


def test_answers_come_back_as_they_were_put_for_many_keys_at_once(store):
    keys = [f"{index}:0f" for index in range(1203)]
    store.put(entry(key, ODD + key) for key in keys)
    assert store.read(keys) == {key: {"raw_text": ODD + key} for key in keys}
    assert store.read(["none"]) == {}
    assert store.find_done([*keys, "none"]) == set(keys)
    assert store.count() == 1203


def test_a_good_answer_stands_and_a_failed_one_is_asked_again_by_the_next_run(store):
    store.put([entry("a", "first"), entry("b", "no memory", failed=True)])
    assert store.find_done(["a", "b"]) == {"a"}
    assert store.find_done(["a", "b"], failed_since=store.started_at) == {"a", "b"}
    later = AnswerStore(store.path)
    later.started_at += 60
    assert later.find_done(["a", "b"], failed_since=later.started_at) == {"a"}
    later.put([entry("a", "second"), entry("b", "second")])
    later.close()
    assert store.read(["a", "b"]) == {"a": {"raw_text": "first"}, "b": {"raw_text": "second"}}
    assert store.find_done(["a", "b"]) == {"a", "b"}


def test_what_was_put_survives_the_death_of_the_process(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from nli.inference.answer_store import AnswerStore\n"
        f"store = AnswerStore(Path({str(tmp_path / 'a.sqlite')!r}))\n"
        "for n in range(100): store.put([(str(n), False, '{}')])\n"
        "print('put', flush=True); store.put((str(n), False, '{}') for n in iter(int, 1))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdout.readline() == "put\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = AnswerStore(tmp_path / "a.sqlite")
    store.check()
    assert store.find_done([str(n) for n in range(200)]) == {str(n) for n in range(100)}
    store.close()


def test_a_damaged_file_is_named_with_its_cure_and_left_alone(tmp_path):
    path = tmp_path / "run.answers.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"run\.answers\.sqlite: damaged \(file is not a database\)\. Move it away"):
        AnswerStore(path)
    assert path.read_bytes().startswith(b"this is no database")
    path.unlink()
    store = AnswerStore(path)
    store.put(entry(str(number), "x" * 1000) for number in range(200))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 20] = b"\xff" * (4096 * 17)
    path.write_bytes(data)
    torn = AnswerStore(path)
    with pytest.raises(StorageError, match=r"run\.answers\.sqlite: damaged"):
        torn.check()
    torn.close()
    path.unlink()
    store = AnswerStore(path)
    store.put([entry("a"), ("b", False, '{"raw_text": "cut')])
    with pytest.raises(
        StorageError, match=r"run\.answers\.sqlite: damaged \(an answer is not JSON: .*\)\. Move it away"
    ):
        store.read(["a", "b"])
    store._db.executescript("DROP TABLE answers; CREATE TABLE answers (id, text)")
    with pytest.raises(
        StorageError, match=r"damaged \(its columns are id, text, not key, failed, answer, stored_at\)\. Move it away"
    ):
        store.check()
    store.close()


def test_a_full_disk_keeps_what_was_stored_before(store):
    store.put([entry("a", "kept")])
    store._db.execute("PRAGMA max_page_count=4")
    with pytest.raises(
        StorageError, match=r"cannot be read or written \(database or disk is full\).*what was stored before is kept"
    ):
        store.put(entry(str(number), "x" * 5000) for number in range(100))
    assert store.read(["a", "0"]) == {"a": {"raw_text": "kept"}}


def test_a_finished_output_is_read_in_where_the_store_is_gone(store, tmp_path):
    rows = [example(number, ODD) | to_answer(FRAME, [said(1)]) for number in range(3)]
    rows.append(example(3) | to_failed(FRAME, "no such token"))
    output = tmp_path / "run.jsonl"
    output.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    store.read_in(output)
    keys = [row_key(row) for row in rows]
    assert store.find_done(keys) == set(keys[:3])
    assert example(0, ODD) | store.read(keys)[keys[0]] == rows[0]
    again = json.dumps(example(7) | to_answer(FRAME, [said(1)])) + "\n"
    for faulty in (
        {"id": "1"},
        example(8) | {"parse_status": "ok"},
        example(8, "\ud800") | to_answer(FRAME, [said(1)]),
    ):
        output.write_text(again + json.dumps(faulty) + "\n")
        with pytest.raises(DataError, match=r"run\.jsonl:2: not a row of this project"):
            store.read_in(output)
    assert store.count() == 4


def test_columns_of_the_pairs_file_are_not_read_in_so_that_an_edited_one_is_seen(store, tmp_path):
    output = tmp_path / "run.jsonl"
    old = {name: value for name, value in to_answer(FRAME, [said(1)]).items() if name not in ("label_forced", "votes")}
    output.write_text(json.dumps(example(0) | {"phenomenon": "negation"} | old) + "\n")
    store.read_in(output)
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        row = example(0) | {"phenomenon": "none"}
        worklist.fill([(row, row_key(row).encode())], tmp_path / "in.csv")
        assert write_answers(worklist, store, output).counts()["correct"] == 1
    assert read_jsonl(output, Answer)[0]["phenomenon"] == "none"


def test_files_are_made_from_rows_and_store_alone(store, tmp_path):
    rows = [
        example(0, ODD, 1),
        example(1, label=0) | {"phenomenon": "negation"},
        example(2, label=None),
        example(3, label=0),
    ]
    answers = [
        to_answer(FRAME, [said(1, ODD, 0.9)]),
        to_answer(FRAME, [said(1)]),
        to_answer(FRAME, [said(0)]),
        to_failed(FRAME, "gone"),
    ]
    store.put(
        (row_key(row), answer["parse_status"] != "ok", json.dumps(answer))
        for row, answer in zip(rows, answers, strict=True)
    )
    output = tmp_path / "run.jsonl"
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        worklist.fill(((row, row_key(row).encode()) for row in rows), tmp_path / "in.csv")
        tally = write_answers(worklist, store, output)
        written = read_jsonl(output, Answer)
        assert written == [{**row, **answer} for row, answer in zip(rows, answers, strict=True)]
        assert tally.counts() | {"accuracy": None} == {
            "rows": 4,
            "unparsed": 1,
            "failed": 1,
            "forced": 0,
            "labelled": 3,
            "correct": 1,
            "accuracy": None,
            "completion_tokens": 15,
        }
        assert tally.metrics["confusion"] == [[1, 0, 0], [1, 0, 1]]
        write_report(output, {"status": "finished", "counts": {}})
        assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {
            "status": "finished",
            "counts": {},
            "rows": written,
        }
        write_table(output)
        assert "\r\n1,Two dogs ran.,Animals moved.,0,1,,T," in (tmp_path / "run.csv").read_bytes().decode()
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        worklist.fill([(example(9), row_key(example(9)).encode())], tmp_path / "in.csv")
        with pytest.raises(StorageError, match="lacks the answer of row '9'"):
            write_answers(worklist, store, output)
    assert read_jsonl(output, Answer) == written


def test_the_last_words_on_a_run_say_what_failed_how_that_is_mended_and_what_was_forced():
    counts = {"rows": 60, "unparsed": 3, "failed": 2, "forced": 40, "labelled": 60, "correct": 30, "accuracy": 0.5}
    assert summarise("run", counts, {"rows_computed": 0}, "--run-name run asks them again") == (
        "inference: run: 3 of 60 unparsed (2 failed; --run-name run asks them again), 40 with a label that was forced, 30 of 60 right (0.500)"
    )


def test_the_speed_of_a_pass_that_answered_for_several_models_is_not_told_as_one_model_s():
    counts = {"rows": 60, "unparsed": 0, "failed": 0, "forced": 0, "labelled": 0}
    figures = {
        "rows": [60, 40],
        "seconds": 5.0,
        "tokens": 1000,
        "engines": [{"load_seconds": 2.0, "compile_seconds": None, "peak_memory_gb": None}],
    }
    told = summarise("run", counts, describe_figures(figures, 0, 9.0), "").splitlines()
    assert told[1:] == [
        "  20.0 rows/s, 200 tokens/s for all models of this pass, 100 rows",
        "  load 2.0 s, rows 5.0 s, in all 9.0 s",
    ]
    alone = summarise("run", counts, describe_figures(figures | {"rows": [60]}, 0, 9.0), "").splitlines()
    assert alone[1] == "  12.0 rows/s, 200 tokens/s"


def test_a_tally_without_labels_has_no_metrics():
    tally = Tally()
    tally.add(example(0, label=None) | to_answer(FRAME, [said(1)]))
    assert tally.metrics is None
    assert tally.counts()["accuracy"] is None


def test_rows_of_several_models_are_pending_apart(tmp_path):
    rows = [example(number) for number in range(3)]
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        worklist.fill(((row, row_key(row).encode()) for row in rows), tmp_path / "in.csv")
        assert worklist.list_pending(lambda keys: set(keys[:1]), 0) == 2
        assert worklist.list_pending(lambda keys: set(), 1) == 3
        assert worklist.list_pending(lambda keys: set(keys[:2]), 0) == 1
        work = list(read_pending_work(str(worklist.path), range(1, 100)))
    assert sorted((target, row["id"]) for _, target, _, row in work) == [(0, "2"), (1, "0"), (1, "1"), (1, "2")]
    assert all(key == row_key(row) for _, _, key, row in work)


def test_each_sample_has_a_seed_of_its_own_in_every_run():
    seeds = {derive_seed(f"{row}:0f", sample) for row in range(100) for sample in range(5)}
    assert len(seeds) == 500 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed("17:9c", 2) == 954689404


VOTES = {
    "most win, with the first thought that voted so": (
        [(0, "a", None), (1, "b", None), (1, "c", None)],
        1,
        "b",
        [1, 2],
    ),
    "unparsed samples do not vote": ([None, None, (0, "a", None)], 0, "a", [1, 0]),
    "a tie goes to the higher mean probability": ([(0, "a", 0.4), (1, "b", 0.9)], 1, "b", [1, 1]),
    "and that may be the lower label": ([(1, "a", 0.55), (0, "b", 0.1)], 0, "b", [1, 1]),
    "a tie without probabilities goes to the earlier": ([(0, "a", None), (1, "b", None)], 0, "a", [1, 1]),
    "a tie in the middle too": ([(1, "a", 0.75), (0, "b", 0.25)], 1, "a", [1, 1]),
    "if none votes, the first stands": ([None, None], None, None, [0, 0]),
}


@pytest.mark.parametrize(("samples", "label", "thought", "votes"), VOTES.values(), ids=list(VOTES))
def test_samples_vote(samples, label, thought, votes):
    generations = [
        said(sample[0], sample[1], sample[2]) if sample else Generation("no idea", "stop", 60, 2) for sample in samples
    ]
    answer = to_answer(FRAME, generations)
    assert (answer["predicted_label"], answer["thought_process"], answer["votes"]) == (label, thought, votes)
    assert answer["num_completion_tokens"] == sum(5 if sample else 2 for sample in samples)
    Answer.model_validate(example(0) | answer)


def test_one_sample_has_no_votes_and_a_failed_one_takes_no_part():
    assert to_answer(FRAME, [said(1, probability=0.7)])["votes"] is None
    assert to_answer(FRAME, [said(1, probability=0.7)])["label_probability"] == 0.7
    failed = Generation(None, None, 61, None, "control token")
    answer = to_answer(FRAME, [failed])
    assert (answer["parse_status"], answer["problem"], answer["raw_text"], answer["num_prompt_tokens"]) == (
        "request_failed",
        "control token",
        "",
        61,
    )
    answers = [to_answer(FRAME, [failed]), to_answer(FRAME, [said(1, probability=0.8)])]
    assert (
        vote(answers)["predicted_label"],
        vote(answers)["label_probability"],
        vote(answers)["num_completion_tokens"],
    ) == (1, 0.8, 5)


def drain(leases, worker, kills=(), most=10**6):
    """Take and finish until nothing is left or a row kills the worker; returns the rows finished, and whether it died."""
    finished = []
    while rows := leases.take(worker, most):
        if set(rows) & set(kills):
            return finished, True
        leases.finish(worker, rows)
        finished += rows
    return finished, False


def test_rows_are_given_out_once_and_in_order():
    leases = Leases(100, most_held=40)
    assert leases.begin("a", "log") is None
    assert leases.take("a", 30) == list(range(1, 31))
    assert leases.take("a", 30) == list(range(31, 41))
    assert leases.take("a", 30) == []
    leases.finish("a", range(1, 21))
    assert leases.take("a", 100) == list(range(41, 61))
    leases.finish("a", range(21, 61))
    assert drain(leases, "a")[0] == list(range(61, 101))
    assert leases.take("a", 1) is None and leases.is_done and leases.num_finished == 100


def test_two_workers_share_what_is_left_however_much_one_could_hold():
    leases = Leases(1000, most_held=1600)
    leases.begin("a", "log")
    leases.begin("b", "log")  # still loading its engine
    first = leases.take("a", 1600)
    assert len(first) == 500
    leases.finish("a", first)
    assert len(leases.take("a", 1600)) == 250
    assert len(leases.take("b", 1600)) == 250


def test_a_killed_worker_s_rows_are_taken_again_and_no_others():
    leases = Leases(2000, most_held=200)
    leases.begin("a", "log")
    held = leases.take("a", 200)
    leases.finish("a", held[:50])
    assert leases.begin("a", "log") is None
    again, died = drain(leases, "a")
    assert sorted(again) == list(range(51, 2001)) and not died
    assert again[-150:] == held[50:]  # suspects come last
    assert (leases.is_done, leases.num_deaths, leases.pop_given_up()) == (True, 1, {})


@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 300, 5000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_row_that_kills_its_worker_each_time_is_given_up_and_all_others_are_done(num_rows, place):
    poison = 1 if place == "first" else num_rows
    leases, finished, given_up, starts = Leases(num_rows, most_held=1536), [], {}, 0
    died = True
    while died:
        starts += 1
        assert leases.begin("a", "log") is None
        given_up |= leases.pop_given_up()
        rows, died = drain(leases, "a", kills=[poison])
        finished += rows
    assert sorted(finished) == [row for row in range(1, num_rows + 1) if row != poison]
    assert list(given_up) == [poison] and "with no other" in given_up[poison]
    assert starts <= 3 + len(COHORTS) + len(FIRST_ROWS)


@pytest.mark.parametrize("num_left", [2, 3, 4, 8, 30])
def test_two_such_rows_are_given_up_however_few_others_are_left(num_left):
    leases, poison, starts = Leases(150, most_held=1536), [148, 150], 1
    leases.begin("a", "log")
    leases.take("a", 150)
    leases.finish("a", [row for row in range(1, 151 - num_left) if row not in poison])
    given_up, died = {}, True
    while died:
        starts += 1
        assert leases.begin("a", "log") is None
        given_up |= leases.pop_given_up()
        _, died = drain(leases, "a", kills=poison)
    assert sorted(given_up) == poison and leases.is_done and leases.num_finished == 150
    assert starts <= 1 + MOST_STARTS + MOST_EXCUSED


def test_an_engine_that_breaks_on_the_way_is_no_excuse_for_ever():
    leases = Leases(5000, most_held=1536)
    leases.begin("a", "log")
    leases.finish("a", leases.take("a", 1000))
    starts = 1
    leases.take("a", 1000)
    while leases.begin("a", "log") is None:
        starts += 1
        assert leases.take("a", 1536)
    assert starts <= 1 + MOST_STARTS + MOST_EXCUSED


def test_a_suspect_cohort_has_the_worker_to_itself():
    leases = Leases(600, most_held=300)
    leases.begin("a", "log")
    leases.take("a", 300)
    leases.begin("a", "log")
    first = leases.take("a", 300)
    assert len(first) == FIRST_ROWS[1]  # few rows after a start that led to nothing
    leases.finish("a", first)
    rest = leases.take("a", 300)
    assert rest[0] == 317 and leases.take("a", 300) == []
    while rest[-1] < 600:
        leases.finish("a", rest)
        rest = leases.take("a", 300)
    assert leases.take("a", 300) == []  # not beside other rows
    leases.finish("a", rest)
    cohort = leases.take("a", 300)
    assert cohort == list(range(1, 1 + COHORTS[1]))
    leases.finish("a", cohort[1:])
    assert leases.take("a", 300) == []
    leases.finish("a", cohort[:1])
    assert leases.take("a", 300)[0] == 1 + COHORTS[1]


def test_an_engine_that_dies_whatever_it_is_given_is_named_with_its_log():
    leases = Leases(5000, most_held=1536)
    for _ in range(MOST_STARTS):
        assert leases.begin("a", "/logs/worker.err") is None
        assert leases.take("a", 1536)
        leases.bury("a", "the device is gone")
    reason = leases.begin("a", "/logs/worker.err")
    assert (
        reason
        == "3 starts in a row ended before a row was finished, the last one so: the device is gone. Its log: /logs/worker.err"
    )
    assert leases.pop_given_up() == {}
    assert leases.begin("b", "/logs/other.err") is None
    assert drain(leases, "b")[0][-1] <= 5000 and leases.is_done


def test_a_start_that_has_ended_gets_no_rows_that_nobody_would_work_on():
    leases = Leases(100, most_held=8)
    assert leases.begin("a", "log", "first") is None
    leases.take("a", 8, "first")
    leases.bury("a", "the device is gone")
    assert leases.take("a", 8, "first") == []
    assert leases.begin("a", "log", "second") is None
    assert leases.take("a", 8, "first") == []  # asked before it was killed
    assert leases.take("a", 8, "second") == list(range(9, 17))


def test_rows_of_a_lost_machine_or_of_a_reply_that_never_arrived_are_no_suspects():
    leases = Leases(100, most_held=50)
    for worker in ("a", "b"):
        leases.begin(worker, "log")
        assert len(leases.take(worker, 50)) == 50
    leases.bury("b", "its machine is gone", machine_lost=True)
    leases.finish("b", [51])  # on its way when the machine was lost
    leases.finish("a", range(1, 41))
    assert leases.take("a", 50) == list(range(52, 92))  # beside other rows
    assert list(leases.list_holders()) == ["a"] and leases.num_alive == 1
    for _ in range(MOST_STARTS):  # machines may go as often as they like
        assert leases.begin("b", "log") is None
        leases.bury("b", "its machine is gone", machine_lost=True)
    assert leases.begin("b", "log") is None
    again = leases.take("a", 50, has_none=True)  # a share of them: b may hold rows, too
    assert again == [*range(41, 51), *range(52, 74)]
    leases.finish("a", again)
    assert drain(leases, "a") == (list(range(74, 101)), False)
    assert leases.is_done and leases.num_finished == 100
    leases.bury("stranger", "of a desk before this one")


def test_an_engine_that_dies_while_loading_is_not_tried_for_ever():
    leases = Leases(10, most_held=8)
    assert [leases.begin("a", "log") is None for _ in range(5)] == [True, True, True, False, False]


def test_a_row_that_was_given_up_while_the_disk_was_full_is_stored_when_there_is_room(store, tmp_path):
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        worklist.fill([(example(0), row_key(example(0)).encode())], tmp_path / "in.csv")
        worklist.list_pending(lambda keys: set())
        desk = Desk(str(worklist.path), [str(store.path)], most_held=8, started_at=0.0, frames=[FRAME])

        async def die_twice() -> None:
            for start in ("first", "second"):
                assert await desk.begin("a", "log", start) is None
                assert [work.row["id"] for work in await desk.take("a", 8, start, 1)] == ["0"]
                await desk.bury("a", "the device is gone")

        desk._stores[0]._db.execute("PRAGMA query_only=ON")
        asyncio.run(die_twice())
        assert isinstance(asyncio.run(desk.begin("a", "log", "third")), StorageError)
        assert store.count() == 0
        desk._stores[0]._db.execute("PRAGMA query_only=OFF")
        assert asyncio.run(desk.begin("b", "log", "first")) == ""
        assert store.read([row_key(example(0))])[row_key(example(0))]["problem"].endswith(
            "with no other: the device is gone"
        )
        assert asyncio.run(desk.describe())["rows"] == [1]
        asyncio.run(desk.close())


@pytest.fixture
def open_desk(store, tmp_path):
    """Opens a desk on six rows."""
    rows = [example(number) for number in range(6)]
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        worklist.fill([(row, row_key(row).encode()) for row in rows], tmp_path / "in.csv")
        worklist.list_pending(lambda keys: set())
        yield lambda: Desk(
            str(worklist.path), [str(store.path)], most_held=3, started_at=store.started_at, frames=[FRAME]
        )


async def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"waited {seconds:.0f} s in vain"
        await asyncio.sleep(0.01)


async def wait_for_deaths(desk: Desk, number: int) -> None:
    await wait_until(lambda: desk._leases.num_deaths >= number)


def post(work, failed=False):
    return [(item.number, item.target, item.key, failed, 5, json.dumps({"num_completion_tokens": 5})) for item in work]


def test_a_worker_waits_for_the_last_rows_of_others_and_takes_them_when_their_machine_is_lost(open_desk, monkeypatch):
    machines = {"here", "there"}
    monkeypatch.setattr("nli.inference.coordinator.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("nli.inference.coordinator.list_machines", lambda: machines)

    async def run() -> None:
        desk = open_desk()
        assert (
            await desk.begin("a", "log", "a1", "here") is None and await desk.begin("b", "log", "b1", "there") is None
        )
        mine, others = await desk.take("a", 3, "a1", 0), await desk.take("b", 3, "b1", 0)
        await desk.put("a", post(mine), {})
        assert await desk.take("a", 3, "a1", 0) == []
        machines.remove("there")
        await wait_for_deaths(desk, 1)
        assert await desk.take("b", 3, "b1", 0) == []  # whatever is left of it
        again = await desk.take("a", 3, "a1", 0)
        assert again == others
        assert await desk.begin("b", "log", "b2", "here") is None
        assert await desk.take("b", 3, "b2", 0) == []
        await desk.put("a", post(again), {})
        assert await desk.take("b", 3, "b2", 0) is None and await desk.take("a", 3, "a1", 0) is None
        assert await desk.begin("c", "log", "c1", "here") == ""
        assert (await desk.describe())["deaths"] == 1

    asyncio.run(run())


def test_a_worker_without_an_engine_waits_for_the_others_and_speaks_up_where_there_are_none(open_desk, capsys):
    async def run() -> None:
        desk = open_desk()
        for worker in "ab":
            await desk.begin(worker, "log", f"{worker}1")
        assert [await desk.resign("a", "no memory") for _ in range(2)] == [None, None]
        assert capsys.readouterr().out == "inference: a worker stays without an engine, the others go on: no memory\n"
        assert (
            str(await desk.resign("b", "no GPU")) == "no GPU"
            and str(await desk.resign("a", "no memory")) == "no memory"
        )
        await desk.begin("b", "log", "b2")
        assert await desk.resign("a", "no memory") is None
        while work := await desk.take("b", 3, "b2", 0):
            assert await desk.resign("a", "no memory") is None
            await desk.put("b", post(work), {})
        assert await desk.resign("a", "no memory") == ""

    asyncio.run(run())


def test_rows_of_a_process_that_ended_are_for_others_though_it_finds_no_place_to_start_again(open_desk, monkeypatch):
    ended, looks = [], []

    def look(workers) -> list[str]:
        looks.extend(workers)
        return [worker for worker in workers if worker in ended]

    monkeypatch.setattr("nli.inference.coordinator.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("nli.inference.coordinator.list_ended", look)

    async def run() -> None:
        desk = open_desk()
        mine, others = await desk.take("a", 3, "a1", 0), await desk.take("b", 3, "b1", 0)
        await desk.put("a", post(mine), {})
        await wait_until(lambda: looks.count("b") > 1)
        assert await desk.take("a", 3, "a1", 0) == []  # b is silent, and at work
        ended.append("b")
        await wait_for_deaths(desk, 1)
        again = []
        while work := await desk.take("a", 3, "a1", 0):  # they are suspects now
            again += work
            await desk.put("a", post(work), {})
        assert again == others and work is None
        assert (await desk.describe())["deaths"] == 1

    asyncio.run(run())


def test_nobody_waits_for_a_worker_that_is_not_heard_of(open_desk, monkeypatch):
    async def run() -> None:
        desk = open_desk()
        mine, _ = await desk.take("a", 3, "a1", 0), await desk.take("b", 3, "b1", 0)
        await desk.put("a", post(mine), {})
        assert await desk.take("a", 3, "a1", 0) == []
        monkeypatch.setattr("nli.inference.coordinator.SILENT_SECONDS", 0.0)
        assert await desk.take("a", 3, "a1", 0) is None

    asyncio.run(run())


def test_a_desk_that_follows_a_dead_one_counts_on_and_counts_a_row_once(open_desk, store):
    async def run() -> None:
        first = open_desk()
        work = await first.take("a", 3, "a1", 0)
        await first.put("a", post(work[:2]), {})
        second = open_desk()
        before = await second.describe()
        assert (before["rows"], before["tokens"]) == ([2], 10)
        await second.put("a", post(work), {})  # two of them again: the first one's reply was lost
        after = await second.describe()
        assert after["rows"] == [3] and after["seconds"] > 0
        assert [work.row["id"] for work in await second.take("b", 3, "b1", 0)] == ["3", "4", "5"]

    asyncio.run(run())


def test_a_run_without_any_worker_or_without_progress_says_so(open_desk, monkeypatch, capsys):
    looks, shown = [], []
    monkeypatch.setattr("nli.inference.coordinator.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("nli.inference.coordinator.IDLE_SECONDS", 0.1)
    monkeypatch.setattr(
        "nli.inference.coordinator.list_ended", lambda workers: looks.append(time.monotonic()) or list_ended(workers)
    )

    def is_shown(text: str) -> bool:
        shown.append(capsys.readouterr().out)
        return text in "".join(shown)

    async def run() -> None:
        desk = open_desk()
        await desk.describe()
        await wait_until(
            lambda: is_shown("inference: no worker: the cluster has no place for one. Add a machine, or stop")
        )
        await desk.begin("a", "/logs/a.err on here", "a1")
        capsys.readouterr()
        begun = time.monotonic()
        await wait_until(lambda: looks[-2] > begun + 0.3)  # so that the one before has said what it had to
        assert capsys.readouterr().out == ""
        monkeypatch.setattr("nli.inference.coordinator.STALLED_SECONDS", 0.1)
        await wait_until(
            lambda: is_shown("inference: no row has ended for 0 minutes. What the workers say: /logs/a.err on here\n")
        )

    asyncio.run(run())


def test_a_desk_that_is_gone_for_good_is_named_with_what_helps():
    from ray.exceptions import RayActorError

    async def call():
        raise RayActorError(error_msg="The actor died.")

    with pytest.raises(
        StorageError,
        match=r"the process that keeps the answers has ended \(The actor died\.\)\. .* the same command goes on",
    ):
        asyncio.run(ask(call()))
