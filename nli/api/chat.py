"""One chat-completions call over HTTP, in the wire format of Mistral's API and of every server that speaks it (vLLM among them).

    async with ChatClient("https://api.mistral.ai", key, timeout_seconds=60) as client:
        data, reply = await client.complete(b'{"messages": [...], "model": "ministral-8b-2512"}')
        reply.text, reply.finish_reason, reply.num_prompt_tokens         # what `read_reply` finds in `data`, the raw body

A call is made once; retrying is the caller's. A failure is one of two: CallFailed, which says whether another try can help and whether the call may have
been billed, or TeacherError, after which no call of this run can succeed.
"""

import asyncio
import json
import math
import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp

from nli.runtime.errors import TeacherError

KEY_VARIABLE = "MISTRAL_API_KEY"
NO_KEY = "none"  # stands for the key of a server that asks for none
CONNECT_SECONDS = 20.0
REDIRECTS = (301, 302, 303, 307, 308)  # not followed: a POST would become a GET, or one grant two requests
FEWEST_KEY_CHARACTERS = (
    16  # of a key that is looked for in replies; a shorter one, such as vLLM users make up, may be a word of theirs
)
MOST_TOKENS = 10**9  # in one reply; what is more is no count


@dataclass(frozen=True)
class Reply:
    """What came back. Token counts are None where the server sends no usage."""

    text: str
    finish_reason: str | None
    model: str
    num_prompt_tokens: int | None
    num_completion_tokens: int | None


