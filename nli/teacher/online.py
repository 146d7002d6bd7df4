"""Send what the ledger has no reply to: one retry layer, one repair, every call through the account's limiter and the ledger.

    teacher = Teacher(config, prompt, key, run, LedgerClient(…), LimiterClient(…))
    await teacher.ask_all([{"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}, …])

What came of it is in the ledger; `nli.teacher.requests.read_outcomes` reads it from there. A call that fails is tried again with exponential waits and jitter where
that can help; a reply that cannot be read is asked for once more, with the fault named.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NoReturn

from nli.api.chat import CallFailed, ChatClient, Reply, Unreachable, chat_url, read_reply
from nli.api.ledger_file import request_key
from nli.api.limiter import LONGEST_PAUSE_SECONDS, Ended
from nli.api.limiter_client import LimiterClient
from nli.api.services import LedgerClient
from nli.api.token_counts import bound_messages, load_token_counter
from nli.runtime.errors import NLIError, StorageError, TeacherError
from nli.task.parsing import parse_reply
from nli.task.prompts import Prompt
from nli.teacher.requests import TeacherConfig, build_body, repair_messages

MAX_WAIT_SECONDS = 60.0
MOST_REFUSED = 20  # refused requests, and none answered, after which a worker gives up
FULL_WAIT_SECONDS = 0.1  # between two tries to reserve money while calls under way hold it
FAILING_SECONDS = 300.0  # of nothing but failures, with no reply before them, after which a worker gives up
BUSY_WAIT_SECONDS = 1.0  # between two looks at a request that another worker is asking


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

    def __init__(
        self,
        config: TeacherConfig,
        prompt: Prompt,
        api_key: str,
        run: str,
        ledger: LedgerClient,
        limiter: LimiterClient,
    ) -> None:
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
        self._room = asyncio.Semaphore(
            config.max_in_flight
        )  # for claims and calls, not for replies on their way: the next claim travels with them
        self._random = random.Random()
        self._open: set[bytes] = set()
        self._stopped: NLIError | None = None
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
        with self._ledger.alive(self.run, self._hear_of_halt):
            while len(self._askers) < min(2 * self.config.max_in_flight, len(self._waiting)):
                self._askers.add(asyncio.get_running_loop().create_task(self._ask_waiting()))
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
                if isinstance(error, StorageError) and self._stopped is None:
                    self._end(
                        error
                    )  # the ledger may have room for a claim and none for its reply, which would be paid for and lost
                piece.failures.append(error)
            finally:
                piece.count_down()
        self._askers.discard(asyncio.current_task())  # in this very step: rows that come next must not count on it

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

    async def _send_until_answered(
        self, key: bytes, body: bytes, messages: Sequence[Mapping], parent: bytes | None
    ) -> tuple[Reply | None, bool]:
        """(the reply or None, whether it is settled), after as many tries as the config allows."""
        config = self.config
        most_prompt_tokens = self._schema_bytes + bound_messages(messages)
        likely_most = self._likely_most_tokens(messages, most_prompt_tokens) + config.max_tokens
        reserve = self._price.cost_nanodollars(most_prompt_tokens, config.max_tokens) if self._price else 0
        attempt = 1
        while True:
            data, reply, failure = None, None, None
            async with self._room:
                if self._stopped is not None:
                    raise self._stopped
                number = await self._limiter.acquire(likely_most)
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
                cost = (
                    self._price.cost_nanodollars(num_prompt, num_completion) if self._price and is_counted else reserve
                )
                await self._ledger.call("done", key, n, data, num_prompt, num_completion, cost)
                self._was_answered = True
                return reply, False
            if isinstance(failure, TeacherError):
                self._limiter.end(Ended(number, 0, "refused"))
                await self._ledger.call("fail", key, n, "refused", str(failure), False)
                await self._ledger.call("halt", self.run, str(failure))
                raise failure
            is_last = (
                not failure.retryable
                or attempt == config.max_attempts
                or (failure.is_ambiguous and config.ambiguous == "hold")
            )
            ending = "limited" if failure.kind == "http_429" else "failed" if failure.retryable else "refused"
            used = likely_most if failure.is_ambiguous else 0
            self._limiter.end(Ended(number, used, ending, time.monotonic() - sent_at, failure.retry_after or 0.0))
            await self._ledger.call(
                "lose" if failure.is_ambiguous else "fail", key, n, failure.kind, str(failure), is_last
            )
            await self._give_up_if_hopeless(failure, attempt, is_last)
            if is_last:
                return None, False
            wait = min(MAX_WAIT_SECONDS, 0.5 * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait, min(failure.retry_after or 0.0, LONGEST_PAUSE_SECONDS)))
            attempt += 1

    async def _call(self, body: bytes) -> tuple[bytes | None, Reply | None, CallFailed | TeacherError | None]:
        """(raw body, reply, None) of one call, or (None, None, why it failed)."""
        try:
            return *await self._client.complete(body), None
        except CallFailed as error:
            return None, None, error
        except TeacherError as error:
            self._end(error)  # before another call can go out
            return None, None, error

    def _hear_of_halt(self, reason: str) -> None:
        """The run was halted while this worker may be waiting for the limiter, which can take minutes."""
        if self._stopped is None:
            self._end(TeacherError(reason))

    async def _stop_if_no_call_may_go(self, answer: tuple) -> None:
        if answer[0] == "halted":
            self._stop(answer[1])
        if answer[0] == "over":
            reason = f"--max-cost {self.config.max_cost:g} is used up: the next call could exceed it. Replies are kept; a larger --max-cost goes on from here."
            await self._ledger.call("halt", self.run, reason)
            self._stop(reason)

    def _stop(self, reason: str) -> NoReturn:
        """End this worker's part of the run: what still waits is not put to the ledger, row by row, to hear the same."""
        raise self._end(TeacherError(reason))

    def _end(self, error: NLIError) -> NLIError:
        """Let no further call of this worker go out, and those who wait for the limiter hear why."""
        self._stopped = error
        self._limiter.turn_away(error)
        return error

    async def _give_up_if_hopeless(self, failure: CallFailed, attempt: int, is_last: bool) -> None:
        reason = None
        self._num_refused += not failure.retryable or failure.kind == "no_completion"
        if (
            self._num_refused >= MOST_REFUSED and not self._was_answered
        ):  # a server that answers refuses single requests, not all
            reason = f"the first {MOST_REFUSED} requests were all refused, the last with: {failure}. Check --base-url, --model and --response-format."
        elif isinstance(failure, Unreachable):
            if is_last:
                reason = f"{failure} in {attempt} tries. Check --base-url and the network; replies are kept, and the same command goes on."
        elif (
            self._limiter.failing_seconds > FAILING_SECONDS and not self._was_answered
        ):  # one that has answered may come back
            minutes = self._limiter.failing_seconds / 60
            reason = f"every call has failed for {minutes:.0f} minutes, the last with: {failure}. Check the server; the same command goes on."
        if reason:
            await self._ledger.call("halt", self.run, reason)
            self._stop(reason)

    def _likely_most_tokens(self, messages: Sequence[Mapping], bound: int) -> int:
        """What the limiter takes a prompt for: its real count and a tenth where the model's tokenizer is known, since the bound is several times that."""
        if self._counter is None or not self._counter.is_exact:
            return bound
        return min(bound, int(1.1 * self._counter.count_messages(messages)) + 16)
