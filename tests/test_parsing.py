"""The parser against replies as models write them: the right status, the right label or none, and the text unchanged.

python -m pytest tests/test_parsing.py
"""

import json
import time

import pytest

from nli.task.parsing import ParseStatus, parse_answer, parse_reply
from nli.task.prompts import INSTRUCTION, TEACHER_PROMPTS, ReflectionReply, ScoringReply, render_completion

THOUGHT = "Step 1: dogs are animals. Step 2: who runs moves."
GOOD = '{"thought_process": "Step 1: dogs are animals. Step 2: who runs moves.", "predicted_label": 1}'

READABLE = {
    "the reply that was asked for": (GOOD, THOUGHT, 1),
    "no entailment": ('{"thought_process": "Cats are not named.", "predicted_label": 0}', "Cats are not named.", 0),
    "the label first": ('{"predicted_label": 0, "thought_process": "Cats are not named."}', "Cats are not named.", 0),
    "no spaces": ('{"thought_process":"x","predicted_label":1}', "x", 1),
    "over several lines": ('{\n  "thought_process": "x",\n  "predicted_label": 1\n}\n', "x", 1),
    "prose before": ("Sure! Here is the answer: " + GOOD, THOUGHT, 1),
    "prose after": (GOOD + " I hope that this helps.", THOUGHT, 1),
    "prose that names the other label after": (GOOD + " So it is not no entailment, label 0.", THOUGHT, 1),
    "a code fence": ("```json\n" + GOOD + "\n```", THOUGHT, 1),
    "an unclosed code fence": ("```\n" + GOOD, THOUGHT, 1),
    "[SOL] and [ANS] around": ("[SOL]Dogs move.[/SOL][ANS]" + GOOD + "[/ANS]", THOUGHT, 1),
    "HTML around": ("<p>Answer:</p><pre>" + GOOD + "</pre>", THOUGHT, 1),
    "HTML inside": ('{"thought_process": "<b>Dogs</b> &amp; cats", "predicted_label": 1}', "<b>Dogs</b> &amp; cats", 1),
    "a label in a string": ('{"thought_process": "x", "predicted_label": "0"}', "x", 0),
    "a label in a string with spaces": ('{"thought_process": "x", "predicted_label": " 1 "}', "x", 1),
    "a label in a string with a newline": ('{"thought_process": "x", "predicted_label": "1\\n"}', "x", 1),
    "a label as 1.0": ('{"thought_process": "x", "predicted_label": 1.0}', "x", 1),
    "a label as 1e0": ('{"thought_process": "x", "predicted_label": 1e0}', "x", 1),
    "the same label twice": ('{"thought_process": "x", "predicted_label": 1, "predicted_label": 1}', "x", 1),
    "extra fields": (
        '{"thought_process": "x", "predicted_label": 1, "confidence": 0.9, "notes": [1, {"a": null}]}',
        "x",
        1,
    ),
    "an outer object": ('{"answer": {"thought_process": "x", "predicted_label": 0}}', "x", 0),
    "an object in a list": ('[{"thought_process": "x", "predicted_label": 0}]', "x", 0),
    "an outer object that is never closed": ('{"answer": {"thought_process": "x", "predicted_label": 0}', "x", 0),
    "two equal objects": (GOOD + "\n" + GOOD, THOUGHT, 1),
    "two objects that disagree: the first is the answer": (
        GOOD + ' {"thought_process": "Or not.", "predicted_label": 0}',
        THOUGHT,
        1,
    ),
    "another pair made up after the answer": (
        GOOD + "\n[INST] Premise: A.\nHypothesis: B.[/INST]" + '{"thought_process": "y", "predicted_label": 0}',
        THOUGHT,
        1,
    ),
    "another object before": ('{"premise": "Two dogs ran."} ' + GOOD, THOUGHT, 1),
    "an empty object before": ("{} " + GOOD, THOUGHT, 1),
    "the student prompt's skeleton before": (INSTRUCTION + "\n" + GOOD, THOUGHT, 1),
    "the teacher prompt's skeleton before": (
        '{"thought_process": "<your three steps>", "predicted_label": <0 or 1>}\n' + GOOD,
        THOUGHT,
        1,
    ),
    "braces in prose before": ("Let {A} be the premise and {B: c} the hypothesis. " + GOOD, THOUGHT, 1),
    "braces in the thought": (
        '{"thought_process": "The set {a, {b}} is named.", "predicted_label": 1}',
        "The set {a, {b}} is named.",
        1,
    ),
    "one open brace in the thought": (
        '{"thought_process": "An odd { here.", "predicted_label": 1}',
        "An odd { here.",
        1,
    ),
    "one closing brace in the thought": (
        '{"thought_process": "An odd } here.", "predicted_label": 1}',
        "An odd } here.",
        1,
    ),
    "a quoted premise that is itself an answer": (
        r'{"thought_process": "It says {\"thought_process\": \"y\", \"predicted_label\": 0}.", "predicted_label": 1}',
        'It says {"thought_process": "y", "predicted_label": 0}.',
        1,
    ),
    "raw newlines in a string": (
        '{"thought_process": "Step 1: a.\nStep 2: b.\r\nStep 3: c.", "predicted_label": 1}',
        "Step 1: a.\nStep 2: b.\r\nStep 3: c.",
        1,
    ),
    "escaped newlines": (
        r'{"thought_process": "Step 1: a.\nStep 2: b.", "predicted_label": 1}',
        "Step 1: a.\nStep 2: b.",
        1,
    ),
    "a raw tab and a control character": ('{"thought_process": "a\tb\x01c", "predicted_label": 1}', "a\tb\x01c", 1),
    "escaped quotes": (r'{"thought_process": "He said \"no\".", "predicted_label": 0}', 'He said "no".', 0),
    "a double backslash at the end": (r'{"thought_process": "C:\\", "predicted_label": 0}', "C:\\", 0),
    "unicode as it is": (
        '{"thought_process": "Ein Hund läuft – 犬 🐕.", "predicted_label": 1}',
        "Ein Hund läuft – 犬 🐕.",
        1,
    ),
    "unicode as escapes": (r'{"thought_process": "caf\u00e9 \ud83d\udc15", "predicted_label": 1}', "café 🐕", 1),
    "line separators": ('{"thought_process": "a\u2028b\u2029c\x85d", "predicted_label": 1}', "a\u2028b\u2029c\x85d", 1),
    "mojibake stays": ('{"thought_process": "cafÃ©", "predicted_label": 1}', "cafÃ©", 1),
    "edge spaces stay": ('{"thought_process": "  x  ", "predicted_label": 1}', "  x  ", 1),
    "capitals stay": ('{"thought_process": "LONDON is in England", "predicted_label": 1}', "LONDON is in England", 1),
    "an empty thought": ('{"thought_process": "", "predicted_label": 1}', "", 1),
    "a byte order mark before": ("\ufeff" + GOOD, THOUGHT, 1),
    "a control token after": (GOOD + "</s>", THOUGHT, 1),
    "a huge number in another field": (
        '{"thought_process": "x", "n": ' + "9" * 5000 + ', "predicted_label": 1}',
        "x",
        1,
    ),
    "`step 1:` before": ("step 1: dogs are animals. step 2: they move. " + GOOD, THOUGHT, 1),
}

