"""The benchmark of inference: its workload, its ratios and tables, and where it says that engines part.

python -m pytest tests/test_inference_benchmark.py
"""

import csv
import time

import pytest

from benchmarks.inference_agree import pair_up, write_ordered
from benchmarks.inference_report import Divergence, compare_answers, find_divergence, find_ratios, render_table
from benchmarks.inference_runs import Board, read_job
from benchmarks.inference_sharing import Pace, StepEngine, find_perfect_seconds
from benchmarks.inference_workload import count_steps, draw_lengths, read_workload, write_pairs, write_workload
from benchmarks.product import pick_lines
from nli.engines.interface import Request

BARE = {
    "arm": "bare-vllm",
    "precision": "bf16",
    "rows": 1977,
    "wall_seconds": 110.0,
    "load_seconds": 70.0,
    "rows_seconds": 20.0,
    "rows_per_second": 98.85,
}
JOB = {
    "arm": "job",
    "precision": "bf16",
    "rows": 1977,
    "wall_seconds": 101.5,
    "load_seconds": 68.0,
    "rows_seconds": 21.0,
    "rows_per_second": 94.14,
}
ORIGINAL = {
    "arm": "original",
    "precision": "nf4",
    "rows": 512,
    "rows_seconds": 512.0,
    "rows_per_second": 1.0,
    "extrapolated_from_batches": 1,
}
FAILED = {"arm": "job", "precision": "fp8", "failed_with": 124, "wall_seconds": 330.0, "end": "…"}


def test_completion_lengths_have_the_original_test_sets_mean_floor_and_cap():
    lengths = draw_lengths(1977)
    assert len(lengths) == 1977
    assert 195 <= sum(lengths) / len(lengths) <= 205
    assert min(lengths) >= 60 and max(lengths) <= 512
    assert draw_lengths(1977) == lengths


def test_the_workload_is_the_same_each_time_and_read_as_the_job_renders_it(tmp_path):
    write_workload(tmp_path / "a.csv", 5)
    write_workload(tmp_path / "b.csv", 5)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    prompts, lengths = read_workload(tmp_path / "a.csv", max_rows=3)
    assert lengths == draw_lengths(5)[:3]
    assert len(prompts) == 3
    assert all(prompt.startswith("[INST] Premise: ") and prompt.endswith("[/INST]") for prompt in prompts)
    assert len(set(prompts)) == 3


def test_short_pairs_have_an_id_each(tmp_path):
    write_pairs(tmp_path / "pairs.csv", 2500)
    rows = list(csv.DictReader((tmp_path / "pairs.csv").open(encoding="utf-8", newline="")))
    assert [row["id"] for row in rows] == [str(index) for index in range(2500)]
    assert rows[0]["premise"] == rows[2000]["premise"]


def test_static_batches_take_the_steps_of_their_longest_rows():
    assert count_steps([3, 9, 4, 5, 1], batch=2) == 9 + 5 + 1


def test_ratios_compare_the_newest_good_results():
    older = JOB | {"rows_seconds": 40.0, "wall_seconds": 130.0}
    ratios = find_ratios([older, BARE, JOB, FAILED, ORIGINAL])
    assert ratios == {
        "job rows ÷ bare rows, bf16": 1.05,
        "job whole − bare load and rows, bf16, s": 11.5,
        "job rows/s ÷ original rows/s, bf16": 94.1,
    }


def test_the_table_says_what_failed_and_what_was_extrapolated():
    lines = render_table([BARE, FAILED, ORIGINAL]).splitlines()
    assert lines[2] == "| bare-vllm | bf16 | 1,977 | 110 | 70.00 | 20.00 | 98.85 |  |  |"
    assert lines[3].startswith("| job | fp8 | failed (124) | 330 |")
    assert "512 (extrapolated from 1 batch)" in lines[4]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], Divergence(1, (2, 5))),
        ([1, 2], [1, 2, 9], Divergence(2, (None, 9))),
        ([], [], None),
    ],
)
def test_the_first_place_where_two_answers_part_is_found(left, right, expected):
    assert find_divergence(left, right) == expected


def test_agreement_counts_labels_and_texts_and_refuses_other_rows():
    left = [{"id": str(index), "predicted_label": 1, "raw_text": "a"} for index in range(4)]
    right = [left[0], left[1] | {"raw_text": "b"}, left[2] | {"raw_text": "c", "predicted_label": 0}, left[3]]
    assert compare_answers(left, right) == {"rows": 4, "labels_agree": 0.75, "texts_agree": 0.5, "differing": [1, 2]}
    with pytest.raises(ValueError, match="other rows"):
        compare_answers(left, right[1:])


