"""One call in the chat-completions wire format, against a server that answers what the test says.

python -m pytest tests/test_chat_api.py
"""

import asyncio
import socket
import time
import traceback
from email.utils import formatdate

import pytest
from chat_server import KEY, Answer, with_server

from nli.api.chat import CallFailed, ChatClient, Reply, Unreachable, chat_url, check_reachable, read_api_key, read_reply
from nli.api.ledger_file import encode_body
from nli.runtime.errors import TeacherError

BODY = {"model": "toy", "messages": [{"role": "user", "content": "Hello – 犬 🐕\u2028"}], "max_tokens": 8}
DATA = encode_body(BODY)


def complete(*answers, timeout_seconds=5.0):
    """The reply to one call, and the server that gave it."""

    async def use(server):
        async with ChatClient(server.base_url, KEY, timeout_seconds) as client:
            return (await client.complete(DATA))[1], server

    return with_server(answers, use)


def failure_of(*answers, timeout_seconds=5.0):
    """The exception of one call, after checking that the key shows nowhere in it."""
    with pytest.raises((CallFailed, TeacherError)) as caught:
        complete(*answers, timeout_seconds=timeout_seconds)
    assert_no_key(caught.value)
    return caught.value


def assert_no_key(error):
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__dict__)
    assert KEY not in shown


def test_a_call_sends_the_body_and_the_key_and_returns_the_reply():
    reply, server = complete(Answer(text="Ja – 犬 🐕\u2028\n "))
    assert reply == Reply(
        text="Ja – 犬 🐕\u2028\n ", finish_reason="stop", model="toy-1", num_prompt_tokens=10, num_completion_tokens=5
    )
    assert server.calls == [BODY]
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("base_url", ["http://host", "http://host/", "http://host/v1", "http://host/v1/"])
def test_a_base_url_may_end_in_v1_or_not(base_url):
    assert chat_url(base_url) == "http://host/v1/chat/completions"


def test_a_path_before_v1_is_kept():
    assert (
        chat_url("https://gateway.example.com/mistral/v1") == "https://gateway.example.com/mistral/v1/chat/completions"
    )


def test_a_reply_without_text_usage_or_finish_reason_is_still_a_reply():
    reply, _ = complete(Answer(text=None, finish_reason=None, usage=None))
    assert (reply.text, reply.finish_reason, reply.num_prompt_tokens, reply.num_completion_tokens) == (
        "",
        None,
        None,
        None,
    )


def test_of_a_reasoning_model_s_chunks_the_text_ones_are_the_answer():
    chunks = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": '{"a": '},
        {"type": "text", "text": "1}"},
    ]
    assert complete(Answer(text=chunks))[0].text == '{"a": 1}'


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_a_failure_that_may_pass_can_be_retried(status):
    error = failure_of(Answer(status=status, body='{"message": "try later"}'))
    assert type(error) is CallFailed
    assert (str(error), error.retryable, error.retry_after) == (f"HTTP {status}: try later", True, None)


@pytest.mark.parametrize("status", [400, 402, 405, 413, 422])
def test_a_failure_of_the_request_itself_cannot(status):
    error = failure_of(Answer(status=status, body='{"message": "bad request"}'))
    assert (str(error), error.retryable) == (f"HTTP {status}: bad request", False)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "Check MISTRAL_API_KEY"), (403, "Check MISTRAL_API_KEY"), (404, "Check --base-url and --model")],
)
def test_a_refused_key_or_an_unknown_model_ends_the_run(status, hint):
    error = failure_of(Answer(status=status, body='{"message": "Unauthorized"}'))
    assert isinstance(error, TeacherError)
    assert f"HTTP {status}: Unauthorized" in str(error)
    assert hint in str(error)
    assert "finished rows are kept" in str(error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"message": "slow down", "type": "rate_limit"}', "slow down"),
        ('{"error": {"message": "slow down", "code": 429}}', "slow down"),
        ('{"detail": [{"loc": ["body"], "msg": "field required"}]}', '[{"loc": ["body"], "msg": "field required"}]'),
        ('{"object": "error", "message": {"detail": "x"}}', '{"detail": "x"}'),
        ("<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        ("", "no message"),
        ("[1]", "[1]"),
        ("x" * 500, "x" * 197 + "..."),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_server_s_own_words_are_in_the_message(body, message):
    assert str(failure_of(Answer(status=500, body=body))) == f"HTTP 500: {message}"


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("0.5", 0.5), ("0", 0.0), ("-3", 0.0), ("soon", None), ("", None)]
)
def test_retry_after_is_read_in_seconds(header, seconds):
    assert failure_of(Answer(status=429, headers={"Retry-After": header})).retry_after == seconds


