"""What a teacher's tokens cost: a dated table of prices, and costs as whole nano-dollars.

In:   require_price("ministral-8b-2512").cost_nanodollars(250, 190)
Out:  66000, which is $0.000066: 250 tokens at $0.15 and 190 at $0.15 per million

Budgets add up hundreds of thousands of such costs, so they are integers: sums do not drift, and no call is rounded down.
"""

from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from math import isfinite

from nli.runtime.config import nearest
from nli.runtime.errors import ConfigError

NANO = 10**9
"""nano-dollars in a dollar"""
PRICES_DATE = "2026-11-22"
PRICES_SOURCE = "litellm's public price map; not checked against the vendor's own page, so verify before a large run"


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens that go in (the prompt) and come out (the completion)."""

    input_per_million: float
    output_per_million: float

    def __post_init__(self) -> None:
        for name in ("input_per_million", "output_per_million"):
            value = getattr(self, name)
            if not isfinite(value) or value < 0:
                raise ConfigError(f"{name} is {value}: a price is 0 or more US dollars per million tokens.")

    def cost_nanodollars(self, num_prompt_tokens: int, num_completion_tokens: int) -> int:
        """The cost of so many tokens in nano-dollars, rounded up."""
        per_million = num_prompt_tokens * to_nanodollars(
            self.input_per_million
        ) + num_completion_tokens * to_nanodollars(self.output_per_million)
        return -(-per_million // 10**6)

    def cost(self, num_prompt_tokens: int, num_completion_tokens: int) -> float:
        """The same in dollars, for the eye; budgets add nano-dollars."""
        return self.cost_nanodollars(num_prompt_tokens, num_completion_tokens) / NANO

    def half(self) -> "Price":
        """The price in the vendor's Batch API."""
        return Price(self.input_per_million / 2, self.output_per_million / 2)


PRICES: dict[str, Price] = {
    "ministral-3b-2512": Price(0.10, 0.10),
    "ministral-8b-2512": Price(0.15, 0.15),
    "ministral-14b-2512": Price(0.20, 0.20),
    "mistral-small-2603": Price(0.15, 0.60),
    "open-mistral-nemo": Price(0.30, 0.30),
    "open-mistral-nemo-2407": Price(0.30, 0.30),
    "mistral-large-2512": Price(0.50, 1.50),
    "mistral-large-4": Price(1.36, 4.18),
    "mistral-medium-2604": Price(1.50, 7.50),
    "mistral-medium-3-5": Price(1.50, 7.50),
}
"""Prices of PRICES_DATE from PRICES_SOURCE, by the model's exact name."""


def find_price(model: str) -> Price | None:
    """The price of exactly this model, or None. An alias such as ministral-8b-latest has none: what it points to, and so its price, changes."""
    return PRICES.get(model)


def require_price(model: str) -> Price:
    """The price of a model. Raises ConfigError with the nearest known name."""
    price = find_price(model)
    if price is not None:
        return price
    if model.endswith("-latest"):
        dated = [name for name in PRICES if name.startswith(model.removesuffix("latest"))]
        hint = " An alias has no price of its own, since what it points to changes" + (
            f": name {' or '.join(dated)}." if dated else "."
        )
    else:
        hint = nearest(model, list(PRICES))
    raise ConfigError(
        f"no price is known for model {model!r} (table of {PRICES_DATE}).{hint} Give the price itself, in dollars per million tokens."
    )


@lru_cache(maxsize=64)  # asked for every call's tokens
def to_nanodollars(dollars: float) -> int:
    """Dollars, as a person writes them, in whole nano-dollars: 0.15 is 150,000,000."""
    return int(Decimal(str(dollars)) * NANO)


def format_dollars(nanodollars: int) -> str:
    """Two decimals from a dollar up, else two significant digits: $2.47, $0.034, $0.000066."""
    dollars = nanodollars / NANO
    if dollars >= 1 or nanodollars == 0:
        return f"${dollars:,.2f}"
    return f"${Decimal(f'{dollars:.1e}'):f}"
