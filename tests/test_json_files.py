"""JSON as editors and downloads leave it."""

from __future__ import annotations

import json

import pytest

from robovlms_jax import json_files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_marks_and_line_ends_of_windows_change_nothing(tmp_path, mark, newline):
    path = tmp_path / "config.json"
    values = {"a": "é", "b": [1, None]}
    path.write_bytes(mark + json.dumps(values, indent=1, ensure_ascii=False).replace("\n", newline).encode())
    assert json_files.read(path) == values == json_files.read_object(path, "settings")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not JSON: .*\(0 bytes\)"),
        (b"<html>", r"is not JSON: Expecting value: line 1"),
        (b'{"a": ', r"is not JSON"),
        ('{"a": "é"}'.encode("latin-1"), r"is not JSON: 'utf-8' codec"),
        (b"[1]", r"holds a list; expected an object of settings"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of Git LFS.*git lfs pull"),
    ],
)
def test_what_is_no_json_is_named_with_its_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        json_files.read_object(path, "settings")
    assert str(path) in str(caught.value)
