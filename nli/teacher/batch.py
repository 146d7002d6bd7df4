"""Asking for a worklist's pending rows by batch jobs: what goes into a job, what is asked again, when it is enough.

    ask_in_batches(config, prompt, api_key, run, ledger, folder, worklist.path)

First the requests of the rows, then repairs of the replies that cannot be read. Each round asks, in new jobs, only what has no reply yet: the requests that
failed, not their jobs. A request that the server refuses is not asked again, and nothing more than `max_attempts` times.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nli.api.batch_store import BatchStore
from nli.api.chat import chat_url, read_reply
from nli.api.ledger import Ledger
from nli.api.ledger_file import Entry, LedgerReader, request_key
from nli.runtime.errors import TeacherError
from nli.runtime.worklist import Worklist, read_pending
from nli.task.parsing import parse_reply
from nli.task.prompts import Prompt
from nli.teacher.batch_jobs import BatchJobs, Request
from nli.teacher.requests import TeacherConfig, build_body, repair_messages

CHUNK = 500  # rows looked up at a time
MOST_FAILED_JOBS = 3  # in a row, without a reply, after which no further job is made


def ask_in_batches(
    config: TeacherConfig,
    prompt: Prompt,
    api_key: str,
    run: str,
    ledger: Ledger,
    folder: Path,
    worklist: Path,
    hook: Callable[[str], None] = lambda step: None,
) -> None:
    """Take the results of an earlier process's jobs, then have the rest asked; the replies are in the ledger when it returns.

    Raises TeacherError when no further job can succeed, a job was cancelled or the budget is used up. Nothing is lost, and the same command goes on.
    """
    store, reader = BatchStore(folder), LedgerReader(folder)
    try:
        jobs = BatchJobs(config, api_key, run, ledger, store, hook)
        jobs.resume()
        jobs.finish()
        for list_requests in (list_first_requests, list_repairs) if config.repair_invalid else (list_first_requests,):
            num_rounds = 0
            while num_rounds < config.max_attempts:
                wanted = list_requests(config, prompt, reader, worklist)
                num_submitted = jobs.submit(request for request in wanted if request.key not in jobs.refused)
                jobs.resume()  # batches of other outputs that hold what is wanted
                jobs.finish()
                if jobs.num_failed_jobs >= MOST_FAILED_JOBS:
                    raise TeacherError(
                        f"{jobs.num_failed_jobs} batch jobs in a row ended without a reply. The same command asks again."
                    )
                if not num_submitted and not jobs.num_waiting:
                    break
                if not num_submitted:
                    time.sleep(config.batch_poll_seconds)
                num_rounds += bool(num_submitted) and not jobs.had_no_room
    finally:
        reader.close()
        store.close()


def list_first_requests(
    config: TeacherConfig, prompt: Prompt, reader: LedgerReader, worklist: Path
) -> Iterator[Request]:
    """The requests of pending rows that have no reply."""
    for chunk in _iterate_pending(config, prompt, worklist):
        entries = reader.read_entries([key for _, _, key in chunk])
        for _, body, key in chunk:
            if key not in entries or entries[key][0].reply is None:
                yield Request(key, body)


def list_repairs(config: TeacherConfig, prompt: Prompt, reader: LedgerReader, worklist: Path) -> Iterator[Request]:
    """The requests that ask again for what could not be read, and have no reply."""
    for chunk in _iterate_pending(config, prompt, worklist):
        entries = reader.read_entries([key for _, _, key in chunk])
        repairs = []
        for messages, _, key in chunk:
            entry, _, is_settled = entries.get(key, (None, None, False))
            if entry is not None and entry.reply is not None and not is_settled:
                repairs += _build_repair(config, prompt, messages, key, entry)
        answered = reader.read_entries([request.key for request in repairs]) if repairs else {}
        yield from (
            request for request in repairs if request.key not in answered or answered[request.key][0].reply is None
        )


def _build_repair(
    config: TeacherConfig, prompt: Prompt, messages: Sequence[dict], key: bytes, entry: Entry
) -> list[Request]:
    reply = read_reply(entry.reply)
    parsed = parse_reply(reply.text, prompt.reply, reply.finish_reason)
    if parsed.fields is not None:
        return []
    body = build_body(config, prompt, repair_messages(messages, reply, parsed.problem))
    return [Request(request_key(chat_url(config.base_url), body, config.sample_index), body, parent=key)]


def _iterate_pending(
    config: TeacherConfig, prompt: Prompt, worklist: Path
) -> Iterator[list[tuple[list[dict], bytes, bytes]]]:
    """Chunks of (messages, body, key) of the pending rows."""
    first = 1
    while rows := read_pending(str(worklist), first, first + CHUNK - 1):
        first += CHUNK
        chunk = []
        for row in rows:
            messages = prompt.render_messages(json.loads(row))
            body = build_body(config, prompt, messages)
            chunk.append((messages, body, request_key(chat_url(config.base_url), body, config.sample_index)))
        yield chunk


def refuse_open_batches(folder: Path, worklist: Worklist) -> None:
    """Raise TeacherError if batch jobs are asking for pending rows: calls would wait for them, or pay twice."""
    store = BatchStore(folder)
    try:
        open_batches = {batch.id: batch for batch in store.list_open()}
        if not open_batches:
            return
        for chunk in worklist.iterate_pending_keys():
            for batch_id in store.find_owners(chunk):
                job_id = open_batches[batch_id].job_id if batch_id in open_batches else None
                name = f"batch job {job_id}" if job_id else "a batch job that is being made"
                raise TeacherError(
                    f"{name} is asking for these rows. Run the command with --mode batch to take its results."
                )
    finally:
        store.close()
