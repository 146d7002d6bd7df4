"""The evaluation from files to files: tables, report, manifest, and each refusal."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nli.evaluation import run as evaluation
from nli.evaluation.report import format_interval, format_p, format_share, render_report, render_table
from nli.evaluation.run import EvaluatePredictionsConfig
from nli.runtime.config import load_config
from nli.runtime.errors import ConfigError, DataError, ResumeError
from nli.runtime.files import write_jsonl
from nli.task.prompts import render_completion
from tests.conftest import run_timed

ROOT = Path(__file__).resolve().parent.parent


def answer(number: int, true_label: int | None, predicted_label: int | None, status: str = "ok", **more) -> dict:
    """An Answer; with `predicted_label` None one that could not be read."""
    thought = None if predicted_label is None else f"Step 1: look at pair {number}. " + "Then think. " * (number % 7)
    return {
        "id": str(number),
        "premise": f"Dog {number} ran in the park." + " It was late." * (number % 4),
        "hypothesis": f"Dog {number} moved." if number % 3 else f"Dog {number} ran.",
        "true_label": true_label,
        "phenomenon": ("negation", "numbers", "rare")[2 if number < 5 else number % 2],
        "answered_by": "tiny",
        "prompt_name": "student",
        "prompt_sha256": "3f" * 32,
        "raw_text": '{"thought_process": "Ste' if thought is None else render_completion(thought, predicted_label),
        "thought_process": thought,
        "predicted_label": predicted_label,
        "parse_status": status if predicted_label is not None or status != "ok" else "truncated",
        "problem": "" if thought else "the text ends before its JSON object does",
    } | more


def good(number: int) -> dict:
    return answer(number, number % 2, 1 - number % 2 if number % 10 == 0 else number % 2)


def poor(number: int) -> dict:
    wrong = number % 3 == 0
    return answer(number, number % 2, None if number % 20 == 7 else (1 - number % 2 if wrong else number % 2))


def write_runs(folder: Path, n: int = 80, **runs) -> tuple[str, ...]:
    """Write files of answers into a folder; returns their paths."""
    for name, make in runs.items():
        write_jsonl(folder / f"{name}.jsonl", [make(number) for number in range(n)])
    return tuple(str(folder / f"{name}.jsonl") for name in runs)


def evaluate(folder: Path, predictions: tuple[str, ...], **fields) -> dict:
    """Run the stage; returns the content of evaluation.json."""
    report = evaluation.run(
        EvaluatePredictionsConfig(predictions=predictions, output_dir=str(folder / "out"), **fields)
    )
    assert report == folder / "out" / "report.html"
    return json.loads((folder / "out" / "evaluation.json").read_text(encoding="utf-8"))


class Cells(HTMLParser):
    """Numbers of a report: {(table, run, other, by, group, key): [value, low, high]}, and all tags and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: dict[tuple, list] = {}
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self._table: dict = {}
        self._row: dict = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag == "table":
            self._table = found
        if tag == "tr":
            self._row = found
        if tag == "td" and "data-key" in found:
            place = (
                self._table.get("data-table"),
                self._row.get("data-run"),
                self._row.get("data-other"),
                self._table.get("data-by"),
            )
            values = [json.loads(found[name]) for name in ("data-value", "data-low", "data-high") if name in found]
            self.cells[(*place, self._row.get("data-group"), found["data-key"])] = values


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict, str]:
    """Two runs of 80 rows, evaluated: the folder, evaluation.json and the report's text."""
    folder = tmp_path_factory.mktemp("evaluated")
    found = evaluate(folder, write_runs(folder, good=good, poor=poor), slice_by=("phenomenon",))
    return folder, found, (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_a_run_is_scored_over_all_its_labelled_rows(made):
    _, found, _ = made
    first, second = found["runs"]
    assert (first["run"], first["n"], first["unparsed"], first["accuracy"]) == ("good", 80, 0, 0.9)
    assert (second["unparsed"], second["statuses"]) == (4, {"ok": 76, "truncated": 4})
    wrong = sum(number % 3 == 0 or number % 20 == 7 for number in range(80))
    assert second["accuracy"] == pytest.approx((80 - wrong) / 80)
    assert second["parsed_accuracy"] == pytest.approx((80 - wrong) / 76)
    assert sum(map(sum, second["confusion"])) == 80
    assert [row[2] for row in second["confusion"]] == [4, 0]


def test_runs_are_compared_on_the_same_rows(made):
    _, found, _ = made
    (compared,) = found["comparisons"]
    assert (compared["run"], compared["other"], compared["n"]) == ("poor", "good", 80)
    assert compared["difference"] == pytest.approx(found["runs"][1]["accuracy"] - found["runs"][0]["accuracy"])
    assert compared["holm_p_value"] == compared["p_value"] < 0.05
    assert compared["differs"] is True
    assert (
        compared["both_right"] + compared["only_run_right"] + compared["only_other_right"] + compared["neither_right"]
        == 80
    )


def test_every_slice_has_its_rows_an_interval_and_a_mark_when_too_small(made):
    _, found, _ = made
    by_phenomenon = {(row["run"], row["group"]): row for row in found["slices"] if row["by"] == "phenomenon"}
    assert by_phenomenon["good", "rare"]["n"] == 5
    assert by_phenomenon["good", "rare"]["too_small"] is True
    assert by_phenomenon["good", "numbers"]["too_small"] is False
    for by in ("phenomenon", "thought length", "premise length", "hypothesis length", "word overlap"):
        for name in ("good", "poor"):
            rows = [row for row in found["slices"] if (row["by"], row["run"]) == (by, name)]
            assert sum(row["n"] for row in rows) == 80
            assert all(row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in rows)
    unread = [row for row in found["slices"] if row["group"] == "no thought"]
    assert [(row["run"], row["n"], row["correct"]) for row in unread] == [("poor", 4, 0)]


def test_the_report_shows_exactly_the_numbers_of_the_json_file(made):
    _, found, html = made
    cells = Cells(html).cells
    for row in found["runs"]:
        for key in (
            "n",
            "unparsed",
            "accuracy",
            "parsed_accuracy",
            "macro_precision",
            "macro_recall",
            "macro_f1",
            "positive_precision",
            "positive_recall",
            "positive_f1",
        ):
            expected = [row[key]] + [row[f"{key}_{end}"] for end in ("low", "high") if f"{key}_low" in row]
            assert cells["runs", row["run"], None, None, None, key] == expected
    for row in found["comparisons"]:
        place = ("comparisons", row["run"], row["other"], None, None)
        assert cells[*place, "difference"] == [row["difference"], row["low"], row["high"]]
        for key in ("only_run_right", "only_other_right", "p_value", "holm_p_value", "smallest_detectable"):
            assert cells[*place, key] == [row[key]]
    for row in found["slices"]:
        place = ("slices", row["run"], None, row["by"], row["group"])
        assert cells[*place, "n"] == [row["n"]]
        assert cells[*place, "accuracy"] == [row["accuracy"], row["accuracy_low"], row["accuracy_high"]]
    assert len(cells) == 2 * 10 + 6 + 1 + 3 * len(
        found["slices"]
    )  # runs, the comparison, the one unparsed status, slices: no number from elsewhere


def test_what_a_cell_shows_is_its_value_rounded(made):
    _, found, html = made
    for row in found["runs"]:
        assert f">{format_share(row['accuracy'])} <span" in html
        assert format_interval(row["accuracy_low"], row["accuracy_high"]) in html


def test_the_report_needs_nothing_else_and_runs_nothing(made):
    page = Cells(made[2])
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert all(address.startswith("#") for address in page.addresses)
    assert "url(http" not in made[2]
    assert "@import" not in made[2]
    assert "svg" in page.tags


def test_the_table_on_stdout_is_aligned_and_the_report_has_its_own_line(tmp_path, capsys):
    found = evaluate(tmp_path, write_runs(tmp_path, good=good, poor=poor))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "n", "unparsed", "accuracy", "95", "%", "interval", "macro", "F1"]
    assert lines[1].split()[:4] == ["good", "80", "0", "0.900"]
    assert lines[2].split() == [
        "poor",
        "80",
        "4",
        *(format_share(found["runs"][1]["accuracy"]),),
        *lines[2].split()[4:],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == f"report: {tmp_path / 'out' / 'report.html'}"


def test_the_json_file_tells_what_was_evaluated_with_what(made):
    folder, found, _ = made
    facts = found["provenance"]
    assert facts["inputs"][str(folder / "good.jsonl")]["sha256"] == facts["runs"][0]["sha256"]
    assert {"python", "numpy", "scipy", "scikit-learn", "matplotlib"} <= set(facts["versions"])
    assert facts["runs"][0]["answered_by"] == ["tiny"]
    assert facts["hardware"]["cpus"] >= 1
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"], manifest["counts"]) == (
        "evaluation",
        "finished",
        {"runs": 2, "rows": 80, "unparsed": 4},
    )


