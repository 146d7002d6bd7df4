"""Ask a teacher model about rows: one prompt, one retry layer, one repair, one reading of the reply.

In:   {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}, prompt initial_generation
Out:  Outcome(status="ok", fields={"thought_process": "…", "predicted_label": 1}, raw_text="{…}", finish_reason="stop", num_prompt_tokens=212, …)

A call that fails is tried again with exponential waits and jitter where that can help; a reply that cannot be read is asked for once more, with the fault
named; what still fails is an outcome with its reason, never an absence.
"""

import asyncio
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nli.chat_api import CallFailed, ChatClient, Reply, Unreachable, read_api_key
from nli.cluster import StoppedEarly
from nli.config import Count, CountOrZero, NonNegative, Positive, config_class
from nli.errors import TeacherError
from nli.limiter import MinuteLimiter
from nli.parsing import Parsed, ParseStatus, parse_reply
from nli.prompts import Prompt

MAX_WAIT_SECONDS = 60.0
MOST_FAILED_SHARE = 0.05  # of a file's rows, beyond which the stage ends in an error
MOST_REFUSED = 20  # refused requests, and none answered, after which a worker gives up
CHARACTERS_PER_TOKEN = 3.5  # for the limiter's guess before a reply's usage is known: a low figure, so that the guess is high


@config_class
class TeacherConfig:
    """How the teacher is reached and asked; the stages that ask one add their files."""

    base_url: str = "https://api.mistral.ai"
    """server that speaks the chat-completions API, with or without /v1"""
    model: str = "ministral-8b-2512"
    """model name as the server knows it"""
    api_key_file: str = ""
    """file that holds the API key; empty: MISTRAL_API_KEY from the environment or .env"""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """sampling temperature, 0 to 2; 0 is the most repeatable"""
    max_tokens: Count = 1024
    """most tokens in one reply"""
    random_seed: CountOrZero = 1337
    """seed sent with each request"""
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"
    """how the server is told to answer in JSON: by the reply's schema, as any JSON object, or only by the prompt"""
    workers: Count = 4
    """actors that send requests"""
    requests_per_minute: NonNegative = 0
    """the account's limit over all workers; 0: none"""
    tokens_per_minute: NonNegative = 0
    """the account's limit over all workers, prompt and reply together; 0: none"""
    max_in_flight: Count = 16
    """most requests under way in one worker"""
    timeout_seconds: Positive = 120
    """seconds until a call without answer counts as failed"""
    max_attempts: Count = 6
    """tries of one request before its row is a failed one"""
    repair_invalid: bool = True
    """ask once more, naming the fault, when a reply cannot be read"""
    max_rows: CountOrZero = 0
    """read only so many rows of the input; 0: all"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""


def describe_requests(config: TeacherConfig, prompt: Prompt) -> dict:
    """The values that decide what the teacher answers: an output's identity. A model may move to another address; its name says which it is."""
    return {
        "model": config.model,
        "prompt_name": prompt.name,
        "prompt_sha256": prompt.sha256,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "random_seed": config.random_seed,
        "response_format": config.response_format,
        "repair_invalid": config.repair_invalid,
    }


def check_teacher(config: TeacherConfig) -> str:
    """The API key, after checking that there is one. Raises TeacherError before anything is started."""
    if not config.base_url.startswith(("http://", "https://")):
        raise TeacherError(f"--base-url {config.base_url!r} is not an http:// or https:// address.")
    if "@" in config.base_url or "?" in config.base_url:
        raise TeacherError("--base-url may hold no user, password or query: it is written into manifests. The key goes into MISTRAL_API_KEY.")
    return read_api_key(config.api_key_file)


def refuse_failed(rows: Sequence[Mapping], status: str, problem: str, output: Path) -> None:
    """Say how many requests failed in the end; raise TeacherError if they are too many to go on with.

    Their rows are in the output with the reason, and the same command asks for them alone.
    """
    failed = [row for row in rows if row[status] == ParseStatus.REQUEST_FAILED]
    if failed:
        reason = f"{len(failed)} of {len(rows)} requests failed, the first with: {failed[0][problem]}"
        message = f"{output}: {reason}. The same command asks for these rows again."
        if len(failed) > MOST_FAILED_SHARE * len(rows):
            raise TeacherError(message)
        print(message, flush=True)


def settle_key_file(config: TeacherConfig) -> TeacherConfig:
    """The config with an absolute path of the key file: actors have a current folder of their own."""
    return replace(config, api_key_file=os.path.abspath(config.api_key_file)) if config.api_key_file else config


