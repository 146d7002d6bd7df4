"""The rows of a run on disk: in order, unchanged, each request pending once.

python -m pytest tests/test_worklist.py
"""

import json
import tracemalloc
from hashlib import sha256

import pytest

from nli.runtime.errors import DataError, StorageError
from nli.runtime.worklist import CHUNK, Worklist, read_pending

ODD = "\ttwo\r\ndogs\u2028 \x00 'quoted' \"n/a\" 犬 🐕 %s ? \\ud83d \ufeff"


def row(number, premise=None, **more):
    return {
        "id": str(number),
        "premise": premise or f"Premise {number}.",
        "hypothesis": "Animals moved.",
        "true_label": 1,
    } | more


def key_of(text):
    return sha256(text.encode()).digest()[:16]


def keyed(rows):
    """Each row with a key that its premise decides."""
    return ((each, key_of(each["premise"])) for each in rows)


@pytest.fixture
def worklist(tmp_path):
    with Worklist(tmp_path / "work/rows.sqlite") as worklist:
        yield worklist


def rows_of(worklist):
    return [each for chunk in worklist.iterate() for each in chunk]


def pending(worklist, first=1, last=10**9):
    return [json.loads(text) for text in read_pending(str(worklist.path), first, last)]


def test_rows_come_back_in_their_order_with_their_keys_and_every_character(worklist, tmp_path):
    rows = [row(0), row(1, ODD, note=ODD, nothing=None, share=0.1, nested={"a": [1, None]}), row(2, ODD)]
    assert worklist.fill(keyed(rows), tmp_path / "in.csv") == 3
    assert rows_of(worklist) == list(keyed(rows))
    assert worklist.list_pending(lambda keys: set()) == 2
    assert pending(worklist) == rows[:2]
    assert [list(each) for each in pending(worklist)] == [
        list(each) for each in rows[:2]
    ]  # the order of the fields too


def test_the_first_row_of_each_request_is_pending_and_slices_of_them_can_be_read(worklist, tmp_path):
    count = 3 * CHUNK + 7
    rows = [row(index, f"Premise {index % (count - 100)}.") for index in range(count)]
    assert worklist.fill(keyed(rows), tmp_path / "in.csv") == count
    assert worklist.count_requests() == count - 100
    done = {key_of(each["premise"]) for each in rows[::2]}
    asked = []

    def are_done(keys):
        assert len(keys) <= CHUNK
        asked.extend(keys)
        return done & set(keys)

    left = [each for each in rows[: count - 100] if key_of(each["premise"]) not in done]
    assert worklist.list_pending(are_done) == len(left)
    assert (len(asked), len(set(asked))) == (count - 100, count - 100)
    assert pending(worklist) == left
    assert [each for first in range(1, len(left) + 1, 50) for each in pending(worklist, first, first + 49)] == left
    assert pending(worklist, len(left) + 1, len(left) + 50) == []
    assert worklist.list_pending(lambda keys: set(keys)) == 0
    assert pending(worklist) == []
    assert worklist.list_pending(lambda keys: set()) == count - 100
    assert pending(worklist, 1, 1) == [rows[0]]


def test_two_rows_of_one_id_and_pair_are_refused_and_one_id_with_two_pairs_is_not(worklist, tmp_path):
    rows = [row("a"), row("b"), row("a", "Another."), row("c"), row("b"), row("a")]
    with pytest.raises(
        DataError, match=r"in\.csv: row 5 repeats the id 'b' and the pair of an earlier row; remove one of them\.$"
    ):
        worklist.fill(keyed(rows), tmp_path / "in.csv")


def test_rows_are_taken_as_they_come_and_memory_does_not_grow_with_them(tmp_path):
    def most_memory(count):
        with Worklist(tmp_path / "rows.sqlite") as worklist:
            tracemalloc.start()
            worklist.fill(
                keyed(row(index, f"Premise {index} {'x' * 500}") for index in range(count)), tmp_path / "in.csv"
            )
            worklist.list_pending(lambda keys: set())
            assert sum(len(chunk) for chunk in worklist.iterate()) == count
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return most

    most_memory(CHUNK)
    assert most_memory(20 * CHUNK) <= 1.2 * most_memory(2 * CHUNK)


def test_a_fault_of_the_source_passes_through(worklist, tmp_path):
    def rows():
        yield row(0)
        raise DataError("in.csv:3: the premise is empty")

    with pytest.raises(DataError, match="the premise is empty"):
        worklist.fill(keyed(rows()), tmp_path / "in.csv")


def test_the_file_goes_with_the_block_whatever_ends_it_and_an_old_one_is_replaced(tmp_path):
    path = tmp_path / "rows.sqlite"
    path.write_text("left by a killed run")
    with pytest.raises(DataError), Worklist(path) as worklist:
        worklist.fill(keyed([row(0), row(0)]), tmp_path / "in.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error(worklist, tmp_path):
    worklist._db.execute("PRAGMA max_page_count=10")
    with pytest.raises(
        StorageError, match=r"rows\.sqlite: cannot be written \(database or disk is full\)\. Free space, or set TMPDIR"
    ):
        worklist.fill(keyed(row(index) for index in range(5000)), tmp_path / "in.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/rows\.sqlite: cannot be written"):
        Worklist(tmp_path / "file/rows.sqlite")


def test_pending_rows_are_read_without_a_lock_or_a_trace(worklist, tmp_path):
    worklist.fill(keyed([row(0)]), tmp_path / "in.csv")
    worklist.list_pending(lambda keys: set())
    before = sorted(path.name for path in worklist.path.parent.iterdir())
    assert pending(worklist) == [row(0)]
    assert sorted(path.name for path in worklist.path.parent.iterdir()) == before
    with pytest.raises(StorageError, match=r"nothing\.sqlite: cannot be read .* run the command again"):
        read_pending(str(tmp_path / "nothing.sqlite"), 1, 2)
