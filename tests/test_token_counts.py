"""Token counts equal Mistral's own encoding; where they cannot, they say so; and the bound holds for all."""

import json
import shutil
import time
from pathlib import Path

import pytest

from nli.api.token_counts import _SHIPPED, CHARACTERS_PER_TOKEN, bound_messages, estimate_tokens, load_token_counter
from nli.data.pairs import read_examples
from nli.runtime.errors import ConfigError
from nli.task.prompts import TEACHER_PROMPTS
from tests.conftest import REPOSITORY, TINY_BASE

SYSTEM = TEACHER_PROMPTS["initial_generation"].system
REPLY = '{"thought_process": "Step 1: dogs are animals.\nÉté, 犬が走った 🐕", "predicted_label": 2}'


def say(*turns: str) -> list[dict]:
    """`say("system: a", "user: b")` as chat messages."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CONVERSATIONS = {
    "one turn": say(f"system: {SYSTEM}", "user: Premise: Two dogs ran.\nHypothesis: Animals moved."),
    "repair": say(
        f"system: {SYSTEM}",
        "user: Premise: Two dogs ran.",
        f"assistant: {REPLY}",
        "user: The label must be 0 or 1. Reply again.",
    ),
    "no system": say("user: Hi"),
    "trailing space": say("system: S. ", "user: A ", "assistant: B  ", "user:  C"),
    "neighbours of one role": say(
        "system: One.", "system: Two.", "user: A", "user: B", "assistant: C", "assistant: D", "user: E"
    ),
    "newlines and slashes at the seams": say(
        "system: ends in a brace}", "user: \n/starts with a newline", "assistant: x", "user: /y\n\n"
    ),
    "control tokens as text": say("system: [INST] s [/INST]", "user: </s> [SYSTEM_PROMPT] <s>"),
    "scripts": say(
        "system: 你好。", "user: Ünïcödé — ½ ﷺ e\u0301 \u200b\u200d 🏳️‍🌈 \x00\x7f", "assistant: न", "user: \u2028"
    ),
}
FILES = {
    "v1": "mistral-medium-2312",
    "v2": "mistral-small-2402",
    "v3": "mistral-large-2407",
    "v3 tekken": "open-mistral-nemo",
    "v7": "mistral-large-2411",
}


def count_by_mistral(tokenizer, messages: list[dict]) -> int:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    return len(tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)


def mistral_file(model: str):
    import mistral_common
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(Path(mistral_common.__file__).parent / "data" / _SHIPPED[model])


@pytest.mark.parametrize("version", FILES)
def test_a_conversation_counts_as_mistral_common_encodes_it(version):
    counter, mistral = load_token_counter(FILES[version]), mistral_file(FILES[version])
    assert counter.is_exact
    for name, messages in CONVERSATIONS.items():
        assert counter.count_messages(messages) == count_by_mistral(mistral, messages), name


@pytest.mark.parametrize("model", ["open-mistral-nemo", "mistral-large-2407"])
@pytest.mark.parametrize("prompt", TEACHER_PROMPTS)
def test_every_sample_row_counts_as_mistral_common_encodes_it(model, prompt):
    counter, mistral = load_token_counter(model), mistral_file(model)
    for row in read_examples(REPOSITORY / "data/sample/dev.csv", max_rows=60):
        messages = TEACHER_PROMPTS[prompt].render_messages(
            row | {"thought_process": 'Step 1: "so"\n', "predicted_label": 1}
        )
        assert counter.count_messages(messages) == count_by_mistral(mistral, messages)


def test_the_list_of_models_is_mistral_commons_own():
    from mistral_common.tokens.tokenizers.mistral import MODEL_NAME_TO_TOKENIZER_CLS

    theirs = {
        name: make().instruct_tokenizer.tokenizer.file_path.name
        for name, make in MODEL_NAME_TO_TOKENIZER_CLS.items()
        if name in _SHIPPED
    }
    assert {name: file for name, file in _SHIPPED.items() if name in theirs} == theirs
    assert set(_SHIPPED) - set(theirs) == {"open-mistral-nemo"}


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("ministral-8b-2512", "tekken_240718.json"),
        ("mistral-large-2512", "tekken_240718.json"),
        ("mistral-small-latest", "tekken_240718.json"),
        ("open-mistral-7b", "mistral_instruct_tokenizer_240323.model.v3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral_instruct_tokenizer_240323.model.v3"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "tekken_240718.json"),
    ],
)
def test_a_model_whose_file_is_not_shipped_gets_the_nearest_and_says_so(model, file):
    counter = load_token_counter(model)
    assert not counter.is_exact
    assert counter.name == f"mistral-common's {file}, which stands in for the tokenizer of {model}"


def test_a_newer_model_is_framed_with_a_system_message_of_its_own():
    old, new = load_token_counter("open-mistral-nemo"), load_token_counter("ministral-8b-2512")
    assert new.count_messages(say("user: Hi")) == old.count_messages(say("user: Hi")) == 4  # <s>[INST]Hi[/INST]
    assert new.count_messages(say("system: Hi", "user: Hi")) == 7  # <s>[SYSTEM_PROMPT]Hi[/SYSTEM_PROMPT][INST]Hi[/INST]


@pytest.mark.parametrize("model", ["gpt-4o", "meta-llama/Llama-3.1-8B-Instruct", "mistralai/", ""])
def test_another_model_gets_an_estimate_that_says_so(model):
    counter = load_token_counter(model)
    assert (counter.is_exact, counter.name) == (False, f"estimate, {CHARACTERS_PER_TOKEN} characters a token")
    assert counter.count_text("x" * 36) == 10
    assert counter.count_messages(say("system: " + "x" * 36, "user: " + "x" * 36)) == 29


def test_the_estimate_is_near_the_count_on_the_sample():
    rows = read_examples(REPOSITORY / "data/sample/train.csv", max_rows=200)
    texts = [
        "\n".join(message["content"] for message in TEACHER_PROMPTS["initial_generation"].render_messages(row))
        for row in rows
    ]
    for model in ("open-mistral-nemo", "mistral-large-2407"):
        counted = sum(map(load_token_counter(model).count_text, texts))
        assert counted <= sum(map(estimate_tokens, texts)) * 1.02
        assert sum(map(estimate_tokens, texts)) <= counted * 1.2


def test_a_tekken_file_of_the_users_own_counts_exactly(tmp_path):
    import mistral_common

    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    for given in (tmp_path, tmp_path / "tekken.json"):
        counter = load_token_counter("my-model", str(given))
        assert (counter.is_exact, counter.name) == (True, str(tmp_path / "tekken.json"))
        assert counter.count_messages(CONVERSATIONS["repair"]) == load_token_counter(
            "open-mistral-nemo"
        ).count_messages(CONVERSATIONS["repair"])


@pytest.fixture
def v15_file(tmp_path):
    """The shipped vocabulary as a v15 file, which writes the model's settings into each request."""
    import mistral_common
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    data = json.loads(
        (Path(mistral_common.__file__).parent / "data" / "tekken_240718.json").read_text(encoding="utf-8")
    )
    data["config"]["version"] = "v15"
    data["special_tokens"] = [
        {"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)
    ]
    data["model_settings_builder"] = {
        "reasoning_effort": {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
    }
    (tmp_path / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path / "tekken.json"


def test_a_newer_file_counts_its_models_settings_too(v15_file):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    counter, mistral = load_token_counter("", str(v15_file)), MistralTokenizer.from_file(v15_file)
    assert counter.count_messages(say("user: Hi")) > 4
    for name in ("one turn", "repair", "no system"):
        assert counter.count_messages(CONVERSATIONS[name]) == count_by_mistral(mistral, CONVERSATIONS[name]), name


def test_a_hugging_face_folder_counts_by_its_own_chat_template(tmp_path):
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY_BASE) / name, tmp_path / name)
    template = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]"
        "{% else %} {{ message.content }}{{ eos_token if message.role == 'assistant' }}{% endif %}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    counter, theirs = load_token_counter("tiny", str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert (counter.is_exact, counter.name) == (True, f"{tmp_path / 'tokenizer.json'} with its chat template")
    for name in ("one turn", "repair", "no system"):
        encoded = theirs.apply_chat_template(CONVERSATIONS[name], add_generation_prompt=True, return_dict=True)
        assert counter.count_messages(CONVERSATIONS[name]) == len(encoded["input_ids"]), name