@dataclass(frozen=True)
class Outcome:
    """What became of asking about one row. `fields` is None unless `status` is ok; token counts add up all calls that were answered."""

    status: ParseStatus
    fields: dict | None
    problem: str
    raw_text: str
    finish_reason: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    num_replies: int
    """1 when the first reply could be read, 2 after a repair, 0 when no call was answered"""


class Teacher:
    """Asks one prompt of one server from one event loop. `share` is this worker's part of the account's limits."""

    def __init__(self, config: TeacherConfig, prompt: Prompt, api_key: str, share: float = 1.0) -> None:
        self.config = config
        self.prompt = prompt
        self._client = ChatClient(config.base_url, api_key, config.timeout_seconds)
        self._limiter = MinuteLimiter(config.requests_per_minute * share, config.tokens_per_minute * share)
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._random = random.Random()
        self._num_refused = 0

    async def ask_all(self, rows: list[dict], build: Callable[[dict, "Outcome"], dict]) -> list[dict]:
        """Ask about rows side by side and build a row of each outcome, in order.

        Raises StoppedEarly, with the rows that were answered, when no further call can succeed.
        """
        outcomes = await asyncio.gather(*(self.ask(row) for row in rows), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        finished = [build(row, outcome) for row, outcome in zip(rows, outcomes, strict=True) if isinstance(outcome, Outcome)]
        unexpected = next((failure for failure in failures if not isinstance(failure, TeacherError)), None)
        if unexpected is not None:
            raise unexpected
        if failures:
            raise StoppedEarly(finished, failures[0])
        return finished

    async def ask(self, row: Mapping) -> Outcome:
        """Ask about one row, with one repair when the first reply cannot be read."""
        messages = self.prompt.render_messages(row)
        replies: list[Reply] = []
        parsed = Parsed(ParseStatus.REQUEST_FAILED)
        try:
            replies.append(await self._call(messages))
            parsed = self._parse(replies[-1])
            if parsed.fields is None and self.config.repair_invalid:
                fault = f"Your reply could not be used: {parsed.problem}. Reply again with the JSON object alone."
                messages = [*messages, {"role": "assistant", "content": replies[-1].text or "(empty)"}, {"role": "user", "content": fault}]
                replies.append(await self._call(messages))
                parsed = self._parse(replies[-1])
        except CallFailed as error:
            if not replies:
                return Outcome(ParseStatus.REQUEST_FAILED, None, str(error), "", None, None, None, 0)
            parsed = Parsed(parsed.status, None, f"{parsed.problem}; the repair failed: {error}")
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

    def _parse(self, reply: Reply) -> Parsed:
        return parse_reply(reply.text, self.prompt.reply, reply.finish_reason)

    async def _call(self, messages: list[dict[str, str]]) -> Reply:
        """One answered call, after as many tries as the config allows."""
        body = self._build_body(messages)
        estimate = int(sum(len(message["content"]) for message in messages) / CHARACTERS_PER_TOKEN) + self.config.max_tokens
        for attempt in range(1, self.config.max_attempts + 1):
            async with self._in_flight:
                grant = await self._limiter.acquire(estimate)
                try:
                    reply = await self._client.complete(body)
                except CallFailed as error:
                    failure = error
                else:
                    self._num_refused = -math.inf  # a server that answers refuses single requests, not all
                    self._limiter.settle(grant, (reply.num_prompt_tokens or 0) + (reply.num_completion_tokens or 0) or estimate)
                    return reply
            if not failure.retryable or attempt == self.config.max_attempts:
                break
            wait = min(MAX_WAIT_SECONDS, 0.5 * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait, failure.retry_after or 0.0))
        self._num_refused += not failure.retryable
        if self._num_refused >= MOST_REFUSED:
            raise TeacherError(f"the first {MOST_REFUSED} requests were all refused, the last with: {failure}. Check --model and --response-format.")
        if isinstance(failure, Unreachable):
            raise TeacherError(f"{failure} in {attempt} tries. Check --base-url and the network; finished rows are kept, and the same command goes on.")
        raise failure

    def _build_body(self, messages: list[dict[str, str]]) -> dict:
        config = self.config
        body = {
            "model": config.model,
            "messages": messages,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "random_seed": config.random_seed,
        }
        if config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif config.response_format == "json_schema":
            schema = {"name": self.prompt.reply.__name__, "schema": self.prompt.reply_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


def _total(counts) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
