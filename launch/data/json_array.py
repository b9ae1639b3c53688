"""Elements of a file that is one JSON array, decoded one by one: in memory is the element at hand, not the file.

`json.loads` needs all of the text at once. Here a window of the text slides over the file. An element that the window
cuts is tried again with twice as much text, so that the work stays in proportion to the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

_WINDOW_BYTES = 1 << 20
_LONGEST_TOKEN = 16  # of those that the decoder names by their start when they are cut, such as -Infinity or 1.5e+
_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class ArrayError(ValueError):
    """The rest of the array cannot be read; `line` of the file counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def elements(file: IO[bytes]) -> Iterator[Any]:
    """Yield each element of the array that `file` holds.

    Raises:
        ArrayError: the text is no JSON array, or not UTF-8, after the elements before the fault.
        OSError: the file cannot be read; unpacking has errors of its own.
    """
    window = _Window(_Text(file))
    if window.next_character() != "[":
        raise window.wrong("Expecting value")
    window.place += 1
    ended = window.next_character() == "]"
    while not ended:
        yield window.next_value()
        found = window.next_character()
        if found not in (",", "]"):
            raise window.wrong("Expecting ',' delimiter")
        ended = found == "]"
        if not ended:
            window.place += 1
            window.next_character()
    window.place += 1
    if window.next_character():
        raise window.wrong("Extra data")
    if window.fault is not None:
        raise window.fault


class _Text:
    """The file's characters, up to its end or to the first byte that is not UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self.fault = ""
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._bytes = 0
        self._ended = False

    def read(self, size: int) -> str:
        """Some more of them, from about `size` bytes; "" when there are none."""
        text = ""
        while not text and not self._ended:
            data = self._file.read(size)
            self._bytes += len(data)
            self._ended = not data
            try:
                text = self._decode(data, self._ended)
            except UnicodeDecodeError as error:
                self._ended = True
                place = self._bytes - len(error.object) + error.start
                byte = error.object[error.start]
                self.fault = f"not UTF-8: byte {place} of the file is 0x{byte:02x} ({error.reason})"
                text = error.object[: error.start].decode("utf-8")
        return text


class _Window:
    """A piece of the text; reading goes on at `place` in it."""

    def __init__(self, source: _Text) -> None:
        self.place = 0
        self._source = source
        self._text = ""
        # What was dropped before it:
        self._characters = 0
        self._newlines = 0
        self._last_newline = -1  # which character of the file

    def next_character(self) -> str:
        """The next one that is not blank, where `place` then is; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self.place)
            self.place = blanks.end() if blanks else self.place
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._refill():
                return ""

    def next_value(self) -> Any:
        """Decode the value that begins at `place`, and go behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.place)
            except json.JSONDecodeError as error:
                # Only what ended too soon may be mended by more text; for other faults all of the rest would be read.
                cut = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self._text)
                if not (cut and self._refill()):
                    raise (cut and self.fault) or self.wrong(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
                raise ArrayError(self._line(self.place), f"invalid JSON array: {error}") from error
            else:
                # "12" may be the start of "12.5e+3": only numbers do not say themselves where they end.
                cut = isinstance(value, int | float) and end + _LONGEST_TOKEN > len(self._text)
                if not (cut and self._refill()):
                    self.place = end
                    return value

    @property
    def fault(self) -> ArrayError | None:
        """What ended the text, if it was not the end of the file."""
        reason = self._source.fault
        return ArrayError(self._line(len(self._text)), reason) if reason else None

    def wrong(self, message: str, place: int | None = None) -> ArrayError:
        """What `json` would say of the file; `place` in the window, None: here."""
        at = self.place if place is None else place
        if at == len(self._text) and (fault := self.fault) is not None:
            return fault
        newline = self._text.rfind("\n", 0, at)
        before = self._last_newline if newline < 0 else self._characters + newline
        line, character = self._line(at), self._characters + at
        where = f"line {line} column {character - before} (char {character})"
        return ArrayError(line, f"invalid JSON array: {message}: {where}")

    def _line(self, place: int) -> int:
        return self._newlines + self._text.count("\n", 0, place) + 1

    def _refill(self) -> bool:
        """Drop the text before `place`, add at least as much as is left; whether there was more."""
        left = self._text[self.place :]
        more = self._source.read(max(_WINDOW_BYTES, len(left)))
        if not more:
            return False
        newline = self._text.rfind("\n", 0, self.place)
        if newline >= 0:
            self._last_newline = self._characters + newline
        self._newlines += self._text.count("\n", 0, self.place)
        self._characters += self.place
        self._text, self.place = left + more, 0
        return True