def test_engines_are_compared_at_the_same_precision_and_with_themselves():
    vllm, plain, small, exact = specs = [
        "vllm:bf16",
        "transformers:bf16",
        "transformers:bf16:7:reversed",
        "transformers:fp32",
    ]
    assert pair_up(specs) == [(vllm, plain), (vllm, small), (plain, small)]
    assert pair_up([exact, plain]) == [(exact, plain)]


def test_rows_keep_their_ids_in_any_order(tmp_path):
    (tmp_path / "pairs.csv").write_text('premise,hypothesis,label\nA ran.,B ran.,0\n"C, D",E,1\n', encoding="utf-8")
    ordered = write_ordered(tmp_path / "pairs.csv", tmp_path)
    assert ordered[""].read_text(encoding="utf-8").splitlines() == [
        "id,premise,hypothesis,label",
        "0,A ran.,B ran.,0",
        '1,"C, D",E,1',
    ]
    assert ordered["reversed"].read_text(encoding="utf-8").splitlines()[1:] == ['1,"C, D",E,1', "0,A ran.,B ran.,0"]


def test_an_arm_that_fails_or_takes_too_long_is_a_result_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.delenv("OUT", raising=False)
    board = Board(tmp_path, budget_seconds=60, gpu=False)
    slow = board.run_process(
        "slow", [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"], 5.5
    )
    assert (slow["exit_status"], slow["output"]) == (124, "began\n")
    quick = board.run_process("quick", [sys.executable, "-c", "import os; print(os.environ['VLLM_CACHE_ROOT'])"], 30)
    assert quick["exit_status"] == 0
    assert quick["output"].startswith(str(tmp_path / "caches-"))
    assert not list(tmp_path.glob("caches-*"))
    board.record({"arm": "slow", "failed_with": 124})
    assert (tmp_path / "results.jsonl").read_text() == capsys.readouterr().out.removeprefix("RESULT ")
    assert "==== slow: exit status 124" in (tmp_path / "arms.log").read_text()


def test_a_jobs_figures_come_from_its_timing_and_rows(tmp_path):
    answers = '[{"parse_status": "ok", "num_completion_tokens": 7, "num_prompt_tokens": 3}, {"parse_status": "request_failed", "num_completion_tokens": null}]'
    (tmp_path / "a.json").write_text(
        '{"config": {"batch_size": 3}, "timing": {"load_seconds": 4.5, "row_seconds": 2.0}, "rows": ' + answers + "}"
    )
    found = read_job([tmp_path / "a.json"])
    assert (found["rows"], found["failed"], found["output_tokens"], found["prompt_tokens"]) == (2, 1, 7, 3)
    assert (found["load_seconds"], found["rows_seconds"], found["peak_memory_gb"]) == (4.5, 2.0, None)


def test_key_lines_of_a_job_are_its_stages_own_once_each_without_rays_names():
    output = "2026-11-25 INFO worker.py:1 -- Connecting\nsft: 40 steps\n\x1b[36m(RayTrainWorker pid=3)\x1b[0m sft a: goes on from checkpoint-2\n"
    output += "inference:  40%|██ | 2/5\ninference: tiny: 0 of 400 unparsed\n  12.0 rows/s\nsft: 40 steps\n"
    assert pick_lines(output) == [
        "sft: 40 steps",
        "sft a: goes on from checkpoint-2",
        "inference: tiny: 0 of 400 unparsed",
        "  12.0 rows/s",
    ]


def test_engines_that_keep_time_answer_after_as_many_steps_as_a_row_has_tokens_and_a_perfect_queue_is_known():
    pace = Pace(step_seconds=0.004, fixed=0.5, at_once=4, load_seconds=0.0)
    assert find_perfect_seconds([10] * 8, 1, pace) == pytest.approx(20 * 0.004)
    assert find_perfect_seconds([10] * 8, 2, pace) == pytest.approx(10 * 0.004)
    assert find_perfect_seconds([10, 20], 1, pace) == pytest.approx(10 * 0.003 + 10 * 0.0025)
    engine, started = StepEngine(pace), time.monotonic()
    futures = [engine.submit(Request(prompt="", num_tokens=length)) for length in (20, 10, 10, 10, 10)]
    assert [future.result(5).num_completion_tokens for future in futures] == [20, 10, 10, 10, 10]
    assert time.monotonic() - started >= 20 * 0.0025
