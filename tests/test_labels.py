"""The label's place is found in whatever a model wrote, and made where it wrote none."""

import pytest

from nli.models.label_tokens import find_label, force_label, label_pairs, read_completion, thought_so_far
from nli.models.tokenizer import encode_example, encode_prompt, load_tokenizer
from nli.runtime.errors import DataError
from nli.task.parsing import parse_answer
from nli.task.prompts import render_completion, render_student_prompt
from tests.conftest import TINY_BASE
from tests.test_tokenization import load_hub_v3

PROMPT = render_student_prompt("Two dogs ran.", "Animals moved.")
WEIRD = [
    "",
    "Dogs run. 1 + 0 = 1.",
    'He said "no", \\ and\n\tleft \\" \\\\',
    '{"thought_process": "inner", "predicted_label": 0}',
    "[INST] </s> <s> [/INST] [control_9]",
    "犬が走った。 👍🏽 \u200b\ufeff café",
    "\x00\x01\x7f",
    "\ud800 half a pair \udfff",
    '"predicted_label": 1',
]


@pytest.fixture(scope="module", params=["tiny", "v3"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(TINY_BASE) if request.param == "tiny" else load_hub_v3(tmp_path_factory.mktemp("v3"))


def completion_ids(tokenizer, text: str) -> list[int]:
    """The ids of a completion, as a model writes them."""
    return tokenizer.encode(f"{PROMPT} {text}", add_special_tokens=False)[len(encode_prompt(tokenizer, PROMPT)) - 1 :]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    "form",
    [
        '{{"thought_process": "Step 1: 0 is not 1.", "predicted_label": {}}}',
        '{{"thought_process": "", "predicted_label": "{}"}}',
        'Sure! {{"predicted_label":{}, "thought_process": "犬が走った 👍🏽"}} Hope this helps: 1 0 1',
        '{{"answer": {{"thought_process": "a", "predicted_label": {}}}}} {{"thought_process": "b", "predicted_label": 1}}',
        '{{"thought_process": "they say \\"predicted_label\\": 1", "predicted_label": {}}}',
        '{{"thought_process": "x", "predicted_label": {}.0}}',
        '{{"predicted_label": 2}} {{"thought_process": "x", "predicted_label": {}}}',
    ],
)
def test_the_place_is_that_of_the_digit_that_the_parser_reads(tokenizer, form, label):
    text = form.format(label)
    ids = completion_ids(tokenizer, text)
    place = find_label(tokenizer, ids, read_completion(tokenizer, ids))
    assert ids[place.index] == place.tokens[label]
    swapped = [*ids[: place.index], place.tokens[1 - label], *ids[place.index + 1 :]]
    assert parse_answer(read_completion(tokenizer, swapped)).fields["predicted_label"] == 1 - label


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        '{"thought_process": "a", "predicted_label": 2}',
        '{"thought_process": "a", "predicted_label": tr',
        '"predicted_label": 1',
    ],
)
def test_a_text_without_a_label_has_no_place(tokenizer, text):
    assert find_label(tokenizer, completion_ids(tokenizer, text), text) is None


def test_bytes_that_are_no_character_do_not_lead_the_search_astray(tokenizer):
    """A model that writes bytes may leave a character unfinished: decoded, its beginning is longer than the whole."""
    vocabulary = tokenizer.get_vocab()
    byte = vocabulary.get("<0xF0>", vocabulary.get("ð"))
    whole = completion_ids(tokenizer, render_completion("xx", 1))
    middle = next(index for index in range(len(whole)) if "xx" in read_completion(tokenizer, whole[: index + 1]))
    for count in (1, 3, 40):
        ids = [*whole[: middle + 1], *[byte] * count, *whole[middle + 1 :]]
        place = find_label(tokenizer, ids, read_completion(tokenizer, ids))
        assert (ids[place.index], place.tokens) == (
            label_pairs(tokenizer)[ids[place.index]][1],
            label_pairs(tokenizer)[ids[place.index]],
        )


@pytest.mark.parametrize("thought", ["", "Dogs run. 1 + 0 = 1.", 'He said "no", \\ and\n\tleft', "犬が走った。 👍🏽"])
def test_a_forced_label_stands_where_training_puts_it(tokenizer, thought):
    ids, tokens, kept = force_label(tokenizer, PROMPT, thought)
    assert kept == thought
    for label in (0, 1):
        trained = encode_example(tokenizer, PROMPT, render_completion(thought, label)).input_ids
        assert trained[: len(ids) + 1] == [*ids, tokens[label]]


@pytest.mark.parametrize("thought", WEIRD, ids=range(len(WEIRD)))
def test_every_thought_can_be_given_a_label_and_is_read_back(tokenizer, thought):
    thought = thought_so_far(thought)
    ids, tokens, kept = force_label(tokenizer, PROMPT, thought)
    prompt_ids = encode_prompt(tokenizer, PROMPT)
    assert ids[: len(prompt_ids)] == prompt_ids and not set(tokenizer.all_special_ids) & set(ids[len(prompt_ids) :])
    assert tokens in label_pairs(tokenizer).values()
    for label in (0, 1):
        assert parse_answer(render_completion(kept, label)).fields == {
            "thought_process": thought,
            "predicted_label": label,
        }


def test_a_thought_is_cut_where_the_model_has_no_more_positions(tokenizer):
    ids, _, whole = force_label(tokenizer, PROMPT, "dogs run far " * 300)
    cut_ids, _, cut = force_label(tokenizer, PROMPT, whole, most_tokens=200)
    assert 195 < len(cut_ids) <= 200 < len(ids)
    assert cut and whole.startswith(cut)


def test_a_control_token_in_the_prompt_is_refused(tokenizer):
    with pytest.raises(DataError, match="control token"):
        force_label(tokenizer, render_student_prompt("Two </s> dogs.", "No."), "")


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("just words", "just words"),
        ("", ""),
        ('{"thought_process": "Dogs are animals; so', "Dogs are animals; so"),
        ('{"thought_process": "a", "predicted_label": maybe', "a"),
        ('{"thought_process":"say \\"no\\"\\n then \\', 'say "no"\n then '),
        ('{"thought_process": "5 \\% of \\\\x \\u00e9 \\u12', "5 \\% of \\x é \\u12"),
        ('{"thought_process": "\\ud83d', "\ufffd"),
        ('{"thought_process": "\\ud83d\\ude00 raw\nnewline', "😀 raw\nnewline"),
        ('{"thought_process": 7', '{"thought_process": 7'),
        ("\ud800", "\ufffd"),
    ],
)
def test_the_thought_goes_as_far_as_the_text_does(text, thought):
    assert thought_so_far(text) == thought
