"""Asking the teacher: retries, one repair, and an outcome for every row in the ledger, whatever the server does.

python -m pytest tests/test_teacher.py
"""

import asyncio
import pickle
import socket
import time
import traceback

import pytest
from chat_server import KEY, Answer, with_server

from nli.api.chat import chat_url
from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.api.limiter_client import LimiterClient
from nli.api.services import GroupCommit, LedgerClient
from nli.runtime import errors
from nli.runtime.errors import ConfigError, NLIError, StorageError, TeacherError
from nli.task.parsing import Parsed, ParseStatus
from nli.task.prompts import TEACHER_PROMPTS
from nli.teacher.online import Teacher
from nli.teacher.requests import (
    TeacherConfig,
    check_teacher,
    describe_parameters,
    describe_requests,
    first_key,
    read_outcomes,
)

PROMPT = TEACHER_PROMPTS["initial_generation"]
ROW = {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}
GOOD = '{"thought_process": "Dogs are animals.", "predicted_label": 1}'


RUN = "thoughts.jsonl"


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the teacher wanted to wait between tries, which pass at once."""
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    # A stand-in for the module's view of asyncio, so that the server's own waits stay real.
    class Hurry:
        def __getattr__(self, name):
            return sleep if name == "sleep" else getattr(__import__("asyncio"), name)

    monkeypatch.setattr("nli.teacher.online.asyncio", Hurry())
    return waited


def many(number):
    """Rows that make as many different requests."""
    return [ROW | {"id": str(index), "premise": f"Premise {index}."} for index in range(number)]


@pytest.fixture
def folder(tmp_path):
    """Where this test's ledger lies."""
    return tmp_path / "ledger"


@pytest.fixture
def ask(folder):
    """A function that asks about rows with a ledger of its own; returns (outcomes, server), or raises what ended the run, with `server` at it."""

    def ask(*answers, rows=(ROW,), base_url=None, prompt=PROMPT, owner="worker", **settings):
        async def use(server):
            config = TeacherConfig(base_url=base_url or "http://teacher.test", **settings)
            ledger = Ledger(folder)
            ledger.begin_run(RUN, int(config.max_cost * 10**9) if config.max_cost else None)
            teacher = Teacher(
                config,
                prompt,
                KEY,
                RUN,
                LedgerClient(GroupCommit(ledger).post, owner),
                LimiterClient(None, owner, config.limits()),
            )
            if base_url is None:
                teacher._client._url = chat_url(
                    server.base_url
                )  # each call of `ask` has a port of its own, and the same requests
            failure = None
            try:
                await teacher.ask_all(list(rows))
            except NLIError as error:
                failure = error
            finally:
                await teacher.close()
                ledger.close()
            reader = LedgerReader(folder)
            keys = [first_key(config, prompt, row) for row in rows]
            found = read_outcomes(prompt, reader, keys, config.repair_invalid)
            server.outcomes, server.totals, server.states = (
                [found[key][0] for key in keys],
                reader.read_totals(RUN),
                reader.count_states(RUN),
            )
            reader.close()
            if failure is not None:
                failure.server = server
                raise failure
            return server.outcomes, server

        return with_server(answers, use)

    return ask


@pytest.fixture
def ask_one(ask):
    """`ask` about one row."""

    def ask_one(*answers, **settings):
        outcomes, server = ask(*answers, **settings)
        assert KEY not in repr(outcomes)
        return outcomes[0], server

    return ask_one


def test_a_good_reply_is_one_call_and_an_ok_outcome(ask_one, waits):
    outcome, server = ask_one(Answer(text=GOOD))
    assert (outcome.status, outcome.fields, outcome.problem) == (
        "ok",
        {"thought_process": "Dogs are animals.", "predicted_label": 1},
        "",
    )
    assert (
        outcome.raw_text,
        outcome.finish_reason,
        outcome.num_prompt_tokens,
        outcome.num_completion_tokens,
        outcome.num_replies,
    ) == (GOOD, "stop", 10, 5, 1)
    assert (len(server.calls), waits) == (1, [])


def test_the_request_says_all_that_decides_the_answer(ask_one, waits):
    _, server = ask_one(Answer(text=GOOD), model="toy", temperature=0.5, max_tokens=64, random_seed=7)
    request = server.calls[0]
    assert request["messages"] == [
        {"role": "system", "content": PROMPT.system},
        {"role": "user", "content": "Premise: Two dogs ran.\nHypothesis: Animals moved."},
    ]
    assert (request["model"], request["temperature"], request["max_tokens"], request["random_seed"]) == (
        "toy",
        0.5,
        64,
        7,
    )
    assert request["response_format"]["type"] == "json_schema"
    schema = request["response_format"]["json_schema"]
    assert (schema["name"], schema["strict"], schema["schema"]["required"]) == (
        "ThoughtReply",
        True,
        ["thought_process", "predicted_label"],
    )


