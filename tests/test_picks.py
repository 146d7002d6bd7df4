"""Which answers a report shows.

python -m pytest tests/test_picks.py
"""

from nli.evaluation.shown_rows import pick_disagreements, pick_unparsed, shorten


def answer(number: int, true_label: int | None, predicted_label: int | None, status: str = "ok") -> dict:
    """An Answer, as far as it is looked at."""
    pair = {"id": str(number), "premise": f"Dog {number} ran.", "hypothesis": "It moved.", "true_label": true_label}
    return {
        **pair,
        "predicted_label": predicted_label,
        "parse_status": status,
        "thought_process": f"Thought {number}.",
        "raw_text": f"text {number}",
    }


def test_rows_that_all_runs_answer_alike_are_no_disagreement():
    rows = [answer(0, 1, 1), answer(1, 0, 1)]
    assert pick_disagreements({"a": rows, "b": rows}) == {"rows": 0, "patterns": [], "examples": []}


def test_disagreements_of_partly_labelled_runs_are_those_on_labelled_rows():
    first = [answer(0, 1, 1), answer(1, None, 1)]
    second = [answer(0, 1, 0), answer(1, None, 0)]
    assert pick_disagreements({"a": first, "b": second})["patterns"] == [{"rows": 1, "runs": {"a": True, "b": False}}]


def test_the_patterns_of_disagreement_take_turns_and_the_most_frequent_comes_first():
    first = [answer(number, 1, 1 if number else 0) for number in range(4)]
    second = [answer(number, 1, 0 if number else 1) for number in range(4)]
    found = pick_disagreements({"a": first, "b": second})
    assert (found["rows"], [pattern["rows"] for pattern in found["patterns"]]) == (4, [3, 1])
    assert [example["answers"][0]["right"] for example in found["examples"]] == [True, False, True, True]


def test_what_could_not_be_read_is_counted_by_status_with_its_first_row():
    rows = [
        answer(0, 1, 1),
        answer(1, 1, None, "truncated"),
        answer(2, 1, None, "bad_json"),
        answer(3, 1, None, "truncated"),
    ]
    assert [(row["status"], row["rows"], row["id"], row["raw_text"]) for row in pick_unparsed({"a": rows})] == [
        ("truncated", 2, "1", "text 1"),
        ("bad_json", 1, "2", "text 2"),
    ]


def test_a_cut_says_how_much_it_left_out():
    assert shorten("abcdef", 4) == "abcd … (2 more characters)"
    assert shorten("abcdef", 6) == "abcdef"