UNREADABLE = {
    "empty": ("", "no_json"),
    "whitespace": (" \n\t ", "no_json"),
    "`step 1:` alone": ("step 1: dogs are animals. step 2: they move. Label: 1", "no_json"),
    "a verdict in words": ("The premise entails the hypothesis. predicted_label: 1", "no_json"),
    "a label alone": ("1", "no_json"),
    "a list": ('["Step 1: dogs are animals.", 1]', "no_json"),
    "the skeleton alone": (INSTRUCTION, "bad_json"),
    "single quotes": ("{'thought_process': 'x', 'predicted_label': 1}", "bad_json"),
    "a trailing comma": ('{"thought_process": "x", "predicted_label": 1,}', "bad_json"),
    "a missing comma": ('{"thought_process": "x" "predicted_label": 1}', "bad_json"),
    "a missing quote": ('{"thought_process": "x, "predicted_label": 1}', "bad_json"),
    "unescaped quotes": ('{"thought_process": "He said "no".", "predicted_label": 1}', "bad_json"),
    "unquoted keys": ('{thought_process: "x", predicted_label: 1}', "bad_json"),
    "a comment": ('{"thought_process": "x", /* sure */ "predicted_label": 1}', "bad_json"),
    "Python's True": ('{"thought_process": "x", "predicted_label": True}', "bad_json"),
    "a bad escape": (r'{"thought_process": "50\% of it", "predicted_label": 1}', "bad_json"),
    "typographic quotes": ("{“thought_process”: “x”, “predicted_label”: 1}", "bad_json"),
    "a set of braces in prose": ("The set {a, b} holds it. The label is 1.", "bad_json"),
    "half of a surrogate pair": (r'{"thought_process": "\ud83d", "predicted_label": 1}', "bad_json"),
    "the other half": (r'{"thought_process": "\udc15 runs", "predicted_label": 1}', "bad_json"),
    "the label 2": ('{"thought_process": "x", "predicted_label": 2}', "bad_label"),
    "the label -1": ('{"thought_process": "x", "predicted_label": -1}', "bad_label"),
    "the label 0.5": ('{"thought_process": "x", "predicted_label": 0.5}', "bad_label"),
    "the label 0.999999": ('{"thought_process": "x", "predicted_label": 0.999999}', "bad_label"),
    "the label null": ('{"thought_process": "x", "predicted_label": null}', "bad_label"),
    "the label true": ('{"thought_process": "x", "predicted_label": true}', "bad_label"),
    "the label false": ('{"thought_process": "x", "predicted_label": false}', "bad_label"),
    "the label NaN": ('{"thought_process": "x", "predicted_label": NaN}', "bad_label"),
    "the label Infinity": ('{"thought_process": "x", "predicted_label": Infinity}', "bad_label"),
    "the label 1e400": ('{"thought_process": "x", "predicted_label": 1e400}', "bad_label"),
    "a label of 5000 digits": ('{"thought_process": "x", "predicted_label": ' + "9" * 5000 + "}", "bad_label"),
    'the label "entailment"': ('{"thought_process": "x", "predicted_label": "entailment"}', "bad_label"),
    'the label "no"': ('{"thought_process": "x", "predicted_label": "no"}', "bad_label"),
    'the label "1."': ('{"thought_process": "x", "predicted_label": "1."}', "bad_label"),
    'the label "01"': ('{"thought_process": "x", "predicted_label": "01"}', "bad_label"),
    'the label ""': ('{"thought_process": "x", "predicted_label": ""}', "bad_label"),
    'the label "0 or 1"': ('{"thought_process": "x", "predicted_label": "0 or 1"}', "bad_label"),
    "a digit of another script": ('{"thought_process": "x", "predicted_label": "١"}', "bad_label"),
    "a label in a list": ('{"thought_process": "x", "predicted_label": [1]}', "bad_label"),
    "a label in an object": ('{"thought_process": "x", "predicted_label": {"value": 1}}', "bad_label"),
    "an answer as the label": (
        '{"thought_process": "x", "predicted_label": {"thought_process": "y", "predicted_label": 1}}',
        "bad_label",
    ),
    "two different labels": ('{"thought_process": "x", "predicted_label": 1, "predicted_label": 0}', "bad_label"),
    "three labels, the last two alike": (
        '{"thought_process": "x", "predicted_label": 1, "predicted_label": 0, "predicted_label": 0}',
        "bad_label",
    ),
    "a number and true": ('{"thought_process": "x", "predicted_label": 1, "predicted_label": true}', "bad_label"),
    "a bad label, then a good object": ('{"thought_process": "x", "predicted_label": 2} ' + GOOD, "bad_label"),
    "no label": ('{"thought_process": "x"}', "missing_field"),
    "no thought": ('{"predicted_label": 1}', "missing_field"),
    "the dataset's field name": ('{"thought_process": "x", "label": 1}', "missing_field"),
    "capitals in a field name": ('{"Thought_Process": "x", "predicted_label": 1}', "missing_field"),
    "an empty object": ("{}", "missing_field"),
    "the two fields in two objects": ('{"thought_process": "x"} {"predicted_label": 1}', "missing_field"),
    "a list as the thought": ('{"thought_process": ["a", "b"], "predicted_label": 1}', "missing_field"),
    "a number as the thought": ('{"thought_process": 7, "predicted_label": 1}', "missing_field"),
    "null as the thought": ('{"thought_process": null, "predicted_label": 1}', "missing_field"),
    "an object as the thought": ('{"thought_process": {"step 1": "a"}, "predicted_label": 1}', "missing_field"),
    "two different thoughts": (
        '{"thought_process": "x", "thought_process": "y", "predicted_label": 1}',
        "missing_field",
    ),
    "a brace at the end of another object's string": ('{"text": "open {"}', "missing_field"),
    "the brace alone": ("{", "truncated"),
    "cut in a key": ('{"thought_pro', "truncated"),
    "cut after a key": ('{"thought_process"', "truncated"),
    "cut after a colon": ('{"thought_process": ', "truncated"),
    "cut in the thought": ('{"thought_process": "Step 1: dogs are', "truncated"),
    "cut in the thought after a brace": ('{"thought_process": "the set {a, b} is', "truncated"),
    "cut after a backslash": ('{"thought_process": "He said \\', "truncated"),
    "cut in an escape": ('{"thought_process": "caf\\u00', "truncated"),
    "cut after the thought": ('{"thought_process": "x"', "truncated"),
    "cut after a comma": ('{"thought_process": "x", ', "truncated"),
    "cut before the label": ('{"thought_process": "x", "predicted_label": ', "truncated"),
    "cut in a word": ('{"thought_process": "x", "predicted_label": nul', "truncated"),
    "cut after the label": ('{"thought_process": "x", "predicted_label": 1', "truncated"),
    "cut with prose before": ('Sure: {"thought_process": "x", "predicted_label": 1', "truncated"),
    "cut with a newline after": ('{"thought_process": "x",\n', "truncated"),
    "very deep nesting": ('{"a":' * 100_000, "bad_json"),
    "very deep nesting, closed": ('{"a":' * 100_000 + "1" + "}" * 100_000, "bad_json"),
    "100,000 braces": ("{" * 100_000, "truncated"),
}


