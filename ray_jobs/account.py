"""The limits of the account that a teacher is asked with: show them, or change them while jobs run.

Local:      python -m ray_jobs.account --requests-per-minute 600
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.account --requests-per-minute 600
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.api.account import AccountConfig, run

    run(parse_config(AccountConfig, argv, prog="python -m ray_jobs.account", description=__doc__))


if __name__ == "__main__":
    start_job(main)
