"""Ablation 3, unmodified: train on all answers of the teacher, wrong ones included."""

from dataclasses import replace

from configs.train.default import config as default

config = replace(
    default,
    train_file="data/finetune/unmodified_train.jsonl",
    dev_file="data/finetune/unmodified_dev.jsonl",
    output_dir="models/unmodified",
)
