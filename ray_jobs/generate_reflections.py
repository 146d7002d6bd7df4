"""Stage 2: ask a stronger model to reflect on the wrong answers.

Local:      python -m ray_jobs.generate_reflections --config configs/generate_reflections.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.generate_reflections --config configs/generate_reflections.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.teacher.reflections import GenerateReflectionsConfig, run

    run(
        parse_config(
            GenerateReflectionsConfig, argv, prog="python -m ray_jobs.generate_reflections", description=__doc__
        )
    )


if __name__ == "__main__":
    start_job(main)
