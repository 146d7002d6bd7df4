"""Reflections on the wrong thoughts, by a stronger model."""

from nli.teacher.reflections import GenerateReflectionsConfig

config = GenerateReflectionsConfig(
    thoughts="data/original_thoughts/train.jsonl",
    output_jsonl="data/reflected_thoughts/train.jsonl",
    model="mistral-large-2512",
    workers=4,
    requests_per_minute=300,
    tokens_per_minute=500_000,
    max_cost=20.0,  # dollars for one output; --dry-run tells what it will take
)
