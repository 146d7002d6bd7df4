"""What a teacher is asked, and what its replies say: configs, requests and outcomes, without a call. `nli.teacher.online` sends.

In:   {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}, prompt initial_generation
Out:  the request's body and key; and from the ledger's reply to it, by `read_outcome`:
      Outcome(status="ok", fields={"thought_process": "…", "predicted_label": 1}, raw_text="{…}", finish_reason="stop", num_prompt_tokens=212, …)

What fails for good is an outcome with its reason, never an absence.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field

from nli.api.chat import KEY_VARIABLE, NO_KEY, Reply, chat_url, read_api_key, read_reply
from nli.api.ledger_file import Entry, LedgerReader, encode_body, request_key
from nli.api.limiter import Limits
from nli.api.prices import Price, find_price, require_price
from nli.runtime.config import Count, CountOrZero, NonNegative, Positive, config_class
from nli.runtime.errors import ConfigError, TeacherError
from nli.task.parsing import Parsed, ParseStatus, parse_reply
from nli.task.prompts import Prompt

NO_LIMITS = Limits()
MOST_DOLLARS = 1e9  # of a budget; the ledger's whole nano-dollars end at nine times that


@config_class
class TeacherConfig:
    """How the teacher is reached and asked; the stages that ask one add their files."""

    base_url: str = "https://api.mistral.ai"
    """server that speaks the chat-completions API, with or without /v1"""
    api: Literal["mistral", "openai"] = "mistral"
    """whose names the request's fields have: openai for vLLM and other compatible servers"""
    model: str = "ministral-8b-2512"
    """model name as the server knows it"""
    api_key_file: str = ""
    """file that holds the API key; empty: MISTRAL_API_KEY from the environment or .env; none: the server asks for no key"""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """sampling temperature, 0 to 2; 0 is the most repeatable"""
    max_tokens: Count = 1024
    """most tokens in one reply"""
    random_seed: CountOrZero = 1337
    """seed sent with each request"""
    sample_index: CountOrZero = 0
    """which of several independent answers to the same request; another index asks anew"""
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"
    """how the server is told to answer in JSON: by the reply's schema, as any JSON object, or only by the prompt"""
    mode: Literal["online", "batch"] = "online"
    """one call for each request, or the server's Batch API: half the price, and hours instead of minutes"""
    batch_max_requests: Count = 100_000
    """most requests in one batch job; the vendor's documented limit is 100,000"""
    batch_timeout_hours: Count = 24
    """hours after which the server ends a batch job that is not done"""
    batch_poll_seconds: Positive = 60
    """longest wait between two looks at a batch job"""
    workers: Count = 4
    """actors that send requests"""
    requests_per_minute: NonNegative | None = None
    """the account's limit over all workers and jobs; 0: none; None: as other jobs have set it"""
    tokens_per_minute: NonNegative | None = None
    """the account's limit over all workers and jobs, prompt and reply together; 0: none; None: as other jobs have set it"""
    calls_in_flight: CountOrZero | None = None
    """the account's limit of calls under way at once, over all workers and jobs; 0: none; None: as other jobs have set it"""
    max_in_flight: Count = 16
    """most requests under way in one worker"""
    timeout_seconds: Positive = 120
    """seconds until a call without answer counts as failed"""
    max_attempts: Count = 6
    """tries of one request before its row is a failed one"""
    ambiguous: Literal["retry", "hold"] = "retry"
    """what to do about a call that was sent and got no answer, and may have been billed: ask again (counted), or leave the row failed"""
    repair_invalid: bool = True
    """ask once more, naming the fault, when a reply cannot be read"""
    max_cost: NonNegative = 0
    """US dollars that this output may cost, earlier attempts included; 0: no bound"""
    price_input_per_million: NonNegative | None = None
    """US dollars per million prompt tokens; None: from the price table"""
    price_output_per_million: NonNegative | None = None
    """US dollars per million reply tokens; None: from the price table"""
    tokenizer: str = ""
    """tokenizer folder to count prompts with; empty: the model's own where it is known, else an estimate"""
    dry_run: bool = False
    """count calls, tokens, cost and time, and send nothing"""
    ledger_dir: str = "data/ledger"
    """folder of the ledger of requests, on a disk of the driver's machine or one that it mounts; shared by all outputs"""
    max_rows: CountOrZero = 0
    """read only so many rows of the input; 0: all"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def check(self) -> None:
        """Raise ConfigError for fields that conflict; the stages' own __post_init__ call it."""
        if (self.price_input_per_million is None) != (self.price_output_per_million is None):
            raise ConfigError("price_input_per_million and price_output_per_million go together; give both or neither.")
        if self.max_cost >= MOST_DOLLARS:
            raise ConfigError(f"max_cost is {self.max_cost:g}, which no account holds; 0 is no bound.")
        if self.max_cost:
            self.price()
        if self.mode == "batch" and self.api != "mistral":
            raise ConfigError("mode batch speaks Mistral's Batch API; use --mode online with --api openai.")

    def price(self) -> Price | None:
        """What tokens cost; None if that is not known. Raises ConfigError if it is not known and max_cost needs it."""
        if self.price_input_per_million is not None and self.price_output_per_million is not None:
            price = Price(self.price_input_per_million, self.price_output_per_million)
        else:
            price = require_price(self.model) if self.max_cost else find_price(self.model)
        return price.half() if price and self.mode == "batch" else price

    def limits(self, others: Limits = NO_LIMITS) -> Limits:
        """The account's limits: this config's, and where it has none those that other jobs have set."""
        return others.changed(self.requests_per_minute, self.tokens_per_minute, self.calls_in_flight)

    def with_limits(self, limits: Limits) -> Self:
        """This config with limits that are settled."""
        each = {
            "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute,
            "calls_in_flight": limits.max_in_flight,
        }
        return replace(self, **each)


