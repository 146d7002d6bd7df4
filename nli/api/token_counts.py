"""How many prompt tokens a chat request has, before it is sent.

In:   load_token_counter("open-mistral-nemo").count_messages([{"role": "system", "content": "Judge."}, {"role": "user", "content": "Premise: …"}])
Out:  14, what Mistral's own encoding of that conversation gives

Which tokenizer counts, in this order; the counter's `name` says which was taken, and `is_exact` whether it is the model's own:

    a folder or file that the user names     tekken.json or a SentencePiece model through mistral-common, tokenizer.json through tokenizers
    a Mistral model of mistral-common's list the file that mistral-common ships for it
    another Mistral model                    the nearest shipped file: newer models share tekken's vocabulary, and a turn's framing differs by a token or two
    any other model                          an estimate by characters

A reply's JSON schema may be billed as well, by a text that only the vendor knows; no counter sees it. The first replies' usage is the measure.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from math import ceil
from pathlib import Path

from nli.runtime.errors import ConfigError

Messages = Sequence[Mapping[str, str]]

CHARACTERS_PER_TOKEN = 3.6
"""of the estimate: the teacher's prompts on the sample have 3.6 to 4.0 with Mistral's v3 tokenizer and 4.1 to 4.5 with tekken"""
TOKENS_PER_MESSAGE = 4
"""control tokens around a message, where the framing is not known"""
BYTES_PER_MESSAGE = 32
"""of the bound: more than any of Mistral's framings writes around a message, as tokens or as text"""

_SPM_V1, _SPM_V2, _SPM_V3 = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
)
_SPM_V7, _TEKKEN = "mistral_instruct_tokenizer_241114.model.v7", "tekken_240718.json"
_SHIPPED: dict[str, str] = {
    "codestral-2405": _SPM_V3,
    "ministral-8b-2410": _TEKKEN,
    "mistral-large-2402": _SPM_V2,
    "mistral-large-2407": _SPM_V3,
    "mistral-large-2411": _SPM_V7,
    "mistral-medium-2312": _SPM_V1,
    "mistral-small-2312": _SPM_V2,
    "mistral-small-2402": _SPM_V2,
    "mistral-small-2409": _TEKKEN,
    "mistral-tiny-2312": _SPM_V2,
    "mistral-tiny-2407": _SPM_V3,
    "open-mistral-nemo": _TEKKEN,
    "open-mistral-nemo-2407": _TEKKEN,
    "open-mixtral-8x22b-2404": _SPM_V3,
}
"""mistral-common's own list of API models whose tokenizer it ships (its MODEL_NAME_TO_TOKENIZER_CLS), text models only; and nemo's name without a date"""
_MISTRAL_NAMES = ("ministral", "mistral", "open-mistral", "codestral", "devstral", "magistral", "pixtral")
_SENTENCEPIECE_NAMES = ("open-mistral-7b", "open-mixtral", "mistral-tiny", "mistral-7b", "mixtral")
"""the models from before tekken, by their names in the API and on the hub"""


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens of texts and of chat requests. `is_exact`: the tokenizer and the framing are the model's own, as far as a client can know."""

    name: str
    is_exact: bool
    count_text: Callable[[str], int]
    """tokens of a text alone, without control tokens"""
    count_messages: Callable[[Messages], int]
    """prompt tokens of a chat request, control tokens included"""


def load_token_counter(model: str, tokenizer: str = "") -> TokenCounter:
    """The best counter for a model's requests; `tokenizer` is a folder or file that the user has, and wins.

    Raises ConfigError if that folder or file holds no tokenizer.
    """
    if tokenizer:
        return _load_from(Path(tokenizer))
    if model in _SHIPPED:
        return _load_shipped(_SHIPPED[model], model)
    name = model.rsplit("/", 1)[-1].lower()  # a hub name, as a server of one's own has it, begins with its owner
    if name.startswith(_SENTENCEPIECE_NAMES):
        return _load_shipped(_SPM_V3, model, stands_in=True)
    if name.startswith(_MISTRAL_NAMES):
        return _load_shipped(_TEKKEN, model, stands_in=True)
    return TokenCounter(
        f"estimate, {CHARACTERS_PER_TOKEN} characters a token",
        False,
        estimate_tokens,
        _add_per_message(estimate_tokens),
    )


def bound_messages(messages: Messages) -> int:
    """An upper bound of a request's prompt tokens for any tokenizer that falls back to bytes: a token covers one byte at least.

    It does not know a chat template that adds a text of its own.
    """
    return BYTES_PER_MESSAGE + sum(
        BYTES_PER_MESSAGE + len(message["content"].encode("utf-8", "surrogatepass")) for message in messages
    )


def estimate_tokens(text: str) -> int:
    """Tokens of a text by its characters."""
    return ceil(len(text) / CHARACTERS_PER_TOKEN)


def frame_v1(messages: Messages, count: Callable[[str], int]) -> int:
    """v1 writes [INST] as text and puts the system message before the first user message."""
    system, turns = _split_system(messages)
    num_tokens = 1  # BOS
    for index, (role, content) in enumerate(turns):
        if role == "user":
            first = next(number for number, (other, _) in enumerate(turns) if other == "user")
            content = f"{system}\n\n{content}" if system and index == first else content
            num_tokens += count(f"[INST] {content} [/INST]")
        else:
            num_tokens += count(content) + 1  # EOS
    return num_tokens


