"""Check pairs, answers and reflections before money or GPU time is spent on them: duplicates, conflicts, leaks between splits, lengths, the teacher's accuracy.

Local:      python -m ray_jobs.check_data --config configs/check_data.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.check_data --config configs/check_data.py --storage-root /shared/nli
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.data.check import CheckDataConfig, run

    run(parse_config(CheckDataConfig, argv, prog="python -m ray_jobs.check_data", description=__doc__))


if __name__ == "__main__":
    start_job(main)