def test_unparsed_answers_are_shown_by_status_with_an_example(made):
    _, found, html = made
    assert [(row["run"], row["status"], row["rows"], row["id"]) for row in found["unparsed"]] == [
        ("poor", "truncated", 4, "7")
    ]
    assert "{&#34;thought_process&#34;: &#34;Ste" in html


def test_disagreements_take_each_pattern_in_turn(made):
    _, found, _ = made
    disagreements = found["disagreements"]
    compared = found["comparisons"][0]
    assert (
        disagreements["rows"]
        == compared["only_run_right"] + compared["only_other_right"]
        == sum(row["rows"] for row in disagreements["patterns"])
    )
    assert len(disagreements["examples"]) == 8
    first, second = disagreements["examples"][:2]
    assert [said["right"] for said in first["answers"]] == [True, False]
    assert [said["right"] for said in second["answers"]] == [False, True]


def test_text_from_the_data_cannot_become_markup(tmp_path):
    evil = '<script>alert(1)</script> & "quoted" $x^2$ 犬'

    def nasty(number: int) -> dict:
        thought = f"{evil} </pre>"
        row = answer(
            number,
            1,
            number % 2,
            premise=f"{evil} {number}",
            hypothesis=evil,
            thought_process=thought,
            phenomenon=f"{evil} {number % 2}",
        )
        return row if number else row | {"parse_status": "bad_json", "raw_text": evil, "problem": evil}

    def inverse(number: int) -> dict:
        return nasty(number) | {"predicted_label": 1 - number % 2, "parse_status": "ok"}

    found = evaluate(
        tmp_path,
        write_runs(tmp_path, 40, a=nasty, b=inverse),
        names=("<b>bold</b>", "$x$ & co"),
        slice_by=("phenomenon",),
    )
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34; $x^2$ 犬" in html
    assert found["disagreements"]["examples"][0]["premise"].startswith(evil)


