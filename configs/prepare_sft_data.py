"""Training rows of the ablation `reflected`. The others: --ablation correct_only --reflections '' --output-jsonl data/finetune/correct_only_train.jsonl."""

from nli.data.sft_rows import PrepareSFTDataConfig

config = PrepareSFTDataConfig(
    thoughts="data/original_thoughts/train.jsonl",
    reflections="data/reflected_thoughts/train.jsonl",
    ablation="reflected",
    output_jsonl="data/finetune/reflected_train.jsonl",
)
