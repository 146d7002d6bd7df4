"""Ask a teacher model about rows: one prompt, one retry layer, one repair, and a ledger that every call goes through.

In:   {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}, prompt initial_generation
Out:  in the ledger: the raw reply under the request's key; from it, by `read_outcome`:
      Outcome(status="ok", fields={"thought_process": "…", "predicted_label": 1}, raw_text="{…}", finish_reason="stop", num_prompt_tokens=212, …)

Sending and reading are two steps. `Teacher` sends what the ledger has no reply to, and reads a reply only to see whether it needs a repair; `read_outcome`
makes the rows of an output, as often as one likes, without a call. A call that fails is tried again with exponential waits and jitter where that can help; a
reply that cannot be read is asked for once more, with the fault named; what still fails is an outcome with its reason, never an absence.
"""

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from nli.chat_api import KEY_VARIABLE, NO_KEY, CallFailed, ChatClient, Reply, Unreachable, chat_url, read_api_key, read_reply
from nli.config import Count, CountOrZero, NonNegative, Positive, config_class
from nli.errors import ConfigError, TeacherError
from nli.ledger import Entry, LedgerReader, encode_body, request_key
from nli.limiter import Ended, Limits
from nli.limiter_client import LimiterClient
from nli.parsing import Parsed, ParseStatus, parse_reply
from nli.prices import Price, find_price, require_price
from nli.prompts import Prompt
from nli.services import LedgerClient
from nli.token_counts import bound_messages, load_token_counter

MAX_WAIT_SECONDS = 60.0
MOST_REFUSED = 20  # refused requests, and none answered, after which a worker gives up
FULL_WAIT_SECONDS = 0.1  # between two tries to reserve money while calls under way hold it
BUSY_WAIT_SECONDS = 1.0  # between two looks at a request that another worker is asking


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
    requests_per_minute: NonNegative = 0
    """the account's limit over all workers and jobs; 0: none"""
    tokens_per_minute: NonNegative = 0
    """the account's limit over all workers and jobs, prompt and reply together; 0: none"""
    calls_in_flight: CountOrZero = 0
    """the account's limit of calls under way at once, over all workers and jobs; 0: none"""
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

    def limits(self) -> Limits:
        """The account's limits."""
        return Limits(requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute, max_in_flight=self.calls_in_flight)


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
    }


def check_teacher(config: TeacherConfig) -> str:
    """The API key, after checking that there is one. Raises TeacherError before anything is started."""
    if not config.base_url.startswith(("http://", "https://")):
        raise TeacherError(f"--base-url {config.base_url!r} is not an http:// or https:// address.")
    if "@" in config.base_url or "?" in config.base_url:
        raise TeacherError(f"--base-url may hold no user, password or query: it is written into manifests. The key goes into {KEY_VARIABLE}.")
    return read_api_key(config.api_key_file)


def settle_key_file(config: TeacherConfig) -> TeacherConfig:
    """The config with an absolute path of the key file: actors have a current folder of their own."""
    return config if config.api_key_file in ("", NO_KEY) else replace(config, api_key_file=os.path.abspath(config.api_key_file))


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
    return request_key(chat_url(config.base_url), build_body(config, prompt, prompt.render_messages(row)), config.sample_index)


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


def read_outcomes(prompt: Prompt, reader: LedgerReader, keys: Sequence[bytes], repair_invalid: bool = True) -> dict[bytes, tuple[Outcome, bool]]:
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


class _Slice:
    """Rows that are asked about together."""

    def __init__(self, num_rows: int) -> None:
        self.failures: list[Exception] = []
        self.finished = asyncio.Event()
        self._num_left = num_rows
        if not num_rows:
            self.finished.set()

    def count_down(self) -> None:
        """One row has ended."""
        self._num_left -= 1
        if not self._num_left:
            self.finished.set()


