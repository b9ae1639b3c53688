"""A JSON array decoded in pieces: the same elements and the same errors as `json.loads` of all of it."""

from __future__ import annotations

import io
import json
import random
import re
from typing import Any

import pytest

from launch.data import json_array

WINDOWS = (1, 2, 3, 7, 64, 1 << 20)
TRAILING_COMMA = re.compile(rb",\s*[]}]")


def read(data: bytes, window: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, str]:
    """The elements, and line and words of the fault."""
    monkeypatch.setattr(json_array, "_WINDOW_BYTES", window)
    found: list[Any] = []
    try:
        for element in json_array.elements(io.BytesIO(data)):
            found.append(element)
    except json_array.ArrayError as error:
        return repr(found), error.line, str(error)
    return repr(found), 0, ""


def any_value(draw: random.Random, depth: int = 0) -> Any:
    texts = ["", 'a\n"\\\u20ac\ud83d\ude00 \u00e9', "x" * draw.randrange(40)]
    simple = [None, True, -12.5e-7, float("-inf"), 1234567, draw.choice(texts)]
    if depth == 3 or draw.random() < 0.6:
        return draw.choice(simple)
    values = [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return values if draw.random() < 0.5 else {str(number): value for number, value in enumerate(values)}


def damaged(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    kinds = (
        data,
        data[:place],
        data[:place] + data[place + 1 :],
        data[:place] + bytes([draw.choice(b'{}[]:"\\1e.-tu \n\x00')]) + data[place + 1 :],
    )
    return draw.choice(kinds)


def of_json(data: bytes, elements: str) -> tuple[str, int, str]:
    """What `read` should give; `elements` stand for those before a fault, which `json` does not tell."""
    try:
        return repr(json.loads(data.decode("utf-8-sig"))), 0, ""
    except json.JSONDecodeError as error:
        return elements, error.lineno, f"invalid JSON array: {error}"


def test_elements_and_errors_are_those_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    outcomes = set()
    for _ in range(1500):
        text = json.dumps([any_value(draw) for _ in range(draw.randrange(5))], indent=draw.choice([None, 1]))
        data = damaged(draw.choice([b"", b" \n", b"\xef\xbb\xbf"]) + text.encode(), draw)
        # Left out: what is not taken for an array, and ",]", for which json's words depend on Python's version.
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") or TRAILING_COMMA.search(data):
            continue
        found = {read(data, window, monkeypatch) for window in WINDOWS}
        assert len(found) == 1, (data, found)
        [(elements, line, fault)] = found
        outcomes.add(bool(fault))
        assert (elements, line, fault) == of_json(data, elements), data
    assert outcomes == {False, True}


@pytest.mark.parametrize("window", WINDOWS)
def test_bytes_that_are_not_utf8_are_named_after_what_came_before(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        data = mark + '["\u20ac",\n"b",\n"c'.encode() + b'\xe9 au lait"]'
        place = data.index(b"\xe9 ")
        expected = "['\u20ac', 'b']", 3, f"not UTF-8: byte {place} of the file is 0xe9 (invalid continuation byte)"
        assert read(data, window, monkeypatch) == expected
    assert read(b'["a"]\n\xe2\x82', window, monkeypatch) == (
        "['a']",
        2,
        "not UTF-8: byte 6 of the file is 0xe2 (unexpected end of data)",
    )


@pytest.mark.parametrize("window", WINDOWS)
def test_values_that_json_refuses(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = read(b"[1,\n" + b"[" * 100_000, window if window > 7 else 64, monkeypatch)
    assert deep[:2] == ("[1]", 2)
    assert "recursion" in deep[2]
    digits = read(b"[1,\n" + b"9" * 5000 + b"]", window, monkeypatch)
    assert digits[:2] == ("[1]", 2)
    assert "digits" in digits[2]


def test_a_fault_is_told_before_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_WINDOW_BYTES", 100)
    file = io.BytesIO(b'[{"a" 1}, ' + b'{"a": 2}, ' * 1000)
    with pytest.raises(json_array.ArrayError, match="Expecting ':' delimiter"):
        list(json_array.elements(file))
    assert file.tell() <= 200
