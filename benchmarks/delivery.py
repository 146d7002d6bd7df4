"""How a scripted fault looks on the wire."""

import asyncio
import json
import math
import socket
import struct
import time
from contextlib import suppress
from email.utils import formatdate

from aiohttp import web

from benchmarks.faults import STATUS_KINDS, FaultScript

DRIP_PIECES = 8


def answer_unbilled(request: web.BaseRequest, script: FaultScript, kind: str) -> web.Response:
    """Faults that come before the bill: a status, or a reset connection."""
    if kind not in STATUS_KINDS:
        return reset(request)
    # A date has whole seconds: rounded up, it never says "now" too early.
    date = formatdate(math.ceil(time.time()) + script.retry_after_seconds, usegmt=True)
    headers = {"429": {"Retry-After": str(script.retry_after_seconds)}, "429_date": {"Retry-After": date}}.get(kind)
    message = "Requests rate limit exceeded" if kind.startswith("429") else "Service unavailable"
    return web.Response(
        status=int(kind[:3]),
        body=json.dumps({"message": message}).encode(),
        content_type="application/json",
        headers=headers,
    )


async def answer_billed(request: web.BaseRequest, script: FaultScript, kind: str, reply: bytes) -> web.StreamResponse:
    """Faults of an answer that is already billed."""
    if kind == "reset_after":
        return reset(request)
    if kind == "not_json":
        return web.Response(body=b"<html><body>upstream closed</body></html>", content_type="text/html")
    if kind == "late":
        await asyncio.sleep(script.late_seconds)
        return web.Response(body=reply, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(reply))})
    with suppress(ConnectionError):
        await response.prepare(request)
        if kind == "truncated":
            await response.write(reply[: len(reply) // 2])
            request.transport.close()
            return response
        size = -(-len(reply) // DRIP_PIECES)
        for start in range(0, len(reply), size):
            await response.write(reply[start : start + size])
            await asyncio.sleep(script.drip_seconds / DRIP_PIECES)
    return response


def reset(request: web.BaseRequest) -> web.Response:
    """End the connection with a TCP reset."""
    transport = request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()
