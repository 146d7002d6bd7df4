"""The sample teacher: its wire format, and how often it is right."""

import json
import re
import socket
import urllib.error
import urllib.request
from collections import Counter

import pytest

from nli.sample.server import complete, start_server
from nli.sample.teacher_mind import answer_messages, count_tokens
from nli.sample.world import build_splits
from nli.task.prompts import TEACHER_PROMPTS, ReflectionReply, ScoringReply, ThoughtReply

JSON_MODE = {"type": "json_object"}
MODEL = "mistral-large-latest"


@pytest.fixture(scope="module")
def base_url():
    with start_server(latency_seconds=0) as url:
        yield url


def _messages(premise, hypothesis, prompt_name="initial_generation", **fields):
    return TEACHER_PROMPTS[prompt_name].render_messages({"premise": premise, "hypothesis": hypothesis, **fields})


def _post(url, body, key="any-key"):
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key is not None else {})}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _answer(pair, prompt_name="initial_generation", **fields):
    """The teacher's reply to a pair of the world, or None where it cannot be read."""
    text, _ = answer_messages(MODEL, _messages(pair.premise, pair.hypothesis, prompt_name, **fields), JSON_MODE)
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    return reply if "predicted_label" in reply else None


@pytest.fixture(scope="module")
def train_answers():
    return [(pair, _answer(pair)) for pair in build_splits()["train"]]


def test_a_reply_has_every_field_of_the_real_api(base_url):
    body = {
        "model": MODEL,
        "messages": _messages("A wasp slept in the garden.", "A wasp slept."),
        "response_format": JSON_MODE,
    }
    status, reply = _post(f"{base_url}/v1/chat/completions", body)
    assert status == 200
    assert (reply["object"], reply["model"]) == ("chat.completion", MODEL)
    choice = reply["choices"][0]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert (choice["message"]["tool_calls"], choice["message"]["prefix"]) == (None, False)
    assert ThoughtReply.model_validate_json(choice["message"]["content"]).predicted_label in (0, 1)
    usage = reply["usage"]
    assert usage["completion_tokens"] == count_tokens(choice["message"]["content"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_official_client_talks_to_it(base_url):
    from mistralai.client import Mistral

    client = Mistral(api_key="any-key", server_url=base_url)
    reply = client.chat.complete(
        model=MODEL, messages=_messages("Two herons slept.", "Two birds slept."), response_format=JSON_MODE
    )
    assert "predicted_label" in json.loads(reply.choices[0].message.content)
    assert MODEL in [model.id for model in client.models.list().data]


def test_the_official_client_raises_its_own_errors(base_url, monkeypatch):
    from mistralai.client import Mistral
    from mistralai.client.errors import HTTPValidationError, SDKError

    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    with pytest.raises(SDKError) as refused:
        Mistral(server_url=base_url).chat.complete(model=MODEL, messages=_messages("A.", "B."))
    assert refused.value.status_code == 401
    with pytest.raises(HTTPValidationError):
        Mistral(api_key="any-key", server_url=base_url).chat.complete(model="", messages=_messages("A.", "B."))


@pytest.mark.parametrize("key", [None, "", " "])
def test_a_request_without_a_key_gets_401(base_url, key):
    assert _post(f"{base_url}/v1/chat/completions", {"model": MODEL, "messages": _messages("A.", "B.")}, key) == (
        401,
        {"detail": "Unauthorized"},
    )


@pytest.mark.parametrize(
    ("body", "missing"), [({"messages": [{"role": "user", "content": "x"}]}, "model"), ({"model": MODEL}, "messages")]
)
def test_a_body_without_model_or_messages_gets_422_and_the_fields_name(base_url, body, missing):
    status, reply = _post(f"{base_url}/v1/chat/completions", body)
    assert status == 422
    assert [problem["loc"] for problem in reply["detail"]] == [["body", missing]]


@pytest.mark.parametrize(
    "body", [[], "text", {"model": MODEL, "messages": "text"}, {"model": MODEL, "messages": ["text"]}]
)
def test_a_body_of_another_shape_gets_422(base_url, body):
    assert _post(f"{base_url}/v1/chat/completions", body)[0] == 422


def test_any_other_path_gets_404(base_url):
    assert _post(f"{base_url}/v1/completions", {})[0] == 404


def test_only_the_loopback_address_listens(base_url):
    host, port = base_url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=2)


def test_the_teacher_is_right_about_three_times_in_four(train_answers):
    assert (
        0.74
        <= sum(reply is not None and reply["predicted_label"] == pair.label for pair, reply in train_answers) / 2000
        <= 0.78
    )


def test_its_precision_for_entailment_is_high_and_its_recall_low(train_answers):
    counts = Counter((pair.label, reply["predicted_label"]) for pair, reply in train_answers if reply)
    assert 0.87 <= counts[1, 1] / (counts[1, 1] + counts[0, 1]) <= 0.93
    assert 0.57 <= counts[1, 1] / (counts[1, 1] + counts[1, 0]) <= 0.63


def test_about_one_answer_in_a_hundred_cannot_be_read(train_answers):
    assert 0.005 <= sum(reply is None for _, reply in train_answers) / 2000 <= 0.02


def test_its_errors_are_habits_tied_to_a_kind_of_step(train_answers):
    """Where every step is of a kind that it always denies, noise alone, under 3 %, makes it right."""
    always = (["verb"], ["place"], ["all_some"])
    denied = [
        reply["predicted_label"]
        for pair, reply in train_answers
        if reply and [step.kind for step in pair.steps] in always
    ]
    assert len(denied) > 100
    assert sum(denied) / len(denied) < 0.03


def test_a_wrong_thought_ends_at_its_wrong_label(train_answers):
    for _, reply in train_answers:
        if reply:
            assert reply["thought_process"].endswith("Every part holds, so it must be true.") == (
                reply["predicted_label"] == 1
            )
            assert (" No." in reply["thought_process"]) == (reply["predicted_label"] == 0)


def test_reflections_reach_the_true_label_with_the_sound_thought(train_answers):
    wrong = [(pair, reply) for pair, reply in train_answers if reply and reply["predicted_label"] != pair.label]
    reflections = [
        (
            pair,
            _answer(
                pair,
                "reflection",
                thought_process=reply["thought_process"],
                predicted_label=reply["predicted_label"],
                true_label=pair.label,
            ),
        )
        for pair, reply in wrong
    ]
    good = [(pair, reply) for pair, reply in reflections if reply and reply["predicted_label"] == pair.label]
    assert 0.96 <= len(good) / len(wrong) < 1
    assert all(reply["improved_thought_process"] == pair.thought for pair, reply in good)
    assert all(reply["error_analysis"] for _, reply in good)


def test_a_reflection_names_the_step_that_fails():
    pair = next(
        pair for pair in build_splits()["train"] if [step.kind for step in pair.steps] == ["place"] and pair.label == 1
    )
    wrong = pair.thought.replace("Yes. Every part holds, so it must", "No. A part fails, so it need not")
    reply = _answer(pair, "reflection", thought_process=wrong, predicted_label=0, true_label=1)
    assert reply["error_analysis"] == f"The step '{pair.steps[0].ask}' fails. It should be: {pair.steps[0].ask} Yes."


def test_regeneration_reaches_the_label_that_it_is_given():
    pair = build_splits()["train"][0]
    assert _answer(pair, "regeneration", true_label=pair.label)["thought_process"] == pair.thought
    assert _answer(pair, "regeneration", true_label=1 - pair.label)["predicted_label"] == 1 - pair.label


def test_scoring_tells_a_sound_thought_from_a_wrong_one():
    pair = build_splits()["train"][1]
    assert _answer(pair, "scoring", thought_process=pair.thought, predicted_label=pair.label)["score"] == 5
    assert _answer(pair, "scoring", thought_process=pair.thought + " Indeed.", predicted_label=pair.label)["score"] == 4
    low = _answer(pair, "scoring", thought_process="I think so.", predicted_label=1 - pair.label)
    assert low["score"] <= 2
    assert low["improved_thought_process"] == pair.thought


def test_the_same_request_gets_the_same_reply_and_another_model_may_differ():
    body = {
        "model": MODEL,
        "messages": _messages("Two herons slept.", "Two birds slept."),
        "response_format": JSON_MODE,
    }
    first, second = complete(body), complete(body)
    assert {**first, "created": 0} == {**second, "created": 0}
    assert complete({**body, "model": "another"})["id"] != first["id"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("initial_generation", ThoughtReply), ("scoring", ScoringReply), ("reflection", ReflectionReply)],
)
def test_a_json_schema_reply_obeys_the_schema(name, shape):
    fields = {"thought_process": "Because it is so.", "predicted_label": 0, "true_label": 1}
    schema = {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": TEACHER_PROMPTS[name].reply_schema, "strict": True},
    }
    text, is_cut = answer_messages(MODEL, _messages("Two herons slept.", "Two birds slept.", name, **fields), schema)
    assert not is_cut
    assert shape.model_validate_json(text)


