"""Ablation 2, reflected: right answers as they are, wrong ones replaced by their reflections. The primary one."""

from dataclasses import replace

from configs.train.default import config as default

config = replace(
    default,
    train_file="data/finetune/reflected_train.jsonl",
    dev_file="data/finetune/reflected_dev.jsonl",
    output_dir="models/reflected",
)
