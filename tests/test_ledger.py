"""The ledger: what it answers, what its sums are, and that nothing it acknowledged is ever lost.

python -m pytest tests/test_ledger.py
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nli.api.ledger import Ledger, new_owner
from nli.api.ledger_file import LedgerReader, Totals, encode_body, in_turn, request_key
from nli.api.prices import Price
from nli.runtime.errors import StorageError

REPOSITORY = Path(__file__).resolve().parent.parent
RUN, OTHER_RUN = "thoughts.jsonl", "other.jsonl"
KEY, REPAIR, OTHER_REPAIR = b"k" * 16, b"r" * 16, b"s" * 16
OK = ("ok",)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A ledger, its clock, and short names for its operations, each committed alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.ledger = Ledger(folder, lease_seconds=10, clock=self.clock)
        self.reader = LedgerReader(folder)

    def post(self, owner, *operation):
        return self.ledger.commit([(owner, [operation])])[0][0]

    def claim(self, owner, key=KEY, run=RUN, policy="retry", parent=None):
        return self.post(owner, "claim", key, run, policy, parent)

    def send(self, owner, n=1, reserve=100, key=KEY):
        return self.post(owner, "send", key, n, reserve)

    def done(self, owner, n=1, reply=b"reply", cost=40, key=KEY):
        return self.post(owner, "done", key, n, reply, 3, 2, cost)

    def fail(self, owner, n=1, is_final=False, key=KEY):
        return self.post(owner, "fail", key, n, "http_500", "HTTP 500", is_final)

    def lose(self, owner, n=1, is_final=False, key=KEY):
        return self.post(owner, "lose", key, n, "timeout", "no answer", is_final)

    def row(self, key=KEY):
        return next(row for row in self.reader.list_rows() if row["key"] == key)

    def totals(self, run=RUN):
        return self.ledger.read_totals(run)

    def die(self, *survivors):
        """Let the lease of every owner but the survivors run out."""
        self.clock.now += 6
        for owner in survivors:
            self.post(owner, "beat")
        self.clock.now += 6


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "ledger")
    yield bench
    bench.reader.close()
    bench.ledger.close()


# --- one request ---


def test_a_request_goes_from_claimed_to_sent_to_done_and_its_reply_is_found_again(bench):
    bench.ledger.begin_run(RUN, None)
    assert bench.claim("a") == ("go", 0)
    assert bench.send("a") == ("go",)
    assert bench.done("a") == OK
    assert bench.claim("b", run=OTHER_RUN) == ("done", b"reply", False, None)
    assert bench.totals() == Totals(done=1, prompt_tokens=3, completion_tokens=2, cost=40)
    assert bench.totals(OTHER_RUN) == Totals()
    entry, repair, is_settled = bench.reader.read_entries([KEY, b"unknown"])[KEY]
    assert (entry.state, entry.reply, entry.prompt_tokens, repair, is_settled) == ("done", b"reply", 3, None, False)
    assert bench.reader.count_states(RUN) == {"done": 1}


def test_a_request_can_be_claimed_before_its_run_was_begun(bench):
    assert (bench.claim("a"), bench.send("a"), bench.done("a")) == (("go", 0), ("go",), OK)
    assert bench.totals().done == 1


def test_repeating_an_operation_changes_nothing(bench):
    bench.ledger.begin_run(RUN, 10_000)
    steps = [
        ("claim", KEY, RUN, "retry", None),
        ("send", KEY, 1, 100),
        ("fail", KEY, 1, "http_500", "HTTP 500", False),
        ("send", KEY, 2, 100),
        ("lose", KEY, 2, "timeout", "no answer", False),
        ("send", KEY, 3, 100),
        ("fail", KEY, 3, "http_400", "HTTP 400", True),
        ("claim", KEY, RUN, "retry", None),
        ("send", KEY, 4, 100),
        ("lose", KEY, 4, "timeout", "no answer", True),
        ("claim", KEY, RUN, "retry", None),
        ("send", KEY, 5, 100),
        ("done", KEY, 5, b"reply", 3, 2, 40),
        ("claim", KEY, RUN, "retry", None),
    ]
    for step in steps:
        answer = bench.post("a", *step)
        state = bench.row(), bench.totals()
        assert bench.ledger.commit([("a", [step, step])]) == [[answer, answer]]
        assert (bench.row(), bench.totals()) == state
    assert bench.totals() == Totals(done=1, ambiguous_sends=2, held=200, cost=40, prompt_tokens=3, completion_tokens=2)
    late = [step for step in steps if step[0] in ("fail", "lose", "done")]
    before = bench.row(), bench.totals()
    assert bench.ledger.commit([("a", late), ("stranger", late)]) == [[OK] * 5] * 2
    assert (bench.row(), bench.totals()) == before


def test_a_send_that_is_not_the_next_one_or_not_of_the_claimer_is_lost(bench):
    assert bench.send("a") == ("lost",)
    bench.claim("a")
    assert (bench.send("b"), bench.send("a", n=2), bench.send("a", n=0)) == (("lost",),) * 3
    bench.send("a")
    bench.fail("a")
    assert bench.send("a", n=1) == ("lost",)
    assert bench.send("a", n=2) == ("go",)
    bench.done("a", n=2)
    assert bench.send("a", n=3) == ("lost",)


def test_what_is_said_of_an_unknown_request_spoils_nothing_in_the_same_commit(bench):
    nothing = [
        ("done", b"unknown", 1, b"reply", 1, 1, 1),
        ("fail", b"unknown", 1, "x", "x", True),
        ("lose", b"unknown", 1, "x", "x", True),
    ]
    answers = bench.ledger.commit([("a", [*nothing, ("claim", KEY, RUN, "retry", None)])])
    assert answers == [[OK, OK, OK, ("go", 0)]]


def test_a_request_that_failed_is_asked_again_by_the_next_run(bench):
    bench.claim("a")
    bench.send("a")
    bench.fail("a", is_final=True)
    assert (bench.row()["state"], bench.row()["kind"], bench.totals().failed) == ("failed", "http_500", 1)
    assert bench.claim("b", run=OTHER_RUN) == ("go", 1)
    assert (bench.totals().failed, bench.totals(OTHER_RUN).failed) == (0, 0)
    assert (bench.send("b", n=2), bench.done("b", n=2)) == (("go",), OK)
    assert (bench.totals().done, bench.totals(OTHER_RUN).done) == (0, 1)


# --- two owners ---


def test_a_request_that_a_living_worker_has_is_waited_for_and_a_dead_one_s_claim_is_free(bench):
    bench.claim("a")
    assert bench.claim("b") == ("wait",)
    bench.die("a")
    assert bench.claim("b") == ("wait",)
    bench.die("b")
    assert bench.claim("b") == ("go", 0)
    assert bench.send("a") == ("lost",)
    assert bench.totals() == Totals()


def test_a_dead_worker_s_send_is_ambiguous_and_is_asked_again_or_held_as_the_policy_says(bench):
    bench.claim("a")
    bench.send("a")
    bench.die()
    assert bench.claim("b", policy="hold") == ("held", "the worker that sent it died before an answer came")
    assert bench.row()["state"] == "ambiguous"
    assert bench.totals() == Totals(ambiguous_sends=1, held=100)
    assert bench.claim("b", policy="retry") == ("go", 1)
    assert bench.send("b", n=2) == ("go",)
    bench.done("b", n=2)
    assert bench.totals() == Totals(done=1, ambiguous_sends=1, held=100, cost=40, prompt_tokens=3, completion_tokens=2)


def test_hold_also_holds_what_another_policy_was_about_to_ask_again(bench):
    bench.claim("a")
    bench.send("a")
    bench.lose("a", is_final=False)
    bench.die()
    assert bench.claim("b", policy="hold") == ("held", "no answer")
    assert bench.reader.count_states(RUN) == {"ambiguous": 1}
    assert bench.totals().ambiguous_sends == 1


def test_a_request_that_is_given_up_unsent_keeps_what_an_earlier_send_may_have_cost(bench):
    bench.claim("a")
    bench.send("a")
    bench.lose("a")
    assert [bench.fail("a", n=2, is_final=True) for _ in range(2)] == [OK, OK]
    assert bench.totals() == Totals(failed=1, ambiguous_sends=1, held=100)
    assert bench.claim("b", policy="hold")[0] == "held"
    assert bench.totals() == Totals(ambiguous_sends=1, held=100)
    bench.done("a")
    assert bench.totals() == Totals(done=1, cost=40, prompt_tokens=3, completion_tokens=2)


def test_a_job_at_the_server_is_never_dead(bench):
    bench.claim("batch:7")
    bench.send("batch:7")
    bench.die()
    assert bench.claim("b") == ("wait",)


def test_workers_that_are_heard_in_one_commit_are_alive_in_it_whoever_comes_first(bench):
    bench.claim("a")
    bench.clock.now += 60
    claim = ("claim", KEY, RUN, "retry", None)
    assert bench.ledger.commit([("b", [claim]), ("a", [("beat",)])]) == [[("wait",)], [OK]]


def test_a_commit_that_took_longer_than_the_lease_kills_nobody_who_waited_for_it(bench):
    bench.claim("a")
    bench.clock.now += 5
    times = iter([bench.clock.now, bench.clock.now + 30])  # a disk that took half a minute
    bench.ledger._clock = lambda: next(times)
    bench.ledger.commit([("a", [("beat",)])])
    bench.ledger._clock = bench.clock
    bench.clock.now += 31
    assert bench.claim("b") == ("wait",)


def test_a_long_wait_for_another_writer_kills_nobody_who_may_have_waited_too(tmp_path):
    ours, other = Ledger(tmp_path, lease_seconds=1.5), Ledger(tmp_path, lease_seconds=1.5)
    other.commit([("a", [("claim", KEY, RUN, "retry", None)])])
    with ThreadPoolExecutor(1) as pool:
        with in_turn(other._turn):
            claiming = pool.submit(ours.commit, [("b", [("claim", KEY, RUN, "retry", None)])])
            time.sleep(1.8)  # longer than the lease of "a", who cannot be heard of meanwhile
            assert not claiming.done()
        assert claiming.result(60) == [[("wait",)]]
    time.sleep(1.8)
    assert ours.commit([("b", [("claim", KEY, RUN, "retry", None)])]) == [[("go", 0)]]
    ours.close()
    other.close()


def test_a_clock_that_is_set_back_makes_no_dead_worker_immortal(bench):
    bench.claim("dead")
    bench.claim("a", key=REPAIR)
    bench.clock.now -= 3600
    for _ in range(3):
        bench.post("a", "beat")
        bench.clock.now += 5
    assert bench.claim("b") == ("go", 0)
    assert bench.claim("b", key=REPAIR) == ("wait",)


def test_a_late_reply_is_kept_and_what_was_held_for_it_becomes_its_cost(bench):
    bench.ledger.begin_run(RUN, 1000)
    bench.claim("a")
    bench.send("a")
    bench.die()
    bench.ledger.begin_run(RUN, 1000)
    assert bench.totals() == Totals(ambiguous_sends=1, held=100)
    assert bench.done("a") == OK
    assert bench.totals() == Totals(done=1, cost=40, prompt_tokens=3, completion_tokens=2)
    assert bench.claim("b") == ("done", b"reply", False, None)


def test_a_late_reply_is_kept_after_another_worker_claimed_and_that_one_sends_nothing(bench):
    bench.claim("a")
    bench.send("a")
    bench.die()
    assert bench.claim("b") == ("go", 1)
    bench.done("a")
    assert bench.send("b", n=2) == ("lost",)
    assert bench.claim("b") == ("done", b"reply", False, None)
    assert bench.totals() == Totals(done=1, cost=40, prompt_tokens=3, completion_tokens=2)


def test_a_late_reply_that_another_run_took_over_costs_that_run_nothing(bench):
    bench.claim("a")
    bench.send("a")
    bench.die()
    bench.claim("b", run=OTHER_RUN)
    bench.done("a")
    assert bench.totals() == Totals(ambiguous_sends=1, held=100)
    assert bench.totals(OTHER_RUN) == Totals(done=1, prompt_tokens=3, completion_tokens=2)


def test_a_late_reply_does_not_disturb_the_send_that_followed_it(bench):
    bench.claim("a")
    bench.send("a")
    bench.die()
    bench.claim("b")
    bench.send("b", n=2)
    before = bench.row(), bench.totals()
    assert (bench.done("a", reply=b"late"), bench.fail("a"), bench.lose("a")) == (OK, OK, OK)
    assert (bench.row(), bench.totals()) == before
    bench.done("b", n=2, reply=b"mine")
    bench.done("a", reply=b"later")
    assert bench.claim("c") == ("done", b"mine", False, None)
    assert bench.totals() == Totals(done=1, ambiguous_sends=1, held=100, cost=40, prompt_tokens=3, completion_tokens=2)


def test_a_late_refusal_says_that_the_send_cost_nothing(bench):
    bench.claim("a")
    bench.send("a")
    bench.die()
    bench.ledger.begin_run(RUN, None)
    bench.fail("a")
    assert bench.totals() == Totals()
    assert bench.send("a", n=2) == ("go",)
    bench.fail("a", n=2, is_final=True)
    assert bench.totals() == Totals(failed=1)


# --- repairs ---


def test_a_repair_is_linked_to_its_parent_and_counted_once(bench):
    bench.claim("a")
    bench.send("a")
    bench.done("a")
    for _ in range(2):
        assert bench.claim("a", key=REPAIR, parent=KEY) == ("go", 0)
    bench.send("a", key=REPAIR)
    bench.done("a", key=REPAIR, reply=b"better")
    assert bench.claim("a", key=REPAIR, parent=KEY) == ("done", b"better", False, None)
    assert bench.claim("b") == ("done", b"reply", False, REPAIR)
    assert (bench.totals().repairs, bench.totals().done) == (1, 2)


def test_a_parent_has_one_repair_however_its_first_reply_is_read(bench):
    bench.claim("a")
    bench.send("a")
    bench.done("a")
    bench.claim("a", key=REPAIR, parent=KEY)
    assert bench.claim("b", key=OTHER_REPAIR, parent=KEY) == (
        "go",
        0,
    )  # the first one has no reply: the link follows the newer reading
    assert bench.row()["repair"] == OTHER_REPAIR
    bench.send("b", key=OTHER_REPAIR)
    bench.done("b", key=OTHER_REPAIR, reply=b"better")
    assert bench.claim("c", key=REPAIR, parent=KEY) == ("done", b"better", False, None)
    assert bench.row()["repair"] == OTHER_REPAIR


def test_a_repair_that_another_run_takes_over_is_counted_there(bench):
    bench.claim("a")
    bench.send("a")
    bench.done("a")
    bench.claim("a", key=REPAIR, parent=KEY)
    bench.send("a", key=REPAIR)
    bench.fail("a", key=REPAIR, is_final=True)
    assert bench.claim("b", key=REPAIR, run=OTHER_RUN, parent=KEY) == ("go", 1)
    assert (bench.totals().repairs, bench.totals(OTHER_RUN).repairs) == (0, 1)


def test_only_replies_can_be_settled(bench):
    bench.claim("a")
    bench.ledger.settle([KEY, b"unknown"])
    assert bench.reader.read_entries([KEY])[KEY][2] is False
    bench.send("a")
    bench.done("a")
    bench.ledger.settle([KEY])
    assert bench.reader.read_entries([KEY])[KEY][2] is True
    assert bench.claim("b") == ("done", b"reply", True, None)


# --- money ---


def ask(bench, owner, key, reserve=100):
    bench.claim(owner, key=key)
    return bench.send(owner, key=key, reserve=reserve)


def test_a_send_is_full_while_calls_under_way_hold_the_money_and_over_when_none_does(bench):
    bench.ledger.begin_run(RUN, 250)
    assert [ask(bench, "a", bytes([index])) for index in range(3)] == [("go",), ("go",), ("full",)]
    bench.done("a", key=b"\0", cost=90)
    assert bench.send("a", key=b"\2") == ("full",)
    bench.done("a", key=b"\1", cost=60)
    assert bench.send("a", key=b"\2") == ("go",)
    bench.done("a", key=b"\2", cost=100)
    assert ask(bench, "a", b"\3") == ("over",)
    assert ask(bench, "a", b"\4", reserve=0) == ("go",)
    assert bench.totals().cost == 250


def test_money_that_dead_workers_reserved_is_held_and_ends_the_wait(bench):
    bench.ledger.begin_run(RUN, 150)
    assert ask(bench, "a", b"1") == ("go",)
    assert ask(bench, "b", b"2") == ("full",)
    bench.die("b")
    assert bench.send("b", key=b"2") == ("full",)
    assert bench.send("b", key=b"2") == ("over",)
    assert bench.totals() == Totals(ambiguous_sends=1, held=100)


def test_a_larger_budget_goes_on_and_what_was_held_counts_in_it(bench):
    bench.ledger.begin_run(RUN, 100)
    ask(bench, "a", b"1")
    bench.post("a", "lose", b"1", 1, "timeout", "no answer", True)
    assert ask(bench, "a", b"2") == ("over",)
    assert bench.ledger.begin_run(RUN, 200).held == 100
    assert bench.send("a", key=b"2") == ("go",)


def test_what_was_used_before_a_price_was_known_counts_in_the_budget_that_comes_later(bench):
    ask(bench, "a", KEY, reserve=0)
    bench.done("a", cost=0)
    price = Price(10.0, 20.0)
    owed = price.cost_nanodollars(bench.row()["prompt_tokens"], bench.row()["completion_tokens"])
    assert bench.ledger.begin_run(RUN, None, price).cost == 0
    assert bench.ledger.begin_run(RUN, owed, price).cost == bench.row()["cost"] == owed > 0
    assert bench.ledger.begin_run(RUN, owed, price).cost == owed
    assert ask(bench, "b", b"2") == ("over",)


def test_no_call_of_a_halted_run_goes_out_until_it_is_begun_again_and_others_do(bench):
    bench.claim("a")
    bench.post("a", "halt", RUN, "the key is refused")
    bench.post("a", "halt", RUN, "something later")
    assert bench.send("a") == ("halted", "the key is refused")
    bench.claim("a", key=b"2", run=OTHER_RUN)
    assert bench.send("a", key=b"2") == ("go",)
    bench.ledger.begin_run(RUN, None)
    assert bench.send("a") == ("go",)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_workers_do_the_sums_are_those_of_the_requests_and_the_budget_holds(bench, seed):
    """Random operations, sensible or not, late or repeated, of four workers that may die, on six requests of two runs."""
    chance = random.Random(seed)
    bench.ledger.begin_run(RUN, 900)
    bench.ledger.begin_run(OTHER_RUN, 700)
    owners, posted = ["a", "b", "c", "batch:1"], []
    for _ in range(400):
        if chance.random() < 0.05:
            bench.clock.now += chance.choice([3, 12])
        if chance.random() < 0.02:
            bench.ledger.begin_run(RUN, 900)
        key = bytes([chance.randrange(6)])
        n = chance.choice(
            [
                1,
                2,
                3,
                (
                    next((row["sends"] for row in bench.reader.list_rows() if row["key"] == key), 0)
                    + chance.choice([0, 0, 1])
                )
                or 1,
            ]
        )
        operation = chance.choice(
            [
                ("claim", key, chance.choice([RUN, OTHER_RUN]), chance.choice(["retry", "hold"]), None),
                ("send", key, n, 100),
                ("send", key, n, 100),
                ("done", key, n, b"x", 3, 2, chance.randrange(101)),
                ("fail", key, n, "kind", "problem", chance.random() < 0.5),
                ("lose", key, n, "kind", "problem", chance.random() < 0.5),
                ("beat",),
            ]
        )
        posted.append((chance.choice(owners), operation))
        for owner, each in [posted[-1], chance.choice(posted)] if chance.random() < 0.2 else [posted[-1]]:
            bench.post(owner, *each)
        rows = list(bench.reader.list_rows())
        everything = [bench.totals(run) for run in (RUN, OTHER_RUN)]
        for run, totals, most in zip((RUN, OTHER_RUN), everything, (900, 700), strict=True):
            mine = [row for row in rows if row["run"] == run]
            assert totals.cost == sum(row["cost"] or 0 for row in mine)
            assert totals.reserved == sum(row["reserved"] for row in mine if row["state"] == "sent")
            assert totals.done == sum(row["state"] == "done" for row in mine)
            assert totals.failed == sum(row["state"] == "failed" for row in mine)
            assert totals.prompt_tokens == sum(row["prompt_tokens"] or 0 for row in mine)
            assert min(totals.held, totals.ambiguous_sends) >= 0
            assert totals.held == 100 * totals.ambiguous_sends
            assert all(row["reserved"] == 100 for row in mine if row["is_unsure"] and row["state"] != "done")
            if operation[0] == "send":
                assert totals.cost + totals.held + totals.reserved <= most
        assert sum(totals.ambiguous_sends for totals in everything) == sum(row["ambiguous_sends"] for row in rows)


# --- files, processes, hosts ---


def test_a_commit_is_flushed_to_the_disk_itself(bench):
    assert bench.ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert bench.ledger._db.execute("PRAGMA synchronous").fetchone() == (
        2,
    )  # FULL: the log is flushed with each commit


def test_a_commit_that_the_disk_refuses_is_a_storage_error_with_nothing_applied_and_the_ledger_goes_on(bench):
    bench.claim("a")
    before = bench.row(), bench.totals()
    pages = bench.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    bench.ledger._db.execute(f"PRAGMA max_page_count={pages}")  # a full disk
    with pytest.raises(
        StorageError,
        match=r"ledger\.sqlite: cannot be written \(database or disk is full\)\. Free space .* what was stored before is kept",
    ):
        bench.ledger.commit([("a", [("send", KEY, 1, 100), ("done", KEY, 1, b"x" * 10_000_000, 1, 1, 1)])])
    assert (bench.row(), bench.totals()) == before
    with pytest.raises(StorageError):
        bench.ledger.commit([("a", [("send", KEY, 1, 100), ("done", KEY, 1, b"x" * 10_000_000, 1, 1, 1)])])
    bench.ledger._db.execute(f"PRAGMA max_page_count={10**6}")
    assert bench.send("a") == ("go",)


class FailingCommit:
    """A connection whose COMMIT fails once, as a disk may do it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection, self.failures = connection, 1

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def execute(self, statement, *arguments):
        if statement == "COMMIT" and self.failures:
            self.failures -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return self.connection.execute(statement, *arguments)