def test_a_schema_of_ones_own_is_filled_field_by_field():
    schema = {"type": "object", "properties": {"predicted_label": {"type": "integer"}, "remark": {"type": "string"}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "own", "schema": schema}}
    text, _ = answer_messages(MODEL, _messages("Two herons slept.", "Two birds slept."), response_format)
    assert list(json.loads(text)) == ["predicted_label", "remark"]


def test_a_pair_from_elsewhere_is_judged_by_its_words_and_the_thought_says_so():
    text, _ = answer_messages(
        MODEL, _messages("Le chat\nHypothesis: dort.\n", "Quantum tunnelling, precisely."), JSON_MODE
    )
    assert json.loads(text) == {
        "thought_process": "Compared by words alone, the hypothesis adds dort, Hypothesis, Quantum, tunnelling, so it need not be true.",
        "predicted_label": 0,
    }


def test_max_tokens_cuts_a_reply_and_says_so():
    reply = complete({"model": MODEL, "messages": _messages("Two herons slept.", "Two birds slept."), "max_tokens": 5})
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 5


def test_the_command_line_names_its_port_in_a_file(tmp_path):
    import subprocess
    import sys
    import time

    port_file = tmp_path / "port"
    process = subprocess.Popen(
        [sys.executable, "-m", "nli.sample.server", "--port-file", str(port_file)], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        assert re.search(re.escape(url), process.stdout.readline())
        assert _post(f"{url}/v1/chat/completions", {"model": MODEL, "messages": _messages("A.", "B.")})[0] == 200
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
