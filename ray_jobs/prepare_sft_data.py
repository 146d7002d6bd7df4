"""Stage 3: make the training rows of one ablation.

Local:      python -m ray_jobs.prepare_sft_data --config configs/prepare_sft_data.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.prepare_sft_data --config configs/prepare_sft_data.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.data.sft_rows import PrepareSFTDataConfig, run

    run(parse_config(PrepareSFTDataConfig, argv, prog="python -m ray_jobs.prepare_sft_data", description=__doc__))


if __name__ == "__main__":
    start_job(main)