class Teacher:
    """Asks one prompt of one server from one event loop, through a ledger and a limiter that others share."""

    def __init__(self, config: TeacherConfig, prompt: Prompt, api_key: str, run: str, ledger: LedgerClient, limiter: LimiterClient) -> None:
        self.config = config
        self.prompt = prompt
        self.run = run
        self._url = chat_url(config.base_url)
        self._client = ChatClient(config.base_url, api_key, config.timeout_seconds)
        self._price = config.price()
        self._ledger = ledger
        self._limiter = limiter
        self._waiting: deque[tuple[Mapping, _Slice]] = deque()
        self._askers: set[asyncio.Task] = set()
        self._random = random.Random()
        self._open: set[bytes] = set()
        self._stopped: TeacherError | None = None
        self._num_refused = 0
        self._was_answered = False
        self._counter = load_token_counter(config.model, config.tokenizer) if config.tokens_per_minute else None
        self._schema_bytes = len(str(prompt.reply_schema)) if config.response_format == "json_schema" else 0

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask_all(self, rows: Sequence[Mapping]) -> None:
        """Ask about rows side by side; what came of it is in the ledger. Raises TeacherError or StorageError when no further call can succeed.

        All calls of `ask_all` share one queue, so that one slice's last rows do not hold up the next slice's first.
        """
        piece = _Slice(len(rows))
        self._waiting.extend((row, piece) for row in rows)
        with self._ledger.alive():
            while len(self._askers) < min(self.config.max_in_flight, len(self._waiting)):
                asker = asyncio.get_running_loop().create_task(self._ask_waiting())
                self._askers.add(asker)
                asker.add_done_callback(self._askers.discard)
            await piece.finished.wait()
        failures = sorted(piece.failures, key=lambda failure: isinstance(failure, TeacherError))
        if failures:
            raise failures[0]

    async def _ask_waiting(self) -> None:
        while self._waiting:
            row, piece = self._waiting.popleft()
            try:
                await self.ask(row)
            except Exception as error:  # it belongs to whoever gave the row
                piece.failures.append(error)
            finally:
                piece.count_down()

    async def ask(self, row: Mapping) -> None:
        """Ask about one row, with one repair when the first reply cannot be read."""
        messages = self.prompt.render_messages(row)
        key, reply, is_settled = await self._request(messages, None)
        if reply is None or is_settled or not self.config.repair_invalid:
            return
        parsed = parse_reply(reply.text, self.prompt.reply, reply.finish_reason)
        if parsed.fields is None:
            await self._request(repair_messages(messages, reply, parsed.problem), key)

    async def _request(self, messages: Sequence[Mapping], parent: bytes | None) -> tuple[bytes, Reply | None, bool]:
        """(key, reply or None, whether it is settled) of one request, which is sent only if the ledger has no reply."""
        body = build_body(self.config, self.prompt, messages)
        key = request_key(self._url, body, self.config.sample_index)
        while key in self._open:  # to the ledger, two tasks of one worker are the same owner
            await asyncio.sleep(0.05)
        self._open.add(key)
        try:
            reply, is_settled = await self._send_until_answered(key, body, messages, parent)
            return key, reply, is_settled
        finally:
            self._open.discard(key)

    async def _send_until_answered(self, key: bytes, body: bytes, messages: Sequence[Mapping], parent: bytes | None) -> tuple[Reply | None, bool]:
        """(the reply or None, whether it is settled), after as many tries as the config allows."""
        config = self.config
        most_prompt_tokens = self._schema_bytes + bound_messages(messages)
        likely_most = self._likely_most_tokens(messages, most_prompt_tokens) + config.max_tokens
        reserve = self._price.cost_nanodollars(most_prompt_tokens, config.max_tokens) if self._price else 0
        attempt = 1
        while True:
            if self._stopped is not None:
                raise self._stopped
            number = await self._limiter.acquire(likely_most)
            data, reply, failure = None, None, None
            sent_at = time.monotonic()
            try:
                answer = await self._ledger.call("open", key, self.run, config.ambiguous, parent, reserve)
                if answer[0] == "go":
                    number = await self._limiter.renew(number, likely_most)  # the ledger may have been away
                    sent_at = time.monotonic()
                    data, reply, failure = await self._call(body)
            except BaseException:
                self._limiter.end(Ended(number, likely_most, "unknown"))
                raise
            if answer[0] != "go":
                self._limiter.end(Ended(number, 0, "unknown"))
                if answer[0] == "done":
                    return read_reply(answer[1]), answer[2]
                if answer[0] == "held":
                    return None, False
                await self._stop_if_no_call_may_go(answer)
                await asyncio.sleep(FULL_WAIT_SECONDS if answer[0] == "full" else BUSY_WAIT_SECONDS)
                continue
            n = answer[1]
            if reply is not None:
                is_counted = reply.num_prompt_tokens is not None and reply.num_completion_tokens is not None
                num_prompt, num_completion = reply.num_prompt_tokens or 0, reply.num_completion_tokens or 0
                self._limiter.end(Ended(number, num_prompt + num_completion or likely_most, "ok"))
                cost = self._price.cost_nanodollars(num_prompt, num_completion) if self._price and is_counted else reserve
                await self._ledger.call("done", key, n, data, num_prompt, num_completion, cost)
                self._was_answered = True
                return reply, False
            if isinstance(failure, TeacherError):
                self._limiter.end(Ended(number, 0, "refused"))
                await self._ledger.call("fail", key, n, "refused", str(failure), False)
                await self._ledger.call("halt", self.run, str(failure))
                raise failure
            is_last = not failure.retryable or attempt == config.max_attempts or (failure.is_ambiguous and config.ambiguous == "hold")
            ending = "limited" if failure.kind == "http_429" else "failed" if failure.retryable else "refused"
            used = likely_most if failure.is_ambiguous else 0
            self._limiter.end(Ended(number, used, ending, time.monotonic() - sent_at, failure.retry_after or 0.0))
            await self._ledger.call("lose" if failure.is_ambiguous else "fail", key, n, failure.kind, str(failure), is_last)
            if is_last:
                await self._give_up_if_hopeless(failure, attempt)
                return None, False
            wait = min(MAX_WAIT_SECONDS, 0.5 * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait, failure.retry_after or 0.0))
            attempt += 1

    async def _call(self, body: bytes) -> tuple[bytes | None, Reply | None, CallFailed | TeacherError | None]:
        """(raw body, reply, None) of one call, or (None, None, why it failed)."""
        try:
            return *await self._client.complete(body), None
        except CallFailed as error:
            return None, None, error
        except TeacherError as error:
            self._stopped = error  # before another call can go out
            return None, None, error

    async def _stop_if_no_call_may_go(self, answer: tuple) -> None:
        if answer[0] == "halted":
            raise TeacherError(answer[1])
        if answer[0] == "over":
            reason = f"--max-cost {self.config.max_cost:g} is used up: the next call could exceed it. Replies are kept; a larger --max-cost goes on from here."
            await self._ledger.call("halt", self.run, reason)
            raise TeacherError(reason)

    async def _give_up_if_hopeless(self, failure: CallFailed, attempt: int) -> None:
        reason = None
        self._num_refused += not failure.retryable
        if self._num_refused >= MOST_REFUSED and not self._was_answered:  # a server that answers refuses single requests, not all
            reason = f"the first {MOST_REFUSED} requests were all refused, the last with: {failure}. Check --model and --response-format."
        elif isinstance(failure, Unreachable):
            reason = f"{failure} in {attempt} tries. Check --base-url and the network; replies are kept, and the same command goes on."
        if reason:
            await self._ledger.call("halt", self.run, reason)
            raise TeacherError(reason)

    def _likely_most_tokens(self, messages: Sequence[Mapping], bound: int) -> int:
        """What the limiter takes a prompt for: its real count and a tenth where the model's tokenizer is known, since the bound is several times that."""
        if self._counter is None or not self._counter.is_exact:
            return bound
        return min(bound, int(1.1 * self._counter.count_messages(messages)) + 16)


def _total(counts) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