def test_rows_without_labels_get_counts_statuses_and_the_share_of_label_1(tmp_path, capsys):
    predictions = write_runs(
        tmp_path,
        a=lambda number: good(number) | {"true_label": None},
        b=lambda number: poor(number) | {"true_label": None},
    )
    found = evaluate(tmp_path, predictions, slice_by=("phenomenon",))
    assert [(row["n"], row["unparsed"], row["labelled"], row["accuracy"]) for row in found["runs"]] == [
        (80, 0, 0, None),
        (80, 4, 0, None),
    ]
    assert found["runs"][0]["share_1"] == 0.6
    assert found["runs"][1]["share_1"] == found["runs"][1]["predicted_1"] / 76
    assert (found["comparisons"], found["slices"]) == ([], [])
    assert capsys.readouterr().out.splitlines()[0].split()[:5] == ["model", "n", "unparsed", "label", "1"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "no true labels" in html
    assert "accuracy</" not in html


def test_a_partly_labelled_file_is_scored_on_its_labelled_rows(tmp_path):
    found = evaluate(
        tmp_path, write_runs(tmp_path, a=lambda number: good(number) | ({} if number < 60 else {"true_label": None}))
    )
    assert (found["runs"][0]["n"], found["runs"][0]["labelled"], found["runs"][0]["correct"]) == (80, 60, 54)


def test_rows_of_another_order_are_matched_by_key(tmp_path):
    predictions = write_runs(tmp_path, good=good, poor=lambda number: poor(79 - number))
    shuffled = evaluate(tmp_path, predictions)["comparisons"]
    assert shuffled == evaluate(tmp_path, write_runs(tmp_path, good=good, poor=poor))["comparisons"]


def test_a_baseline_is_compared_with_each_other_run_and_all_tests_are_adjusted_together(tmp_path):
    third = write_runs(tmp_path, good=good, poor=poor, worst=lambda number: answer(number, number % 2, 1 - number % 2))
    found = evaluate(tmp_path, third, baseline="poor")
    assert [(row["run"], row["other"]) for row in found["comparisons"]] == [("good", "poor"), ("worst", "poor")]
    smaller, larger = sorted(found["comparisons"], key=lambda row: row["p_value"])
    assert smaller["holm_p_value"] == pytest.approx(2 * smaller["p_value"])
    assert larger["holm_p_value"] == pytest.approx(max(larger["p_value"], 2 * smaller["p_value"]))
    everything = evaluate(tmp_path, third)
    assert [(row["run"], row["other"]) for row in everything["comparisons"]] == [
        ("poor", "good"),
        ("worst", "good"),
        ("worst", "poor"),
    ]


def test_a_rerun_with_other_files_or_settings_is_made_anew(tmp_path):
    predictions = write_runs(tmp_path, good=good, poor=poor)
    first = evaluate(tmp_path, predictions)
    again = evaluate(tmp_path, predictions)
    assert {**first, "provenance": None} == {**again, "provenance": None}
    assert len(evaluate(tmp_path, predictions[:1], confidence=0.9)["runs"]) == 1
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["attempts"]) == 3


