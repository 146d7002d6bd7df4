"""Ablation 1, correct only: train on the teacher's right answers."""

from dataclasses import replace

from configs.train.default import config as default

config = replace(
    default,
    train_file="data/finetune/correct_only_train.jsonl",
    dev_file="data/finetune/correct_only_dev.jsonl",
    output_dir="models/correct_only",
)