def test_retry_after_is_read_as_a_date():
    later = failure_of(Answer(status=429, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}))
    assert 25 < later.retry_after <= 30
    assert (
        failure_of(Answer(status=503, headers={"Retry-After": formatdate(time.time() - 30, usegmt=True)})).retry_after
        == 0
    )


@pytest.mark.parametrize("header", ["nan", "inf", "1e999"])
def test_a_retry_after_that_is_no_time_is_ignored(header):
    assert failure_of(Answer(status=429, headers={"Retry-After": header})).retry_after is None


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not JSON",
        '{"choices": [',
        "[]",
        "null",
        "{}",
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"message": {}}]}',
        '{"choices": [{"message": {"content": 7}}]}',
        b"\xff",
        "[" * 100_000,
    ],
)
def test_a_body_that_is_no_completion_is_a_failed_call(body):
    error = failure_of(Answer(body=body))
    assert (str(error), error.retryable) == ("the body of the reply is not a chat completion", True)


def test_a_slow_server_is_a_failed_call():
    error = failure_of(Answer(delay_seconds=5), timeout_seconds=0.2)
    assert (type(error), str(error), error.retryable) == (CallFailed, "no answer within 0.2 s", True)


def test_a_connection_that_breaks_is_a_failed_call():
    error = failure_of(Answer(hang_up=True))
    assert (type(error), error.retryable, error.is_ambiguous, error.kind) == (CallFailed, True, True, "reset")
    assert str(error).startswith("the connection broke (")


def unreachable(base_url):
    async def run():
        async with ChatClient(base_url, KEY, timeout_seconds=5) as client:
            await client.complete(DATA)

    with pytest.raises(Unreachable) as caught:
        asyncio.run(run())
    assert_no_key(caught.value)
    return caught.value


def test_a_server_that_is_not_there_is_unreachable():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        error = unreachable(f"http://127.0.0.1:{port}")
    assert str(error).startswith(f"no connection to http://127.0.0.1:{port}/v1/chat/completions (")
    assert error.retryable and not error.is_ambiguous


def test_a_server_is_looked_for_without_a_call():
    async def use(server):
        await asyncio.to_thread(check_reachable, server.base_url)
        return server.calls

    assert with_server([Answer()], use) == []
    with pytest.raises(Unreachable, match=r"no connection to http://127.0.0.1:9 \("):
        check_reachable("http://127.0.0.1:9")


def test_a_key_that_the_server_sends_back_is_not_in_what_is_kept():
    async def use(server):
        async with ChatClient(server.base_url, KEY, 5) as client:
            return (await client.complete(DATA))[0]

    assert KEY.encode() not in with_server([Answer(text=f"your key is {KEY}")], use)


@pytest.mark.parametrize("key", ["test", "1", "EMPTY"])
def test_a_key_that_is_an_ordinary_word_changes_no_reply(key):
    async def use(server):
        async with ChatClient(server.base_url, key, 5) as client:
            return (await client.complete(DATA))[1].text

    assert with_server([Answer(text="a test of 1 EMPTY box")], use) == "a test of 1 EMPTY box"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_address_is_said(status):
    async def use(server):
        async with ChatClient(server.base_url, KEY, 5) as client:
            with pytest.raises(
                TeacherError, match=r"redirects to https://elsewhere/v1\. Give --base-url the address that answers"
            ) as caught:
                await client.complete(DATA)
        assert_no_key(caught.value)
        return len(server.calls)

    assert with_server([Answer(status=status, headers={"Location": "https://elsewhere/v1"})], use) == 1


def test_a_certificate_that_is_not_trusted_is_said(tmp_path):
    import ssl
    import subprocess

    files = {"-keyout": tmp_path / "key.pem", "-out": tmp_path / "cert.pem"}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*command, *(str(part) for pair in files.items() for part in pair)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def run():
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        async with server, ChatClient(f"https://localhost:{server.sockets[0].getsockname()[1]}", KEY, 5) as client:
            await client.complete(DATA)

    with pytest.raises(Unreachable, match="certificate verify failed"):
        asyncio.run(run())


