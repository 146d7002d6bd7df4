"""The pairs that engines are measured on: English-like words, prompts of about 175 tokens, completions of fixed lengths.

    write_workload(Path("/tmp/b/pairs.csv"), 1977)
    -> id,premise,hypothesis,label,num_tokens
       0,The harbour would carry …,The letter under …,1,187

`num_tokens` is lognormal with mean 200, from 60 to 512, as the lengths of thoughts are. Random weights never write EOS when they should, so every arm is made
to write exactly so many tokens.
"""

import csv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 1977
BATCH = 32  # of the original
FLOOR, CAP = 60, 512

_TEXT = (
    "the a of to and in on for with from by as at that this which who was is were had has will would could after before under over between near harbour letter "
    "market captain village window garden river teacher doctor station morning evening winter summer bridge street council report number company family house "
    "people children woman man soldier farmer writer painter engine machine paper bread water money ticket train ship road hill forest field church school "
    "office kitchen carried found lost bought sold opened closed wrote read heard saw left reached followed answered refused promised believed called asked "
    "small large old young red blue quiet early late heavy broken empty public first second third last several many some no every another"
)
WORDS = _TEXT.split()


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Completion lengths in tokens."""
    import numpy

    chance = numpy.random.default_rng(seed)
    return numpy.clip(chance.lognormal(numpy.log(190), 0.35, count), FLOOR, CAP).astype(int).tolist()


def draw_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Premises of about 100 words and hypotheses of about 17."""
    import numpy

    chance = numpy.random.default_rng(seed + 1)
    pairs = []
    for _ in range(count):
        lengths = [
            int(numpy.clip(chance.normal(mean, deviation), low, high))
            for mean, deviation, low, high in ((100, 22, 40, 220), (17, 4, 5, 40))
        ]
        premise, hypothesis = (" ".join(chance.choice(WORDS, length)).capitalize() + "." for length in lengths)
        pairs.append((premise, hypothesis))
    return pairs


def write_workload(path: Path, count: int = ROWS, longest: int = CAP) -> None:
    """Write the CSV; `longest` cuts the completions, for a trial on a CPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "premise", "hypothesis", "label", "num_tokens"])
        for index, ((premise, hypothesis), length) in enumerate(
            zip(draw_pairs(count), draw_lengths(count), strict=True)
        ):
            writer.writerow([index, premise, hypothesis, index * 7 % 3 % 2, min(length, longest)])


def read_workload(path: Path, max_rows: int = 0) -> tuple[list[str], list[int]]:
    """Prompts as the job renders them, and completion lengths."""
    from nli.task.prompts import render_student_prompt

    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[: max_rows or None]
    return [render_student_prompt(row["premise"], row["hypothesis"]) for row in rows], [
        int(row["num_tokens"]) for row in rows
    ]


def count_steps(lengths: list[int], batch: int = BATCH) -> int:
    """Decoding steps of static batches in file order, each as long as its longest row."""
    return sum(max(lengths[start : start + batch]) for start in range(0, len(lengths), batch))


def write_pairs(path: Path, count: int) -> None:
    """Unlabelled short pairs: those of the sample world again and again, each under an id of its own."""
    with open(REPOSITORY / "data/sample/train.csv", encoding="utf-8", newline="") as file:
        pairs = [(row["premise"], row["hypothesis"]) for row in csv.DictReader(file)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "premise", "hypothesis"])
        writer.writerows([index, *pairs[index % len(pairs)]] for index in range(count))
