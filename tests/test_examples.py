"""Reading pairs from CSV: every character as it stands in the file, and every fault named with its line before anything starts.

python -m pytest tests/test_examples.py
"""

import csv
import re
import tracemalloc
from pathlib import Path

import pytest

from nli.data.pairs import is_labelled, iterate_examples, read_examples, shared_premises
from nli.runtime.errors import DataError
from nli.runtime.files import read_jsonl, write_csv, write_jsonl
from nli.task.records import Example

# Texts that a reader may spoil: by reading them as missing, by stripping, by joining lines, by mending what is not broken.
ODD_TEXTS = {
    "n/a": "n/a",
    "NA": "NA",
    "nan": "nan",
    "null": "null",
    "None": "None",
    "a number": "007",
    "true": "true",
    "edge spaces": "  two dogs  ",
    "edge tabs": "\ttwo dogs\t",
    "a tab": "two\tdogs",
    "commas": "a, b, and c",
    "quotes": 'He said "no".',
    "only quotes": '""',
    "an apostrophe": "It's the dogs' ball",
    "a newline": "two\ndogs",
    "a Windows newline": "two\r\ndogs",
    "a lone carriage return": "two\rdogs",
    "newlines at the edges": "\ntwo dogs\r\n",
    "a line separator": "two\u2028dogs",
    "next line": "two\x85dogs",
    "a form feed": "two\x0cdogs",
    "mojibake": "cafÃ©",
    "an accent of its own": "cafe\u0301",
    "emoji": "👩‍👩‍👧 walk 🐕",
    "other scripts": "犬が走る – собака",
    "a no-break space": "two\xa0dogs",
    "a byte order mark inside": "two\ufeffdogs",
    "a formula": "=1+1",
    "a backslash": "C:\\dogs\\n",
    "capitals": "LONDON is in England",
    "a brace": '{"premise": 1}',
    "a NUL": "two\x00dogs",
    "a control character": "two\x01dogs",
    "a hash": "# not a comment",
}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def pairs(tmp_path):
    return tmp_path / "pairs.csv"


@pytest.fixture
def refusal(pairs):
    """The message with which a CSV text is refused, without the path."""

    def read(text, **options):
        with pytest.raises(DataError) as caught:
            read_examples(write(pairs, text), **options)
        return str(caught.value).replace(str(pairs), "pairs.csv")

    return read


def test_pairs_become_examples(pairs):
    write(pairs, "premise,hypothesis,label\nTwo dogs ran.,Animals moved.,1\nA cat sat.,A dog sat.,0\n")
    assert read_examples(pairs) == [
        {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1},
        {"id": "1", "premise": "A cat sat.", "hypothesis": "A dog sat.", "true_label": 0},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffpremise,hypothesis,label\na,b,1\n",
        '\ufeff"premise","hypothesis","label"\n"a","b","1"\n',
        "premise,hypothesis,label\r\na,b,1\r\n",
        "premise,hypothesis,label\ra,b,1\r",
        "premise,hypothesis,label\na,b,1",
        "premise,hypothesis,label\n\na,b,1\n\n\n",
        "label,hypothesis,premise\n1,b,a\n",
        "premise,hypothesis,true_label\na,b,1\n",
        "premise,hypothesis,label\na,b, 1 \n",
    ],
    ids=[
        "BOM",
        "BOM and quotes",
        "Windows",
        "old Mac",
        "no newline at the end",
        "blank lines",
        "another order",
        "true_label",
        "spaces around a label",
    ],
)
def test_the_same_pair_is_read_from_any_form_of_the_file(pairs, text):
    assert read_examples(write(pairs, text)) == [{"id": "0", "premise": "a", "hypothesis": "b", "true_label": 1}]


def test_without_a_label_column_pairs_are_unlabelled(pairs):
    rows = read_examples(write(pairs, "premise,hypothesis\na,b\n"))
    assert rows == [{"id": "0", "premise": "a", "hypothesis": "b", "true_label": None}]
    assert not is_labelled(rows)


def test_an_empty_label_is_no_label_and_the_other_rows_keep_theirs(pairs):
    rows = read_examples(write(pairs, "premise,hypothesis,label\na,b,\nc,d,0\ne,f, \n"))
    assert [row["true_label"] for row in rows] == [None, 0, None]
    assert is_labelled(rows)


def test_an_own_id_column_is_kept_as_text(pairs):
    rows = read_examples(write(pairs, "id,premise,hypothesis\n007,a,b\nx-1,c,d\n"))
    assert [row["id"] for row in rows] == ["007", "x-1"]


def test_other_columns_ride_along_as_text(pairs):
    rows = read_examples(write(pairs, "premise,genre,hypothesis,label,year\na,fiction,b,1,1999\n"))
    assert rows == [{"id": "0", "premise": "a", "hypothesis": "b", "true_label": 1, "genre": "fiction", "year": "1999"}]