class CallFailed(Exception):
    """One call failed. `kind` is a word for it: http_429, reset, timeout, ….

    `retryable`: the same call may succeed later; `is_ambiguous`: it was sent and no answer came, so it may have been billed; `retry_after`: seconds that the
    server asks to wait, if it does.
    """

    def __init__(
        self, reason: str, kind: str, retryable: bool, is_ambiguous: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.retryable = retryable
        self.is_ambiguous = is_ambiguous
        self.retry_after = retry_after


def read_api_key(key_file: str = "") -> str:
    """The API key: from `key_file`, else from MISTRAL_API_KEY in the environment, else from `.env` in the current folder. Raises TeacherError without one.

    A `key_file` called `none` stands for a server that asks for no key.
    """
    if key_file == NO_KEY:
        return NO_KEY
    if key_file:
        try:
            key = Path(key_file).read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise TeacherError(f"{key_file}: the key file cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            raise TeacherError(f"{key_file}: the key file is not text in UTF-8; save it as that.") from None
    else:
        from dotenv import dotenv_values

        try:
            key = (
                os.environ.get(KEY_VARIABLE, "").strip()
                or (dotenv_values(".env", encoding="utf-8-sig").get(KEY_VARIABLE) or "").strip()
            )
        except UnicodeDecodeError:
            raise TeacherError(
                f".env is not text in UTF-8; save it as that, or set {KEY_VARIABLE} in the environment."
            ) from None
    if not key:
        raise TeacherError(
            f"No API key. Set {KEY_VARIABLE} in the environment of this machine (of the nodes, on a cluster) or in .env, or give --api-key-file."
        )
    if not (key.isascii() and key.isprintable()):
        raise TeacherError(f"{key_file or KEY_VARIABLE}: the API key holds characters that no key has; copy it again.")
    return key


class Unreachable(CallFailed):
    """No connection could be made: the call was not sent."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "unreachable", retryable=True)


class ChatClient:
    """A connection pool to one server. Use as an async context manager, or call `close`."""

    def __init__(self, base_url: str, api_key: str, timeout_seconds: float) -> None:
        self._url = chat_url(base_url)
        self._headers = {"Content-Type": "application/json"} | (
            {} if api_key == NO_KEY else {"Authorization": f"Bearer {api_key}"}
        )
        self._key = api_key.encode()
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(timeout_seconds, CONNECT_SECONDS))
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def __del__(self) -> None:
        # An actor that Ray ends is given no moment to await in.
        session, loop = self._session, self._loop
        if session is None or session.closed or loop.is_closed():
            return
        if loop.is_running():
            loop.call_soon_threadsafe(lambda: loop.create_task(session.close()))
        else:
            loop.run_until_complete(session.close())

    async def complete(self, body: bytes) -> tuple[bytes, Reply]:
        """Send one request's JSON; returns the raw body of the response and what it says.

        Raises CallFailed, or TeacherError for a refused key (401, 403) or an unknown address or model (404).
        """
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, connector=connector)
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                data = await response.read()
                if response.status in REDIRECTS:
                    place = self._hide_key(response.headers.get("Location", "").encode(errors="replace")).decode()
                    raise TeacherError(
                        f"{self._url} redirects to {place or 'nowhere'}. Give --base-url the address that answers; finished rows are kept."
                    )
                if response.status != 200:
                    raise _failure(
                        self._url, response.status, response.headers.get("Retry-After"), self._hide_key(data)
                    )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None)
            raise Unreachable(
                f"no connection to {self._url} ({getattr(cause, 'strerror', None) or cause or 'timeout'})"
            ) from None
        except TimeoutError:
            raise CallFailed(
                f"no answer within {self._timeout.total:g} s", "timeout", retryable=True, is_ambiguous=True
            ) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise CallFailed(
                f"the connection broke ({type(error).__name__})", "reset", retryable=True, is_ambiguous=True
            ) from None
        if len(self._key) >= FEWEST_KEY_CHARACTERS:
            data = self._hide_key(data)
        return data, read_reply(data)

    def _hide_key(self, data: bytes) -> bytes:
        return data if self._key == NO_KEY.encode() else data.replace(self._key, b"***")


def check_reachable(base_url: str, seconds: float = 10.0) -> None:
    """Open and close a connection to the server, without sending anything. Raises Unreachable after three tries."""
    import socket
    from urllib.parse import urlsplit

    place = urlsplit(base_url)
    address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
    for is_last in (False, False, True):
        try:
            socket.create_connection(address, timeout=seconds).close()
            return
        except (OSError, UnicodeError) as error:  # the second of a name that no host can have
            if is_last:
                raise Unreachable(
                    f"no connection to {base_url} ({getattr(error, 'strerror', None) or error})"
                ) from None
            time.sleep(0.5)


def chat_url(base_url: str) -> str:
    """The chat-completions address of a base URL, which may or may not end in /v1."""
    return base_url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"


def read_reply(data: bytes) -> Reply:
    """The reply in a response's body. Raises CallFailed if it is no chat completion; it may have been billed all the same."""
    try:
        body = json.loads(data)
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"]["content"]
        if isinstance(text, list):  # reasoning models send chunks; the text ones make up the answer
            text = "".join(chunk.get("text", "") for chunk in text if chunk.get("type") == "text")
        if text is not None and not isinstance(text, str):
            raise TypeError
        counts = [_as_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(_mend(text or ""), choice.get("finish_reason"), body.get("model", ""), *counts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise CallFailed(
            "the body of the reply is not a chat completion", "no_completion", retryable=True, is_ambiguous=True
        ) from None


def _as_count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= MOST_TOKENS else None


def _mend(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair: JSON can escape one, and no file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _failure(url: str, status: int, retry_after: str | None, data: bytes) -> Exception:
    message = _error_message(data)
    if status in (401, 403):
        return TeacherError(
            f"{url} refuses the API key (HTTP {status}: {message}). Check {KEY_VARIABLE}; finished rows are kept."
        )
    if status == 404:
        return TeacherError(f"{url}: HTTP 404: {message}. Check --base-url and --model; finished rows are kept.")
    retryable = status in (408, 425, 429) or status >= 500
    return CallFailed(f"HTTP {status}: {message}", f"http_{status}", retryable, retry_after=_seconds(retry_after))


def _error_message(data: bytes) -> str:
    try:
        body = json.loads(data)
        inner = body.get("error", body)
        message = inner.get("message") or inner.get("detail") or inner
    except (ValueError, AttributeError, RecursionError):
        message = data.decode("utf-8", "replace").strip() or "no message"
    text = _mend(message) if isinstance(message, str) else json.dumps(message)
    return text if len(text) <= 200 else text[:197] + "..."


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds: given as seconds or as an HTTP date."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
