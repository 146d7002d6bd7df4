"""The benchmark's teacher: what it bills, and that it misbehaves as scripted. Every other promise about paid calls rests on its count."""

import asyncio
import json
import time
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

import aiohttp
import pytest

from benchmarks.bill import Bill, find_fullest_window
from benchmarks.faults import CONTENT_KINDS, FaultScript, FaultScriptError, read_script
from benchmarks.replies import key_of, load_exact_counters, write_content
from benchmarks.teacher_server import Settings, TeacherServer, start_teacher_server
from nli.task.parsing import ParseStatus, parse_reply
from nli.task.prompts import TEACHER_PROMPTS, ReflectionReply, ScoringReply, ThoughtReply

MODEL = "ministral-8b-2512"


def _body(number=0, prompt_name="initial_generation", schema=True, **values):
    prompt = TEACHER_PROMPTS[prompt_name]
    row = {
        "premise": f"Two dogs ran {number} times.",
        "hypothesis": "Animals moved.",
        "thought_process": "So.",
        "predicted_label": 1,
        "true_label": 0,
    }
    body = {"model": MODEL, "messages": prompt.render_messages(row), "max_tokens": 1024}
    if schema:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "Reply", "schema": prompt.reply_schema, "strict": True},
        }
    return body | values


async def _post(session, url, body, headers=None):
    """Status, headers and body of one call, or the name of the exception."""
    try:
        async with session.post(f"{url}/v1/chat/completions", data=json.dumps(body), headers=headers) as response:
            return response.status, response.headers, await response.read()
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        return type(error).__name__, {}, b""


def _ask(server, bodies, timeout_seconds=10.0, headers=None):
    """The answers to requests that are sent one after another, each on a connection of its own."""

    async def run():
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers={"Authorization": "Bearer any"} | (headers or {})
        ) as session:
            return [await _post(session, server.base_url, body) for body in bodies]

    return asyncio.run(run())


def _content(data):
    return json.loads(data)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def calm():
    with start_teacher_server() as server:
        yield server


@pytest.fixture
def server(calm):
    calm.change(faults={}, refuse_after=None, max_requests_per_minute=0, key="", latency_seconds=0.0)
    calm.reset_bill()
    return calm


def test_it_bills_each_call_once_and_counts_what_was_asked_twice(server):
    answers = _ask(server, [_body(0), _body(1), _body(0)])
    assert [status for status, _, _ in answers] == [200, 200, 200]
    usages = [json.loads(data)["usage"] for _, _, data in answers]
    bill = server.bill(calls=True)
    assert (bill["requests"], bill["billed"], bill["distinct"], bill["repeated"], bill["in_flight"]) == (3, 3, 2, 1, 0)
    assert (
        bill["total_tokens"] == sum(usage["total_tokens"] for usage in usages) == bill["windows"]["tokens_by_arrival"]
    )
    assert bill["calls"] == {key_of(_body(0)): 2, key_of(_body(1)): 1}
    assert bill["nanodollars"] == bill["total_tokens"] * 150  # $0.15 a million either way


def test_a_reset_forgets_the_bill_and_the_attempts(server):
    _ask(server, [_body()])
    server.reset_bill()
    assert (server.bill()["requests"], server.bill()["billed"], server.bill()["total_tokens"]) == (0, 0, 0)


def test_a_call_that_is_under_way_at_a_reset_stays_on_the_bill_that_was_forgotten():
    server = TeacherServer(Settings(read_script({}, 0)))
    number = server.bill.arrive()

    async def reset_in_the_middle(request, bill, number):
        server.bill = Bill()
        server.charge(bill, number, "key", {"model": "ministral-8b-2512", "messages": []}, "text")

    server._complete_chat = reset_in_the_middle
    asyncio.run(server.handle(SimpleNamespace(path="/v1/chat/completions", method="POST")))
    assert number == 0 and (server.bill.summarise()["requests"], server.bill.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("initial_generation", ThoughtReply),
        ("regeneration", ThoughtReply),
        ("scoring", ScoringReply),
        ("reflection", ReflectionReply),
    ],
)
@pytest.mark.parametrize("schema", [True, False])
def test_every_prompt_is_answered_in_its_own_shape(name, reply, schema):
    for number in range(20):
        parsed = parse_reply(write_content(_body(number, name, schema)), reply)
        assert parsed.status == ParseStatus.OK
        text = parsed.fields.get("thought_process") or parsed.fields["improved_thought_process"]
        assert 35 <= len(text.split()) <= 95


