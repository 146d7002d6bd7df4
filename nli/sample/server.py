"""The sample teacher as a local server that speaks Mistral's chat-completions wire format, on the loopback address only.

    python -m nli.sample.server --port 0 --port-file /tmp/port
    python -m nli.sample.server --port 8377 -- python -m ray_jobs.pipeline ...      serves while the command runs, and gives it a key

    POST http://127.0.0.1:<port>/v1/chat/completions   with any bearer key
        {"model": "mistral-large-latest", "messages": [...], "response_format": {"type": "json_object"}}
    reply
        {"id": "cmpl-5c1d...", "object": "chat.completion", "created": 1760000000, "model": "mistral-large-latest",
         "choices": [{"index": 0, "message": {"role": "assistant", "content": "{...}", "tool_calls": null, "prefix": false}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 410, "completion_tokens": 31, "total_tokens": 441}}

In Python, `with start_server() as base_url:` runs it in a thread. What it answers is decided in `nli.sample.teacher_mind`.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from aiohttp import web

from nli.sample.teacher_mind import answer_messages, count_tokens
from nli.sample.world import SEED, build_splits

HOST = "127.0.0.1"
MODELS = ("mistral-large-latest", "mistral-medium-latest", "mistral-small-latest")
LATENCY_SECONDS = 0.005

_count_long_text = lru_cache(maxsize=64)(count_tokens)


def build_app(latency_seconds: float = LATENCY_SECONDS, seed: int = SEED) -> web.Application:
    """The server's routes; every reply waits `latency_seconds` first."""
    build_splits(seed)

    async def complete_chat(request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError as error:
            return _refuse_body([{"type": "json_invalid", "loc": ["body"], "msg": f"JSON decode error: {error}"}])
        problems = _find_problems(body)
        if problems:
            return _refuse_body(problems)
        if latency_seconds:
            await asyncio.sleep(latency_seconds)
        return web.json_response(complete(body, seed))

    async def list_models(request: web.Request) -> web.Response:
        capabilities = {
            "completion_chat": True,
            "completion_fim": False,
            "function_calling": False,
            "fine_tuning": False,
            "vision": False,
        }
        cards = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "sample",
                "capabilities": capabilities,
                "type": "base",
            }
            for name in MODELS
        ]
        return web.json_response({"object": "list", "data": cards})

    app = web.Application(middlewares=[_ask_for_key], client_max_size=16 * 2**20)
    app.router.add_post("/v1/chat/completions", complete_chat)
    app.router.add_get("/v1/models", list_models)
    return app


@web.middleware
async def _ask_for_key(request: web.Request, handler: Callable) -> web.StreamResponse:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return web.json_response({"detail": "Unauthorized"}, status=401)
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return web.json_response({"message": "no Route matched with those values"}, status=404)
    except web.HTTPMethodNotAllowed:
        return web.json_response({"detail": "Method Not Allowed"}, status=405)


def _find_problems(body) -> list[dict]:
    """What FastAPI would say of a body without model or messages."""
    if not isinstance(body, dict):
        return [
            {
                "type": "model_attributes_type",
                "loc": ["body"],
                "msg": "Input should be a valid dictionary",
                "input": body,
            }
        ]
    problems = [
        {"type": "missing", "loc": ["body", name], "msg": "Field required", "input": body}
        for name in ("model", "messages")
        if not body.get(name)
    ]
    if problems:
        return problems
    messages = body["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and "role" in message for message in messages
    ):
        return [
            {
                "type": "list_type",
                "loc": ["body", "messages"],
                "msg": "Input should be a list of messages",
                "input": messages,
            }
        ]
    return []


def _refuse_body(problems: list[dict]) -> web.Response:
    return web.json_response({"detail": problems}, status=422)


def complete(body: dict, seed: int = SEED) -> dict:
    """The reply to a valid request body."""
    model, messages = body["model"], body["messages"]
    content, is_cut = answer_messages(model, messages, body.get("response_format"), seed)
    limit = body.get("max_tokens")
    if limit is not None and count_tokens(content) > limit:
        pieces = list(re.finditer(r"\w+|[^\w\s]", content))[:limit]
        content, is_cut = content[: pieces[-1].end() if pieces else 0], True
    num_prompt = sum(_count_long_text(str(message.get("content") or "")) for message in messages)
    num_completion = count_tokens(content)
    digest = hashlib.blake2b(
        json.dumps([model, messages, content], sort_keys=True).encode(), digest_size=16
    ).hexdigest()
    message = {"role": "assistant", "content": content, "tool_calls": None, "prefix": False}
    return {
        "id": f"cmpl-{digest}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "length" if is_cut else "stop"}],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }


async def _listen(app: web.Application, port: int) -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port, backlog=1024).start()
    return runner, runner.addresses[0][1]


@contextmanager
def start_server(port: int = 0, latency_seconds: float = LATENCY_SECONDS, seed: int = SEED) -> Iterator[str]:
    """Run the server in a thread while the block lasts; gives its base URL, such as `http://127.0.0.1:40123`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="sample-teacher", daemon=True)
    thread.start()
    try:
        runner, bound_port = asyncio.run_coroutine_threadsafe(
            _listen(build_app(latency_seconds, seed), port), loop
        ).result(timeout=30)
        try:
            yield f"http://{HOST}:{bound_port}"
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=90)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


async def _serve_forever(port: int, port_file: Path | None, latency_seconds: float, seed: int) -> None:
    runner, bound_port = await _listen(build_app(latency_seconds, seed), port)
    if port_file:
        # Renamed into place, so that whoever waits for the file never reads half a number.
        draft = port_file.with_name(port_file.name + ".part")
        draft.write_text(f"{bound_port}\n")
        draft.replace(port_file)
    print(f"sample teacher on http://{HOST}:{bound_port}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the sample teacher on the loopback address until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--port-file", type=Path, help="file to write the chosen port to")
    parser.add_argument("--latency-seconds", type=float, default=LATENCY_SECONDS)
    parser.add_argument("--seed", type=int, default=SEED, help="the world's seed")
    parser.add_argument(
        "command",
        nargs="*",
        help="after --: a command to run with MISTRAL_API_KEY set; the server and this process end with it",
    )
    arguments = parser.parse_args()
    if arguments.command:
        sys.exit(serve_while_running(arguments.command, arguments.port, arguments.latency_seconds, arguments.seed))
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(arguments.port, arguments.port_file, arguments.latency_seconds, arguments.seed))


def serve_while_running(
    command: list[str], port: int, latency_seconds: float = LATENCY_SECONDS, seed: int = SEED
) -> int:
    """Run a command while the server answers; returns the command's exit status."""
    try:
        with start_server(port, latency_seconds, seed) as url:
            print(f"sample teacher on {url}", flush=True)
            process = subprocess.Popen(command, env=os.environ | {"MISTRAL_API_KEY": "sample-key"})
            while True:
                # An interrupt reaches the command too, which ends in its own way.
                with suppress(KeyboardInterrupt):
                    return process.wait()
    except OSError as error:
        print(
            f"error: no server on {HOST}:{port} ({error.strerror}); end what listens there, or choose another --port.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    main()
