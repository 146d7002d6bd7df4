"""Score the teacher's answers on the sample; `--predictions a.jsonl b.jsonl` scores and compares others."""

from nli.evaluation.run import EvaluatePredictionsConfig

config = EvaluatePredictionsConfig(
    predictions=("data/original_thoughts/sample_train.jsonl",),
    output_dir="results/sample_evaluation",
    slice_by=("phenomenon",),
)