def test_an_answer_depends_on_the_request_alone():
    assert write_content(_body(1)) == write_content(_body(1, temperature=0.5)) != write_content(_body(2))
    labels = [json.loads(write_content(_body(number)))["predicted_label"] for number in range(200)]
    assert 60 < sum(labels) < 140
    told = [json.loads(write_content(_body(number, "reflection")))["predicted_label"] for number in range(200)]
    assert 5 < sum(told) < 45  # the true label is 0, and a tenth disagrees


def test_a_requests_key_ignores_spelling_and_the_clients_defaults():
    body = _body()
    assert (
        key_of(dict(reversed(body.items())) | {"stream": False, "safe_prompt": False})
        == key_of(body)
        != key_of(body | {"max_tokens": 5})
    )


def test_the_official_client_talks_to_it(server):
    from mistralai.client import Mistral

    with Mistral(api_key="any", server_url=server.base_url) as client:
        reply = client.chat.complete(model=MODEL, messages=[{"role": "user", "content": "Premise: a\nHypothesis: b"}])
    assert json.loads(reply.choices[0].message.content).keys() == {"thought_process", "predicted_label"}
    assert server.bill()["total_tokens"] == reply.usage.total_tokens


def test_exact_counts_are_mistral_commons_own():
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    count, _ = load_exact_counters()
    old = _body(model="open-mistral-7b")
    assert count(old) == len(
        MistralTokenizer.v3().encode_chat_completion(ChatCompletionRequest(messages=old["messages"])).tokens
    )
    nemo = len(
        MistralTokenizer.v3(is_tekken=True)
        .encode_chat_completion(ChatCompletionRequest(messages=_body()["messages"]))
        .tokens
    )
    assert 0 < abs(count(_body()) - nemo) <= 4  # the same vocabulary in another framing


@pytest.mark.parametrize(
    ("kind", "outcome", "billed"),
    [
        ("429", 429, 0),
        ("429_date", 429, 0),
        ("429_bare", 429, 0),
        ("500", 500, 0),
        ("502", 502, 0),
        ("503", 503, 0),
        ("529", 529, 0),
        ("reset_before", ("ServerDisconnectedError", "ClientOSError", "ConnectionResetError"), 0),
        ("reset_after", ("ServerDisconnectedError", "ClientOSError", "ConnectionResetError"), 1),
        ("truncated", ("ClientPayloadError",), 1),
        ("late", ("TimeoutError", "ServerTimeoutError"), 1),
        ("drip", ("TimeoutError", "ServerTimeoutError"), 1),
        ("not_json", 200, 1),
    ],
)
def test_a_fault_comes_twice_and_is_billed_or_not_and_then_the_request_succeeds(server, kind, outcome, billed):
    server.change(faults={"rate": 1.0, "kinds": [kind], "attempts": 2, "late_seconds": 3.0, "drip_seconds": 3.0})
    started = time.time()
    first, second = _ask(server, [_body()] * 2, timeout_seconds=1.0 if kind in ("late", "drip") else 10.0)
    ended = time.time()
    [third] = _ask(server, [_body()])
    for status, headers, data in (first, second):
        assert status in outcome if isinstance(outcome, tuple) else status == outcome
        if kind.startswith("429"):
            asked = headers.get("Retry-After")
            if kind == "429_date":
                assert started + 0.9 < parsedate_to_datetime(asked).timestamp() < ended + 2.1
            else:
                assert asked == {"429": "1", "429_bare": None}[kind]
        if kind == "not_json":
            assert data.startswith(b"<html>")
    assert third[0] == 200
    assert json.loads(_content(third[2]))["predicted_label"] in (0, 1)
    bill = server.bill()
    assert (bill["requests"], bill["billed"], bill["distinct"], bill["faults"]) == (3, 2 * billed + 1, 1, {kind: 2})