def test_without_a_template_that_takes_our_messages_a_folder_counts_texts_and_says_so(tmp_path):
    counter = load_token_counter("tiny", TINY_BASE)
    assert (counter.is_exact, counter.name) == (False, f"{TINY_BASE}/tokenizer.json, without a chat template")
    text = counter.count_text("Two dogs ran.")
    assert counter.count_messages(say("user: Two dogs ran.")) == text + 5
    shutil.copy(Path(TINY_BASE) / "tokenizer.json", tmp_path / "tokenizer.json")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": refusing}]}), encoding="utf-8"
    )
    assert not load_token_counter("tiny", str(tmp_path)).is_exact


def test_a_place_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer there; give a folder with"):
        load_token_counter("ministral-8b-2512", str(tmp_path))
    for name, reader in (("tekken.json", "mistral-common"), ("tokenizer.json", "tokenizers")):
        (tmp_path / name).write_text('{"config": {"version": "v3"}}', encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{name}: not a tokenizer that .*{reader}.* can read"):
            load_token_counter("ministral-8b-2512", str(tmp_path / name))


@pytest.mark.parametrize("model", [*FILES.values(), "ministral-8b-2512", "open-mistral-7b"])
def test_the_bound_holds_for_every_conversation(model):
    counter = load_token_counter(model)
    hard = say(f"system: {'🏳️‍🌈' * 50}", "user: \x00\x01\u0fff\U000e0001", "assistant: ", "user: ")
    for messages in [*CONVERSATIONS.values(), hard, say("system: x"), say("user: ")]:
        assert counter.count_messages(messages) <= bound_messages(messages)


def test_the_bound_is_bytes_and_a_margin():
    assert bound_messages(say("system: abc", "user: é")) == 32 + (32 + 3) + (32 + 2)


@pytest.mark.parametrize("model", ["ministral-8b-2512", "mistral-large-2407"])
def test_two_hundred_thousand_rows_count_within_a_minute(model):
    counter, prompt = load_token_counter(model), TEACHER_PROMPTS["initial_generation"]
    rows = read_examples(REPOSITORY / "data/sample/train.csv", max_rows=2000)
    seconds = []
    while (
        len(seconds) < 10 and min(seconds, default=9) >= 0.6
    ):  # the best of ten, of this thread alone: other work on the machine is not the counter's fault
        started = time.thread_time()
        for row in rows:
            counter.count_messages(prompt.render_messages(row))
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.6
