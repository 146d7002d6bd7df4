"""Checks of the data: each fault is found once, with its file, its count and an example; clean data has none; nothing is changed."""

import json
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from nli.data.check import BUCKETS, CheckDataConfig, name_bucket, run, split_names
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import write_jsonl
from tests.conftest import REPOSITORY

CLEAN = [
    ("Two dogs ran.", "Animals moved.", 1),
    ("A cat slept.", "A dog slept.", 0),
    ("Tom sang, and Ann danced.", "Ann danced.", 1),
]


def write_csv(path, pairs) -> str:
    lines = [
        "premise,hypothesis,label",
        *(f'"{premise}","{hypothesis}",{"" if label is None else label}' for premise, hypothesis, label in pairs),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def answer(
    number: int, pair: tuple, predicted_label: int | None, thought: str = "Step 1: dogs are animals.", **more
) -> dict:
    premise, hypothesis, label = pair
    read = predicted_label is not None
    return {
        "id": str(number),
        "premise": premise,
        "hypothesis": hypothesis,
        "true_label": label,
        "answered_by": "ministral-8b-2512",
        "prompt_name": "initial_generation",
        "prompt_sha256": "3f",
        "raw_text": "{}",
        "thought_process": thought if read else None,
        "predicted_label": predicted_label,
        "parse_status": "ok" if read else "truncated",
    } | more


def reflection(wrong: dict, label: int | None, thought: str = "Dogs are animals; who runs moves.", **more) -> dict:
    read = label is not None
    return (
        wrong
        | {
            "reflected_by": "mistral-large-2512",
            "reflection_prompt_sha256": "4f",
            "reflection_raw_text": "{}",
            "error_analysis": "Step 1 fails." if read else None,
            "improved_thought_process": thought if read else None,
            "reflected_label": label,
            "reflection_status": "ok" if read else "no_json",
        }
        | more
    )


@pytest.fixture
def check(tmp_path):
    """Writes files of the given rows, checks them, and returns check.json."""

    def do(csv=(), thoughts=(), reflections=(), **fields) -> dict:
        files = {
            "csv": tuple(f"{name}={write_csv(tmp_path / f'{name}.csv', pairs)}" for name, pairs in dict(csv).items())
        }
        for kind, named in (("thoughts", dict(thoughts)), ("reflections", dict(reflections))):
            for name, rows in named.items():
                write_jsonl(tmp_path / f"{name}_{kind}.jsonl", rows)
            files[kind] = tuple(f"{name}={tmp_path / f'{name}_{kind}.jsonl'}" for name in named)
        run(CheckDataConfig(**files, output_dir=str(tmp_path / "out"), bootstrap_draws=100, **fields))
        return json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))

    return do


def found(check: dict) -> set[tuple]:
    return {(finding["level"], finding["where"], finding["check"], finding["count"]) for finding in check["findings"]}


def test_clean_data_have_no_findings(check):
    wrong = answer(2, CLEAN[2], 0)
    answers = [answer(0, CLEAN[0], 1), answer(1, CLEAN[1], 0), wrong]
    other = [("It rained.", "It was wet.", 1), ("It rained here.", "It was dry.", 0)]
    made = check({"train": CLEAN, "dev": other}, {"train": answers}, {"train": [reflection(wrong, 1)]})
    assert (made["faults"], made["warnings"], made["findings"]) == (0, 0, [])


def test_the_sample_is_clean(tmp_path, repository):
    run(CheckDataConfig(output_dir=str(tmp_path), strict=True))
    made = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert [(row["split"], row["rows"]) for row in made["splits"]] == [
        ("train", 2000),
        ("dev", 300),
        ("test", 400),
        ("demo", 20),
    ]
    assert (made["findings"], made["unit"]) == ([], "words")


def test_a_split_is_counted(check):
    pairs = [*CLEAN, ("Two dogs ran.", "Two dogs ran fast.", None)]
    (row,) = check({"train": pairs})["splits"]
    assert row == {
        "split": "train",
        "rows": 4,
        "label_1": 2,
        "label_0": 1,
        "unlabelled": 1,
        "premises": 3,
        "repeated_pairs": 0,
        "conflicting_pairs": 0,
    }