def test_the_folder_of_another_stage_is_refused_and_left_alone(tmp_path):
    predictions = write_runs(tmp_path, good=good)
    (tmp_path / "out").mkdir()
    manifest = json.dumps({"stage": "sft", "status": "finished", "identity": {"lora_rank": 32}})
    (tmp_path / "out" / "manifest.json").write_text(manifest)
    with pytest.raises(ResumeError, match="lora_rank: 32"):
        evaluate(tmp_path, predictions)
    assert (tmp_path / "out" / "manifest.json").read_text() == manifest
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_sweep_and_earlier_stages_appear_in_the_report(tmp_path):
    predictions = write_runs(tmp_path, good=good)
    trials = [
        {
            "lora_rank": 8,
            "learning_rate": 0.0002,
            "ablation": "reflected",
            "eval_loss": float("nan"),
            "status": "failed",
            "seconds": 3.0,
        },
        {
            "lora_rank": 32,
            "learning_rate": 0.002,
            "ablation": "reflected",
            "eval_loss": 0.25,
            "status": "finished",
            "seconds": 31.5,
        },
    ]
    (tmp_path / "sweep.json").write_text(
        json.dumps({"trials": trials, "best": {"lora_rank": 32, "learning_rate": 0.002, "ablation": "reflected"}})
    )
    found = evaluate(tmp_path, predictions, sweep_json=str(tmp_path / "sweep.json"))
    found = evaluate(
        tmp_path,
        predictions,
        sweep_json=str(tmp_path / "sweep.json"),
        stages=(str(tmp_path / "out" / "manifest.json"),),
    )
    assert found["sweep"]["trials"][0]["eval_loss"] is None
    assert found["stages"][0]["stage"] == "evaluation"
    assert found["stages"][0]["output"] == "out"
    assert found["stages"][0]["rows"] == 80
    html = (tmp_path / "out" / "report.html").read_text()
    best, failed = html.index("<td>best</td><td>32</td><td>0.002</td>"), html.index("<td>failed</td>")
    assert best < failed
    assert '<h2 id="section-2">Stages</h2>' in html


def test_an_extra_section_is_escaped_rows_or_trusted_html(made):
    sections = [
        {"title": "A & B", "rows": [{"rank": 8, "loss": 0.123456}, {"rank": "<i>", "done": True}]},
        {"title": "Picture", "html": "<svg id='own'></svg>"},
    ]
    html = render_report(made[1], sections)
    assert "A &amp; B</h2>" in html
    assert "<td>8</td><td>0.1235</td><td>–</td>" in html
    assert "<td>&lt;i&gt;</td><td>–</td><td>yes</td>" in html
    assert "<svg id='own'></svg>" in html


def test_without_provenance_there_is_still_a_report(made):
    bare = {key: value for key, value in made[1].items() if key not in ("provenance", "sweep", "stages")}
    assert '<h2 id="provenance">' not in render_report(bare)


