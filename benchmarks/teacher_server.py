"""A teacher with a bill: a server for tests and benchmarks that speaks Mistral's wire format, counts what it charges, and misbehaves as scripted.

    python -m benchmarks.teacher_server --port 0 --port-file /tmp/port --faults '{"rate": 0.2, "kinds": ["429", "reset_after"], "attempts": 2}'

    POST /v1/chat/completions, /v1/files, /v1/batch/jobs ...      with any bearer key, or only the one of --key
    GET  /bill           {"requests": 120, "billed": 97, "distinct": 90, "repeated": 7, "prompt_tokens": …, "windows": {"requests": 97, …}}
    GET  /bill?calls=1   the same with billed calls by request key; ?window=5 for windows of 5 seconds
    POST /bill/reset     forgets the bill and the attempts, keeps files and jobs
    POST /batch/reset    forgets files and jobs
    POST /settings       {"refuse_after": null, "faults": {…}, "max_requests_per_minute": 600}: changed while it runs

In Python, `with start_teacher_server(faults={"rate": 0.2}) as server:` runs it as a process of its own; `server.base_url`, `server.bill()`.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from benchmarks.batch_endpoints import BatchEndpoints
from benchmarks.bill import WINDOW_SECONDS, Bill
from benchmarks.delivery import answer_billed, answer_unbilled
from benchmarks.faults import STATUS_KINDS, UNBILLED_KINDS, FaultScript, FaultScriptError, read_script
from benchmarks.replies import count_fast, count_text_fast, key_of, load_exact_counters, write_content

HOST = "127.0.0.1"
CHAT_PATH = "/v1/chat/completions"
START_SECONDS = 120.0


@dataclass
class Settings:
    """What may change while the server runs."""

    faults: FaultScript
    latency_seconds: float = 0.0
    max_requests_per_minute: int = 0
    """more in a sliding minute are answered with 429 and Retry-After; 0: no limit"""
    refuse_after: int | None = None
    """calls that are answered before every one is refused with 401"""
    key: str = ""
    """the only key that is accepted; empty: any"""


class TeacherServer:
    """Answers, bills and misbehaves. One event loop."""

    def __init__(self, settings: Settings, count: str = "fast", batch_polls: int = 2) -> None:
        self.settings = settings
        self.bill = Bill()
        self._count_prompt, self._count_text = (
            load_exact_counters() if count == "exact" else (count_fast, count_text_fast)
        )
        self._accepted: deque[float] = deque()
        self._num_chat_calls = 0
        self.batch = BatchEndpoints(self, batch_polls)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request of every path."""
        path = request.path
        if path == CHAT_PATH and request.method == "POST":
            bill, number = self.bill, self.bill.arrive()  # a reset in the meantime starts another bill
            try:
                return await self._complete_chat(request, bill, number)
            finally:
                bill.complete(number)
        if path.startswith("/v1/"):
            return self._refuse_key(request) or await self.batch.handle(request)
        return await self._handle_control(request)

    async def _complete_chat(self, request: web.BaseRequest, bill: Bill, number: int) -> web.StreamResponse:
        self._num_chat_calls += 1
        data = await request.read()
        refusal = self._refuse_key(request) or self._refuse_rate()
        if refusal is not None:
            return refusal
        try:
            body = json.loads(data)
            key = key_of(body)
            content = write_content(body)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            return self.refuse(
                422, {"detail": [{"type": "invalid", "loc": ["body"], "msg": f"{type(error).__name__}: {error}"}]}
            )
        bill.asked[key] += 1
        fault = self.settings.faults.choose(key, bill.asked[key])
        if fault is not None:
            bill.faults[fault] += 1
        if fault in UNBILLED_KINDS:
            response = answer_unbilled(request, self.settings.faults, fault)
            if fault in STATUS_KINDS:
                bill.refused[str(response.status)] += 1
            return response
        reply = self.charge(bill, number, key, body, content)
        if self.settings.latency_seconds:
            await asyncio.sleep(self.settings.latency_seconds)
        if fault is None:
            return web.Response(body=reply, content_type="application/json")
        return await answer_billed(request, self.settings.faults, fault, reply)

    def charge(
        self, bill: Bill, number: int | None, key: str, body: Mapping, content: str, half_price: bool = False
    ) -> bytes:
        """Bill one call and write its completion."""
        kind = self.settings.faults.choose_content(key)
        if kind is not None:
            bill.faults[kind] += 1
        content, finish_reason = self.settings.faults.spoil(content, kind)
        num_prompt, num_completion = self._count_prompt(body), self._count_text(content)
        limit = body.get("max_tokens")
        if limit is not None and num_completion > limit:
            content, finish_reason, num_completion = content[: len(content) * limit // num_completion], "length", limit
        bill.charge(number, key, body["model"], num_prompt, num_completion, half_price)
        completion = {
            "id": f"cmpl-{key}",
            "object": "chat.completion",
            "created": 1760000000,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content, "tool_calls": None, "prefix": False},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_completion,
                "total_tokens": num_prompt + num_completion,
            },
        }
        return json.dumps(completion).encode()

    def refuse(self, status: int, body: Mapping, headers: Mapping[str, str] | None = None) -> web.Response:
        """An answer that is no success, counted."""
        self.bill.refused[str(status)] += 1
        return web.Response(
            status=status, body=json.dumps(body).encode(), content_type="application/json", headers=headers
        )

    def _refuse_key(self, request: web.BaseRequest) -> web.Response | None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        limit = self.settings.refuse_after
        if (
            scheme == "Bearer"
            and key
            and self.settings.key in ("", key)
            and (limit is None or self._num_chat_calls <= limit)
        ):
            return None
        return self.refuse(401, {"detail": "Unauthorized"})

    def _refuse_rate(self) -> web.Response | None:
        limit = self.settings.max_requests_per_minute
        if not limit:
            return None
        now = time.monotonic()
        while self._accepted and self._accepted[0] <= now - WINDOW_SECONDS:
            self._accepted.popleft()
        if len(self._accepted) < limit:
            self._accepted.append(now)
            return None
        wait = math.ceil(self._accepted[0] + WINDOW_SECONDS - now)
        return self.refuse(429, {"message": "Requests rate limit exceeded"}, {"Retry-After": str(wait)})

    async def _handle_control(self, request: web.BaseRequest) -> web.Response:
        """The bill and the settings: not part of what a client sees."""
        if request.path == "/bill" and request.method == "GET":
            summary = self.bill.summarise(float(request.query.get("window", WINDOW_SECONDS))) | {
                "batch": self.batch.summarise()
            }
            return web.json_response(summary | ({"calls": dict(self.bill.calls)} if request.query.get("calls") else {}))
        if request.path == "/bill/reset" and request.method == "POST":
            self.bill = Bill()
            self._num_chat_calls = 0
            self._accepted.clear()
            return web.json_response({})
        if request.path == "/batch/reset" and request.method == "POST":
            self.batch.forget()
            return web.json_response({})
        if request.path == "/settings" and request.method == "POST":
            try:
                for name, value in (await request.json()).items():
                    if not hasattr(self.settings, name):
                        return web.json_response({"message": f"there is no setting {name!r}"}, status=422)
                    setattr(
                        self.settings,
                        name,
                        read_script(value, self.settings.faults.seed) if name == "faults" else value,
                    )
            except FaultScriptError as error:
                return web.json_response({"message": str(error)}, status=422)
            return web.json_response({})
        return web.json_response({"message": "no Route matched with those values"}, status=404)


