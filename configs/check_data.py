"""Your own pairs, and what the teacher made of them. Before there are answers: --thoughts --reflections (both empty)."""

from nli.data.check import CheckDataConfig

config = CheckDataConfig(
    csv=("train=data/original_data/train.csv", "dev=data/original_data/dev.csv", "test=data/original_data/test.csv"),
    thoughts=("train=data/original_thoughts/train.jsonl", "dev=data/original_thoughts/dev.jsonl"),
    reflections=("train=data/reflected_thoughts/train.jsonl", "dev=data/reflected_thoughts/dev.jsonl"),
    output_dir="results/data_check",
    strict=False,
)
