"""Stage 1: ask the teacher for a thought and a label for every pair.

Local:      python -m ray_jobs.generate_thoughts --config configs/generate_thoughts.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.generate_thoughts --config configs/generate_thoughts.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.teacher.thoughts import GenerateThoughtsConfig, run

    run(parse_config(GenerateThoughtsConfig, argv, prog="python -m ray_jobs.generate_thoughts", description=__doc__))


if __name__ == "__main__":
    start_job(main)