async def serve(server: TeacherServer, port: int, port_file: Path | None) -> None:
    """Answer until the process is ended by SIGTERM or SIGINT."""
    runner = web.ServerRunner(web.Server(server.handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, HOST, port, backlog=4096).start()
    bound = runner.addresses[0][1]
    if port_file:
        # Renamed into place, so that whoever waits for the file never reads half a number.
        draft = port_file.with_name(port_file.name + ".part")
        draft.write_text(f"{bound}\n")
        draft.replace(port_file)
    print(f"benchmark teacher on http://{HOST}:{bound}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    # Calls under way are dropped: no client of a test waits for a server that was told to end.


@dataclass(frozen=True)
class RunningServer:
    """A server in a process of its own."""

    base_url: str
    process: subprocess.Popen

    def bill(self, calls: bool = False, window_seconds: float = WINDOW_SECONDS) -> dict:
        """The bill; with `calls`, also the billed calls by request key."""
        return self._ask(f"/bill?window={window_seconds}" + ("&calls=1" if calls else ""))

    def reset_bill(self) -> None:
        """Forget the bill and the attempts."""
        self._ask("/bill/reset", {})

    def forget_batches(self) -> None:
        """Forget files and jobs."""
        self._ask("/batch/reset", {})

    def change(self, **settings: object) -> None:
        """Change settings while it runs: refuse_after, faults, max_requests_per_minute, latency_seconds, key."""
        self._ask("/settings", settings)

    def stop(self) -> None:
        """End the process, if it has not ended."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, path: str, body: Mapping | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.base_url + path, data=data), timeout=30) as response:
            return json.load(response)


@contextmanager
def start_teacher_server(faults: Mapping | None = None, port: int = 0, **options: object) -> Iterator[RunningServer]:
    """Run the server in its own process while the block lasts. Options are the flags: seed=3, latency_seconds=0.01, count="exact", refuse_after=50."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [
            sys.executable,
            "-m",
            "benchmarks.teacher_server",
            f"--port={port}",
            f"--port-file={port_file}",
            *flags,
        ]
        root = Path(__file__).resolve().parent.parent
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        }
        process = subprocess.Popen(
            [*command, f"--faults={json.dumps(faults or {})}"], cwd=root, env=environment, stdout=subprocess.DEVNULL
        )
        server = None
        try:
            deadline = time.monotonic() + START_SECONDS
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the benchmark's teacher did not start (exit status {process.poll()})")
                time.sleep(0.02)
            server = RunningServer(f"http://{HOST}:{port_file.read_text().strip()}", process)
            yield server
        finally:
            (server or RunningServer("", process)).stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a teacher that bills and misbehaves, on the loopback address, until interrupted."
    )
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--port-file", type=Path, help="file to write the chosen port to")
    parser.add_argument("--seed", type=int, default=0, help="of the fault script")
    parser.add_argument("--faults", default="{}", help="the fault script as JSON; see benchmarks/faults.py")
    parser.add_argument("--latency-seconds", type=float, default=0.0, help="waited before each answer")
    parser.add_argument(
        "--count",
        choices=("exact", "fast"),
        default="fast",
        help="tokens as mistral-common encodes them, or by characters",
    )
    parser.add_argument(
        "--max-requests-per-minute", type=int, default=0, help="more are answered with 429; 0: no limit"
    )
    parser.add_argument("--refuse-after", type=int, help="answer 401 after so many calls")
    parser.add_argument("--key", default="", help="the only API key that is accepted; empty: any")
    parser.add_argument(
        "--batch-polls", type=int, default=2, help="times that a batch job is looked at until it has ended"
    )
    arguments = parser.parse_args()
    try:
        faults = read_script(arguments.faults, arguments.seed)
    except FaultScriptError as error:
        parser.error(f"--faults: {error}")
    settings = Settings(
        faults, arguments.latency_seconds, arguments.max_requests_per_minute, arguments.refuse_after, arguments.key
    )
    asyncio.run(
        serve(TeacherServer(settings, arguments.count, arguments.batch_polls), arguments.port, arguments.port_file)
    )


if __name__ == "__main__":
    main()