def test_a_pair_that_stands_twice_is_a_warning_and_one_with_both_labels_a_fault(check):
    pairs = [*CLEAN, CLEAN[0], CLEAN[0], ("A cat slept.", "A dog slept.", 1)]
    made = check({"train": pairs})
    assert found(made) == {("fault", "train", "conflicting labels", 1), ("warning", "train", "duplicates", 1)}
    fault, warning = made["findings"]
    assert fault["examples"] == ["ids 1, 5: 'A cat slept.' / 'A dog slept.'"]
    assert warning["examples"] == ["ids 0, 3, 4: 'Two dogs ran.' / 'Animals moved.'"]


def test_an_unlabelled_copy_of_a_labelled_pair_is_no_conflict(check):
    assert found(check({"train": [*CLEAN, (*CLEAN[0][:2], None)]})) == {("warning", "train", "duplicates", 1)}


def test_texts_that_differ_by_a_space_or_a_capital_are_other_pairs(check):
    assert (
        found(
            check({"train": [*CLEAN, ("two dogs ran.", "Animals moved.", 0), ("Two dogs ran. ", "Animals moved.", 0)]})
        )
        == set()
    )


def test_splits_may_share_no_pair_and_should_share_no_premise(check):
    dev = [
        CLEAN[0],
        ("A cat slept.", "A dog slept.", 1),
        ("Tom sang, and Ann danced.", "Tom sang.", 1),
        ("It rained.", "It was wet.", 0),
    ]
    made = check(
        {"train": CLEAN, "dev": dev, "test": [("It snowed.", "It was wet.", 1), ("It froze.", "It was hot.", 0)]}
    )
    assert found(made) == {
        ("fault", "train, dev", "shared pairs", 2),
        ("fault", "train, dev", "conflicting labels", 1),
        ("warning", "train, dev", "shared premises", 3),
    }
    assert made["shared"][0] == {"splits": "train, dev", "premises": 3, "pairs": 2, "conflicting_pairs": 1}
    assert [row["premises"] for row in made["shared"][1:]] == [0, 0]


def test_a_split_of_one_label_only_is_a_warning(check):
    assert found(check({"train": [CLEAN[0], CLEAN[2]]})) == {("warning", "train", "label balance", 2)}
    assert found(check({"train": [(*CLEAN[0][:2], None)]})) == set()


def test_a_csv_that_cannot_be_read_is_a_fault_and_the_others_are_checked(check):
    made = check({"train": [*CLEAN, ("", "Nothing.", 1), ("A.", "B.", 7)], "dev": [CLEAN[0], CLEAN[0], CLEAN[1]]})
    assert found(made) == {("fault", "train", "broken rows", 1), ("warning", "dev", "duplicates", 1)}
    lines = made["findings"][0]["examples"]
    assert "train.csv:5: the premise is empty" in lines[0]
    assert "train.csv:6: label '7' is neither 1" in lines[1]
    assert [row["split"] for row in made["splits"]] == ["dev"]


def test_answers_are_compared_with_their_csv_row_by_row(check):
    pairs = [*CLEAN, ("It rained.", "It was wet.", 1), ("It snowed.", "It was wet.", 1)]
    answers = [
        answer(0, CLEAN[0], 1),
        answer(1, ("A cat slept!", "A dog slept.", 0), 0),
        answer(2, (*CLEAN[2][:2], 0), 1),
        answer(4, pairs[4], 1),
        answer(9, ("Other.", "Pair.", 1), 1),
    ]
    made = check({"train": pairs}, {"train": answers})
    assert found(made) == {
        ("fault", "train thoughts", "other texts", 1),
        ("fault", "train thoughts", "other labels", 1),
        ("warning", "train thoughts", "missing rows", 1),
        ("warning", "train thoughts", "unknown rows", 1),
    }
    assert {finding["check"]: finding["examples"] for finding in made["findings"]} == {
        "other texts": ["id 1"],
        "other labels": ["id 2"],
        "missing rows": ["id 3"],
        "unknown rows": ["id 9"],
    }


def test_answers_without_a_csv_of_their_name_are_checked_by_themselves(check):
    assert found(check({"dev": CLEAN}, {"train": [answer(7, CLEAN[0], 1), answer(8, CLEAN[1], 0)]})) == set()
    assert check({}, {"train": [answer(7, CLEAN[0], 1), answer(8, CLEAN[1], 0)]})["splits"] == []


