"""JSON from others: every wrong type, missing key and hostile number is an error with file and key."""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from mae_dat.config.errors import CheckpointError, DataError
from mae_dat.storage.json_files import ShapeError, check_shape, read_json


class Item(TypedDict):
    name: str
    size: int


class Content(TypedDict):
    items: list[Item]
    scores: dict[str, float | None]
    kind: NotRequired[Literal["a", "b"]]
    flag: NotRequired[bool]


VALID = '{"items": [{"name": "x", "size": 3}], "scores": {"a": 1, "b": 2.5, "c": null}, "kind": "a", "more": [1]}'


def read(path: Path, text: str | bytes, **options: Any) -> Any:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_json(path, Content, "a list of items", **options)


def test_what_fits_is_read_with_unknown_keys(tmp_path: Path) -> None:
    content = read(tmp_path / "a.json", VALID)
    assert content["items"] == [{"name": "x", "size": 3}]
    assert content["more"] == [1]
    assert read(tmp_path / "a.json", VALID.replace("2.5", "NaN"))["scores"]["b"] is None


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ('"x"', "7", r"items\[0\]\.name must be text, not 7"),
        ("3", "true", r"items\[0\]\.size must be a whole number, not true"),
        ("3", "3.0", r"items\[0\]\.size must be a whole number, not 3.0"),
        ("3", "9" * 30, r"items\[0\]\.size must be a whole number, not 9999"),
        ("2.5", "1e999", r"scores\.b must be a finite number or null, not Infinity"),
        ("2.5", '"2"', r"scores\.b must be a finite number or null, not \"2\""),
        ('[{"name": "x", "size": 3}]', '{"a": 1}', "items must be a list, not an object"),
        ('{"name": "x", "size": 3}', "[]", r"items\[0\] must be an object of keys and values, not a list"),
        ('"name": "x", ', "", r"items\[0\]\.name is missing"),
        ('"a", "more"', '"c", "more"', 'kind must be one of a, b, not "c"'),
        ('"kind": "a"', '"flag": 1', "flag must be true or false, not 1"),
        ('"b": 2.5', '"\\u001b[2J": "x"', r"scores\.\?\[2J must be"),
        (VALID, "[]", "its content must be an object of keys and values, not a list"),
        (VALID, "[" * 100_000, "it is nested too deeply"),
        (VALID, "{", "it is not JSON"),
        ("3", "9" * 5000, "it is not JSON .*digits"),
        (VALID, "", "it is not JSON"),
    ],
)
def test_what_does_not_fit_is_an_error_with_file_and_key(tmp_path: Path, before: str, now: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.json is not a list of items: {message}") as caught:
        read(tmp_path / "a.json", VALID.replace(before, now, 1))
    assert str(caught.value).isprintable()


def test_files_that_are_not_text_too_large_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is not text in UTF-8"):
        read(tmp_path / "a.json", b'{"a": "\xff"}', error=DataError)
    with pytest.raises(CheckpointError, match=r"it has \d+ bytes, more than the 100 allowed"):
        read(tmp_path / "a.json", VALID, max_bytes=100)
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json", Content, "a list of items")


def test_the_fault_within_a_union_is_named() -> None:
    check_shape(None, Item | None)
    with pytest.raises(ShapeError, match=r"x\.size is missing"):
        check_shape({"name": "a"}, Item | None, "x")
    with pytest.raises(ShapeError, match="x must be an object of keys and values or null, not 3"):
        check_shape(3, Item | None, "x")
