"""Stage 4: QLoRA SFT of one adapter.

Local:      python -m ray_jobs.train_sft --config configs/train/default.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.train_sft --config configs/train/default.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.training.run import TrainConfig, run

    run(parse_config(TrainConfig, argv, prog="python -m ray_jobs.train_sft", description=__doc__))


if __name__ == "__main__":
    start_job(main)
