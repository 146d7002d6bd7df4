"""Mistral's Batch API: half the price, hours instead of minutes. One step a method, recorded before the next: a kill between any two loses nothing.

    jobs = BatchJobs(config, api_key, "data/original_thoughts/train.jsonl", ledger, store)
    jobs.submit([Request(key, b'{"messages": …}'), …])      plan, upload, create: the requests are claimed in the ledger, the job runs at the server
    jobs.finish()                                           poll, take: each raw reply is in the ledger, once; what failed is free to be asked again

    plan     intent recorded, requests claimed and their money reserved, the file of requests written
    upload   the file is at the server; its id recorded
    create   "creating" recorded, the job made with the batch's id in its metadata; the job's id recorded before the first poll
    poll     until the job has ended; how, and where its results are, recorded
    take     the results downloaded, each stored as a raw reply under its request's key, which is its custom_id; then the batch is closed

A process that finds a batch in "creating" does not know whether its job was made. It looks for it among the account's jobs by the metadata, and makes one only
if there is none. `nli.teacher.batch` decides what is asked, and how often.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nli.api.batch_client import MOST_TRIES, BatchClient, JobRefused, Unanswered, pause
from nli.api.batch_store import Batch, BatchStore, OpenRequest
from nli.api.chat import CallFailed, read_reply
from nli.api.ledger import Ledger
from nli.api.token_counts import bound_messages
from nli.runtime.errors import TeacherError
from nli.runtime.files import write_atomic
from nli.teacher.requests import TeacherConfig

MOST_BYTES = 500_000_000  # of one upload; the vendor's limit is 512 MB
CHUNK = 500  # requests in one transaction
ENDED = ("SUCCESS", "FAILED", "TIMEOUT_EXCEEDED", "CANCELLED")
FIRST_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """One request: its key, its body as JSON, and the key of the request that it repairs, if it does."""

    key: bytes
    body: bytes
    parent: bytes | None = None


class BatchJobs:
    """The batches of one run. Not thread-safe. `hook` is called with the name of each step when it is done; tests stop there."""

    def __init__(
        self,
        config: TeacherConfig,
        api_key: str,
        run: str,
        ledger: Ledger,
        store: BatchStore,
        hook: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.config = config
        self.run = run
        self._ledger = ledger
        self._store = store
        self._hook = hook
        self._price = config.price()
        self._client = BatchClient(config.base_url, api_key)
        self.refused: set[bytes] = set()
        """requests that the server will not answer, however often it is asked"""
        self.num_replies = 0
        self.num_failed_jobs = 0
        """in a row, without a single reply"""
        self.num_waiting = 0
        """requests, of those last submitted, that others are asking"""
        self.had_no_room = False
        """whether the budget had no room for some of those last submitted until running jobs end"""
        self._adopted: set[str] = set()

    def submit(self, requests: Iterable[Request]) -> int:
        """Make jobs of the requests that nobody has asked and the budget allows; returns how many requests they hold."""
        requests, num_submitted = iter(requests), 0
        self.num_waiting, self.had_no_room = 0, False
        while (batch := self.plan(requests)) is not None:
            num_submitted += batch.detail["num_requests"]
            self.upload(batch)
            self.create(batch)
        return num_submitted

    def resume(self) -> None:
        """Take up what an earlier process left: batches without a job are dropped or continued, jobs are kept for `finish`."""
        for batch in self._open_batches():
            if batch.state == "planning":
                self.drop(batch, "the run was stopped before the batch was sent")
            if batch.state == "planned" and not self._store.path(batch, "requests.jsonl").exists():
                self.drop(batch, "the file of its requests is gone")  # no job was made of them
            if batch.state == "planned":
                self.upload(batch)
            if batch.state in ("uploaded", "creating"):
                self.create(batch)

    def finish(self) -> None:
        """Wait for all jobs of the run and take their results."""
        for batch in self._open_batches():
            self.poll(batch)
            self.take(batch)

    def plan(self, requests: Iterator[Request]) -> Batch | None:
        """Claim as many requests as one job may hold and write them to the batch's file; None if there was none to claim."""
        first = next(requests, None)
        if first is None:
            return None
        requests = itertools.chain([first], requests)
        batch = self._store.add(self.run, server=self._client.server, model=self.config.model, planned_at=time.time())
        self._hook("planning")
        num_requests = 0

        def write(aside: Path) -> None:
            nonlocal num_requests
            has_room = True
            with open(aside, "wb") as file:
                while has_room and (
                    chunk := list(islice(requests, min(CHUNK, self.config.batch_max_requests - num_requests)))
                ):
                    claimed, has_room = self._claim(batch, chunk)
                    file.writelines(_to_line(request) for request in claimed)
                    num_requests += len(claimed)
                    has_room = has_room and file.tell() < MOST_BYTES
                    self._hook("claimed")

        write_atomic(self._store.path(batch, "requests.jsonl"), write)
        self._hook("file_written")
        if not num_requests:
            self.drop(batch, "nothing was to be asked")
            return None
        self._store.update(batch, "planned", num_requests=num_requests)
        self._hook("planned")
        return batch

    def _claim(self, batch: Batch, chunk: list[Request]) -> tuple[list[Request], bool]:
        """The requests of a chunk that are the batch's now, and whether the budget has room for more. Raises TeacherError if it has room for none."""
        claims = [("claim", request.key, self.run, self.config.ambiguous, request.parent) for request in chunk]
        answers = list(zip(chunk, self._ledger.commit([(batch.owner, claims)])[0], strict=True))
        self.refused |= {request.key for request, answer in answers if answer[0] == "held"}
        self._note_waiting([request.key for request, answer in answers if answer[0] == "wait"])
        mine = [(request, answer[1] + 1) for request, answer in answers if answer[0] == "go"]
        sends = [("send", request.key, n, self._most_cost(request)) for request, n in mine]
        answers = list(zip(mine, self._ledger.commit([(batch.owner, sends)])[0], strict=True))
        rejected = [(request, n) for (request, n), answer in answers if answer[0] != "go"]
        self._ledger.commit(
            [
                (
                    batch.owner,
                    [("fail", request.key, n, "not_sent", "the budget had no room", True) for request, n in rejected],
                )
            ]
        )
        self.had_no_room = self.had_no_room or bool(rejected)
        accepted = [request for (request, _), answer in answers if answer[0] == "go"]
        stopping = next((answer for _, answer in answers if answer[0] in ("over", "halted")), None)
        if stopping is not None and not accepted and not self._store.list_requests(batch):
            self.drop(batch, "the budget is used up")
            over = f"--max-cost {self.config.max_cost:g} is used up: the next request could exceed it. Replies are kept; a larger --max-cost goes on from here."
            raise TeacherError(over if stopping[0] == "over" else stopping[1])
        return accepted, not rejected

    def _note_waiting(self, keys: list[bytes]) -> None:
        """Others are asking for these: workers, or a batch of another output, which is taken up if its process is dead."""
        self.num_waiting += len(keys)
        owners = self._store.find_owners(keys) if keys else []
        self._adopted |= {batch_id for batch_id in owners if self._store.lock(Batch(batch_id, ""))}

    def _most_cost(self, request: Request) -> int:
        if self._price is None:
            return 0
        body = json.loads(request.body)
        most_prompt_tokens = bound_messages(body["messages"]) + len(str(body.get("response_format", "")))
        return self._price.cost_nanodollars(most_prompt_tokens, self.config.max_tokens)

    def upload(self, batch: Batch) -> None:
        """Put the batch's file where the server can read it."""
        file_id = self._client.upload(self._store.path(batch, "requests.jsonl"))
        self._hook("file_uploaded")
        self._store.update(batch, "uploaded", file_id=file_id)
        self._hook("file_recorded")

    def create(self, batch: Batch) -> None:
        """Make the batch's job, unless there is one already. Raises TeacherError if the server does not let it be made."""
        may_exist = batch.state == "creating"
        self._store.update(batch, "creating")
        self._hook("creating")
        job_id = self._client.find_job(batch.id, batch.detail["planned_at"]) if may_exist else None
        attempt = 1
        while job_id is None:
            try:
                job_id = self._client.create_job(
                    batch.file_id, batch.detail["model"], batch.id, self.config.batch_timeout_hours
                )
            except JobRefused as error:
                self.drop(batch, str(error))
                raise
            except Unanswered as error:
                # The job may be there all the same, so it is looked for before another one is made.
                if attempt == MOST_TRIES:
                    raise TeacherError(
                        f"no batch job could be made in {attempt} tries ({error}). Nothing is lost; the same command goes on."
                    ) from None
                pause(attempt)
                attempt += 1
                job_id = self._client.find_job(batch.id, batch.detail["planned_at"])
        self._hook("job_created")
        self._store.update(batch, "created", job_id=job_id)
        self._hook("job_recorded")
        print(
            f"batch: job {job_id} with {batch.detail['num_requests']} requests to {batch.detail['model']}", flush=True
        )

    def poll(self, batch: Batch) -> None:
        """Wait until the batch's job has ended."""
        if batch.state == "ended":
            return
        wait, seen = min(FIRST_POLL_SECONDS, self.config.batch_poll_seconds), ""
        while True:
            job = self._client.get_job(batch.job_id)
            if job is None or job.status in ENDED:
                break
            if job.status != seen:
                seen = job.status
                print(
                    f"batch: job {batch.job_id} is {seen}, {job.completed_requests} of {job.total_requests} requests done",
                    flush=True,
                )
            time.sleep(wait)
            wait = min(self.config.batch_poll_seconds, 1.5 * wait)
        self._hook("job_ended")
        if job is None:
            self._store.update(batch, "ended", status="GONE")
        else:
            errors = "; ".join(error.message for error in job.errors)
            files = {"output_file": job.output_file or None, "error_file": job.error_file or None}
            self._store.update(batch, "ended", status=str(job.status), errors=errors, **files)
        self._hook("end_recorded")

    def take(self, batch: Batch) -> None:
        """Store the results of an ended job, and free the requests that have none. Raises TeacherError if the job was cancelled."""
        status = batch.detail["status"]
        is_whole = status != "GONE"
        before = self.num_replies
        for kind in ("output", "error"):
            file_id = batch.detail.get(f"{kind}_file")
            if file_id:
                path = self._store.path(batch, f"{kind}.jsonl")
                is_there = self._client.download(file_id, path)
                self._hook(f"{kind}_downloaded")
                is_whole = is_whole and is_there
                if is_there:
                    self._take_lines(batch, path)
        self._free(batch, self._explain(status, batch.detail.get("errors", ""), is_whole))
        self._hook("results_stored")
        self._store.update(batch, "taken")
        self._store.clear(batch)
        self._hook("taken")
        num_replies = self.num_replies - before
        print(
            f"batch: job {batch.job_id} ended with {status}, {num_replies} of {batch.detail['num_requests']} requests answered",
            flush=True,
        )
        self.num_failed_jobs = 0 if num_replies else self.num_failed_jobs + 1
        if status == "CANCELLED":
            raise TeacherError(
                f"batch job {batch.job_id} was cancelled. The replies that it had are kept; the same command asks for the rest in a new job."
            )

    @staticmethod
    def _explain(status: str, errors: str, is_whole: bool) -> tuple[str, str, str]:
        """(operation, kind, problem) for a request of an ended job that has no result. What may have been billed is "lose", what was not run is "fail"."""
        if not is_whole:
            return "lose", "results_gone", "the batch job's results are not at the server any more"
        if status == "SUCCESS":
            return "lose", "no_result", "the batch job ended without a result for it"
        return "fail", f"job_{status.lower()}", f"the batch job ended with {status}" + (f": {errors}" if errors else "")

    def _take_lines(self, batch: Batch, path: Path) -> None:
        with open(
            path, "rb"
        ) as file:  # bytes, since a text's lines also end at characters that stand inside JSON strings
            while chunk := list(islice(file, CHUNK)):
                results = dict(filter(None, map(_read_line, chunk)))
                known = self._store.find_requests(list(results))
                self._ledger.commit(
                    [(batch.owner, [self._to_operation(request, results[key]) for key, request in known.items()])]
                )
                self._hook("results_in_part")

    def _to_operation(self, request: OpenRequest, line: dict) -> tuple:
        """The ledger's operation for one line of a results file."""
        key, n = request.key, request.num_sends
        response = line.get("response") or {}
        status = response.get("status_code")
        if status != 200:
            problem = f"HTTP {status}: {json.dumps(response.get('body') or line.get('error'))[:200]}"
            if status in range(400, 500) and status not in (408, 425, 429):
                self.refused.add(key)
            return ("fail", key, n, f"http_{status}", problem, True)
        data = json.dumps(response["body"]).encode()
        try:
            reply = read_reply(data)
        except CallFailed as error:
            return ("lose", key, n, error.kind, str(error), True)
        self.num_replies += 1
        num_prompt, num_completion = reply.num_prompt_tokens, reply.num_completion_tokens
        is_counted = num_prompt is not None and num_completion is not None
        cost = (
            self._price.cost_nanodollars(num_prompt, num_completion) if self._price and is_counted else request.reserved
        )
        return ("done", key, n, data, num_prompt or 0, num_completion or 0, cost)

    def drop(self, batch: Batch, problem: str) -> None:
        """Close a batch that has no job."""
        self._free(batch, ("fail", "not_sent", problem))
        self._store.update(batch, "dropped")
        self._store.clear(batch)

    def _free(self, batch: Batch, ending: tuple[str, str, str]) -> None:
        """End the batch's requests that have no answer, so that another batch may ask them."""
        operation, kind, problem = ending
        left = self._store.list_requests(batch)
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            self._ledger.commit(
                [(batch.owner, [(operation, request.key, request.num_sends, kind, problem, True) for request in chunk])]
            )

    def _open_batches(self) -> list[Batch]:
        """The run's open batches as they stand, locked. Raises TeacherError if another process works on one."""
        for batch in self._list_mine():
            if not self._store.lock(batch):
                raise TeacherError(f"another process is working on a batch job of {self.run}; wait for it, or end it.")
            if batch.detail["server"] != self._client.server:
                raise TeacherError(
                    f"{self.run} has a batch job at {batch.detail['server']}; take its results with that --base-url first."
                )
        return self._list_mine()

    def _list_mine(self) -> list[Batch]:
        return [batch for batch in self._store.list_open() if batch.run == self.run or batch.id in self._adopted]


def _to_line(request: Request) -> bytes:
    body = json.loads(request.body)
    body.pop("model")  # a job has one model for all its requests
    return json.dumps({"custom_id": request.key.hex(), "body": body}).encode() + b"\n"


def _read_line(line: bytes) -> tuple[bytes, dict] | None:
    """(key, result) of a line of results; None for a line that is neither, whose request then counts as one without a result."""
    try:
        result = json.loads(line)
        return bytes.fromhex(result["custom_id"]), result
    except (ValueError, KeyError, TypeError):
        return None