@pytest.mark.parametrize(("response_format", "sent"), [("json_object", {"type": "json_object"}), ("text", None)])
def test_json_can_be_asked_for_without_a_schema(ask_one, waits, response_format, sent):
    _, server = ask_one(Answer(text=GOOD), response_format=response_format)
    assert server.calls[0].get("response_format") == sent


def test_a_label_never_reaches_the_teacher_where_the_prompt_does_not_show_it(ask_one, waits):
    _, server = ask_one(Answer(text=GOOD))
    assert "True label" not in str(server.calls[0]["messages"])
    _, server = ask_one(Answer(text=GOOD), prompt=TEACHER_PROMPTS["regeneration"])
    assert server.calls[0]["messages"][1]["content"].endswith("True label: 1")


def test_errors_that_pass_are_tried_again_with_growing_waits(ask_one, waits):
    outcome, server = ask_one(
        Answer(status=500), Answer(status=429), Answer(body="not JSON"), Answer(hang_up=True), Answer(text=GOOD)
    )
    assert (outcome.status, outcome.num_replies, len(server.calls)) == ("ok", 1, 5)
    assert server.calls == [server.calls[0]] * 5
    assert len(waits) == 4
    for step, wait in enumerate(waits):
        assert 0.25 * 2**step <= wait <= 0.75 * 2**step