def test_after_a_commit_that_failed_at_its_very_end_nothing_is_applied_and_the_next_one_works(bench):
    bench.ledger._db = FailingCommit(bench.ledger._db)
    with pytest.raises(StorageError, match="disk I/O error"):
        bench.claim("a")
    assert list(bench.reader.list_rows()) == []
    assert bench.claim("a") == ("go", 0)
    bench.ledger._db.failures = 2
    for act in (lambda: bench.ledger.begin_run(RUN, 1), lambda: bench.ledger.settle([KEY])):
        with pytest.raises(StorageError):
            act()


def test_a_folder_that_cannot_be_used_and_a_file_that_is_no_ledger_are_storage_errors(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="the ledger cannot be kept there"):
        Ledger(tmp_path / "file" / "ledger")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/ledger.sqlite").write_bytes(b"this is no database" * 1000)
    for opens in (Ledger, LedgerReader):
        with pytest.raises(StorageError, match=r"the ledger cannot be opened \(file is not a database\)"):
            opens(tmp_path / "bad")
    with pytest.raises(StorageError, match=r"ledger\.sqlite: no ledger there"):
        LedgerReader(tmp_path)


def test_a_ledger_of_another_version_is_refused_and_left_as_it_is(tmp_path):
    Ledger(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        db.execute("ALTER TABLE requests DROP COLUMN is_unsure")
        db.execute("ALTER TABLE owners ADD COLUMN node TEXT")
    for opens in (Ledger, LedgerReader):
        with pytest.raises(
            StorageError,
            match=r"a ledger of another version .* \(they differ in owners.node, requests.is_unsure\)\. Use that",
        ):
            opens(tmp_path)


def test_a_ledger_whose_maker_was_killed_before_the_first_table_is_an_empty_one(tmp_path):
    sqlite3.connect(tmp_path / "ledger.sqlite").execute("PRAGMA journal_mode=WAL")
    reader = LedgerReader(tmp_path)
    assert (reader.read_entries([KEY]), reader.read_totals(RUN), reader.read_entries([])) == ({}, Totals(), {})
    reader.close()


def test_a_ledger_that_another_machine_has_open_is_refused_and_one_it_left_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("nli.api.ledger_file._this_host", lambda: "elsewhere 1234")
    there = Ledger(tmp_path)
    monkeypatch.setattr("nli.api.ledger_file._this_host", lambda: "here 5678")
    with pytest.raises(
        StorageError,
        match=r"the ledger is in use on elsewhere; run the job on that machine's cluster, or give another --ledger-dir\.",
    ):
        Ledger(tmp_path)
    with pytest.raises(StorageError, match="the ledger is in use on elsewhere"):
        LedgerReader(tmp_path)
    monkeypatch.setattr("nli.api.ledger_file._this_host", lambda: "container 1234")  # another name, the same kernel
    Ledger(tmp_path).close()
    there.close()
    monkeypatch.setattr("nli.api.ledger_file._this_host", lambda: "here 5678")
    ours, too = Ledger(tmp_path), Ledger(tmp_path)
    ours.close()
    too.close()


def test_a_ledger_can_be_made_by_several_processes_at_the_same_moment(tmp_path):
    script = """
import multiprocessing, sys
from pathlib import Path
from nli.api.ledger import Ledger

def make(barrier):
    for index in range(40):
        barrier.wait(120)
        Ledger(Path(sys.argv[1]) / str(index)).close()

context = multiprocessing.get_context("fork")
barrier = context.Barrier(3)
processes = [context.Process(target=make, args=(barrier,)) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_two_processes_of_one_host_share_a_ledger_and_no_request_is_sent_by_both(tmp_path):
    script = """
import sys
from pathlib import Path
from nli.api.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
owner, sent = sys.argv[2], 0
for index in range(300):
    key = index.to_bytes(16, "big")
    if ledger.commit([(owner, [("claim", key, "run", "retry", None)])])[0][0][0] == "go":
        sent += ledger.commit([(owner, [("send", key, 1, 10)])])[0][0] == ("go",)
        ledger.commit([(owner, [("done", key, 1, owner.encode(), 1, 1, 5)])])
print(sent)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    results = [worker.communicate(timeout=300) for worker in workers]
    assert [errors for _, errors in results] == ["", ""]
    reader = LedgerReader(tmp_path)
    assert sum(int(output) for output, _ in results) == 300
    assert reader.read_totals("run") == Totals(done=300, prompt_tokens=300, completion_tokens=300, cost=1500)
    reader.close()


def test_what_was_acknowledged_survives_a_kill_in_the_middle_of_commits(tmp_path):
    script = """
import sys
from pathlib import Path
from nli.api.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for index in range(10**6):
    key = index.to_bytes(16, "big")
    ledger.commit([("a", [("claim", key, "run", "retry", None), ("send", key, 1, 10)])])
    print("sent", index, flush=True)
    ledger.commit([("a", [("done", key, 1, b"x" * 3000, 1, 1, 5)])])
    print("done", index, flush=True)
"""
    for _ in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        lines = [worker.stdout.readline() for _ in range(40)]
        time.sleep(random.uniform(0, 0.05))
        os.kill(worker.pid, signal.SIGKILL)
        lines += worker.communicate()[0].splitlines()
        said = {
            kind: {int(line.split()[1]) for line in lines if line.startswith(kind) and len(line.split()) == 2}
            for kind in ("sent", "done")
        }
        ledger = Ledger(tmp_path)
        reader = LedgerReader(tmp_path)
        states = {int.from_bytes(row["key"], "big"): row["state"] for row in reader.list_rows()}
        assert len(said["done"]) >= 10
        assert all(states[index] == "done" for index in said["done"])
        assert all(states[index] in ("sent", "done") for index in said["sent"])
        assert ledger.read_totals("run").done == sum(state == "done" for state in states.values())
        assert ledger._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        reader.close()
        ledger.close()
        (
            tmp_path / "ledger.sqlite"
        ).unlink()  # the next round starts anew; the files beside it went with the last one to close it


# --- keys ---


def test_a_key_depends_on_its_parts_and_on_nothing_else():
    body = encode_body({"model": "m", "messages": [{"role": "user", "content": "犬 \u2028"}], "temperature": 0.0})
    assert (
        encode_body({"temperature": 0.0, "messages": [{"content": "犬 \u2028", "role": "user"}], "model": "m"}) == body
    )
    key = request_key("http://a/v1/chat/completions", body, 0)
    assert key == bytes.fromhex("338151143973e087a3278dba21f4e98a")  # the same in every process, on every machine
    others = [
        request_key("http://b/v1/chat/completions", body),
        request_key("http://a/v1/chat/completions", body, 1),
        request_key("http://a", body + b" "),
    ]
    assert len({key, *others}) == 4


def test_no_two_owners_have_one_name():
    assert len({new_owner("worker") for _ in range(1000)}) == 1000
    assert new_owner("worker").startswith("worker@")
