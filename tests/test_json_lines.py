"""Files of JSON lines: whatever a killed process or a full disk leaves, all whole lines stay, and only they."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax import json_files, json_lines
from tests.processes import run_python

values = st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


def read(path, **options):
    return json_lines.read(path, lambda number, value: value, expected="a value", **options)


@settings(deadline=None, max_examples=60)
@given(st.lists(values, min_size=1, max_size=5), st.integers(0, 10**6), values)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path_factory, stored, cut, new):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    for value in stored:
        json_lines.append(path, value)
    assert read(path) == stored
    data = path.read_bytes()
    data = data[: cut % (len(data) + 1)]
    path.write_bytes(data)
    whole = stored[: data.count(b"\n")]
    assert read(path) == whole
    json_lines.append(path, new)
    assert read(path) == [*whole, new]


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    json_lines.append(path, 1)
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    json_lines.append(path, 2)
    assert path.read_bytes() == b"1\n2\n"


def test_a_damaged_line_is_named_with_the_remedy_or_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('1\n{"torn\n3\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2 is not a value \(JSONDecodeError: .*\): '\{\"torn'\. Delete"
    ):
        read(path, remedy="Delete it.")
    assert read(path, skip_damaged=True) == [1, 3] and "line 2" in caplog.text


def test_there_are_no_lines_without_a_file(tmp_path):
    assert read(tmp_path / "none") == []


FULL = """
import pathlib, resource, signal, sys
from robovlms_jax import json_lines
path = pathlib.Path(sys.argv[1])
json_lines.append(path, "first")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    json_lines.append(path, "x" * 200)
except OSError as error:
    print(error)
json_lines.append(path, "last")
"""


def test_a_line_that_finds_the_disk_full_leaves_nothing_behind(tmp_path):
    assert "File too large" in run_python("-c", FULL, tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["first", "last"]


def test_differences_name_what_was_stored_and_what_is_asked():
    theirs, ours = {"steps": 5, "seed": 0, "old": 1}, {"steps": 6, "seed": 0, "new": None}
    assert json_files.differences(theirs, ours) == "steps: 5 there, 6 here; old: 1 there, None here"
    assert json_files.differences(theirs, ours, ["seed"]) == ""
