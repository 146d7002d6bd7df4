"""Read premise–hypothesis pairs from CSV, every character as it stands in the file.

In:   premise,hypothesis,label                     Out:  {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}
      Two dogs ran.,Animals moved.,1

`id` is the file's `id` column or, without one, the row's index from 0. `label` (or `true_label`) may be missing as a column or empty in a row: the pair is
unlabelled then. Other columns ride along as text. Nothing is stripped, lower-cased or read as missing: "n/a" is the text n/a.
"""

import csv
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from nli.runtime.config import nearest
from nli.runtime.errors import DataError
from nli.runtime.files import summarise_faults
from nli.task.records import Answer, Reflection, Score

_OWN_COLUMNS = (set(Answer.model_fields) | set(Score.model_fields) | set(Reflection.model_fields)) - {
    "id",
    "premise",
    "hypothesis",
    "true_label",
}
_LABEL_COLUMNS = {"label", "true_label"}
_PAIR_COLUMNS = {"id", "premise", "hypothesis"} | _LABEL_COLUMNS
_COUNT = re.compile("[1-9][0-9]{0,5}")
_LABELS = {"0": 0, "1": 1, "": None}

csv.field_size_limit(1 << 27)  # characters; the default of 131,072 refuses long documents


def read_examples(path: Path, max_rows: int = 0, need_labels: bool = False) -> list[dict]:
    """Rows of a CSV as Examples, at most `max_rows` of them (0: all). Raises as `iterate_examples` does."""
    return list(iterate_examples(path, max_rows, need_labels))


def iterate_examples(
    path: Path, max_rows: int = 0, need_labels: bool = False, count_column: str = ""
) -> Iterator[dict]:
    """The same, one by one, for files that should not be held in memory. A faulty file raises at its end, or instead of its next row.

    Raises DataError, all faults at once with their lines: no file, no rows, no `premise` or `hypothesis` column, an empty text, a label that is not 0 or 1,
    `Label` or ` id` for a column's name, a repeated id, a row with too many or too few cells, bytes that are not UTF-8; with `need_labels`, also a pair without
    label; with `count_column`, also a cell of that column that is no whole number from 1.
    """
    records = _iterate_csv(path)
    _, header = next(records)
    _check_header(path, header, need_labels)
    if count_column and count_column not in header:
        raise DataError(
            f"{path}:1: no column {count_column}; the header is {','.join(header)}.{nearest(count_column, header)}"
        )
    if count_column in _PAIR_COLUMNS:
        raise DataError(
            f"{path}:1: column {count_column} is part of the pair and holds no numbers to go by; name another."
        )
    label_column = "label" if "label" in header else "true_label"
    faults: list[str] = []
    places = array("q")  # (hash of the id, line) of every row, flat: some bytes a row instead of a dict's hundreds
    num_rows = 0
    for index, (line, cells) in enumerate(records):
        if max_rows and num_rows == max_rows:
            break
        if len(cells) != len(header):
            faults.append(
                f"{path}:{line}: {len(cells)} cells where the header has {len(header)}; quote a text that holds commas or newlines"
            )
            continue
        named = dict(zip(header, cells, strict=True))
        row = {
            "id": named.pop("id", str(index)),
            "premise": named.pop("premise"),
            "hypothesis": named.pop("hypothesis"),
        }
        label = named.pop(label_column, "")
        faults += [
            f"{path}:{line}: the {name} is empty" for name in ("id", "premise", "hypothesis") if not row[name].strip()
        ]
        if label.strip() not in _LABELS:
            faults.append(f"{path}:{line}: label {label!r} is neither 1 (entailment) nor 0 (no entailment)")
        row["true_label"] = _LABELS.get(label.strip())
        if need_labels and row["true_label"] is None:
            faults.append(f"{path}:{line}: no label, which this stage needs")
        if count_column and not _COUNT.fullmatch(named[count_column]):
            faults.append(f"{path}:{line}: {count_column} {named[count_column]!r} is no whole number from 1")
        if "id" in header:
            places.extend((_hash(row["id"]), line))
        num_rows += 1
        if not faults:
            yield row | named
    if "id" in header:
        faults += _find_repeated_ids(path, header.index("id"), places)
    if faults:
        raise DataError(summarise_faults(sorted(faults, key=_line_of), "mend these rows; nothing was started"))
    if not num_rows:
        raise DataError(f"{path}: the file has a header but no rows.")


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little", signed=True)


def _find_repeated_ids(path: Path, column: int, places: array) -> list[str]:
    """A fault for each id that stands at an earlier line already. The file is read again only if there is one."""
    import numpy as np

    hashes, lines = np.frombuffer(places, np.int64).reshape(-1, 2).T
    order = np.lexsort((lines, hashes))
    repeats = np.flatnonzero(np.diff(hashes[order]) == 0)
    if not len(repeats):
        return []
    earlier = {int(lines[order[index + 1]]): int(lines[order[index]]) for index in repeats}
    ids = {line: cells[column] for line, cells in _iterate_csv(path) if line in earlier}
    return [f"{path}:{line}: id {ids[line]!r} stands at line {earlier[line]} already" for line in sorted(earlier)]


def _line_of(fault: str) -> int:
    return int(re.search(r":(\d+): ", fault).group(1))


def is_labelled(rows: Sequence[Mapping]) -> bool:
    """Whether any row has a true label."""
    return any(row["true_label"] is not None for row in rows)


def shared_premises(left: Iterable[Mapping], right: Iterable[Mapping]) -> set[str]:
    """Premises that stand on both sides: a leak when one side trains and the other tests."""
    return {row["premise"] for row in left} & {row["premise"] for row in right}


def _iterate_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the data rows, each with the line that it starts on; blank lines are passed over."""
    is_empty, line = True, 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells:
                    is_empty = False
                    yield line, cells
                line = reader.line_num + 1
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, not a CSV file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 near line {line} (byte {error.object[error.start]:#04x}); save it as UTF-8."
        ) from None
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV ({error}); a quote may be left open there.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a file ({error.strerror}).") from None
    if is_empty:
        raise DataError(
            f"{path}: the file is empty; it needs a header with premise,hypothesis[,label] and a row for each pair."
        )


def _check_header(path: Path, header: Sequence[str], need_labels: bool) -> None:
    needed = ["premise", "hypothesis"] + (["label"] if need_labels and "true_label" not in header else [])
    missing = [name for name in needed if name not in header]
    if missing:
        hints = "".join(nearest(name, header) for name in missing)
        raise DataError(
            f"{path}:1: no column {' and no column '.join(missing)}; the header is {','.join(header)}.{hints}"
        )
    meant = {name: name.strip().lower() for name in header if name not in _PAIR_COLUMNS}
    lacking = _PAIR_COLUMNS - set(header) - (_LABEL_COLUMNS if _LABEL_COLUMNS & set(header) else set())
    alike = [f"{name!r} is not {known}" for name, known in meant.items() if known in lacking]
    if alike:
        raise DataError(
            f"{path}:1: column {' and column '.join(alike)}, but would ride along as any other text; rename it."
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    own = sorted(_OWN_COLUMNS & set(header))
    both = set(header) >= _LABEL_COLUMNS
    if repeated or own or both:
        names = ", ".join(repeated or own or ["label", "true_label"])
        reason = "stands twice" if repeated else "is written by this project" if own else "mean the same"
        raise DataError(f"{path}:1: column {names} {reason}; rename or remove it.")
