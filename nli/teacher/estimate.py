"""What a generation run will take, before it is started: calls, tokens, cost, and time at the limits.

In:   a config, and the rows of a worklist
Out:  Estimate(num_rows=2000, num_calls=1990, num_prompt_tokens=812_340, num_completion_tokens=398_000, cost=181_551_000, seconds=398.0, …)

Prompts are counted by the model's tokenizer. How long replies are, and how many want a repair, is assumed until this output has 50 replies in the ledger;
from then on they tell, and correct the count of the prompts as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nli.api.ledger_file import LedgerReader, Totals
from nli.api.limiter import MARGIN_SECONDS, WINDOW_SECONDS
from nli.api.prices import PRICES_DATE, PRICES_SOURCE, format_dollars
from nli.api.token_counts import load_token_counter
from nli.runtime.worklist import Worklist
from nli.task.prompts import Prompt
from nli.teacher.progress import FEWEST_REPLIES
from nli.teacher.requests import TeacherConfig

ASSUMED_COMPLETION_TOKENS = {"initial_generation": 190, "regeneration": 190, "scoring": 250, "reflection": 250}


@dataclass(frozen=True)
class Estimate:
    """What asking for the pending rows will take. Cost in nano-dollars, None where the price is unknown; `basis` says where the figures come from."""

    num_rows: int
    num_requests: int
    num_done: int
    num_calls: int
    num_prompt_tokens: int
    num_completion_tokens: int
    cost: int | None
    most_cost: int | None
    seconds: float | None
    basis: str


def estimate_run(
    config: TeacherConfig,
    prompt: Prompt,
    worklist: Worklist,
    ledger_folder: Path,
    run: str,
    is_done: Callable[[list[bytes]], set[bytes]],
) -> Estimate:
    """Count all rows of a worklist. Sends nothing and writes nothing."""
    counter = load_token_counter(config.model, config.tokenizer)
    num_rows, counted_done, counted_pending, num_done, num_pending = 0, 0, 0, 0, 0
    known: set[bytes] = set()
    for chunk in worklist.iterate():
        done = is_done(list({key for _, key in chunk}))
        for row, key in chunk:
            num_rows += 1
            if key in known:
                continue
            known.add(key)
            tokens = counter.count_messages(prompt.render_messages(row))
            if key in done:
                num_done, counted_done = num_done + 1, counted_done + tokens
            else:
                num_pending, counted_pending = num_pending + 1, counted_pending + tokens
    totals = _read_totals(ledger_folder, run)
    rows_of_run = totals.done - totals.repairs  # another output may have had the rows of this one's repairs
    if num_done >= FEWEST_REPLIES and rows_of_run >= FEWEST_REPLIES:
        calls_per_row = totals.done / rows_of_run
        completion_per_row = totals.completion_tokens / rows_of_run
        num_prompt = round(counted_pending * (totals.prompt_tokens / rows_of_run) / (counted_done / num_done))
        basis = f"prompts counted by {counter.name} and corrected, like replies and repairs, by the {totals.done} replies that are there"
    else:
        calls_per_row, completion_per_row, num_prompt = 1.0, ASSUMED_COMPLETION_TOKENS[prompt.name], counted_pending
        exact = "" if counter.is_exact else " (an estimate)"
        basis = f"prompts counted by {counter.name}{exact}; replies taken for {completion_per_row} tokens each until {FEWEST_REPLIES} are there"
    num_calls = round(num_pending * calls_per_row)
    num_completion = round(num_pending * completion_per_row)
    price = config.price()
    minute = WINDOW_SECONDS + MARGIN_SECONDS
    waits = [num_calls / config.requests_per_minute * minute] if config.requests_per_minute else []
    waits += [(num_prompt + num_completion) / config.tokens_per_minute * minute] if config.tokens_per_minute else []
    return Estimate(
        num_rows=num_rows,
        num_requests=num_done + num_pending,
        num_done=num_done,
        num_calls=num_calls,
        num_prompt_tokens=num_prompt,
        num_completion_tokens=num_completion,
        cost=price.cost_nanodollars(num_prompt, num_completion) if price else None,
        most_cost=price.cost_nanodollars(num_prompt, num_pending * config.max_tokens) if price else None,
        seconds=max(waits, default=None),
        basis=basis,
    )


def describe_estimate(config: TeacherConfig, estimate: Estimate) -> str:
    """The estimate for the console."""
    lines = [
        f"dry run: {estimate.num_rows} rows, {estimate.num_requests} different requests, {estimate.num_done} answered already; nothing was sent",
        f"  calls              {estimate.num_calls:,}",
        f"  prompt tokens      {estimate.num_prompt_tokens:,}",
        f"  completion tokens  {estimate.num_completion_tokens:,}",
    ]
    if estimate.cost is None:
        lines.append(
            f"  cost               unknown: no price of {config.model}; give --price-input-per-million and --price-output-per-million"
        )
    else:
        source = (
            f"prices of {PRICES_DATE}, {PRICES_SOURCE}" if config.price_input_per_million is None else "prices as given"
        )
        half = ", batch at half price" if config.mode == "batch" else ""
        most = f"{format_dollars(estimate.most_cost)} if every reply had {config.max_tokens} tokens"
        lines.append(f"  cost               {format_dollars(estimate.cost)}, {most}")
        lines.append(f"                     ({source}{half})")
    at_limits = "set no limit" if estimate.seconds is None else f"{estimate.seconds:,.0f} s at the limits"
    lines.append(
        f"  time               {'as fast as the server answers: you have ' if estimate.seconds is None else ''}{at_limits}"
    )
    lines.append(f"  basis              {estimate.basis}")
    return "\n".join(lines)


def _read_totals(folder: Path, run: str) -> Totals:
    if not (folder / "ledger.sqlite").exists():
        return Totals()
    reader = LedgerReader(folder)
    try:
        return reader.read_totals(run)
    finally:
        reader.close()
