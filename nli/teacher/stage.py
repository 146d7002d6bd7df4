"""What the stages that ask a teacher have in common: rows in, the ledger between, rows out.

    run_generation(Generation(stage="thoughts", config=config, prompt=prompt, source=csv, output=jsonl, read_rows=…, build_row=…, …))

    1  the rows are read once, checked, and put into a worklist on disk with the key of each one's request
    2  requests without a reply in the ledger are asked, by Ray Data actors that fetch slices of the worklist; identical requests are asked once
    3  the output is made from the rows and the ledger: a pure step, repeated on every run, that costs no call

Nothing of this is held in memory whole. A run that stops for whatever reason goes on with step 2; a finished one has nothing to do there.
"""

import contextlib
import gc
import json
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nli.api.chat import Unreachable, check_reachable
from nli.api.ledger import Ledger, new_owner
from nli.api.ledger_file import LedgerReader
from nli.api.limiter import Limits
from nli.api.limiter_client import LimiterClient
from nli.api.prices import NANO
from nli.api.services import open_ledger_client, start_ledger_service, start_limiter_service, sync_with_actor
from nli.runtime.cluster import connected, spread
from nli.runtime.errors import NLIError, ResumeError, StorageError, TeacherError
from nli.runtime.files import dump_line, resolve_output, write_atomic
from nli.runtime.manifest import Run, manifest_beside, start_run
from nli.runtime.worklist import Worklist
from nli.task.parsing import ParseStatus
from nli.task.prompts import TEACHER_PROMPTS, Prompt
from nli.teacher.batch import ask_in_batches, refuse_open_batches
from nli.teacher.estimate import describe_estimate, estimate_run
from nli.teacher.online import Teacher
from nli.teacher.progress import LiveProgress
from nli.teacher.requests import (
    Outcome,
    TeacherConfig,
    check_teacher,
    describe_requests,
    first_key,
    read_outcomes,
    settle_key_file,
)

MOST_FAILED_SHARE = 0.05  # of a file's rows, beyond which the stage ends in an error
CPUS_PER_WORKER = (
    0.2  # a worker waits for the server most of the time; the workers asked for all run, also on few cores
)
LARGEST_SLICE = 256  # rows that a worker takes at a time
SLICES_AT_ONCE = 3  # that a worker has
STOPPED = "stopped from outside; calls under way were awaited"


@dataclass(frozen=True)
class Generation:
    """One stage's work: what it reads, asks and writes."""

    stage: str
    config: TeacherConfig
    prompt: Prompt
    source: Path
    output: Path
    read_rows: Callable[[], Iterable[dict]]
    """the rows to ask about, streamed; raises DataError"""
    build_row: Callable[[Mapping, Outcome], dict]
    """the output's row"""
    count_row: Callable[[Counter, Mapping], None]
    """adds a row of the output to the run's counts"""
    find_fault: Callable[[Mapping], tuple[str, str] | None]
    """(reason, details) of a row that is a dead letter, None of a good one"""


def run_generation(work: Generation) -> Counter | None:
    """Ask for what is not there yet and write the output; returns its counts, None after a dry run.

    Raises DataError, TeacherError, StorageError or ResumeError before the first call; TeacherError also later, when no call can succeed, the budget is used
    up or too many requests failed. Replies stay in the ledger, and the same command goes on.
    """
    config = settle_key_file(work.config)
    key = check_teacher(config)
    folder = resolve_output(config.ledger_dir, config.storage_root)
    with _temporary_folder() as place, Worklist(Path(place) / "rows.sqlite") as worklist:
        num_rows = worklist.fill(((row, first_key(config, work.prompt, row)) for row in work.read_rows()), work.source)
        if config.dry_run:
            with _finding_done(work, folder) as find_done:
                estimate = estimate_run(config, work.prompt, worklist, folder, str(work.output), find_done)
            print(describe_estimate(config, estimate), flush=True)
            return None
        identity = describe_requests(config, work.prompt)
        record = start_run(
            manifest_beside(work.output), work.stage, identity, config, [work.source], has_work=work.output.exists()
        )
        try:
            with contextlib.closing(Ledger(folder)) as ledger:
                counts, spent = _ask_and_write(work, config, key, ledger, folder, worklist, num_rows, record)
        except BaseException:
            record.stop(record.manifest["counts"])
            raise
    record.finish({**counts, "spent": spent})
    _refuse_failed(work, counts)
    return counts


def _temporary_folder() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="nli-rows-")
    except OSError as error:
        raise StorageError(
            f"no temporary folder can be made ({error.strerror}). Free space, or set TMPDIR to a folder that can be written to."
        ) from None


