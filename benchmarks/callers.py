"""Three ways to make the same calls from one process: a bare aiohttp loop, the official client, and this project's Teacher with its ledger on disk.

    python -m benchmarks.callers teacher --base-url http://127.0.0.1:40123 --calls 6000 --in-flight 64 --ledger-dir bench/ledger

Prints {"way": "teacher", "calls": 6000, "seconds": 3.1, "calls_per_second": 1935.5}. Each call asks `initial_generation` about a pair of its own, with the
reply's JSON schema, and reads the reply; the clock runs from the first row to the last reply, imports and connections' closing left out.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from nli.api.chat import chat_url, read_reply
from nli.api.ledger import Ledger, new_owner
from nli.api.ledger_file import LedgerReader
from nli.api.limiter_client import LimiterClient
from nli.api.services import GroupCommit, LedgerClient
from nli.task.parsing import ParseStatus, parse_reply
from nli.task.prompts import TEACHER_PROMPTS
from nli.teacher.online import Teacher
from nli.teacher.requests import TeacherConfig, build_body

MODEL = "ministral-8b-2512"
PROMPT = TEACHER_PROMPTS["initial_generation"]
SLICE = 256  # rows handed to the teacher at a time, as a Ray Data worker does


def make_row(number: int) -> dict:
    """A pair of an ordinary length; the number makes the request one of its own."""
    premise = f"A man in a red jacket, number {number}, walks two small dogs along the river while his friends watch from the bridge."
    return {
        "id": str(number),
        "premise": premise,
        "hypothesis": f"Somebody is outside with animals near the water, and number {number} is seen.",
    }


def make_config(base_url: str, in_flight: int) -> TeacherConfig:
    """One worker without limits."""
    return TeacherConfig(base_url=base_url, model=MODEL, max_in_flight=in_flight, workers=1)


async def _run_side_by_side(num_calls: int, in_flight: int, call: Callable[[dict], Awaitable[None]]) -> float:
    """Seconds that so many calls take, so many at a time."""
    rows: Iterator[dict] = (make_row(number) for number in range(num_calls))

    async def work() -> None:
        for row in rows:
            await call(row)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    return time.perf_counter() - started


async def run_bare(base_url: str, num_calls: int, in_flight: int) -> float:
    """What a person writes in ten lines: no retries, no record, no limit."""
    import aiohttp

    config, url = make_config(base_url, in_flight), chat_url(base_url)
    headers = {"Authorization": "Bearer benchmark", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(row: dict) -> None:
            async with session.post(url, data=build_body(config, PROMPT, PROMPT.render_messages(row))) as response:
                reply = read_reply(await response.read())
            if parse_reply(reply.text, PROMPT.reply).status != ParseStatus.OK:
                raise ValueError(reply.text)

        return await _run_side_by_side(num_calls, in_flight, call)


async def run_sdk(base_url: str, num_calls: int, in_flight: int) -> float:
    """The official client, asynchronously."""
    from mistralai.client import Mistral

    config = make_config(base_url, in_flight)
    async with Mistral(api_key="benchmark", server_url=base_url) as client:

        async def call(row: dict) -> None:
            body = json.loads(build_body(config, PROMPT, PROMPT.render_messages(row)))
            reply = await client.chat.complete_async(**body)
            if parse_reply(reply.choices[0].message.content, PROMPT.reply).status != ParseStatus.OK:
                raise ValueError(reply)

        return await _run_side_by_side(num_calls, in_flight, call)


async def run_teacher(base_url: str, num_calls: int, in_flight: int, folder: Path) -> float:
    """The project's caller: claim, send and reply of each call on disk before the next step."""
    config, name = make_config(base_url, in_flight), new_owner("benchmark")
    ledger = Ledger(folder)
    ledger.begin_run("benchmark", None)
    client = LedgerClient(GroupCommit(ledger).post, name, gather_seconds=0.001)  # nothing travels to another process
    teacher = Teacher(config, PROMPT, "benchmark", "benchmark", client, LimiterClient(None, name, config.limits()))
    started = time.perf_counter()
    await run_slices(teacher, num_calls)
    seconds = time.perf_counter() - started
    await teacher.close()
    ledger.close()
    reader = LedgerReader(folder)
    states = reader.count_states("benchmark")
    reader.close()
    if states != {"done": num_calls}:
        raise ValueError(states)
    return seconds


async def run_slices(teacher: Teacher, num_calls: int) -> None:
    """Slices of rows, four under way at a time, as Ray Data hands batches to an asynchronous actor."""
    starts = iter(range(0, num_calls, SLICE))

    async def work() -> None:
        for start in starts:
            await teacher.ask_all([make_row(number) for number in range(start, min(start + SLICE, num_calls))])

    await asyncio.gather(*(work() for _ in range(4)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time calls to a running benchmark teacher, in one of three ways.")
    parser.add_argument("way", choices=("bare", "sdk", "teacher"))
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--ledger-dir", type=Path, help="of `teacher`: a new folder")
    arguments = parser.parse_args()
    if arguments.way == "teacher" and arguments.ledger_dir is None:
        parser.error("teacher needs --ledger-dir")
    ways = {"bare": run_bare, "sdk": run_sdk, "teacher": run_teacher}
    values = (
        arguments.base_url,
        arguments.calls,
        arguments.in_flight,
        *((arguments.ledger_dir,) if arguments.way == "teacher" else ()),
    )
    seconds = asyncio.run(ways[arguments.way](*values))
    print(
        json.dumps(
            {
                "way": arguments.way,
                "calls": arguments.calls,
                "seconds": seconds,
                "calls_per_second": arguments.calls / seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