@pytest.mark.parametrize(("text", "thought", "label"), READABLE.values(), ids=READABLE)
def test_a_reply_that_holds_an_answer_is_read(text, thought, label):
    parsed = parse_answer(text)
    assert (parsed.status, parsed.fields, parsed.problem) == (
        "ok",
        {"thought_process": thought, "predicted_label": label},
        "",
    )
    assert type(parsed.fields["predicted_label"]) is int


@pytest.mark.parametrize(("text", "status"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_reply_without_an_answer_has_a_reason_and_no_label(text, status):
    parsed = parse_answer(text)
    assert (parsed.status, parsed.fields) == (status, None)
    assert 0 < len(parsed.problem) < 120


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Step 1: dogs are", "truncated"),
        ("", "truncated"),
        ("{'thought_process': 'x", "truncated"),
        ('{"thought_process": "x"} and', "truncated"),
        ('{"thought_process": "x", "predicted_label": 1.', "truncated"),
        ('{"thought_process": "x", "predicted_label": 3} and', "bad_label"),
        (GOOD + " and then", "ok"),
    ],
)
def test_a_text_that_the_token_limit_cut_is_truncated_unless_its_object_is_whole(text, status):
    assert parse_answer(text, finish_reason="length").status == status


@pytest.mark.parametrize(
    "thought",
    ['He said "no {": \\ \n\t– 犬🐕\u2028', "", "{}", '{"thought_process": "y", "predicted_label": 0}', "\\u00e9 \\"],
)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_prefix_of_a_reply_has_a_label_until_the_reply_is_whole(thought, label, ascii_only):
    reply = json.dumps({"thought_process": thought, "predicted_label": label}, ensure_ascii=ascii_only)
    assert parse_answer(reply).fields == {"thought_process": thought, "predicted_label": label}
    for length in range(1, len(reply)):
        assert (parse_answer(reply[:length]).status, parse_answer(reply[:length]).fields) == ("truncated", None), reply[
            :length
        ]