def describe_requests(config: TeacherConfig, prompt: Prompt) -> dict:
    """The values that decide what the teacher answers: an output's identity."""
    return {
        "server": chat_url(config.base_url),
        "model": config.model,
        "prompt_name": prompt.name,
        "prompt_sha256": prompt.sha256,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "random_seed": config.random_seed,
        "sample_index": config.sample_index,
        "response_format": config.response_format,
        "repair_invalid": config.repair_invalid,
        **(
            {"api": config.api} if config.api != "mistral" else {}
        ),  # its requests are others, and would be paid for anew
    }


def describe_parameters(config: TeacherConfig) -> str:
    """The parameters that an answer was asked with, for its row: `temperature=0, max_tokens=1024, …`."""
    names = ("temperature", "max_tokens", "random_seed", "sample_index", "response_format")
    return ", ".join(
        f"{name}={value:g}" if isinstance(value := getattr(config, name), float) else f"{name}={value}"
        for name in names
    )


def check_teacher(config: TeacherConfig) -> str:
    """The API key, after checking that there is one. Raises TeacherError before anything is started."""
    if not config.base_url.startswith(("http://", "https://")):
        raise TeacherError(f"--base-url {config.base_url!r} is not an http:// or https:// address.")
    if "@" in config.base_url or "?" in config.base_url:
        raise TeacherError(
            f"--base-url may hold no user, password or query: it is written into manifests. The key goes into {KEY_VARIABLE}."
        )
    try:
        place = urlsplit(config.base_url)
        is_whole = bool(place.hostname) and place.port != 0
    except ValueError:
        is_whole = False
    if not is_whole or "#" in config.base_url:
        raise TeacherError(
            f"--base-url {config.base_url!r} is not the address of a server, such as https://api.mistral.ai or http://localhost:8000."
        )
    return read_api_key(config.api_key_file)


def settle_key_file(config: TeacherConfig) -> TeacherConfig:
    """The config with an absolute path of the key file: actors have a current folder of their own."""
    return (
        config
        if config.api_key_file in ("", NO_KEY)
        else replace(config, api_key_file=os.path.abspath(config.api_key_file))
    )