def test_a_patient_client_gets_the_late_and_the_dripped_answer(server):
    server.change(
        faults={"rate": 1.0, "kinds": ["late", "drip"], "attempts": 1, "late_seconds": 0.2, "drip_seconds": 0.2}
    )
    answers = _ask(server, [_body(number) for number in range(6)])
    assert [json.loads(_content(data)) for _, _, data in answers] == [
        json.loads(write_content(_body(number))) for number in range(6)
    ]
    assert set(server.bill()["faults"]) == {"late", "drip"}


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        ("invalid_json", {ParseStatus.BAD_JSON, ParseStatus.NO_JSON}),
        ("wrong_schema", {ParseStatus.MISSING_FIELD}),
        ("length", {ParseStatus.TRUNCATED}),
    ],
)
def test_a_content_fault_belongs_to_its_request_for_ever(server, kind, statuses):
    server.change(faults={"content_rate": 1.0, "content_kinds": [kind]})
    answers = _ask(server, [_body()] * 3)
    assert len({data for _, _, data in answers}) == 1
    choice = json.loads(answers[0][2])["choices"][0]
    assert choice["finish_reason"] == ("length" if kind == "length" else "stop")
    assert parse_reply(choice["message"]["content"], ThoughtReply, choice["finish_reason"]).status in statuses
    assert server.bill()["billed"] == 3


def test_a_script_is_decided_by_seed_key_and_attempt_alone():
    script = read_script({"rate": 0.3, "attempts": 2, "content_rate": 0.1}, seed=5)
    chosen = [
        (script.choose(str(key), attempt), script.choose_content(str(key)))
        for key in range(1000)
        for attempt in (1, 2, 3)
    ]
    assert chosen == [
        (script.choose(str(key), attempt), script.choose_content(str(key)))
        for key in range(1000)
        for attempt in (1, 2, 3)
    ]
    faults = [fault for fault, _ in chosen if fault]
    assert 500 < len(faults) < 700
    assert set(faults) == set(FaultScript().kinds)
    assert {content for _, content in chosen} == {None, *CONTENT_KINDS}
    assert not any(script.choose(str(key), 3) for key in range(1000))
    assert chosen != [
        (other.choose(str(key), attempt), None)
        for other in [read_script({"rate": 0.3}, seed=6)]
        for key in range(1000)
        for attempt in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('{"rates": 0.1}', "there is no 'rates'"),
        ('{"kinds": ["teapot"]}', "there is no 'teapot'"),
        ('{"rate": 2}', "a share"),
        ("{", "not a JSON object"),
    ],
)
def test_a_wrong_script_is_refused(spec, message):
    with pytest.raises(FaultScriptError, match=message):
        read_script(spec)


def test_the_key_is_refused_from_the_nth_call_on_until_that_is_lifted(server):
    server.change(refuse_after=2)
    assert [status for status, _, _ in _ask(server, [_body(number) for number in range(4)])] == [200, 200, 401, 401]
    server.change(refuse_after=None)
    assert [status for status, _, _ in _ask(server, [_body(9)])] == [200]
    assert (server.bill()["billed"], server.bill()["refused"]) == (3, {"401": 2})


def test_only_the_set_key_is_accepted(server):
    server.change(key="right")
    assert _ask(server, [_body()])[0][0] == 401
    assert _ask(server, [_body()], headers={"Authorization": "Bearer right"})[0][0] == 200


def test_the_servers_own_limit_says_when_to_come_again(server):
    server.change(max_requests_per_minute=3)
    started = time.monotonic()
    answers = _ask(server, [_body(number) for number in range(5)])
    seconds = time.monotonic() - started
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    assert 60 - seconds <= int(answers[-1][1]["Retry-After"]) <= 60
    assert server.bill()["billed"] == 3


@pytest.mark.parametrize(
    "body",
    [{"model": MODEL}, {"messages": [{"role": "user", "content": "x"}]}, {"model": MODEL, "messages": []}, [], "x"],
)
def test_a_body_that_is_no_request_is_refused_and_not_billed(server, body):
    assert _ask(server, [body])[0][0] == 422
    assert server.bill()["billed"] == 0


def test_calls_under_way_are_seen_side_by_side(server):
    server.change(latency_seconds=1.5)  # longer than it takes to send them all

    async def run():
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer any"}) as session:
            await asyncio.gather(*(_post(session, server.base_url, _body(number)) for number in range(20)))

    asyncio.run(run())
    bill = server.bill()
    assert (bill["billed"], bill["most_in_flight"], bill["in_flight"]) == (20, 20, 0)


def test_the_fullest_window_slides_and_is_half_open():
    assert find_fullest_window([(0.0, 1), (59.9, 1), (60.0, 1), (60.1, 1), (200.0, 1)], 60) == 3
    assert find_fullest_window([(0.0, 5), (60.0, 7)], 60) == 7
    assert find_fullest_window([(3.0, 2), (1.0, 4), (2.0, 1)], 1.5) == 5
    assert find_fullest_window([], 60) == 0
