"""Stage 7: score and compare sets of answers, with intervals and paired tests, in a JSON file and an HTML report.

local:      python -m ray_jobs.evaluate_predictions --config configs/evaluate_predictions.py
submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.evaluate_predictions --config configs/evaluate_predictions.py \
                --predictions results/base.jsonl results/reflected.jsonl --storage-root /shared/nli
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    """Read the config and run the stage."""
    from nli.evaluation.run import EvaluatePredictionsConfig, run

    run(
        parse_config(
            EvaluatePredictionsConfig, argv, prog="python -m ray_jobs.evaluate_predictions", description=__doc__
        )
    )


if __name__ == "__main__":
    start_job(main)
