"""Contents that a file should never have, for tests that damage files in every way that they know."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Whole contents, by what happened to the file.
CONTENTS: dict[str, bytes] = {
    "emptied": b"",
    "a list": b"[]",
    "an empty object": b"{}",
    "null": b"null",
    "a number": b"7",
    "a text": b'"[/red]"',
    "zeros": bytes(4096),
    "not UTF-8": b"\xff\xfe\x80",
    "nested without end": b"[" * 100_000,
    "markup": b'{"[/red]": "[bold"}',
    "a wide number": b"9" * 6000,
    "lines of another program": b"Traceback (most recent call last):\n  File [/usr/bin/python]\n",
}
# Values in the place of one value.
VALUES: list[Any] = [None, True, -1, 0, 1e-320, float("inf"), float("nan"), 10**400, "", "[/red]", "\ud800\x1b[2J"]
VALUES += ["2026-01-01", "x" * 10_000, [], [[]], {}, {"a\nb": 1}]


def cut(content: bytes) -> bytes:
    """The first half, as a full disk leaves it."""
    return content[: len(content) // 2]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit is another one."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def with_other_values(value: Any, rng: random.Random, count: int) -> Iterator[bytes]:
    """JSON of the value with one of its parts replaced by an odd value, or removed."""
    places = list(_places(value))
    for _ in range(count):
        changed = copy.deepcopy(value)
        *way, last = rng.choice(places)
        inner = changed
        for key in way:
            inner = inner[key]
        if rng.random() < 0.1:
            del inner[last]
        else:
            inner[last] = rng.choice(VALUES)
        yield json.dumps(changed).encode()


def _places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*way, key)
        yield from _places(part, (*way, key))


def every_way(path: Path, rng: random.Random, values: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and content of each way to damage a file; `values` of them replace one value of its JSON."""
    whole = path.read_bytes()
    yield from CONTENTS.items()
    yield "cut", cut(whole)
    for number in range(5):
        yield f"a flipped bit {number}", flipped(whole, rng)
    for number, content in enumerate(with_other_values(json.loads(whole), rng, values) if values else ()):
        yield f"another value {number}", content