def test_a_column_may_look_like_a_label_beside_the_label(pairs):
    rows = read_examples(write(pairs, "premise,hypothesis,true_label,Label\na,b,1,entailed\n"))
    assert rows == [{"id": "0", "premise": "a", "hypothesis": "b", "true_label": 1, "Label": "entailed"}]


def test_only_the_first_rows_are_read_when_a_number_is_given(pairs):
    write(pairs, "premise,hypothesis,label\na,b,1\nc,d,0\ne,f,seven\n")
    assert [row["premise"] for row in read_examples(pairs, max_rows=2)] == ["a", "c"]


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_text_passes_from_csv_through_json_lines_to_csv_unchanged(tmp_path, text):
    with open(tmp_path / "in.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["premise", "hypothesis", "label", "note"], [text, text, "1", text]])
    read = read_examples(tmp_path / "in.csv")
    assert read == [{"id": "0", "premise": text, "hypothesis": text, "true_label": 1, "note": text}]
    write_jsonl(tmp_path / "rows.jsonl", read)
    kept = read_jsonl(tmp_path / "rows.jsonl", Example)
    assert kept == read
    write_csv(tmp_path / "out.csv", kept, ["id", "premise", "hypothesis", "true_label", "note"])
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "premise", "hypothesis", "true_label", "note"],
            ["0", text, text, "1", text],
        ]


def test_all_odd_texts_in_one_file_keep_their_rows(tmp_path):
    rows = [
        {"id": name, "premise": text, "hypothesis": text[::-1], "true_label": index % 2 if index % 3 else None}
        for index, (name, text) in enumerate(ODD_TEXTS.items())
    ]
    write_csv(tmp_path / "odd.csv", rows, ["id", "premise", "hypothesis", "true_label"])
    assert read_examples(tmp_path / "odd.csv") == rows


def test_a_long_document_is_read(pairs):
    write(pairs, f"premise,hypothesis\n{'dog ' * 100_000},b\n")
    assert len(read_examples(pairs)[0]["premise"]) == 400_000


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path, refusal):
    with pytest.raises(DataError, match=r"nothing\.csv: no such file\.$"):
        read_examples(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match=r"a folder, not a CSV file\.$"):
        read_examples(tmp_path)
    for text in ("", "\ufeff", "\n\n"):
        assert (
            refusal(text)
            == "pairs.csv: the file is empty; it needs a header with premise,hypothesis[,label] and a row for each pair."
        )
    assert refusal("premise,hypothesis,label\n") == "pairs.csv: the file has a header but no rows."


def test_a_file_that_the_system_does_not_give_is_refused():
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read as a file \(Input/output error\)\.$"):
        list(iterate_examples(Path("/proc/self/mem")))


@pytest.mark.parametrize("column", ["num_replies", "thought_process", "telling_phrase", "score"])
def test_a_column_that_an_answer_would_overwrite_is_refused(refusal, column):
    assert f"column {column} is written by this project" in refusal(f"premise,hypothesis,{column}\na,b,c\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "premises,hypothesis\na,b\n",
            "pairs.csv:1: no column premise; the header is premises,hypothesis. Did you mean premises?",
        ),
        (
            "premise,hypotesis\na,b\n",
            "pairs.csv:1: no column hypothesis; the header is premise,hypotesis. Did you mean hypotesis?",
        ),
        (
            "Premise,Hypothesis\na,b\n",
            "pairs.csv:1: no column premise and no column hypothesis; the header is Premise,Hypothesis.",
        ),
        ("a,b\n", "pairs.csv:1: no column premise and no column hypothesis; the header is a,b."),
        (
            "premise;hypothesis\na;b\n",
            "pairs.csv:1: no column premise and no column hypothesis; the header is premise;hypothesis.",
        ),
        ("premise,hypothesis,label,ID\na,b,1,7\n", "pairs.csv:1: column 'ID' is not id"),
        (
            "premise,hypothesis,Label\na,b,1\n",
            "pairs.csv:1: column 'Label' is not label, but would ride along as any other text; rename it.",
        ),
        (
            "ID,premise,hypothesis, label\n7,a,b,1\n",
            "pairs.csv:1: column 'ID' is not id and column ' label' is not label, but",
        ),
        ("premise,hypothesis,premise\na,b,c\n", "pairs.csv:1: column premise stands twice; rename or remove it."),
        (
            "premise,hypothesis,raw_text\na,b,c\n",
            "pairs.csv:1: column raw_text is written by this project; rename or remove it.",
        ),
        (
            "premise,hypothesis,predicted_label\na,b,1\n",
            "pairs.csv:1: column predicted_label is written by this project; rename or remove it.",
        ),
        (
            "premise,hypothesis,error_analysis\na,b,c\n",
            "pairs.csv:1: column error_analysis is written by this project; rename or remove it.",
        ),
        (
            "premise,hypothesis,label,true_label\na,b,1,1\n",
            "pairs.csv:1: column label, true_label mean the same; rename or remove it.",
        ),
    ],
)
def test_a_header_that_does_not_fit_is_refused(refusal, text, message):
    assert refusal(text).startswith(message)