def test_broken_and_repeated_lines_of_answers_are_faults(tmp_path):
    lines = [
        json.dumps(answer(0, CLEAN[0], 1)),
        '{"id": "1", "prem',
        json.dumps({"id": 5}),
        json.dumps(answer(0, CLEAN[0], 0)),
        "[]",
        "",
    ]
    lines.append(json.dumps(answer(2, CLEAN[2], 1) | {"predicted_label": None}))
    (tmp_path / "train.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"id": "\xff"}\n')
    run(CheckDataConfig(thoughts=(str(tmp_path / "train.jsonl"),), output_dir=str(tmp_path / "out")))
    made = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))
    assert found(made) == {
        ("fault", "train thoughts", "broken rows", 5),
        ("fault", "train thoughts", "repeated rows", 1),
    }
    assert made["findings"][0]["examples"][0] == "line 2: not JSON"
    assert made["findings"][0]["examples"][1].startswith("line 3: id: input should be a valid string")
    assert made["answers"][0]["rows"] == 2


def test_a_line_nested_too_deeply_and_a_file_without_answers_are_faults(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "empty.jsonl").write_text("\n")
    run(
        CheckDataConfig(
            thoughts=(str(tmp_path / "deep.jsonl"), str(tmp_path / "empty.jsonl")),
            output_dir=str(tmp_path / "out"),
            bootstrap_draws=10,
        )
    )
    found = json.loads((tmp_path / "out/check.json").read_text())["findings"]
    assert [(item["where"], item["check"], item["examples"]) for item in found] == [
        ("deep thoughts", "broken rows", ["line 1: nested too deeply"]),
        ("empty thoughts", "no rows", ["empty thoughts"]),
    ]


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read as a file \(Is a directory\)"):
        run(CheckDataConfig(csv=(f"train={tmp_path}",), output_dir=str(tmp_path / "out")))


def test_unread_answers_are_counted_by_status(check):
    answers = [
        answer(0, CLEAN[0], 1),
        answer(1, CLEAN[1], None),
        answer(2, CLEAN[2], None, parse_status="request_failed"),
    ]
    made = check({"train": CLEAN}, {"train": answers})
    assert found(made) == {("warning", "train thoughts", "unread", 1)}
    assert sorted(finding["message"] for finding in made["findings"]) == [
        "answers that could not be read: request_failed",
        "answers that could not be read: truncated",
    ]
    assert made["answers"][0]["statuses"] == {"ok": 1, "truncated": 1, "request_failed": 1}


def test_a_thought_that_betrays_the_label_is_named_with_its_phrase(check):
    wrong = answer(0, CLEAN[0], 0)
    answers = [
        wrong,
        answer(1, CLEAN[1], 0, thought="The true label is 0.", prompt_name="regeneration"),
        answer(2, CLEAN[2], 1, thought=""),
    ]
    made = check(
        {"train": CLEAN},
        {"train": answers},
        {"train": [reflection(wrong, 1, thought="Since the label is 1, dogs are animals.")]},
    )
    assert found(made) == {
        ("warning", "train thoughts", "told the label", 1),
        ("warning", "train reflections", "told the label", 1),
        ("warning", "train thoughts", "empty thoughts", 1),
    }
    assert {tuple(finding["examples"]) for finding in made["findings"]} == {
        ("id 1: 'true label'",),
        ("id 0: 'Since the label is 1'",),
        ("id 2",),
    }


