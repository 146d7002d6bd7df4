"""Every prompt, once: what the teacher is asked, and what the student is trained and tested on.

The student's prompt for the premise "Two dogs ran." and the hypothesis "Animals moved.":

    [INST] Premise: Two dogs ran.
    Hypothesis: Animals moved.

    Does the premise entail the hypothesis? Reason step by step, then answer in JSON: {"thought_process": "...", "predicted_label": 0 or 1}[/INST]

and its completion, which one space joins to the prompt:

    {"thought_process": "Dogs are animals; who runs moves.", "predicted_label": 1}

`[INST]` and `[/INST]` are single control tokens in Mistral's v3 tokenizer; the framing equals its instruct encoding of one user message. BOS and EOS
are added as token ids by `nli.models.tokenizer`, never as text.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

ENTAILMENT = 1
NO_ENTAILMENT = 0

INSTRUCTION = 'Does the premise entail the hypothesis? Reason step by step, then answer in JSON: {"thought_process": "...", "predicted_label": 0 or 1}'
STUDENT_PROMPT_NAME = "student"


STUDENT_TEMPLATE = f"[INST] Premise: {{premise}}\nHypothesis: {{hypothesis}}\n\n{INSTRUCTION}[/INST]"
"""The student's prompt with `{premise}` and `{hypothesis}` in the places of the pair."""

PLACEHOLDERS = ("{premise}", "{hypothesis}")
_SEQUENCE_TOKENS = ("<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>")


def render_prompt(template: str, premise: str, hypothesis: str) -> str:
    """A template with the pair in its places, all other text unchanged, its braces too.

    render_prompt('{premise} => {hypothesis}? {"label": ', "Sets {a}.", "{premise}")  ->  'Sets {a}. => {premise}? {"label": '
    """
    values = dict(zip(PLACEHOLDERS, (premise, hypothesis), strict=True))
    return re.sub(r"\{premise\}|\{hypothesis\}", lambda place: values[place[0]], template)


def find_template_fault(template: str) -> str | None:
    """Why a text cannot be a prompt's template, None if it can."""
    if not template.strip():
        return "the prompt template is empty."
    for place in PLACEHOLDERS:
        if (count := template.count(place)) != 1:
            return f"the prompt template needs {place} exactly once, and has it {'not at all' if not count else f'{count} times'}."
    if found := next((token for token in _SEQUENCE_TOKENS if token in template), None):
        return f"the prompt template holds {found}: leave it out; BOS and EOS are added as tokens."
    return None


def prompt_sha256(template: str) -> str:
    """Hash of a template: the provenance of an answer, and what an adapter's card keeps."""
    return hashlib.sha256(template.encode()).hexdigest()


def render_student_prompt(premise: str, hypothesis: str) -> str:
    """The text that the student sees, in training and at inference, without BOS."""
    return render_prompt(STUDENT_TEMPLATE, premise, hypothesis)


def render_completion(thought_process: str, predicted_label: int) -> str:
    """The student's target, one JSON object on one line, its text unchanged (no ASCII escapes), without EOS."""
    return json.dumps({"thought_process": thought_process, "predicted_label": predicted_label}, ensure_ascii=False)


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ThoughtReply(_Reply):
    """Reply to `initial_generation` and `regeneration`; the thought comes before the label."""

    thought_process: str
    predicted_label: int = Field(ge=0, le=1)


class ScoringReply(_Reply):
    """Reply to `scoring`: a judgement of an existing thought. `score` is 1 (useless) to 5 (sound and short)."""

    analysis: str
    score: int = Field(ge=1, le=5)
    improved_thought_process: str
    predicted_label: int = Field(ge=0, le=1)


class ReflectionReply(_Reply):
    """Reply to `reflection`: what went wrong, and reasoning that reaches the true label."""

    error_analysis: str
    improved_thought_process: str
    predicted_label: int = Field(ge=0, le=1)


@lru_cache
def _schema_of(reply: type[BaseModel]) -> dict:
    return reply.model_json_schema()


