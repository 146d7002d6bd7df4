"""Which answers become training rows, for every ablation."""

import json

import pytest

from nli.data.sft_rows import PrepareSFTDataConfig, run, select_rows
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import write_jsonl
from nli.task.records import row_key


def answer(id: str, true: int | None, predicted: int | None, status: str = "ok", thought: str | None = "T") -> dict:
    return {
        "id": id,
        "premise": f"p{id}",
        "hypothesis": f"h{id}",
        "true_label": true,
        "answered_by": "m",
        "prompt_name": "initial_generation",
        "prompt_sha256": "0",
        "raw_text": "{}",
        "thought_process": thought,
        "predicted_label": predicted,
        "parse_status": status,
        "problem": "",
    }


def reflection(of: dict, label: int | None, status: str = "ok") -> dict:
    return {
        **of,
        "reflected_by": "s",
        "reflection_prompt_sha256": "1",
        "reflection_raw_text": "{}",
        "error_analysis": "E",
        "improved_thought_process": "better",
        "reflected_label": label,
        "reflection_status": status,
    }


RIGHT, WRONG, WRONG_AGAIN, UNREAD, UNLABELLED = (
    answer("1", 1, 1),
    answer("2", 1, 0),
    answer("3", 0, 1),
    answer("4", 1, None, "bad_json", None),
    answer("5", None, 1),
)
ANSWERS = [RIGHT, WRONG, WRONG_AGAIN, UNREAD, UNLABELLED]
REFLECTIONS = {row_key(row): row for row in (reflection(WRONG, 1), reflection(WRONG_AGAIN, 1))}


def labels(rows: list[dict]) -> dict[str, int]:
    return {row["id"]: json.loads(row["completion"])["predicted_label"] for row in rows}


def test_correct_only_keeps_right_answers():
    rows, counts = select_rows(ANSWERS, {}, PrepareSFTDataConfig(ablation="correct_only"))
    assert labels(rows) == {"1": 1}
    assert counts == {
        "from_teacher": 1,
        "left_out_wrong_answer": 2,
        "left_out_unreadable_answer": 1,
        "left_out_unlabelled": 1,
    }


def test_reflected_adds_reflections_that_reach_the_true_label_and_drops_those_that_do_not():
    rows, counts = select_rows(ANSWERS, REFLECTIONS, PrepareSFTDataConfig(ablation="reflected", reflections="r"))
    assert labels(rows) == {"1": 1, "2": 1}
    assert [(row["source"], json.loads(row["completion"])["thought_process"]) for row in rows] == [
        ("teacher", "T"),
        ("reflection", "better"),
    ]
    assert counts["left_out_reflection_disagrees_with_true_label"] == 1


def test_unmodified_keeps_wrong_labels_and_unlabelled_rows_but_no_unread_ones():
    rows, counts = select_rows(ANSWERS, {}, PrepareSFTDataConfig(ablation="unmodified"))
    assert labels(rows) == {"1": 1, "2": 0, "3": 1, "5": 1}
    assert counts == {"from_teacher": 4, "left_out_unreadable_answer": 1}


def test_custom_can_teach_the_true_label_on_all_answers():
    config = PrepareSFTDataConfig(ablation="custom", filter_correct=False, label_field="true_label")
    assert labels(select_rows(ANSWERS, {}, config)[0]) == {"1": 1, "2": 1, "3": 0}


def test_custom_can_filter():
    config = PrepareSFTDataConfig(ablation="custom", filter_correct=True, label_field="predicted_label")
    assert labels(select_rows(ANSWERS, {}, config)[0]) == {"1": 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (reflection(WRONG, None, "bad_json"), "unreadable_reflection"),
        (reflection(WRONG, 0), "reflection_disagrees_with_true_label"),
        (reflection(WRONG | {"thought_process": "another"}, 1), "reflection_of_another_answer"),
    ],
)
def test_a_reflection_that_cannot_be_used_is_counted_with_its_reason(bad, reason):
    rows, counts = select_rows(
        [WRONG], {row_key(bad): bad}, PrepareSFTDataConfig(ablation="reflected", reflections="r")
    )
    assert rows == []
    assert counts == {f"left_out_{reason}": 1}


def test_a_wrong_answer_without_reflection_is_counted_not_forgotten():
    assert select_rows([WRONG], {}, PrepareSFTDataConfig(ablation="reflected", reflections="r"))[1] == {
        "left_out_no_reflection": 1
    }


def test_an_empty_thought_is_left_out():
    assert select_rows([answer("1", 1, 1, thought=" ")], {}, PrepareSFTDataConfig())[1] == {"left_out_empty_thought": 1}


def test_text_reaches_the_training_row_unchanged():
    row = answer("1", 1, 1, thought='Step 1: "cafÃ©" \\ {x}\nStep 2: n/a ')
    prompt, completion = (
        select_rows([row], {}, PrepareSFTDataConfig())[0][0][name] for name in ("prompt", "completion")
    )
    assert prompt.startswith("[INST] Premise: p1\nHypothesis: h1\n\n") and prompt.endswith("[/INST]")
    assert json.loads(completion) == {"thought_process": 'Step 1: "cafÃ©" \\ {x}\nStep 2: n/a ', "predicted_label": 1}


@pytest.mark.parametrize(
    "values",
    [
        {"ablation": "reflected"},
        {"ablation": "correct_only", "reflections": "r.jsonl"},
        {"ablation": "custom"},
        {"ablation": "custom", "filter_correct": True},
        {"ablation": "unmodified", "label_field": "true_label"},
    ],
)
def test_conflicting_fields_are_refused(values):
    with pytest.raises(ConfigError):
        PrepareSFTDataConfig(**values)


def test_no_usable_answer_is_an_error_and_writes_nothing(tmp_path):
    write_jsonl(tmp_path / "thoughts.jsonl", [WRONG])
    config = PrepareSFTDataConfig(thoughts=str(tmp_path / "thoughts.jsonl"), output_jsonl=str(tmp_path / "out.jsonl"))
    with pytest.raises(DataError, match=r"no answer can be used for ablation correct_only \(left out wrong answer 1\)"):
        run(config)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_file_is_made_anew_when_its_input_changed(tmp_path):
    config = PrepareSFTDataConfig(thoughts=str(tmp_path / "thoughts.jsonl"), output_jsonl=str(tmp_path / "out.jsonl"))
    write_jsonl(tmp_path / "thoughts.jsonl", [RIGHT])
    run(config)
    write_jsonl(tmp_path / "thoughts.jsonl", [RIGHT, answer("6", 0, 0)])
    assert [json.loads(line)["id"] for line in run(config).read_text().splitlines()] == ["1", "6"]