def _ask_and_write(
    work: Generation,
    config: TeacherConfig,
    key: str,
    ledger: Ledger,
    folder: Path,
    worklist: Worklist,
    num_rows: int,
    record: Run,
) -> tuple[Counter, dict]:
    """Steps 2 and 3; returns the counts of the output's rows and what the run has spent, earlier attempts included."""
    run = str(work.output)
    with _finding_done(work, folder) as find_done:
        num_pending = worklist.list_pending(find_done)
    num_requests = worklist.count_requests()
    same = f" ({num_requests} different requests)" if num_requests < num_rows else ""
    done = num_requests - num_pending
    if not done:
        _refuse_to_pay_again(work, folder, record)
    print(
        f"{work.stage}: {num_rows} rows{same}, {done} finished already, {num_pending} to ask {config.model} for",
        flush=True,
    )
    if num_pending:
        ledger.begin_run(run, int(config.max_cost * NANO) if config.max_cost else None, config.price())
        if config.mode == "batch":
            ask_in_batches(config, work.prompt, key, run, ledger, folder, worklist.path)
        else:
            refuse_open_batches(folder, worklist)
            _ask(work, config, key, ledger, folder, worklist, num_pending)
    counts = _write_output(work, ledger, folder, worklist)
    totals = ledger.read_totals(run)
    spent = {"ambiguous_sends": totals.ambiguous_sends, "repairs": totals.repairs}
    return counts, spent | (
        {"cost_dollars": totals.cost / NANO, "held_dollars": totals.held / NANO} if config.price() else {}
    )


