"""What is wrong with a training run's rows, all of it at once and before any model is loaded.

In:   reflected_train.jsonl, reflected_dev.jsonl, a tokenizer, max_length
Out:  DataError: reflected_train.jsonl:17: not JSON (Expecting ',' delimiter at character 88)
                 reflected_train.jsonl:40: completion: empty, so there is nothing to learn
                 reflected_train.jsonl:61: 540 tokens, over max_length 512
                 reflected_dev.jsonl:3: the pair stands in reflected_train.jsonl:9 too

or `Splits`, which `nli.training.preflight_report` describes.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nli.models.tokenizer import encode_example, load_tokenizer
from nli.runtime.errors import DataError, ModelError
from nli.runtime.files import scan_jsonl, summarise_faults
from nli.task.records import SFTExample

NAMES = ("train", "dev")
_CURE = "mend the rows, raise max_length, or leave long rows out with --drop-overlong"
_SHOWN = 100  # faults in a message


@dataclass
class Splits:
    """The good rows of both files as (line, row), and what is wrong with the others."""

    paths: dict[str, Path]
    rows: dict[str, list[tuple[int, dict]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read_splits(inputs: tuple[Path, Path]) -> Splits:
    """Read both files. `faults` names each line that is no row, has nothing to learn, or is a dev pair that is trained on."""
    splits = Splits(dict(zip(NAMES, inputs, strict=True)))
    for name, path in splits.paths.items():
        splits.rows[name] = []
        for line, row in scan_jsonl(path, SFTExample, splits.faults):
            empty = next((part for part in ("prompt", "completion") if not row[part].strip()), None)
            if empty:
                splits.faults.append(
                    f"{path}:{line}: {empty}: empty, so there is nothing to {'learn' if empty == 'completion' else 'answer'}"
                )
            else:
                splits.rows[name].append((line, row))
    trained_on = {(row["premise"], row["hypothesis"]): line for line, row in splits.rows["train"]}
    for line, row in splits.rows["dev"]:
        if (pair := (row["premise"], row["hypothesis"])) in trained_on:
            splits.faults.append(
                f"{splits.paths['dev']}:{line}: the pair stands in {splits.paths['train']}:{trained_on[pair]} too"
            )
    return splits


def check_splits(inputs: tuple[Path, Path], tokenizer_path: str, max_length: int, drop_overlong: bool) -> None:
    """Raise DataError if a line of either file is faulty, naming those of length and encoding too.

    Good files are not tokenised here: that is spread over the cluster, and `find_token_faults` looks at its outcome.
    """
    splits = read_splits(inputs)
    if splits.faults:
        token_faults: list[str] = []
        with contextlib.suppress(ModelError):  # without a tokenizer the other faults are worth telling
            token_faults = find_token_faults(splits, tokenise_here(splits, tokenizer_path), max_length, drop_overlong)
        raise_faults(splits, token_faults)


def list_items(splits: Splits) -> list[dict]:
    """All rows as what `tokenise_batch` takes."""
    kept = ("prompt", "completion", "true_label")
    return [
        {"split": name, "line": line} | {part: row[part] for part in kept}
        for name in NAMES
        for line, row in splits.rows[name]
    ]


def tokenise_here(splits: Splits, tokenizer_path: str):
    """All rows as a tokenised table, by this process."""
    import pyarrow as pa

    return tokenise_batch(pa.Table.from_pylist(list_items(splits)), tokenizer_path)


def tokenise_batch(table, tokenizer_path: str):
    """Columns prompt and completion of a pyarrow table become input_ids, labels, num_tokens and problem ('' when the row is good); the others stay."""
    import pyarrow as pa

    tokenizer = load_tokenizer(tokenizer_path)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "num_tokens": [], "problem": []}
    for prompt, completion in zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True):
        try:
            example = encode_example(tokenizer, prompt, completion)
            values = (example.input_ids, example.labels, len(example.input_ids), "")
        except DataError as error:
            values = ([], [], 0, str(error))
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    ids = pa.list_(pa.int32())
    arrays = [
        pa.array(columns["input_ids"], ids),
        pa.array(columns["labels"], ids),
        pa.array(columns["num_tokens"]),
        pa.array(columns["problem"]),
    ]
    true_labels = pa.array(
        table["true_label"].to_pylist(), pa.int8()
    )  # a block without any label would have a column of no type
    return pa.table(
        [table["split"], table["line"], true_labels, *arrays], names=["split", "line", "true_label", *columns]
    )


def find_token_faults(splits: Splits, table, max_length: int, drop_overlong: bool) -> list[str]:
    """Rows that cannot be encoded and, where they may not be dropped, rows over `max_length`."""
    faults = [
        f"{splits.paths[row['split']]}:{row['line']}: {row['problem']}" for row in _facts(table) if row["problem"]
    ]
    return faults + ([] if drop_overlong else describe_overlong(splits, table, max_length))


def describe_overlong(splits: Splits, table, max_length: int) -> list[str]:
    """`file:line: N tokens, over max_length M` for each row that is too long."""
    return [
        f"{splits.paths[row['split']]}:{row['line']}: {row['num_tokens']} tokens, over max_length {max_length}"
        for row in _facts(table)
        if row["num_tokens"] > max_length
    ]


def raise_faults(splits: Splits, token_faults: Sequence[str] = ()) -> None:
    """Raise DataError that names all faults, if there are any."""
    if splits.faults or token_faults:
        raise DataError(summarise_faults([*splits.faults, *token_faults], _CURE, _SHOWN))


def _facts(table) -> list[dict]:
    rows = table.select(["split", "line", "num_tokens", "problem"]).to_pylist()
    return sorted(rows, key=lambda row: (NAMES.index(row["split"]), row["line"]))
