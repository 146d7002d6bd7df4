"""A chat-completions server for tests, which answers what the test says, one call after another.

with_server([Answer(status=500), Answer(text='{"predicted_label": 1}')], use)    # runs `await use(server)`; `server.calls` keeps what was asked
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.test_utils import TestServer

KEY = "key-that-must-not-show"


@dataclass
class Answer:
    """One HTTP answer. `body` replaces the completion that `text` would be; `delay_seconds` passes before it; `hang_up` ends the connection instead."""

    text: str | list | None = "Hello."
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: str | bytes | None = None
    finish_reason: str | None = "stop"
    usage: dict | None = field(
        default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    )
    delay_seconds: float = 0.0
    hang_up: bool = False

    def render(self) -> bytes:
        if self.body is not None:
            return self.body if isinstance(self.body, bytes) else self.body.encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish_reason,
        }
        return json.dumps(
            {"id": "1", "object": "chat.completion", "model": "toy-1", "choices": [choice], "usage": self.usage}
        ).encode()


@dataclass
class ChatServer:
    """Where the server is and what was asked of it. The last answer repeats."""

    answers: list[Answer]
    base_url: str = ""
    calls: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    _in_flight: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.calls.append(json.loads(await request.read()))
        self.keys.append(request.headers.get("Authorization", ""))
        answer = self.answers[min(len(self.calls), len(self.answers)) - 1]
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            await asyncio.sleep(answer.delay_seconds)
        finally:
            self._in_flight -= 1
        if answer.hang_up:
            request.transport.close()
        return web.Response(
            status=answer.status, body=answer.render(), headers=answer.headers, content_type="application/json"
        )


def with_server(answers: Sequence[Answer], use: Callable[[ChatServer], Awaitable]) -> object:
    """Run `use` while a server answers; returns what `use` returns, or raises what it raises."""

    async def run() -> object:
        chat = ChatServer(list(answers))
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat.handle)
        server = TestServer(app)
        await server.start_server()
        chat.base_url = str(server.make_url("/")).rstrip("/")
        try:
            return await use(chat)
        finally:
            await server.close()

    return asyncio.run(run())
