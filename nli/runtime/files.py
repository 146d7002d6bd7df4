"""Files: where inputs and outputs lie, and how rows are read, checked and written whole or not at all.

resolve_output("results/a.jsonl", storage_root="/data")     -> Path("/data/results/a.jsonl")
write_jsonl(Path("results/a.jsonl"), rows)                  # readers see the old file or the new one
iterate_jsonl(Path("results/a.jsonl"), Answer)              # row by row; names every faulty line
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from nli.runtime.config import is_submitted_job
from nli.runtime.errors import DataError, StorageError
from nli.task.records import row_key

STORAGE_ROOT_VARIABLE = "NLI_STORAGE_ROOT"
_HALF_PAIR = "\\ud"  # how every escape of a surrogate begins, alone or in a pair


def resolve_output(path: str, storage_root: str) -> Path:
    """Where an output goes: absolute as it is, relative below the storage root (the field, else NLI_STORAGE_ROOT, else the current folder).

    Raises StorageError for a URI, and for a relative place under a submitted job, whose current folder vanishes with it.
    """
    place = _root(storage_root) / path
    if "://" in path or "://" in storage_root:
        raise StorageError(
            f"{path if '://' in path else storage_root}: object storage is not supported; give a folder that all nodes mount, such as NFS."
        )
    if not place.is_absolute() and is_submitted_job():
        raise StorageError(
            f"{path}: a submitted job runs in a temporary copy of the folder, which vanishes with what it holds. "
            f"Give an absolute --storage-root (or set {STORAGE_ROOT_VARIABLE}) on storage that all nodes mount."
        )
    return Path(os.path.abspath(place))


def resolve_input(path: str, storage_root: str) -> Path:
    """Where an input is: absolute as it is; relative below the storage root if it exists there (another stage made it), else below the current folder.

    Raises DataError if there is no such file or folder.
    """
    candidates = [_root(storage_root) / path, Path(path)]
    for candidate in candidates:
        if path and candidate.exists():
            return Path(os.path.abspath(candidate))
    looked = " or ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise DataError(f"{path or '(no path)'}: no such file; looked for {looked}.")


def resolve_model(name: str, storage_root: str) -> str:
    """A model's folder, looked for as `resolve_input` does; a name that nothing here has stays what it is, for it may be the hub's."""
    found = next((path for path in (_root(storage_root) / name, Path(name)) if name and path.exists()), None)
    return os.path.abspath(found) if found else name


def _root(storage_root: str) -> Path:
    return Path(storage_root or os.environ.get(STORAGE_ROOT_VARIABLE, ""))


def write_atomic(path: Path, write: Callable[[Path], object] | str) -> None:
    """Write a file beside its place, flush it to disk and rename it: readers see the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(write, str):
                aside.write_text(write, encoding="utf-8", newline="")
            else:
                write(aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}). Free space or choose another output; what was there is untouched."
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_line(row: Mapping) -> str:
    """One row as a line of JSON, text unescaped, with its newline."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> None:
    """Write rows as JSON Lines, atomically."""

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(dump_line(row) for row in rows)

    write_atomic(path, write)


def write_csv(path: Path, rows: Iterable[Mapping], columns: Sequence[str]) -> None:
    """Write the named columns of rows as CSV, atomically; None becomes an empty cell."""

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)  # the default \r\n line ends make it quote a lone \r inside a field
            writer.writerow(columns)
            writer.writerows([row.get(column) for column in columns] for row in rows)

    write_atomic(path, write)


def read_jsonl(path: Path, record: type[BaseModel]) -> list[dict]:
    """Read and check a JSON Lines file. Raises DataError that names all faulty lines (the first ten), or an empty file."""
    return list(iterate_jsonl(path, record))


def iterate_jsonl(path: Path, record: type[BaseModel]) -> Iterator[dict]:
    """The same, row by row, for files that should not be held in memory. A faulty file raises at its end, or instead of its next row."""
    faults: list[str] = []
    for _, row in scan_jsonl(path, record, faults):
        if not faults:
            yield row
    if faults:
        raise DataError(
            summarise_faults(faults, f"each line must be a JSON object with the fields of {record.__name__}")
        )


def scan_jsonl(path: Path, record: type[BaseModel], faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Line numbers and good rows of a JSON Lines file; what is wrong with the others is added to `faults`. Raises DataError for an empty file."""
    num_rows = 0
    for number, line in _lines(path):
        num_rows += 1
        try:
            row = json.loads(line)
            record.model_validate(row)
            if _HALF_PAIR in line.lower():
                dump_line(row).encode()
            yield number, row
        except UnicodeEncodeError:
            faults.append(
                f"{path}:{number}: half of a surrogate pair, which is no character and can be written nowhere"
            )
        except RecursionError:
            faults.append(f"{path}:{number}: nested too deeply")
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON ({error.msg} at character {error.pos + 1})")
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "the line"
            faults.append(f"{path}:{number}: {name}: {first['msg'][0].lower()}{first['msg'][1:]}")
    if not num_rows:
        raise DataError(f"{path}: the file is empty; the stage before it has made nothing.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a file ({error.strerror}).") from None


def index_rows(rows: Iterable[Mapping], path: Path) -> dict[str, Mapping]:
    """Rows by row key, in their order. Raises DataError if two rows share one: the later would hide the earlier."""
    indexed: dict[str, Mapping] = {}
    for number, row in enumerate(rows, start=1):
        if row_key(row) in indexed:
            raise DataError(
                f"{path}: row {number} repeats the id {row['id']!r} and the pair of an earlier row; remove one of them."
            )
        indexed[row_key(row)] = row
    return indexed


def summarise_faults(faults: Sequence[str], cure: str, shown: int = 10) -> str:
    """The first faults, one a line, how many more there are, and the cure."""
    lines = list(faults[:shown])
    if len(faults) > shown:
        lines.append(f"... and {len(faults) - shown} more")
    return "\n".join(lines) + f"\n{cure[0].upper()}{cure[1:]}."