def _ask(
    work: Generation,
    config: TeacherConfig,
    key: str,
    ledger: Ledger,
    folder: Path,
    worklist: Worklist,
    num_pending: int,
) -> None:
    """Have workers ask for all pending rows. Raises the first NLIError of a worker, after the calls under way of all workers have ended."""
    import ray

    try:
        check_reachable(config.base_url)
    except Unreachable as error:
        raise TeacherError(f"{error}. Check --base-url and the network; nothing was sent.") from None
    size = max(1, min(LARGEST_SLICE, num_pending // (8 * config.workers)))
    slices = [{"first": first, "last": min(first + size - 1, num_pending)} for first in range(1, num_pending + 1, size)]
    run = str(work.output)
    with (
        connected(),
        _halting_on_signals(ledger, run),
        LiveProgress(work.stage, LedgerReader(folder), run, num_pending, bool(config.price())),
    ):
        services = [start_ledger_service(folder), start_limiter_service(config.base_url, key, config.limits())]
        config = config.with_limits(settle_limits(config, services[1], work.stage))
        arguments = (
            config,
            work.prompt.name,
            run,
            str(worklist.path),
            *services,
            folder,
            ray.get_runtime_context().get_node_id(),
        )
        pool = {"num_workers": config.workers, "num_cpus": CPUS_PER_WORKER}
        for _ in spread(
            slices,
            Asker,
            arguments,
            **pool,
            batch_size=1,
            label=work.stage,
            calls_at_once=SLICES_AT_ONCE,
            awaits_all=True,
        ):
            pass


class Asker:
    """Ray Data actor: slices of a worklist in, tallies out; the replies go into the ledger."""

    def __init__(
        self, config: TeacherConfig, prompt_name: str, run: str, worklist: str, ledger, limiter, folder: Path, node: str
    ) -> None:
        self.worklist = worklist
        self.ledger = ledger
        name = new_owner("worker")
        limits = LimiterClient(sync_with_actor(limiter), name, config.limits(), config.workers)
        client = open_ledger_client(ledger, folder, node, config.workers, name)
        self.teacher = Teacher(config, TEACHER_PROMPTS[prompt_name], check_teacher(config), run, client, limits)
        gc.freeze()  # what Ray has imported is not searched again at every full collection

    async def __call__(self, slices: list[dict]) -> list[dict]:
        for piece in slices:
            rows = await self.ledger.read_rows.remote(self.worklist, piece["first"], piece["last"])
            await self.teacher.ask_all([json.loads(row) for row in rows])
        return slices


@contextlib.contextmanager
def _finding_done(work: Generation, folder: Path) -> Iterator[Callable[[list[bytes]], set[bytes]]]:
    """A function that picks, from keys of first requests, those that need no call any more."""
    if not (folder / "ledger.sqlite").exists():
        yield lambda keys: set()
        return
    with contextlib.closing(LedgerReader(folder)) as reader:
        yield lambda keys: {
            key
            for key, (_, is_complete) in read_outcomes(work.prompt, reader, keys, work.config.repair_invalid).items()
            if is_complete
        }


def _write_output(work: Generation, ledger: Ledger, folder: Path, worklist: Worklist) -> Counter:
    """Make the output and its dead letters from rows and ledger; returns the counts."""
    counts: Counter = Counter()
    reader = LedgerReader(folder)
    dead_letters = dead_letters_beside(work.output)

    def write(aside: Path) -> None:
        bad = aside.with_name(aside.name + ".dead")
        try:
            fill(aside, bad)
            bad.replace(dead_letters)
        finally:
            bad.unlink(missing_ok=True)

    def fill(aside: Path, bad: Path) -> None:
        with (
            open(aside, "w", encoding="utf-8", newline="\n") as file,
            open(bad, "w", encoding="utf-8", newline="\n") as bad_file,
        ):
            for chunk in worklist.iterate():
                outcomes = read_outcomes(
                    work.prompt, reader, list({key for _, key in chunk}), work.config.repair_invalid
                )
                ledger.settle([key for key, (_, is_complete) in outcomes.items() if is_complete])
                for row, key in chunk:
                    made = work.build_row(row, outcomes[key][0])
                    file.write(dump_line(made))
                    counts["rows"] += 1
                    work.count_row(counts, made)
                    if fault := work.find_fault(made):
                        counts[f"dead_{fault[0]}"] += 1
                        why = {"reason": fault[0], "details": fault[1]}
                        bad_file.write(
                            dump_line(why | made | why)
                        )  # first, and also where the user's file has such columns

    try:
        write_atomic(work.output, write)
    finally:
        reader.close()
    if not dead_letters.stat().st_size:
        dead_letters.unlink()
    return counts


def dead_letters_beside(output: Path) -> Path:
    """Where the rows that are not fit for training lie, each with its reason."""
    return output.with_name(f"{output.stem}.dead_letters{output.suffix}")


def _refuse_to_pay_again(work: Generation, folder: Path, record: Run) -> None:
    """Raise ResumeError if the output holds answers to these very inputs, of which the ledger knows none: it is not the one that they were paid through."""
    replies = sum(
        count
        for name, count in record.manifest["counts"].items()
        if name.startswith("status_") and name != f"status_{ParseStatus.REQUEST_FAILED}"
    )
    if replies and record.has_same_inputs and work.output.exists():
        raise ResumeError(
            f"{work.output} holds {replies} replies of which the ledger in {folder} knows none, so all would be asked and paid again."
            " Give the --ledger-dir that they went through; or, to pay again, move the output away."
        )


def _refuse_failed(work: Generation, counts: Mapping) -> None:
    """Say how many requests failed in the end; raise TeacherError if they are too many to go on with."""
    failed = counts.get(f"status_{ParseStatus.REQUEST_FAILED}", 0)
    if failed:
        why = dead_letters_beside(work.output).name
        message = f"{work.output}: {failed} of {counts['rows']} requests failed; {why} says why. The same command asks for them again."
        if failed > MOST_FAILED_SHARE * counts["rows"]:
            raise TeacherError(message)
        print(message, flush=True)


def settle_limits(config: TeacherConfig, limiter, stage: str) -> Limits:
    """Give the account this job's limits; those that it leaves open stay as other jobs have set them. Returns what is in force, and says where it is news."""
    import ray

    before = ray.get(limiter.describe.remote())["limits"]
    limits = config.limits(before)
    if limits != before:
        ray.get(limiter.set_limits.remote(limits))
        print(
            f"{stage}: the account's limits are now {describe_limits(limits)}; they were {describe_limits(before)}",
            flush=True,
        )
    elif limits != config.limits():
        print(
            f"{stage}: the account's limits are {describe_limits(limits)}, as another job set them; ray_jobs.account changes them",
            flush=True,
        )
    return limits


def describe_limits(limits: Limits) -> str:
    """An account's limits in words."""
    names = {
        "requests_per_minute": "requests a minute",
        "tokens_per_minute": "tokens a minute",
        "max_in_flight": "calls in flight",
    }
    return (
        ", ".join(f"{getattr(limits, name):g} {words}" for name, words in names.items() if getattr(limits, name))
        or "none"
    )


@contextlib.contextmanager
def _halting_on_signals(ledger: Ledger, run: str) -> Iterator[None]:
    """On the first SIGINT or SIGTERM, let no further call go out and wait for those under way; a second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    received = []

    def halt(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        print("stopping: no further call is sent; waiting for those under way (again: stop at once)", flush=True)
        ledger.commit([("driver", [("halt", run, STOPPED)])])

    for number in before:
        signal.signal(number, halt)
    try:
        yield
    except NLIError:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
