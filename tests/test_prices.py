"""Prices: exact sums, honest gaps."""

import pytest

from nli.api.prices import PRICES, Price, find_price, format_dollars, require_price, to_nanodollars
from nli.runtime.errors import ConfigError


def test_a_million_tokens_each_way_cost_what_the_table_says():
    for price in PRICES.values():
        assert price.cost(1_000_000, 0) == price.input_per_million
        assert price.cost(0, 1_000_000) == price.output_per_million


def test_one_call_costs_whole_nanodollars():
    assert find_price("ministral-8b-2512").cost_nanodollars(250, 190) == 66_000
    assert find_price("mistral-large-2512").cost_nanodollars(600, 200) == 600_000
    assert Price(0.15, 0.15).cost_nanodollars(0, 0) == 0


def test_a_cost_below_a_nanodollar_is_rounded_up_never_down():
    assert Price(0.0001, 0).cost_nanodollars(1, 0) == 1
    assert Price(0.0001, 0).cost_nanodollars(11, 0) == 2


def test_two_hundred_thousand_calls_add_up_without_drift():
    price = Price(0.15, 0.60)
    assert sum(price.cost_nanodollars(251, 187) for _ in range(200_000)) == 200_000 * (251 * 150 + 187 * 600)


def test_the_seeds_size_costs_what_the_reference_works_out():
    rows = 37_500
    assert require_price("ministral-8b-2512").cost(rows * 250, rows * 190) == pytest.approx(2.475)
    assert require_price("ministral-8b-2512").half().cost(rows * 250, rows * 190) == pytest.approx(1.2375)


@pytest.mark.parametrize("model", sorted(PRICES))
def test_batch_costs_half(model):
    price = find_price(model)
    assert price.half() == Price(price.input_per_million / 2, price.output_per_million / 2)
    assert price.half().cost_nanodollars(12_346, 7_890) * 2 == price.cost_nanodollars(12_346, 7_890)


@pytest.mark.parametrize(
    "model", ["ministral-8b-latest", "mistral-large-latest", "open-mistral-7b", "my-own-model", "Ministral-8B-2512", ""]
)
def test_a_model_that_is_not_in_the_table_has_no_price(model):
    assert find_price(model) is None


def test_a_missing_price_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError,
        match=r"'ministral-8b-2521' \(table of \d{4}-\d\d-\d\d\)\. Did you mean ministral-8b-2512\? Give the price itself",
    ):
        require_price("ministral-8b-2521")
    with pytest.raises(ConfigError, match=r"'xyzzy' \(table of [0-9-]+\)\. Give the price itself"):
        require_price("xyzzy")


def test_an_alias_is_refused_with_the_dated_name():
    with pytest.raises(ConfigError, match=r"what it points to changes: name ministral-8b-2512\."):
        require_price("ministral-8b-latest")
    with pytest.raises(ConfigError, match=r"what it points to changes\. Give"):
        require_price("codestral-latest")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="a price is 0 or more"):
        Price(0.1, value)


def test_a_server_of_ones_own_may_be_free():
    assert Price(0, 0).cost_nanodollars(10**9, 10**9) == 0


def test_dollars_become_nanodollars_as_written():
    assert [to_nanodollars(value) for value in (0.15, 1, 0.1 + 0.2, 25.0)] == [
        150_000_000,
        10**9,
        300_000_000,
        25 * 10**9,
    ]


@pytest.mark.parametrize(
    ("nanodollars", "text"),
    [
        (0, "$0.00"),
        (66_000, "$0.000066"),
        (33_600_000, "$0.034"),
        (2_470_000_000, "$2.47"),
        (1_234_500_000_000, "$1,234.50"),
    ],
)
def test_costs_are_shown_as_money(nanodollars, text):
    assert format_dollars(nanodollars) == text