def frame_v3(messages: Messages, count: Callable[[str], int]) -> int:
    """v2 and v3 have [INST] and [/INST] as tokens and put the system message before the last user message."""
    system, turns = _split_system(messages)
    last = max(number for number, (role, _) in enumerate(turns) if role == "user")
    num_tokens = 1  # BOS
    for index, (role, content) in enumerate(turns):
        if role == "user":
            num_tokens += 2 + count(f"{system}\n\n{content}" if system and index == last else content)
        else:
            num_tokens += count(content.rstrip(" ")) + 1  # EOS
    return num_tokens


def frame_v7(messages: Messages, count: Callable[[str], int]) -> int:
    """v7 and later leave system messages where they stand, between tokens of their own."""
    num_tokens = 1  # BOS
    for role, group in groupby(messages, key=lambda message: message["role"]):
        contents = [message["content"] for message in group]
        if role == "system":
            num_tokens += sum(2 + count(content) for content in contents)
        else:
            joined = _join(contents)
            num_tokens += 2 + count(joined) if role == "user" else count(joined.rstrip(" ")) + 1
    return num_tokens


_FRAMES = {
    "v1": frame_v1,
    "v2": frame_v3,
    "v3": frame_v3,
    "v7": frame_v7,
    "v11": frame_v7,
    "v13": frame_v7,
    "v15": frame_v7,
}


def _join(contents: Sequence[str]) -> str:
    return "\n\n".join(content for content in contents if content)


def _split_system(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    """All system messages as one, and the turns: neighbours of one role joined, a user first."""
    system = _join([message["content"] for message in messages if message["role"] == "system"])
    grouped = [
        (role, [message["content"] for message in group])
        for role, group in groupby(messages, key=lambda message: message["role"])
    ]
    turns = [(role, _join(contents)) for role, contents in grouped if role != "system"]
    return system, turns if turns and turns[0][0] == "user" else [("user", ""), *turns]


def _add_per_message(count: Callable[[str], int]) -> Callable[[Messages], int]:
    return lambda messages: 1 + sum(TOKENS_PER_MESSAGE + count(message["content"]) for message in messages)


def _load_shipped(file_name: str, model: str, stands_in: bool = False) -> TokenCounter:
    import mistral_common

    counter = _load_mistral(
        Path(mistral_common.__file__).parent / "data" / file_name, "v7" if stands_in and file_name == _TEKKEN else ""
    )
    name = f"mistral-common's {file_name}" + (f", which stands in for the tokenizer of {model}" if stands_in else "")
    return TokenCounter(name, not stands_in, counter.count_text, counter.count_messages)


@lru_cache(maxsize=8)
def _load_mistral(path: Path, framing: str = "") -> TokenCounter:
    """A file of mistral-common's form, with its own version's framing or a later one's."""
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    try:
        loaded = MistralTokenizer.from_file(path)
    except (MistralCommonException, AssertionError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigError(f"{path}: not a tokenizer that mistral-common {_version()} can read ({error}).") from None
    encode = loaded.instruct_tokenizer.tokenizer.encode
    frame = _FRAMES[framing or loaded.version.value]

    def count_text(text: str) -> int:
        return len(encode(text, bos=False, eos=False))

    sample = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Premise"}]
    # A v15 file adds its model's settings to each request, always the same.
    constant = 0 if framing else _encode_by_mistral(loaded, sample) - frame(sample, count_text)
    return TokenCounter(str(path), True, count_text, lambda messages: constant + frame(messages, count_text))


def _encode_by_mistral(loaded: object, messages: Messages) -> int:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    return len(loaded.encode_chat_completion(ChatCompletionRequest(messages=list(messages))).tokens)


def _version() -> str:
    from importlib.metadata import version

    return version("mistral-common")


def _load_from(path: Path) -> TokenCounter:
    """A tokenizer that the user names: a file, or a folder with one."""
    candidates = (
        [path] if path.is_file() else [path / "tekken.json", *sorted(path.glob("*.model.v*")), path / "tokenizer.json"]
    )
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{path}: no tokenizer there; give a folder with tekken.json or tokenizer.json, as a model's folder has it."
        )
    return _load_hugging_face(found) if found.name == "tokenizer.json" else _load_mistral(found)


def _load_hugging_face(path: Path) -> TokenCounter:
    from tokenizers import Tokenizer

    try:
        encode = Tokenizer.from_file(str(path)).encode
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(f"{path}: not a tokenizer that the library tokenizers can read ({error}).") from None

    def count_text(text: str) -> int:
        return len(encode(text, add_special_tokens=False).ids)

    render = _load_chat_template(path.parent)
    if render is None:
        return TokenCounter(f"{path}, without a chat template", False, count_text, _add_per_message(count_text))
    return TokenCounter(
        f"{path} with its chat template", True, count_text, lambda messages: count_text(render(messages))
    )


def _load_chat_template(folder: Path) -> Callable[[Messages], str] | None:
    """What renders a conversation as the model's own template does; None without a template, or with one that refuses such conversations as ours."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(text, list):  # several by name
        text = next((item["template"] for item in text if item["name"] == "default"), None)
    if not text:
        return None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    values = {"add_generation_prompt": True, "tools": None, "documents": None}
    values |= {name: _content_of(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    sample = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    try:
        template = environment.from_string(text)
        template.render(messages=sample, **values)
    except (TemplateError, TypeError, ValueError):
        return None
    return lambda messages: template.render(messages=messages, **values)


def _content_of(token: object) -> str:
    return token["content"] if isinstance(token, Mapping) else token or ""


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}).") from None
