"""JSON arrays of rows, element by element."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(rb'["\\\[\]{},\n]')


def elements(pieces: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, each with the line where it begins, from 1; not parsed, so that a broken one leaves the
    others alone. Of one that is longer than `longest` bytes only as much is kept as shows that.

    pieces: the file, which begins with the array. Raises EOFError where the array does not end, ValueError for what
    comes after it.
    """
    element, begun = bytearray(), 1  # what there is of it, and the line of what ended the one before
    line, depth, in_text, some = 1, 0, False, False
    escaped = -1  # the place in the piece that a backslash stands before
    for piece in pieces:
        kept = 0  # from where on the piece is the element's
        for match in _TOKEN.finditer(piece):
            position, token = match.start(), match[0]
            line += token == b"\n"
            if position == escaped or token == b"\n":
                continue
            if token == b'"':
                in_text = not in_text
            elif in_text:
                escaped = position + 1 if token == b"\\" else -1
            elif token in b"[{":
                depth += 1
                if depth == 1:
                    kept, begun = position + 1, line
            elif token == b"\\" or (token == b"," and depth > 1):
                continue
            elif depth > 1:
                depth -= 1
            else:  # a comma between elements, or the array's end
                if len(element) <= longest:
                    element += piece[kept:position]
                text = element.lstrip()
                some = some or bool(text) or token == b","
                if some:
                    yield begun + element[: len(element) - len(text)].count(b"\n"), bytes(text)
                element, begun, kept = bytearray(), line, position + 1
                if token != b",":
                    if piece[kept:].strip() or any(rest.strip() for rest in pieces):
                        raise ValueError("something comes after the array")
                    return
        if len(element) <= longest and depth:
            element += piece[kept:]
        escaped -= len(piece)
    raise EOFError("the array has no end")