def test_the_config_file_in_the_repository_loads():
    assert load_config(ROOT / "configs" / "evaluate_predictions.py", EvaluatePredictionsConfig).predictions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predictions": ()}, "at least one file"),
        ({"predictions": ("a.jsonl", "b.jsonl"), "names": ("a",)}, "names has 1 entries and predictions 2"),
        ({"predictions": ("x/a.jsonl", "y/a.jsonl")}, "two runs are called 'a'; tell them apart with --names"),
        ({"predictions": ("a.jsonl", "a.jsonl"), "names": ("a", "b")}, "names a file twice"),
        ({"predictions": ("a.jsonl",), "names": (" ",)}, "has no name"),
        (
            {"predictions": ("base.jsonl", "b.jsonl"), "baseline": "bas"},
            "no run; the runs are base, b. Did you mean base?",
        ),
        ({"predictions": ("a.jsonl",), "baseline": "a"}, "is the only run"),
        ({"confidence": 1.0}, "less than 1"),
        ({"bootstrap_draws": 0}, "greater than or equal to 1"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        EvaluatePredictionsConfig(**fields)


@pytest.mark.parametrize(
    ("second", "fields", "message"),
    [
        (
            lambda number: poor(number + 3),
            {},
            r"poor.jsonl: lacks 3 of the rows of .*good.jsonl, such as id '0' with the premise 'Dog 0 ran",
        ),
        (
            lambda number: poor(number) | {"premise": "Edited."} if number == 4 else poor(number),
            {},
            r"poor.jsonl: lacks 1 of the rows of .* such as id '4'",
        ),
        (
            lambda number: poor(number) | {"true_label": 1 - number % 2} if number == 4 else poor(number),
            {},
            r"id '4' has true_label 1, and 0 in .*good",
        ),
        (lambda number: poor(number % 79), {}, r"poor.jsonl: id '0' stands twice"),
        (
            lambda number: poor(number) | {"parse_status": "ok"},
            {},
            r"id '7' has parse_status ok and no predicted_label",
        ),
        (
            poor,
            {"slice_by": ("phenomenom",)},
            r"80 rows have no column 'phenomenom' to slice by. Did you mean phenomenon\?",
        ),
        (poor, {"slice_by": ("id",)}, r"column 'id' has 80 different values"),
        (poor, {"sweep_json": "{folder}/good.jsonl"}, r"not the results of a sweep"),
        (poor, {"stages": ("{folder}/good.jsonl",)}, r"not the manifest of a stage"),
        (poor, {"predictions": ("{folder}",)}, r"a folder; give the JSON Lines file"),
        (poor, {"predictions": ("{folder}/none.jsonl",)}, r"no such file"),
    ],
)
def test_files_that_cannot_be_evaluated_are_refused_and_nothing_is_written(tmp_path, second, fields, message):
    predictions = write_runs(tmp_path, good=good, poor=second)
    placed = {
        key: tuple(item.format(folder=tmp_path) for item in value)
        if isinstance(value, tuple)
        else value.format(folder=tmp_path)
        for key, value in fields.items()
    }
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path, **({"predictions": predictions} | placed))
    assert not (tmp_path / "out").exists()


def test_runs_without_labels_cannot_be_compared_with_a_baseline(tmp_path):
    predictions = write_runs(
        tmp_path,
        a=lambda number: good(number) | {"true_label": None},
        b=lambda number: poor(number) | {"true_label": None},
    )
    with pytest.raises(DataError, match="no row has a true label, so no run can be compared with 'a'"):
        evaluate(tmp_path, predictions, baseline="a")


def test_help_answers_within_two_seconds_and_loads_no_heavy_library():
    done, seconds = run_timed([sys.executable, "-m", "ray_jobs.evaluate_predictions", "--help"], enough=2)
    assert done.returncode == 0
    assert "--predictions" in done.stdout
    assert seconds < 2
    script = "import sys, nli.evaluation.run; print([name for name in ('numpy', 'scipy', 'sklearn', 'matplotlib', 'ray', 'torch') if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_refusal_on_the_command_line_is_one_message_and_status_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ray_jobs.evaluate_predictions",
        "--predictions",
        str(tmp_path / "none.jsonl"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file")
    assert "Traceback" not in done.stderr


def test_formats_are_honest():
    assert (format_p(0.0004), format_p(0.05), format_share(None)) == ("<0.001", "0.050", "–")
    assert format_interval(-0.12, 0.045, signed=True) == "−0.120 to +0.045"


def test_a_long_name_keeps_the_table_aligned(made):
    runs = [row | {"run": "a-very-long-name-of-a-run" if number else "b"} for number, row in enumerate(made[1]["runs"])]
    lines = render_table(made[1] | {"runs": runs}).splitlines()
    assert len({len(line) for line in lines}) == 1