@pytest.mark.parametrize(("header", "least"), [("7", 7), ("0", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_a_server_s_own_wait_is_kept(ask_one, waits, header, least):
    outcome, _ = ask_one(Answer(status=429, headers={"Retry-After": header}), Answer(text=GOOD))
    assert outcome.status == "ok"
    assert least <= waits[0] <= max(least, 0.75)


def test_no_wait_that_a_server_asks_for_holds_a_row_up_for_hours(ask_one, waits):
    ask_one(Answer(status=503, headers={"Retry-After": "86400"}), Answer(text=GOOD))
    assert waits == [600]


def test_a_call_that_keeps_failing_is_a_row_with_its_reason(ask_one, waits):
    outcome, server = ask_one(Answer(status=503, body='{"message": "overloaded"}'), max_attempts=3)
    assert (outcome.status, outcome.fields, outcome.problem) == ("request_failed", None, "HTTP 503: overloaded")
    assert (outcome.raw_text, outcome.num_prompt_tokens, outcome.num_completion_tokens, outcome.num_replies) == (
        "",
        None,
        None,
        0,
    )
    assert (len(server.calls), len(waits)) == (3, 2)


def test_a_call_that_cannot_succeed_is_not_tried_again(ask_one, waits):
    outcome, server = ask_one(Answer(status=400, body='{"message": "prompt too long"}'))
    assert (outcome.status, outcome.problem, len(server.calls), waits) == (
        "request_failed",
        "HTTP 400: prompt too long",
        1,
        [],
    )


def test_a_server_that_never_answers_is_a_row_with_its_reason(ask_one, waits):
    outcome, server = ask_one(Answer(delay_seconds=9), timeout_seconds=0.5, max_attempts=2)
    assert (outcome.status, outcome.problem, len(server.calls)) == ("request_failed", "no answer within 0.5 s", 2)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_an_unknown_model_ends_the_run_at_the_first_call(ask, waits, status):
    with pytest.raises(TeacherError, match=f"HTTP {status}") as caught:
        ask(Answer(status=status, body='{"message": "no"}'))
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert waits == []


def test_an_unreachable_server_ends_the_run_after_the_last_try(ask, waits):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(
            TeacherError, match=r"no connection to .* in 3 tries\. Check --base-url and the network; replies are kept"
        ) as caught:
            ask(Answer(), base_url=f"http://127.0.0.1:{reserved.getsockname()[1]}", max_attempts=3)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert len(waits) == 2


def test_an_invalid_reply_is_repaired_once_with_the_fault_named(ask_one, waits):
    bad = '{"thought_process": "Dogs are animals.", "predicted_label": 2}'
    outcome, server = ask_one(Answer(text=bad), Answer(text=GOOD))
    assert (outcome.status, outcome.raw_text, outcome.num_replies) == ("ok", GOOD, 2)
    assert (outcome.num_prompt_tokens, outcome.num_completion_tokens) == (20, 10)
    assert server.calls[1]["messages"][:2] == server.calls[0]["messages"]
    assert server.calls[1]["messages"][2:] == [
        {"role": "assistant", "content": bad},
        {
            "role": "user",
            "content": "Your reply could not be used: predicted_label is 2. Reply again with the JSON object alone.",
        },
    ]


def test_a_reply_that_is_never_right_is_a_row_with_the_last_text_and_no_label(ask_one, waits):
    outcome, server = ask_one(Answer(text="I think so."), Answer(text='{"thought_process": "x"}'))
    assert (outcome.status, outcome.fields, outcome.problem) == ("missing_field", None, "no field predicted_label")
    assert (outcome.raw_text, outcome.num_replies, len(server.calls)) == ('{"thought_process": "x"}', 2, 2)


def test_an_empty_reply_is_repaired_too(ask_one, waits):
    outcome, server = ask_one(Answer(text=None), Answer(text=GOOD))
    assert outcome.status == "ok"
    assert server.calls[1]["messages"][2] == {"role": "assistant", "content": "(empty)"}


def test_a_repair_that_fails_keeps_the_first_reply_and_both_reasons(ask_one, waits):
    outcome, _ = ask_one(Answer(text="I think so."), Answer(status=400, body='{"message": "no"}'))
    assert (outcome.status, outcome.raw_text, outcome.num_replies) == ("no_json", "I think so.", 1)
    assert outcome.problem == "no JSON object in the text; the repair failed: HTTP 400: no"


def test_without_repair_the_first_reply_counts(ask_one, waits):
    outcome, server = ask_one(Answer(text="I think so."), Answer(text=GOOD), repair_invalid=False)
    assert (outcome.status, len(server.calls)) == ("no_json", 1)


def test_a_reply_cut_by_the_token_limit_is_truncated(ask_one, waits):
    outcome, _ = ask_one(Answer(text='{"thought_process": "Dogs', finish_reason="length"), repair_invalid=False)
    assert (outcome.status, outcome.finish_reason) == ("truncated", "length")


def test_outcomes_come_in_the_rows_order_and_no_more_calls_are_under_way_than_allowed(ask, waits):
    rows = many(12)
    slow_first = [Answer(text=GOOD, delay_seconds=0.5)] + [Answer(text=GOOD, delay_seconds=0.1)] * 11
    outcomes, server = ask(*slow_first, rows=rows, max_in_flight=3)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 12
    assert server.most_in_flight == 3
    asked = {call["messages"][1]["content"].splitlines()[0] for call in server.calls}
    assert asked == {f"Premise: Premise {number}." for number in range(12)}


def test_one_bad_row_does_not_disturb_the_others(ask, waits):
    rows = many(3)
    outcomes, _ = ask(Answer(text=GOOD), Answer(status=400), Answer(text=GOOD), rows=rows, max_in_flight=1)
    assert [outcome.status for outcome in outcomes] == ["ok", "request_failed", "ok"]


def test_an_address_without_http_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("MISTRAL_API_KEY", KEY)
    assert check_teacher(TeacherConfig()) == KEY
    with pytest.raises(TeacherError, match=r"^--base-url 'localhost:8377' is not an http:// or https:// address\.$"):
        check_teacher(TeacherConfig(base_url="localhost:8377"))


@pytest.mark.parametrize(
    "address", ["http://", "http://[::1", "http://host:99999", "http://host:port", "http://host/#v1"]
)
def test_an_address_of_no_server_is_refused_before_anything_starts(address):
    with pytest.raises(TeacherError, match=r"^--base-url .* is not the address of a server"):
        check_teacher(TeacherConfig(base_url=address, api_key_file="none"))


def test_an_address_by_number_is_one():
    assert check_teacher(TeacherConfig(base_url="http://[::1]:8000/v1/", api_key_file="none")) == "none"


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 2.5},
        {"max_tokens": 0},
        {"workers": 0},
        {"requests_per_minute": -1.0},
        {"timeout_seconds": 0.0},
        {"response_format": "xml"},
        {"max_attempts": 0},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} is "):
        TeacherConfig(**values)


def test_a_budget_without_end_is_refused():
    with pytest.raises(ConfigError, match="^max_cost is inf, which no account holds; 0 is no bound"):
        TeacherConfig(max_cost=float("inf")).check()


def test_an_output_s_identity_holds_what_decides_the_answers_and_no_key():
    identity = describe_requests(TeacherConfig(), PROMPT)
    assert identity == describe_requests(
        TeacherConfig(
            workers=9,
            requests_per_minute=5,
            timeout_seconds=1,
            max_attempts=1,
            max_rows=3,
            max_cost=1,
            ledger_dir="elsewhere",
        ),
        PROMPT,
    )
    for change in (
        {"model": "x"},
        {"base_url": "http://x"},
        {"sample_index": 1},
        {"temperature": 0.1},
        {"max_tokens": 9},
        {"random_seed": 1},
        {"response_format": "text"},
        {"repair_invalid": False},
        {"api": "openai"},
    ):
        assert describe_requests(TeacherConfig(**change), PROMPT) != identity
    assert describe_requests(TeacherConfig(), TEACHER_PROMPTS["scoring"]) != identity
    assert not any("key" in name for name in identity)


def test_every_error_of_ours_travels_between_processes():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NLIError)]
    assert len(kinds) >= 7
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("where: what. How to cure it.")))
        assert (type(copy), str(copy)) == (kind, "where: what. How to cure it.")