SHORT = {name: text for name, (text, *_) in (READABLE | UNREADABLE).items() if len(text) < 300}


@pytest.mark.parametrize("text", SHORT.values(), ids=SHORT)
def test_a_label_comes_only_with_status_ok_wherever_a_text_is_cut(text):
    for length in range(len(text)):
        for finish_reason in (None, "stop", "length"):
            parsed = parse_answer(text[:length], finish_reason)
            assert (parsed.status == ParseStatus.OK) == (parsed.fields is not None)


def test_every_text_survives_rendering_and_parsing_unchanged():
    characters = [chr(code) for code in [*range(0x500), 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0xFFFF, 0x1F415, 0x10FFFF]]
    for thought in [*characters, "".join(characters), "\r\n \r \n", '\\"', "\\n", "  x  ", "n/a", "null", "</s>[INST]"]:
        assert parse_answer(render_completion(thought, 1)).fields == {"thought_process": thought, "predicted_label": 1}


def test_the_longest_replies_are_read_in_no_time():
    started = time.perf_counter()
    for text in (
        "{" * 100_000,
        '{"a":' * 20_000,
        "{ " * 50_000,
        "x" * 100_000,
        '{"thought_process": "' + "a{" * 50_000 + '", "predicted_label": 1}',
    ):
        parse_answer(text)
    assert time.perf_counter() - started < 2


def test_a_reflection_is_read_by_its_own_fields():
    text = (
        '{"error_analysis": "Step 2 fails.", "improved_thought_process": "Dogs are animals.", "predicted_label": "1"}'
    )
    assert parse_reply(text, ReflectionReply).fields == {
        "error_analysis": "Step 2 fails.",
        "improved_thought_process": "Dogs are animals.",
        "predicted_label": 1,
    }
    assert parse_reply(GOOD, ReflectionReply).problem == "no field error_analysis, improved_thought_process"


@pytest.mark.parametrize(
    ("score", "status"),
    [(1, "ok"), (5, "ok"), ("3", "ok"), (0, "bad_label"), (6, "bad_label"), (4.5, "bad_label"), (None, "bad_label")],
)
def test_a_score_is_one_to_five(score, status):
    text = json.dumps({"analysis": "Sound.", "score": score, "improved_thought_process": "x", "predicted_label": 1})
    assert parse_reply(text, ScoringReply).status == status


@pytest.mark.parametrize("name", TEACHER_PROMPTS)
def test_no_prompt_of_the_teacher_is_itself_an_answer_but_its_worked_example(name):
    prompt = TEACHER_PROMPTS[name]
    parsed = parse_reply(prompt.system, prompt.reply)
    assert parsed.status == ("ok" if name == "initial_generation" else "bad_json")
