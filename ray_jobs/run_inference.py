"""Stage 6: answer a CSV of pairs with a base, an adapter or a checkpoint.

Local:      python -m ray_jobs.run_inference --config configs/run_inference.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.run_inference --config configs/run_inference.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.inference.run import InferenceConfig, run

    run(parse_config(InferenceConfig, argv, prog="python -m ray_jobs.run_inference", description=__doc__))


if __name__ == "__main__":
    start_job(main)
