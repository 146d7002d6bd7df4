"""Thoughts for your own training pairs, by the real API. For dev and test: --input-csv data/original_data/dev.csv --output-jsonl …/dev.jsonl."""

from nli.teacher.thoughts import GenerateThoughtsConfig

config = GenerateThoughtsConfig(
    input_csv="data/original_data/train.csv",
    output_jsonl="data/original_thoughts/train.jsonl",
    model="ministral-8b-2512",
    prompt_name="initial_generation",
    workers=4,
    requests_per_minute=300,  # of the account, over all workers
    tokens_per_minute=500_000,
    max_cost=10.0,  # dollars for one output; --dry-run tells what it will take
)
