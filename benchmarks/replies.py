"""What the benchmark's teacher answers: a function of a request's model and messages alone, so that any run, in any order, is told the same.

In:   {"model": "ministral-8b-2512", "messages": [...], "max_tokens": 1024, "response_format": {"type": "json_schema", ...}}
Out:  '{"thought_process": "step 1 premise states two parts ...", "predicted_label": 1}'

The fields are those of the request's schema, else those that the system message names. The words mean nothing; their number is that of a real answer. A
request that tells the true label is answered with it nine times of ten.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

_PROSE = """step premise hypothesis states that the scene holds two parts each part of which must be true before it follows a person is somebody who acts in \
some place while nothing says when or why this happens so we test every claim against what was written and find it there or not therefore we conclude"""
WORDS = _PROSE.split()
THOUGHT_WORDS, SHORT_WORDS = (35, 90), (12, 40)
FIELDS = ("error_analysis", "analysis", "score", "improved_thought_process", "thought_process", "predicted_label")
"""all fields that the stages ask for, in the order in which replies hold them"""
LEAST_AND_MOST = {"score": (1, 5), "predicted_label": (0, 1)}
SHARE_TOLD = 0.9
CHARACTERS_PER_TOKEN = 4
PARAMETERS = ("model", "messages", "temperature", "top_p", "max_tokens", "random_seed", "response_format")


def key_of(body: Mapping) -> str:
    """A hash of what is asked, whatever the client's spelling of the JSON and whatever defaults it sends along."""
    asked = json.dumps([body.get(name) for name in PARAMETERS], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def fraction_of(*parts: object) -> float:
    """A number from 0 up to 1 that the parts decide."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big") / 2**56


def write_content(body: Mapping) -> str:
    """The text of the right answer to a request."""
    texts = [str(message.get("content") or "") for message in body["messages"]]
    digest = hashlib.blake2b(
        "\0".join([str(body["model"]), *texts]).encode("utf-8", "surrogatepass"), digest_size=32
    ).digest()
    told = _find_told_label(texts[-1])
    fields: dict[str, object] = {}
    for index, name in enumerate(_find_fields(body)):
        if name in LEAST_AND_MOST:
            least, most = LEAST_AND_MOST[name]
            fields[name] = least + digest[index] % (most - least + 1)
            if name == "predicted_label" and told is not None:
                fields[name] = told if digest[31] < 256 * SHARE_TOLD else 1 - told
        else:
            fields[name] = _write_words(
                digest, index, *(THOUGHT_WORDS if name.endswith("thought_process") else SHORT_WORDS)
            )
    return json.dumps(fields)


def _write_words(digest: bytes, index: int, fewest: int, most: int) -> str:
    number = int.from_bytes(digest[index : index + 8], "big")
    count, start, step = fewest + number % (most - fewest + 1), number >> 8, 1 + (number >> 24) % (len(WORDS) - 1)
    # The digest itself stands in the text, so that two requests never share an answer.
    return (
        f"{digest[:6].hex()} "
        + " ".join([WORDS[(start + step * position) % len(WORDS)] for position in range(count)])
        + "."
    )


def _find_fields(body: Mapping) -> tuple[str, ...]:
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema") or {}
    if "properties" in schema:
        return tuple(schema["properties"])
    return _fields_named_by(
        next((str(message.get("content")) for message in body["messages"] if message["role"] == "system"), "")
    )


@lru_cache(maxsize=256)
def _fields_named_by(system: str) -> tuple[str, ...]:
    return tuple(name for name in FIELDS if f'"{name}"' in system) or ("thought_process", "predicted_label")


def _find_told_label(text: str) -> int | None:
    found = re.search(r"^True label: ([01])$", text, re.MULTILINE) if "True label" in text else None
    return int(found[1]) if found else None


def count_fast(body: Mapping) -> int:
    """Prompt tokens by characters, in no time."""
    return 4 + sum(len(str(message.get("content") or "")) // CHARACTERS_PER_TOKEN + 4 for message in body["messages"])


def count_text_fast(text: str) -> int:
    return len(text) // CHARACTERS_PER_TOKEN + 1


def load_exact_counters() -> tuple[Callable[[Mapping], int], Callable[[str], int]]:
    """Count a request's prompt tokens, and a text's, as mistral-common encodes them: v3 for the models of its time, tekken in v7's framing for later ones."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    @lru_cache(maxsize=2)
    def load(is_old: bool) -> MistralTokenizer:
        return MistralTokenizer.v3() if is_old else _load_tekken_v7()

    @lru_cache(maxsize=100_000)
    def count(is_old: bool, messages: str) -> int:
        request = ChatCompletionRequest(messages=json.loads(messages))
        return len(load(is_old).encode_chat_completion(request).tokens)

    def count_body(body: Mapping) -> int:
        return count(str(body["model"]).startswith(("open-mistral-7b", "open-mixtral")), json.dumps(body["messages"]))

    @lru_cache(maxsize=100_000)
    def count_text(text: str) -> int:
        return len(load(False).instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)) + 1

    return count_body, count_text


def _load_tekken_v7() -> object:
    """mistral-common ships tekken with v3's framing; the models since late 2024 have the same vocabulary and v7's."""
    import mistral_common
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    data = json.loads(
        (Path(mistral_common.__file__).parent / "data" / "tekken_240718.json").read_text(encoding="utf-8")
    )
    data["config"]["version"] = "v7"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return MistralTokenizer.from_file(path)
