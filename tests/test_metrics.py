"""The figures of an evaluation: published numbers, small tables that the eye can check, and scipy or simulation as a second opinion."""

import time

import numpy as np
import pytest
from scipy.stats import binomtest

from nli.evaluation.metrics import (
    UNPARSED,
    adjust_holm,
    bootstrap_f1,
    compare_answers,
    count_confusion,
    find_quartiles,
    name_quartiles,
    score_answers,
    score_group,
    share_words,
    smallest_detectable_difference,
    wilson_interval,
)


def from_counts(*cells: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels from (truth, predicted, count)."""
    return np.repeat([cell[0] for cell in cells], [cell[2] for cell in cells]), np.repeat(
        [cell[1] for cell in cells], [cell[2] for cell in cells]
    )


def score(truth, predicted, draws=1000) -> dict:
    return score_answers(np.array(truth, dtype=int), np.array(predicted, dtype=int), 0.95, draws, seed=1)


@pytest.mark.parametrize(
    ("true_positive", "false_positive", "false_negative", "true_negative", "accuracy", "precision", "recall", "f1"),
    [(916, 101, 105, 855, 0.8958017, 0.89566, 0.89576, 0.89570), (984, 877, 37, 79, 0.5377, 0.6049, 0.5232, 0.4151)],
)
def test_the_published_macro_figures_follow_from_their_confusion_counts(
    true_positive, false_positive, false_negative, true_negative, accuracy, precision, recall, f1
):
    scores = score(
        *from_counts((1, 1, true_positive), (0, 1, false_positive), (1, 0, false_negative), (0, 0, true_negative))
    )
    assert scores["labelled"] == 1977
    assert scores["accuracy"] == pytest.approx(accuracy, abs=5e-5 if accuracy < 0.6 else 5e-8)
    digits = 5e-5 if accuracy < 0.6 else 5e-6
    assert [scores["macro_precision"], scores["macro_recall"], scores["macro_f1"]] == pytest.approx(
        [precision, recall, f1], abs=digits
    )
    assert scores["confusion"] == [[true_positive, false_negative, 0], [false_positive, true_negative, 0]]


def test_the_published_teacher_figures_are_those_of_the_positive_class():
    scores = score(*from_counts((1, 1, 10927), (0, 1, 1119), (1, 0, 7412), (0, 0, 16139)))
    figures = [scores["accuracy"], scores["positive_precision"], scores["positive_recall"], scores["positive_f1"]]
    assert figures == pytest.approx([0.760, 0.907, 0.596, 0.719], abs=5e-4)


def test_an_unparsed_row_is_wrong_lowers_recall_and_is_no_prediction():
    scores = score([1, 1, 0, 0], [1, UNPARSED, 0, 1])
    assert scores["accuracy"] == 0.5
    assert scores["parsed_accuracy"] == pytest.approx(2 / 3)
    assert (scores["unparsed_labelled"], scores["correct"], scores["confusion"]) == (1, 2, [[1, 0, 1], [1, 1, 0]])
    assert (scores["positive_precision"], scores["positive_recall"], scores["positive_f1"]) == (0.5, 0.5, 0.5)
    assert scores["macro_precision"] == 0.75  # class 0: 1 of 1 predicted
    assert scores["macro_recall"] == 0.5
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_answers_that_are_all_unparsed_score_zero_and_have_no_parsed_accuracy():
    scores = score([1, 0], [UNPARSED, UNPARSED])
    assert (scores["accuracy"], scores["macro_f1"], scores["positive_f1"], scores["parsed_accuracy"]) == (
        0.0,
        0.0,
        0.0,
        None,
    )


def test_rows_of_one_class_have_an_accuracy_but_no_macro_mean():
    scores = score([0, 0, 0], [0, 0, 1])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] is None
    assert scores["macro_f1_low"] is None
    assert scores["positive_f1"] is None


def test_no_labelled_rows_have_no_figures():
    scores = score([], [])
    assert (scores["labelled"], scores["accuracy"], scores["accuracy_low"], scores["macro_f1"]) == (0, None, None, None)
    assert scores["confusion"] == [[0, 0, 0], [0, 0, 0]]


def test_wilson_intervals_match_the_published_ones_and_stay_inside_0_and_1():
    assert wilson_interval(1771, 1977, 0.95) == pytest.approx((0.882, 0.909), abs=5e-4)
    assert wilson_interval(0, 10, 0.95) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10, 0.95)[1] == pytest.approx(1)


def test_the_bootstrap_of_counts_equals_resampling_rows():
    truth, predicted = from_counts((1, 1, 60), (1, 0, 12), (1, UNPARSED, 3), (0, 1, 10), (0, 0, 65))
    rng = np.random.default_rng(5)
    values = []
    for _ in range(1000):
        rows = rng.integers(0, len(truth), len(truth))
        table = count_confusion(truth[rows], predicted[rows])
        f1 = [2 * table[k, k] / (table[k].sum() + table[:, k].sum()) for k in (0, 1)]
        values.append(sum(f1) / 2)
    macro, _ = bootstrap_f1(count_confusion(truth, predicted), 0.95, 10_000, seed=1)
    assert macro == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.01)


def test_ten_thousand_draws_take_well_under_a_second_and_a_seed_repeats_them():
    confusion = np.array([[916, 105, 4], [101, 855, 2]])
    start = time.perf_counter()
    first = bootstrap_f1(confusion, 0.95, 10_000, seed=1)
    assert time.perf_counter() - start < 0.5
    assert bootstrap_f1(confusion, 0.95, 10_000, seed=1) == first != bootstrap_f1(confusion, 0.95, 10_000, seed=2)


def test_a_paired_comparison_counts_the_rows_that_one_run_alone_has_right():
    truth = np.array([1] * 10)
    run = np.array([1, 1, 1, 1, 1, 1, 1, 0, 0, UNPARSED])
    other = np.array([1, 0, 0, 0, UNPARSED, 0, 0, 1, 0, 0])
    compared = compare_answers(truth, run, other, 0.95, 1000, seed=1)
    counts = [
        compared[name]
        for name in (
            "n",
            "both_right",
            "only_run_right",
            "only_other_right",
            "neither_right",
            "unparsed_run",
            "unparsed_other",
        )
    ]
    assert counts == [10, 1, 6, 1, 2, 1, 1]
    assert compared["difference"] == 0.5
    assert compared["p_value"] == pytest.approx(16 / 128)  # 2 × P(at most 1 of 7) = 2 × (1 + 7) / 2**7
    assert compared["low"] < 0.5 < compared["high"]


def test_equal_runs_show_no_difference():
    truth = np.array([1, 0, 1, 0] * 20)
    compared = compare_answers(truth, truth, truth, 0.95, 1000, seed=1)
    assert (compared["difference"], compared["p_value"], compared["low"], compared["high"]) == (0, 1, 0, 0)
    assert compared["smallest_detectable"] > 0.05  # no discordance seen is no proof that there is none


def test_the_paired_interval_agrees_with_the_normal_one_on_many_rows():
    truth = np.ones(2000, dtype=int)
    run = np.r_[np.ones(1800, dtype=int), np.zeros(200, dtype=int)]
    other = np.r_[np.zeros(100, dtype=int), np.ones(1700, dtype=int), np.ones(40, dtype=int), np.zeros(160, dtype=int)]
    compared = compare_answers(truth, run, other, 0.95, 10_000, seed=1)
    spread = 1.96 * np.sqrt(140 - 60**2 / 2000) / 2000
    assert [compared["low"], compared["high"]] == pytest.approx([0.03 - spread, 0.03 + spread], abs=5e-4)


def test_holm_multiplies_step_by_step_and_never_falls():
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_the_smallest_detectable_difference_solves_connors_formula():
    difference = smallest_detectable_difference(1977, 0.08, 0.05)
    needed = (1.959964 * np.sqrt(0.08) + 0.841621 * np.sqrt(0.08 - difference**2)) ** 2 / difference**2
    assert needed == pytest.approx(1977, rel=1e-4)
    assert difference == pytest.approx(0.0178, abs=1e-4)


@pytest.mark.parametrize(("n", "discordance"), [(400, 0.1), (1977, 0.08), (100, 0.02)])
def test_the_exact_test_finds_the_smallest_detectable_difference_about_four_times_in_five(n, discordance):
    difference = smallest_detectable_difference(n, discordance, 0.05)
    share = max(discordance, difference)
    tables = np.random.default_rng(0).multinomial(
        n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=600
    )
    found = np.mean([binomtest(int(run), int(run + other)).pvalue < 0.05 for run, other, _ in tables if run + other])
    assert 0.70 < found < 0.86


def test_three_rows_can_detect_nothing():
    assert smallest_detectable_difference(3, 0.5, 0.05) is None


def test_a_group_has_counts_and_an_interval():
    group = score_group(np.array([1, 1, 0]), np.array([1, UNPARSED, 0]), 0.95)
    assert (group["n"], group["unparsed"], group["correct"], group["accuracy"]) == (3, 1, 2, pytest.approx(2 / 3))
    assert group["accuracy_low"] < 2 / 3 < group["accuracy_high"]


def test_equal_values_share_a_quartile():
    assert find_quartiles(np.array([1, 2, 3, 4, 5, 6, 7, 8])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(find_quartiles(np.array([4, 4, 4, 4])).tolist()) == {0}


def test_quartiles_name_the_range_that_they_span():
    assert name_quartiles([3, 4, None, 9, 12], "words", "none") == [
        ("Q1", "3 words"),
        ("Q2", "4 words"),
        ("none", ""),
        ("Q3", "9 words"),
        ("Q4", "12 words"),
    ]
    assert name_quartiles([5, 5, 5], "%") == [("Q1", "5 %")] * 3
    assert name_quartiles([None], "words", "none") == [("none", "")]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "share"),
    [
        ("Two dogs ran.", "Dogs ran!", 1.0),
        ("Two dogs ran.", "Animals ran.", 0.5),
        ("Two dogs ran.", "...", 0.0),
        ("", "Ran.", 0.0),
    ],
)
def test_word_overlap_is_the_share_of_the_hypothesis_words_that_the_premise_has(premise, hypothesis, share):
    assert share_words(premise, hypothesis) == share