def build_body(config: TeacherConfig, prompt: Prompt, messages: Sequence[Mapping]) -> bytes:
    """The JSON of one request, as it is sent and hashed."""
    return b'{"messages":' + encode_body(messages) + _encode_parameters(config, prompt)


@lru_cache(maxsize=16)
def _encode_parameters(config: TeacherConfig, prompt: Prompt) -> bytes:
    """What all requests of a run share: the end of their JSON, from the comma after the messages."""
    body = {
        "model": config.model,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "random_seed" if config.api == "mistral" else "seed": config.random_seed,
    }
    if config.response_format == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif config.response_format == "json_schema":
        schema = {"name": prompt.reply.__name__, "schema": prompt.reply_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return b"," + encode_body(body)[1:]


def first_key(config: TeacherConfig, prompt: Prompt, row: Mapping) -> bytes:
    """The key of the request that asks about a row."""
    return request_key(
        chat_url(config.base_url), build_body(config, prompt, prompt.render_messages(row)), config.sample_index
    )


def repair_messages(messages: Sequence[Mapping], reply: Reply, problem: str) -> list[dict]:
    """The messages of the request that asks again, naming the fault of the first reply."""
    fault = f"Your reply could not be used: {problem}. Reply again with the JSON object alone."
    return [*messages, {"role": "assistant", "content": reply.text or "(empty)"}, {"role": "user", "content": fault}]


@dataclass(frozen=True)
class Outcome:
    """What became of asking about one row. `fields` is None unless `status` is ok; token counts add up the replies that there are."""

    status: ParseStatus
    fields: dict | None
    problem: str
    raw_text: str
    finish_reason: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    num_replies: int
    """1 when the first reply could be read, 2 after a repair, 0 when no call was answered"""


def read_outcome(prompt: Prompt, first: Entry | None, repair: Entry | None) -> Outcome:
    """The outcome of a row from the ledger's entries of its request and of the repair, if there was one: pure, and without a call."""
    if first is None or first.reply is None:
        problem = (first.problem if first else None) or "not asked"
        return Outcome(ParseStatus.REQUEST_FAILED, None, problem, "", None, None, None, 0)
    replies = [read_reply(first.reply)]
    parsed = parse_reply(replies[0].text, prompt.reply, replies[0].finish_reason)
    if parsed.fields is None and repair is not None:
        if repair.reply is None:
            parsed = Parsed(parsed.status, None, f"{parsed.problem}; the repair failed: {repair.problem}")
        else:
            replies.append(read_reply(repair.reply))
            parsed = parse_reply(replies[1].text, prompt.reply, replies[1].finish_reason)
    return Outcome(
        status=parsed.status,
        fields=parsed.fields,
        problem=parsed.problem,
        raw_text=replies[-1].text,
        finish_reason=replies[-1].finish_reason,
        num_prompt_tokens=_total(reply.num_prompt_tokens for reply in replies),
        num_completion_tokens=_total(reply.num_completion_tokens for reply in replies),
        num_replies=len(replies),
    )


def read_outcomes(
    prompt: Prompt, reader: LedgerReader, keys: Sequence[bytes], repair_invalid: bool = True
) -> dict[bytes, tuple[Outcome, bool]]:
    """The outcome of each first request's row, and whether it is complete: a later run has nothing to ask for it.

    A repair that no reply came to leaves a row incomplete; a reply that was judged when its run ended does not, whatever the parser says of it now.
    """
    firsts = reader.read_entries(keys)
    repairs = reader.read_entries([repair for _, repair, _ in firsts.values() if repair is not None])
    outcomes = {}
    for key in keys:
        first, repair_key, is_settled = firsts.get(key, (None, None, False))
        repair = repairs[repair_key][0] if repair_key in repairs else None
        outcome = read_outcome(prompt, first, repair)
        is_first_enough = outcome.num_replies == 1 and (is_settled or outcome.fields is not None or not repair_invalid)
        outcomes[key] = outcome, is_first_enough or outcome.num_replies == 2
    return outcomes


def _total(counts) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