def test_the_rows_that_were_answered_before_a_key_is_refused_are_in_the_ledger_and_no_more_calls_go_out(ask):
    with pytest.raises(TeacherError, match="refuses the API key") as caught:
        ask(Answer(text=GOOD), Answer(status=401), rows=many(5), max_in_flight=1)
    assert [outcome.status for outcome in caught.value.server.outcomes] == ["ok"] + ["request_failed"] * 4
    assert len(caught.value.server.calls) == 2
    outcomes, server = ask(Answer(text=GOOD), rows=many(5))
    assert ([outcome.status for outcome in outcomes], len(server.calls)) == (["ok"] * 5, 4)


def test_a_run_that_was_halted_ends_without_asking_the_ledger_about_every_row(folder):
    async def run():
        ledger = Ledger(folder)
        ledger.begin_run(RUN, None)
        ledger.commit([("driver", [("halt", RUN, "stopped from outside")])])
        commits, asked = GroupCommit(ledger), []

        async def post(owner, operations):
            asked.extend(operation for operation in operations if operation[0] == "open")
            return await commits.post(owner, operations)

        config = TeacherConfig(base_url="http://127.0.0.1:9", max_in_flight=4)
        teacher = Teacher(
            config, PROMPT, KEY, RUN, LedgerClient(post, "worker"), LimiterClient(None, "worker", config.limits())
        )
        for _ in range(2):
            with pytest.raises(TeacherError, match="^stopped from outside$"):
                await teacher.ask_all(many(500))
        await teacher.close()
        ledger.close()
        return len(asked)

    assert asyncio.run(run()) == 4


def test_a_reply_and_the_next_claim_travel_together_and_no_call_goes_out_before_its_claim_is_back(folder):
    async def use(server):
        ledger = Ledger(folder)
        ledger.begin_run(RUN, None)
        commits, posts = GroupCommit(ledger), []

        async def post(owner, operations):
            posts.append(([operation[0] for operation in operations], len(server.calls)))
            return await commits.post(owner, operations)

        config = TeacherConfig(base_url=server.base_url, max_in_flight=1)
        teacher = Teacher(
            config, PROMPT, KEY, RUN, LedgerClient(post, "worker", 0.25), LimiterClient(None, "worker", config.limits())
        )
        await teacher.ask_all(many(3))
        await teacher.close()
        ledger.close()
        return posts

    assert with_server((Answer(text=GOOD),), use) == [
        (["open"], 0),
        (["done", "open"], 1),
        (["done", "open"], 2),
        (["done"], 3),
    ]


def test_rows_that_come_at_the_moment_at_which_the_last_ones_end_are_not_left_waiting(folder):
    async def run():
        ledger = Ledger(folder)
        config = TeacherConfig(base_url="http://127.0.0.1:9")
        teacher = Teacher(
            config,
            PROMPT,
            KEY,
            RUN,
            LedgerClient(GroupCommit(ledger).post, "worker"),
            LimiterClient(None, "worker", config.limits()),
        )
        teacher._stopped = TeacherError("stopped")  # rows end in the step that takes them

        async def come_later():
            await asyncio.sleep(0)
            await teacher.ask_all(many(1))

        ends = await asyncio.wait_for(asyncio.gather(teacher.ask_all(many(1)), come_later(), return_exceptions=True), 5)
        await teacher.close()
        ledger.close()
        return [str(end) for end in ends]

    assert asyncio.run(run()) == ["stopped", "stopped"]