def test_reflections_are_compared_with_answers(check):
    pairs = [(f"Premise {number}.", "Hypothesis.", number % 2) for number in range(8)]
    answers = [answer(number, pair, 1 - pair[2], thought=f"Thought {number}.") for number, pair in enumerate(pairs[:6])]
    answers += [answer(6, pairs[6], 0), answer(7, pairs[7], None)]
    reflections = [
        reflection(answers[0], 0),
        reflection(answers[1], 0),
        reflection(answers[2], None),
        reflection(answers[3] | {"thought_process": "An older thought."}, 1),
        reflection(answers[6], 0),
        reflection(answer(99, ("Gone.", "Pair.", 1), 0), 1),
    ]
    made = check({"train": pairs}, {"train": answers}, {"train": reflections})
    assert found(made) == {
        ("warning", "train thoughts", "unread", 1),
        ("warning", "train reflections", "unread", 1),
        ("warning", "train reflections", "disagreement", 1),
        ("warning", "train reflections", "missing reflections", 2),
        ("warning", "train reflections", "unknown rows", 1),
        ("warning", "train reflections", "another answer", 1),
        ("warning", "train reflections", "right answers", 1),
    }
    (row,) = made["reflections"]
    assert {key: row[key] for key in ("rows", "read", "reach_true_label", "disagree", "wrong_answers", "missing")} == {
        "rows": 6,
        "read": 5,
        "reach_true_label": 4,
        "disagree": 1,
        "wrong_answers": 6,
        "missing": 2,
    }


def test_the_teacher_is_scored_over_all_its_labelled_rows(check):
    pairs = [(f"Premise {number}.", "Hypothesis.", number % 2) for number in range(20)]
    answers = [
        answer(number, pair, None if number == 4 else 1 - pair[2] if number < 4 else pair[2])
        for number, pair in enumerate(pairs)
    ]
    (row,) = check({"train": pairs}, {"train": answers})["answers"]
    assert (row["rows"], row["unparsed"], row["accuracy"]) == (20, 1, 0.75)
    assert row["accuracy_low"] < 0.75 < row["accuracy_high"]
    assert (row["positive_precision"], row["positive_recall"]) == (pytest.approx(8 / 10), 0.8)
    assert row["confusion"] == [[8, 2, 0], [2, 7, 1]]
    assert (row["answered_by"], row["prompt_name"]) == ({"ministral-8b-2512": 20}, {"initial_generation": 20})


def test_accuracy_is_told_by_length_of_thought_in_quartiles_and_in_the_original_s_ranges(check):
    pairs = [(f"Premise {number}.", "Hypothesis.", 1) for number in range(8)]
    words = [10, 20, 90, 110, 130, 160, 180, 310]
    answers = [
        answer(number, pair, int(number < 4), thought=" ".join(["abc"] * count))
        for number, (pair, count) in enumerate(zip(pairs, words, strict=True))
    ]
    buckets = check({"train": pairs}, {"train": answers})["buckets"]
    quartiles = [(row["group"], row["range"], row["n"], row["accuracy"]) for row in buckets if row["by"] == "quartile"]
    assert quartiles == [
        ("Q1", "10–20 words", 2, 1.0),
        ("Q2", "90–110 words", 2, 1.0),
        ("Q3", "130–160 words", 2, 0.0),
        ("Q4", "180–310 words", 2, 0.0),
    ]
    ranges = {row["group"]: (row["n"], row["accuracy"]) for row in buckets if row["by"] == "tokens"}
    # four characters a word with its space, four characters a token: as many tokens as words
    assert ranges == {"0-100": (3, 1.0), "101-150": (2, 0.5), "151-200": (2, 0.0), "301+": (1, 0.0)}


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(0, "0-100"), (100, "0-100"), (101, "101-150"), (250, "201-250"), (300, "251-300"), (301, "301+"), (9999, "301+")],
)
def test_every_length_falls_into_one_range(tokens, name):
    assert name_bucket(tokens) == (name, "")
    assert len(BUCKETS) == 6


def test_with_a_tokenizer_lengths_are_tokens(check):
    made = check({"train": CLEAN}, tokenizer="open-mistral-nemo")
    assert made["unit"] == "tokens"
    premise = next(row for row in made["lengths"] if row["text"] == "premise")
    assert (premise["n"], premise["min"], premise["max"]) == (3, 4, 8)  # Two| dogs| ran|.
    with pytest.raises(ConfigError, match="tokenizer 'gpt-4o' is no folder, file or Mistral model"):
        check({"train": CLEAN}, tokenizer="gpt-4o")


def test_every_length_stands_in_its_histogram(check):
    pairs = [("word " * count + "end.", "Hypothesis.", count % 2) for count in [*range(200), 5000]]
    rows = check({"train": pairs})["lengths"]
    premise = next(row for row in rows if row["text"] == "premise")
    assert sum(premise["counts"]) == premise["n"] == 201
    assert (premise["min"], premise["max"], premise["median"]) == (1, 5001, 101.0)
    assert len(premise["edges"]) == len(premise["counts"]) + 1 <= 33


