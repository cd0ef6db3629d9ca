"""Subjects are read from the columns of their name; a table that can be read in two ways is refused."""

import json
import re
from pathlib import Path

import pytest

from nnunetv2_dycon.conversion.groups import CASE_COLUMNS, SUBJECT_COLUMNS, read_groups
from nnunetv2_dycon.errors import SplitError

SUBJECTS = {"a": "s1", "b": "s1", "c": "s2"}


def read(folder: Path, text: str, name: str = "groups.csv") -> dict[str, str]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_groups(path, lambda case: case.strip().removesuffix(".nii.gz"), ["a", "b", "c"])


@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize(
    "rows",
    [
        ["a,s1", "b,s1", "c,s2"],
        ["case,subject", "a,s1", "b,s1", "c,s2"],
        ["subject,case", "s1,a", "s1,b", "s2,c"],
        ["patient,file", "s1,a", "s1,b", "s2,c"],
        ["file,patient", "a,s1", "b,s1", "c,s2"],
        ["case,age,subject", "a,61,s1", "b,63,s1", "c,61,s2"],
        ["age,Patient_ID,sex, CASE ", "61,s1,f,a", "63,s1,f,b", "61,s2,m,c"],
        ["", "case,subject", "a,s1", "", "b,s1", "a,s1", "c.nii.gz, s2 ", ""],
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, rows: list[str], sign: str) -> None:
    assert read(tmp_path, "\n".join(rows).replace(",", sign)) == SUBJECTS


@pytest.mark.parametrize("case", CASE_COLUMNS)
@pytest.mark.parametrize("subject", SUBJECT_COLUMNS)
def test_every_known_name_of_a_column_is_understood(tmp_path: Path, case: str, subject: str) -> None:
    assert read(tmp_path, f"age,{subject},{case}\n61,s1,a\n61,s1,b\n9,s2,c\n") == SUBJECTS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,age,who\na,61,s1\nb,63,s1\nc,61,s2\n", "has the columns case, age, who: it is not clear which"),
        ("a,61,s1\nb,63,s1\nc,61,s2\n", "has the columns a, 61, s1: it is not clear"),
        ("case,subject,patient\na,1,2\nb,1,2\nc,1,3\n", "it is not clear"),
        ("case,scan,subject\na,1,2\nb,1,2\nc,1,3\n", "it is not clear"),
        ("case,subject\na,s1\nb,s1,x\nc,s2\n" + "x,s9\n" * 30, "line 3 has 3 columns and line 1 has 2"),
        ("case,subject\na,s1\nb,s1\nc,s2\na,s2\n", "has two subjects for 'a': s1 and s2"),
        ("case,subject\na,s1\na.nii.gz,s2\nb,s1\nc,s2\n", "has two subjects for 'a'"),
        ("case,subject\na,s1\nb,\nc,s2\n", "has no subject for 'b' (1 cases in all)"),
        (" \n \n", "groups.csv"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SplitError, match=re.escape(said)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "groups.csv" in str(caught.value)


def test_json_has_texts_or_whole_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps({"a": 1, "b.nii.gz": " 1 ", "c": "2"}), "g.json") == {"a": "1", "b": "1", "c": "2"}
    for value in (None, ["s1"], {"x": 1}, 1.5):
        with pytest.raises(SplitError, match="the subject of 'c' is not a text or a whole number"):
            read(tmp_path, json.dumps({"a": 1, "b": 1, "c": value}), "g.json")