@dataclass(frozen=True)
class Prompt:
    """A prompt of the teacher: a system message, the row's fields that the user message shows, and the reply's shape."""

    name: str
    system: str
    user_fields: tuple[str, ...]
    reply: type[BaseModel]

    @property
    def sha256(self) -> str:
        """Hash of all that the teacher sees but the row: the provenance of an answer."""
        parts = [self.system, *self.user_fields, json.dumps(self.reply_schema, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def reply_schema(self) -> dict:
        """JSON schema of the reply, in the form that `response_format={"type": "json_schema"}` carries."""
        return _schema_of(self.reply)

    def render_messages(self, row: Mapping) -> list[dict[str, str]]:
        """Chat messages for one row: the system message and a user message of one titled field after another."""
        lines = [f"{_TITLES[name]}: {row[name]}" for name in self.user_fields]
        return [{"role": "system", "content": self.system}, {"role": "user", "content": "\n".join(lines)}]


_TITLES = {
    "premise": "Premise",
    "hypothesis": "Hypothesis",
    "thought_process": "Thought process",
    "predicted_label": "Predicted label",
    "true_label": "True label",
}

_TASK = """You are an expert in natural language inference. The label is 1 when the premise entails the hypothesis: whenever the premise is true, the \
hypothesis must be true as well. The label is 0 in every other case, also when the hypothesis is merely likely. Use only what the premise says and what \
its words mean."""

_PROMPTS = [
    Prompt(
        name="initial_generation",
        system=f"""{_TASK}

Work in three short steps:
1. Say what the premise states.
2. Test each part of the hypothesis against it.
3. Conclude.
Give the reasoning before the label, and no more words than it needs.

Reply with one JSON object and nothing else: {{"thought_process": "<your three steps>", "predicted_label": <0 or 1>}}

Example
Premise: A woman is playing the violin in a full hall.
Hypothesis: Somebody is making music.
Reply: {{"thought_process": "Step 1: a woman plays the violin. Step 2: a woman is somebody, and playing the violin is making music. Step 3: the hypothesis \
follows.", "predicted_label": 1}}""",
        user_fields=("premise", "hypothesis"),
        reply=ThoughtReply,
    ),
    Prompt(
        name="regeneration",
        system=f"""{_TASK}

You are given the true label. Write reasoning that reaches it from the premise and the hypothesis alone, in at most three short steps, as if you had not \
been told the label; do not mention it before the conclusion.

Reply with one JSON object and nothing else: {{"thought_process": "<your steps>", "predicted_label": <the true label>}}""",
        user_fields=("premise", "hypothesis", "true_label"),
        reply=ThoughtReply,
    ),
    Prompt(
        name="scoring",
        system=f"""{_TASK}

Judge somebody's reasoning about a pair. Score 5: sound, complete and short. 4: sound, with a blemish. 3: the right idea with a gap. 2: mostly wrong or \
far too long. 1: useless. Anything that you would improve scores 3 or less.

Reply with one JSON object and nothing else: {{"analysis": "<one or two sentences>", "score": <1 to 5>, "improved_thought_process": "<better reasoning>", \
"predicted_label": <0 or 1>}}""",
        user_fields=("premise", "hypothesis", "thought_process", "predicted_label"),
        reply=ScoringReply,
    ),
    Prompt(
        name="reflection",
        system=f"""{_TASK}

Somebody's reasoning about a pair reached the wrong label. Find the step that fails, then write new reasoning that reaches the true label from the premise \
and the hypothesis alone. Keep the step style, be concise, and do not refer to the earlier attempt or to the given label. If you are convinced that the \
true label cannot be reached, give the label that you believe.

Reply with one JSON object and nothing else: {{"error_analysis": "<the step that fails and why>", "improved_thought_process": "<new reasoning>", \
"predicted_label": <0 or 1>}}""",
        user_fields=("premise", "hypothesis", "thought_process", "predicted_label", "true_label"),
        reply=ReflectionReply,
    ),
]

TEACHER_PROMPTS: dict[str, Prompt] = {prompt.name: prompt for prompt in _PROMPTS}
"""The teacher's prompts by name."""

THOUGHT_PROMPT_NAMES = ("initial_generation", "scoring", "regeneration")
"""What `generate_thoughts --prompt-name` accepts."""


def student_prompt_sha256() -> str:
    """Hash of the student's template, kept beside every adapter that was trained with it."""
    return prompt_sha256(STUDENT_TEMPLATE)