def test_a_second_run_asks_nothing_and_reads_the_same(ask):
    first, _ = ask(Answer(text=GOOD), rows=many(3))
    second, server = ask(Answer(status=500), rows=many(3), owner="another")
    assert (second, server.calls) == (first, [])


def test_identical_requests_are_asked_once(ask):
    outcomes, server = ask(
        Answer(text=GOOD, delay_seconds=0.05), rows=[ROW, ROW | {"id": "1"}, ROW | {"id": "2", "true_label": 0}]
    )
    assert ([outcome.status for outcome in outcomes], len(server.calls)) == (["ok"] * 3, 1)


def test_a_parser_that_changed_reads_old_replies_anew_and_asks_nothing(ask, folder, monkeypatch):
    ask(Answer(text=GOOD), rows=many(2))
    ledger = Ledger(folder)
    ledger.settle(
        [first_key(TeacherConfig(base_url="http://teacher.test"), PROMPT, row) for row in many(2)]
    )  # what a run does at its end
    ledger.close()
    monkeypatch.setattr(
        "nli.teacher.requests.parse_reply", lambda *_: Parsed(ParseStatus.BAD_LABEL, None, "a stricter parser")
    )
    outcomes, server = ask(Answer(text=GOOD), rows=many(2))
    assert ([(outcome.status, outcome.problem) for outcome in outcomes], server.calls) == (
        [("bad_label", "a stricter parser")] * 2,
        [],
    )


def test_a_run_that_ended_before_its_repair_asks_for_the_repair_alone(ask):
    with pytest.raises(TeacherError):
        ask(Answer(text="I think so."), Answer(status=401))
    outcomes, server = ask(Answer(text=GOOD))
    assert (outcomes[0].status, outcomes[0].num_replies, len(server.calls)) == ("ok", 2, 1)
    assert server.calls[0]["messages"][2]["content"] == "I think so."


@pytest.mark.parametrize(
    ("broken", "kind", "timeout_seconds"),
    [
        (Answer(hang_up=True), "reset", 30.0),
        (Answer(body="not JSON"), "no_completion", 30.0),
        (Answer(delay_seconds=9), "timeout", 0.5),
    ],
)
def test_a_call_without_answer_is_ambiguous_and_asked_again_or_held_as_the_config_says(
    ask, waits, folder, broken, kind, timeout_seconds
):
    held, server = ask(broken, timeout_seconds=timeout_seconds, ambiguous="hold", max_cost=1.0)
    assert (held[0].status, len(server.calls), server.states, server.totals.ambiguous_sends) == (
        "request_failed",
        1,
        {"ambiguous": 1},
        1,
    )
    assert server.totals.held > 0 and server.totals.cost == server.totals.reserved == 0
    again, server = ask(Answer(text=GOOD), ambiguous="hold", max_cost=1.0)
    assert (again, server.calls) == (held, [])
    reader = LedgerReader(folder)
    assert [row["kind"] for row in reader.list_rows()] == [kind]
    reader.close()
    outcomes, server = ask(Answer(text=GOOD), ambiguous="retry", max_cost=1.0)
    assert (outcomes[0].status, len(server.calls), server.totals.ambiguous_sends) == ("ok", 1, 1)


def test_a_budget_stops_before_the_call_that_could_exceed_it_and_a_larger_one_goes_on(ask):
    settings = {"price_input_per_million": 1000.0, "price_output_per_million": 1000.0, "max_tokens": 100}
    usage = {"prompt_tokens": 900, "completion_tokens": 100}  # a dollar a call; what a call could cost is more
    with pytest.raises(TeacherError, match=r"--max-cost 5 is used up") as caught:
        ask(Answer(text=GOOD, usage=usage), rows=many(9), max_cost=5.0, **settings)
    assert 1 <= len(caught.value.server.calls) < 5
    assert caught.value.server.totals.cost == len(caught.value.server.calls) * 10**9
    outcomes, server = ask(Answer(text=GOOD, usage=usage), rows=many(9), max_cost=50.0, **settings)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 9
    assert (server.totals.cost, server.totals.reserved, server.totals.held) == (9 * 10**9, 0, 0)


def test_a_price_is_needed_for_a_budget_and_for_nothing_else():
    assert TeacherConfig(model="unheard-of").price() is None
    with pytest.raises(ConfigError, match="no price is known for model 'unheard-of'"):
        TeacherConfig(model="unheard-of", max_cost=1.0).price()
    assert TeacherConfig(mode="batch").price().input_per_million == TeacherConfig().price().input_per_million / 2