def test_only_a_strict_check_with_faults_ends_with_an_error_and_after_all_is_written(check, tmp_path):
    pairs = [*CLEAN, ("A cat slept.", "A dog slept.", 1)]
    check({"train": pairs})
    (tmp_path / "out" / "report.html").unlink()
    with pytest.raises(
        DataError,
        match=r"^the data have 1 fault, 0 warnings, listed above and in .*check\.json\. Mend the faults, or check",
    ):
        check({"train": pairs}, strict=True)
    assert (tmp_path / "out" / "report.html").exists()
    check({"train": [*CLEAN, CLEAN[0]]}, strict=True)  # a warning is no fault


def test_the_job_s_exit_status_is_2_only_if_strict(tmp_path):
    path = write_csv(tmp_path / "train.csv", [*CLEAN, ("A cat slept.", "A dog slept.", 1)])
    command = [sys.executable, "-m", "ray_jobs.check_data", "--csv", path, "--output-dir", str(tmp_path / "out")]
    lenient = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (lenient.returncode, lenient.stderr) == (0, "")
    assert (
        "1 fault, 0 warnings\n\nfault    train: conflicting labels (1): pairs that stand with both labels\n"
        in lenient.stdout
    )
    strict = subprocess.run(
        [*command, "--strict"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert strict.returncode == 2
    assert strict.stderr.startswith("error: the data have 1 fault, 0 warnings, listed above")


def test_the_check_changes_no_input(check, tmp_path):
    check({"train": CLEAN}, {"train": [answer(0, CLEAN[0], 1)]})
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    check({"train": CLEAN}, {"train": [answer(0, CLEAN[0], 1)]})
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], len(manifest["attempts"]), len(manifest["inputs"])) == ("finished", 2, 2)


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "action") and not value.startswith("#")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_with_pictures_that_fetches_and_runs_nothing(check, tmp_path):
    wrong = answer(0, CLEAN[0], 0, thought="<script>alert(1)</script> the true label is 1")
    pairs = [*CLEAN, ("<b>A & B</b>", "H", 0), ("<b>A & B</b>", "H", 1)]
    check({"train": pairs}, {"train": [wrong, answer(1, CLEAN[1], None)]}, {"train": [reflection(wrong, 0)]})
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("svg") == 6  # quartiles, ranges; premise, hypothesis, thought, improved thought
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert page.addresses == []
    assert "'<b>A & B</b>' / 'H'" in page.text
    assert "Data check: 1 fault, " in page.text
    assert "●train thoughts" in page.text  # whose mark is whose


def test_names_come_from_the_files_or_are_given():
    assert split_names(("data/train.csv", "dev=a/b.csv", "x=y=z.csv", "a/b=c.csv")) == [
        ("train", "data/train.csv"),
        ("dev", "a/b.csv"),
        ("x", "y=z.csv"),
        ("b=c", "a/b=c.csv"),
    ]


def test_two_files_of_one_name_and_a_nameless_one_are_refused():
    with pytest.raises(ConfigError, match=r"^csv has two files called 'train'; tell them apart as name=file\.$"):
        CheckDataConfig(csv=("a/train.csv", "b/train.csv"))
    with pytest.raises(ConfigError, match=r"^thoughts has a file without a name; write name=file\.$"):
        CheckDataConfig(thoughts=("=a.jsonl",))


def test_a_missing_file_is_refused_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file; looked for"):
        run(CheckDataConfig(csv=("nowhere.csv",), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_twenty_thousand_rows_take_seconds(check):
    pairs = [
        (f"Premise number {number} says something.", f"Hypothesis {number}.", number % 2) for number in range(20_000)
    ]
    answers = [
        answer(number, pair, 1, thought="Step 1: the premise says something. " * 10)
        for number, pair in enumerate(pairs)
    ]
    started = time.process_time()  # what else the machine does takes none of it
    made = check({"train": pairs}, {"train": answers})
    assert time.process_time() - started < 30
    assert (made["splits"][0]["rows"], made["answers"][0]["accuracy"]) == (20_000, 0.5)
