"""Writes the sample world's pairs as CSV files, from a seed.

    python -m nli.sample.world --output-dir data/sample --seed 7

    premise,hypothesis,label,phenomenon
    Four spaniels slept in the garden.,At least three dogs slept.,1,numbers

train.csv has 2,000 rows, dev.csv 300, test.csv 400; demo.csv has 20 rows without label and phenomenon. No premise occurs twice, in one split or in two.
Train is written with a part of the lexicon; at least half of dev and test use a word that train lacks.
"""

import argparse
import csv
import random
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from nli.sample.grammar import PHENOMENA, Grammar, Pair
from nli.sample.lexicon import TRAIN_WORDS, WORDS, held_out_words

SEED = 7
NUM_ROWS = {"train": 2000, "dev": 300, "test": 400, "demo": 20}
ENTAILMENT_SHARE = 0.52
_NEW_WORD_SHARE = 0.5


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@cache
def build_splits(seed: int = SEED) -> dict[str, tuple[Pair, ...]]:
    """The pairs of every split. The same seed gives the same pairs."""
    used: set[str] = set()
    return {
        split: tuple(_build_split(split, num_rows, random.Random(f"{seed} {split}"), used))
        for split, num_rows in NUM_ROWS.items()
    }


def _build_split(split: str, num_rows: int, rng: random.Random, used: set[str]) -> list[Pair]:
    grammar = Grammar(TRAIN_WORDS if split == "train" else WORDS, rng)
    held_out = held_out_words()
    pairs: list[Pair] = []
    for index in range(num_rows):
        phenomenon = PHENOMENA[index % len(PHENOMENA)]
        # Labels go round within each phenomenon, so that its share of entailment is the world's.
        turn = index // len(PHENOMENA)
        label = int((turn + 1) * ENTAILMENT_SHARE) - int(turn * ENTAILMENT_SHARE)
        needs_new_word = split != "train" and rng.random() < _NEW_WORD_SHARE
        while True:
            pair = grammar.make_pair(phenomenon, label)
            has_new_word = bool(held_out & words_of(f"{pair.premise} {pair.hypothesis}"))
            if pair.premise not in used and (has_new_word or not needs_new_word):
                break
        used.add(pair.premise)
        pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def generate_pairs(seed: int, world_seed: int = SEED, shares: Mapping[str, float] | None = None) -> Iterator[Pair]:
    """Pairs without end, in the whole lexicon, none of which shares its premise with a row of any split; `shares` weighs the phenomena."""
    used = {pair.premise for pairs in build_splits(world_seed).values() for pair in pairs}
    rng = random.Random(seed)
    grammar = Grammar(WORDS, rng)
    weights = [(shares or {}).get(phenomenon, 1.0) for phenomenon in PHENOMENA]
    while True:
        pair = grammar.make_pair(rng.choices(PHENOMENA, weights)[0], int(rng.random() < ENTAILMENT_SHARE))
        if pair.premise not in used:
            yield pair


def write_world(output_dir: Path, seed: int = SEED) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, pairs in build_splits(seed).items():
        with open(output_dir / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if split == "demo":
                writer.writerow(["premise", "hypothesis"])
                writer.writerows([pair.premise, pair.hypothesis] for pair in pairs)
            else:
                writer.writerow(["premise", "hypothesis", "label", "phenomenon"])
                writer.writerows([pair.premise, pair.hypothesis, pair.label, pair.phenomenon] for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample world's pairs as CSV files.")
    parser.add_argument("--output-dir", type=Path, default=Path("data/sample"))
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_world(arguments.output_dir, arguments.seed)
    for split, pairs in build_splits(arguments.seed).items():
        print(f"{split}.csv: {len(pairs)} rows, {sum(pair.label for pair in pairs) / len(pairs):.1%} entailment")


if __name__ == "__main__":
    main()