@pytest.mark.parametrize("column", ["id", "premise", "hypothesis", "label"])
def test_a_column_of_lengths_that_is_part_of_the_pair_is_refused(pairs, column):
    write(pairs, "id,premise,hypothesis,label\n7,8,9,1\n")
    with pytest.raises(
        DataError, match=f"pairs.csv:1: column {column} is part of the pair and holds no numbers to go by"
    ):
        list(iterate_examples(pairs, count_column=column))


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "1.0", "entailment", "yes", "true", "nan", "n/a", "٠"])
def test_an_unknown_label_is_refused_with_its_line(refusal, label):
    message = refusal(f"premise,hypothesis,label\na,b,1\nc,d,{label}\n")
    assert (
        message
        == f"pairs.csv:3: label {label!r} is neither 1 (entailment) nor 0 (no entailment)\nMend these rows; nothing was started."
    )


def test_a_line_number_is_the_line_in_the_file_also_after_newlines_inside_fields(refusal):
    assert refusal('premise,hypothesis,label\n"a\nb\r\nc",d,1\n\ne,f,9\n').startswith("pairs.csv:6: label '9'")


def test_all_faults_of_a_file_are_named_at_once(refusal):
    message = refusal("id,premise,hypothesis,label\n1,a,b,7\n2,,b,1\n1,c,d,0\n3,e,f\n4,g,h,1,0\n")
    assert message.splitlines() == [
        "pairs.csv:2: label '7' is neither 1 (entailment) nor 0 (no entailment)",
        "pairs.csv:3: the premise is empty",
        "pairs.csv:4: id '1' stands at line 2 already",
        "pairs.csv:5: 3 cells where the header has 4; quote a text that holds commas or newlines",
        "pairs.csv:6: 5 cells where the header has 4; quote a text that holds commas or newlines",
        "Mend these rows; nothing was started.",
    ]


def test_ids_are_checked_for_repeats_in_little_memory_and_rows_come_one_by_one(pairs):
    count = 10_000

    def read(last_id):
        pairs.write_text(
            "id,premise,hypothesis,label\n"
            + "".join(f"row-{index},a,b,1\n" for index in range(count))
            + f"{last_id},a,b,1\n"
        )
        tracemalloc.start()
        try:
            return sum(1 for _ in iterate_examples(pairs)), None
        except DataError as error:
            return str(error).replace(str(pairs), "pairs.csv"), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert read("new") == (count + 1, None)
    message, most = read("row-7")
    assert (
        message == f"pairs.csv:{count + 2}: id 'row-7' stands at line 9 already\nMend these rows; nothing was started."
    )
    assert most <= 100 * count  # a set of the ids alone takes more


def test_rows_before_a_fault_are_given_and_none_after_it(pairs):
    write(pairs, "premise,hypothesis,label\na,b,1\nc,d,7\ne,f,0\n")
    given = []
    with pytest.raises(DataError, match="label '7'"):
        given.extend(row["premise"] for row in iterate_examples(pairs))
    assert given == ["a"]


def test_of_many_faults_ten_are_shown_and_the_rest_counted(refusal):
    lines = refusal("premise,hypothesis,label\n" + "a,b,x\n" * 25).splitlines()
    assert len(lines) == 12
    assert lines[10] == "... and 15 more"


def test_a_pair_without_label_is_refused_where_labels_are_needed(refusal):
    assert refusal("premise,hypothesis,label\na,b,1\nc,d,\n", need_labels=True).startswith(
        "pairs.csv:3: no label, which this stage needs"
    )
    assert refusal("premise,hypothesis\na,b\n", need_labels=True).startswith(
        "pairs.csv:1: no column label; the header is premise,hypothesis."
    )


def test_an_open_quote_is_refused_with_the_line_where_its_row_starts(refusal):
    message = refusal('premise,hypothesis,label\na,b,1\n"c,d,0\ne,f,1\n')
    assert re.fullmatch(r"pairs\.csv:3: not CSV \(.+\); a quote may be left open there\.", message)


def test_a_file_that_is_not_utf8_is_refused(pairs):
    with pytest.raises(DataError, match=r"not UTF-8 near line 1 \(byte 0xff\); save it as UTF-8\."):
        read_examples(write(pairs, "premise,hypothesis\na,b\n", "utf-16"))
    with pytest.raises(DataError, match=r"not UTF-8 near line \d \(byte 0xe9\); save it as UTF-8\."):
        read_examples(write(pairs, "premise,hypothesis\ncafé,b\n", "latin-1"))


def test_premises_on_both_sides_are_found():
    left = [{"premise": "a"}, {"premise": "b"}]
    right = [{"premise": "b"}, {"premise": "B"}, {"premise": "c"}]
    assert shared_premises(left, right) == {"b"}