def test_a_row_says_what_it_was_asked_with():
    assert describe_parameters(TeacherConfig(temperature=0.5, max_tokens=64)) == (
        "temperature=0.5, max_tokens=64, random_seed=1337, sample_index=0, response_format=json_schema"
    )


def test_a_server_of_another_make_gets_its_own_names_and_no_key(ask_one, waits):
    _, server = ask_one(Answer(text=GOOD), api="openai", random_seed=7)
    assert server.calls[0]["seed"] == 7 and "random_seed" not in server.calls[0]
    assert check_teacher(TeacherConfig(api_key_file="none")) == "none"


def test_a_server_that_refuses_every_request_ends_the_run_and_one_that_answers_does_not(ask):
    rows = many(30)
    with pytest.raises(TeacherError, match="the first 20 requests were all refused, the last with: HTTP 422"):
        ask(*[Answer(status=422)] * 30, rows=rows, max_in_flight=1)
    rows = many(31)[1:]
    outcomes, _ = ask(Answer(text=GOOD), *[Answer(status=422)] * 29, rows=rows, max_in_flight=1)
    assert [outcome.status for outcome in outcomes] == ["ok"] + ["request_failed"] * 29


def test_a_server_that_answers_with_web_pages_alone_ends_the_run(ask, waits):
    page = Answer(body="<html>Please log in</html>")
    with pytest.raises(
        TeacherError,
        match="the first 20 requests were all refused, the last with: the body of the reply is not .* Check --base-url",
    ) as caught:
        ask(page, rows=many(8), max_in_flight=4)
    assert len(caught.value.server.calls) < 20 + 4


def test_a_server_that_has_failed_for_minutes_and_never_answered_ends_the_run(ask, waits, monkeypatch):
    monkeypatch.setattr("nli.api.limiter.BREAKER_FAILURES", 2)
    monkeypatch.setattr("nli.teacher.online.FAILING_SECONDS", -1.0)
    with pytest.raises(
        TeacherError, match="every call has failed for 0 minutes, the last with: HTTP 500: down. Check the server"
    ):
        ask(Answer(status=500, body='{"message": "down"}'), rows=many(6), max_in_flight=1)


def test_after_a_reply_that_could_not_be_stored_no_further_call_is_paid_for(folder):
    """A full disk may have room for claims and none for replies."""

    async def use(server):
        ledger = Ledger(folder)
        ledger.begin_run(RUN, None)
        commit = GroupCommit(ledger)

        async def post(owner, operations):
            if any(operation[0] == "done" for operation in operations):
                raise StorageError("ledger: cannot be written (disk full).")
            return await commit.post(owner, operations)

        config = TeacherConfig(base_url=server.base_url, max_in_flight=2)
        teacher = Teacher(
            config, PROMPT, KEY, RUN, LedgerClient(post, "worker"), LimiterClient(None, "worker", config.limits())
        )
        with pytest.raises(StorageError, match="disk full"):
            await teacher.ask_all(many(40))
        await teacher.close()
        ledger.close()
        return len(server.calls)

    assert with_server([Answer(text=GOOD)], use) <= 4


def test_who_waits_for_a_slow_limit_hears_at_once_that_the_run_has_ended(ask):
    started = time.monotonic()
    with pytest.raises(TeacherError, match="HTTP 401"):
        ask(Answer(status=401), rows=many(16), requests_per_minute=1)
    assert time.monotonic() - started < 5


def test_a_run_that_is_halted_from_outside_ends_workers_that_wait_for_the_limiter_within_seconds(folder):
    async def use(server):
        ledger = Ledger(folder)
        ledger.begin_run(RUN, None)
        config = TeacherConfig(base_url=server.base_url, requests_per_minute=1)
        teacher = Teacher(
            config,
            PROMPT,
            KEY,
            RUN,
            LedgerClient(GroupCommit(ledger).post, "worker"),
            LimiterClient(None, "worker", config.limits()),
        )
        asking = asyncio.ensure_future(teacher.ask_all(many(8)))
        async with asyncio.timeout(60):
            while not server.calls:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        ledger.commit([("driver", [("halt", RUN, "stopped from outside")])])
        with pytest.raises(TeacherError, match="^stopped from outside$"):
            await asyncio.wait_for(asking, 10)
        await teacher.close()
        ledger.close()
        return len(server.calls)

    assert with_server([Answer(text=GOOD)], use) == 1