def test_a_name_that_no_host_can_have_is_unreachable():
    with pytest.raises(Unreachable, match="no connection to http://a..b"):
        check_reachable("http://a..b")


def test_a_name_that_no_server_has_is_unreachable():
    assert "no connection to http://no-such-host.invalid/v1/chat/completions" in str(
        unreachable("http://no-such-host.invalid")
    )


def test_a_client_can_be_closed_and_used_again():
    async def use(server):
        client = ChatClient(server.base_url, KEY, 5)
        await client.close()
        first = await client.complete(DATA)
        await client.close()
        second = await client.complete(DATA)
        await client.close()
        return first == second

    assert with_server([Answer()], use)


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    return tmp_path


def test_the_key_comes_from_a_file_else_the_environment_else_dot_env(no_key, monkeypatch):
    (no_key / ".env").write_text("MISTRAL_API_KEY='from-dot-env'\nHF_TOKEN=\n")
    assert read_api_key() == "from-dot-env"
    monkeypatch.setenv("MISTRAL_API_KEY", " from-environment\n")
    assert read_api_key() == "from-environment"
    (no_key / "key").write_text("from-file\n")
    assert read_api_key(str(no_key / "key")) == "from-file"


def test_without_a_key_the_message_says_where_to_put_it(no_key, monkeypatch):
    message = r"^No API key\. Set MISTRAL_API_KEY in the environment of this machine .* or in \.env, or give --api-key-file\.$"
    with pytest.raises(TeacherError, match=message):
        read_api_key()
    monkeypatch.setenv("MISTRAL_API_KEY", "  ")
    (no_key / ".env").write_text("MISTRAL_API_KEY=\n")
    with pytest.raises(TeacherError, match=message):
        read_api_key()
    with pytest.raises(
        TeacherError, match=r"^no-such-file: the key file cannot be read \(No such file or directory\)\.$"
    ):
        read_api_key("no-such-file")


def test_a_byte_order_mark_is_no_part_of_a_key(no_key):
    (no_key / "key").write_text("from-file\n", encoding="utf-8-sig")
    (no_key / ".env").write_text("MISTRAL_API_KEY=from-dot-env\n", encoding="utf-8-sig")
    assert (read_api_key(str(no_key / "key")), read_api_key()) == ("from-file", "from-dot-env")


def test_a_key_saved_in_another_encoding_is_said_to_be_so(no_key):
    (no_key / "key").write_text("from-file", encoding="utf-16")
    with pytest.raises(TeacherError, match="key: the key file is not text in UTF-8"):
        read_api_key(str(no_key / "key"))
    (no_key / ".env").write_text("MISTRAL_API_KEY=from-dot-env", encoding="utf-16")
    with pytest.raises(TeacherError, match=r"^\.env is not text in UTF-8"):
        read_api_key()


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}\r", f"{KEY}–", f"{KEY}\x00"])
def test_a_key_that_is_no_header_is_refused_without_showing_it(no_key, monkeypatch, key):
    (no_key / "key").write_text(key + "x", encoding="utf-8")
    with pytest.raises(TeacherError, match="the API key holds characters that no key has") as caught:
        read_api_key(str(no_key / "key"))
    assert_no_key(caught.value)


def test_half_of_a_surrogate_pair_in_a_reply_becomes_the_sign_for_no_character():
    answer = read_reply(rb'{"choices": [{"message": {"content": "a \ud83d\udc15 b \ud83d c \udc15"}}]}')
    assert answer.text == "a 🐕 b \ufffd c \ufffd"
    assert answer.text.encode()


def test_an_error_with_half_of_a_surrogate_pair_can_be_stored():
    assert str(failure_of(Answer(status=400, body=r'{"message": "bad \ud83d"}'))) == "HTTP 400: bad \ufffd"


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "12", "completion_tokens": -1}, {"prompt_tokens": None}, {}, {"prompt_tokens": 10**30}]
)
def test_token_counts_that_are_none_are_unknown(usage):
    answer = read_reply(encode_body({"choices": [{"message": {"content": "x"}}], "usage": usage}))
    assert (answer.num_prompt_tokens, answer.num_completion_tokens) == (None, None)
