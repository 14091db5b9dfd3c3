"""Frozen dataclasses as JSON: read and checked, written, and described by a JSON Schema.

The files of a run are values: a dataclass whose annotations say the types, whose `Annotated` aliases say the ranges,
and whose attribute docstrings say the meanings. One table of types serves the reader and the schema. It is own code
because a validation library costs each verb a tenth of a second of imports. A key that the dataclass does not have is
ignored, so that files of a later version load.
"""

import ast
import inspect
import json
import math
import reprlib
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from embedscale.errors import UserError
from embedscale.files import checksum, write_json

T = TypeVar("T")
CHECKSUM = "checksum"  # key of a written value: the digest of all other keys
CHANGED = "has changed since it was written: its checksum does not fit"

LARGEST = 1e300  # of a number that is read: sums and products of a few such numbers are finite


@dataclass(frozen=True)
class AtLeast:
    """The range of a number: from `low` to LARGEST, which leaves out infinity and NaN."""

    low: float

    @property
    def schema(self) -> dict[str, object]:
        return {"minimum": self.low}

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= LARGEST

    def __str__(self) -> str:
        return f"at least {self.low:g}"


@dataclass(frozen=True)
class Between:
    """The range of a number: from `low` to `high`, both included."""

    low: float
    high: float

    @property
    def schema(self) -> dict[str, object]:
        return {"minimum": self.low, "maximum": self.high}

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class InIsoFormat:
    """The form of a time: ISO 8601 with an offset from UTC."""

    @property
    def schema(self) -> dict[str, object]:
        return {"format": "date-time"}

    def __contains__(self, value: str) -> bool:
        try:
            return datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            return False

    def __str__(self) -> str:
        return "such as 2026-01-31T12:00:00+00:00"


Count = Annotated[int, AtLeast(0)]
"""A whole number of at least 0."""
Amount = Annotated[float, AtLeast(0)]
"""A number of at least 0."""
Share = Annotated[float, Between(0, 1)]
"""A number from 0 to 1."""
Positive = Annotated[int, AtLeast(1)]
"""A whole number of at least 1."""
ProcessNumber = Annotated[int, Between(1, 2**31 - 1)]
"""The number of a process. 0 and -1 would stand for many processes."""
Time = Annotated[str, InIsoFormat()]
"""A time, ISO 8601 with an offset from UTC."""


class Misfit(UserError):
    """A value that does not fit its type: the message names the key, what was found and what was expected."""

    def __init__(self, problem: str):
        self.keys: list[str] = []
        self.problem = problem

    def __str__(self) -> str:
        return f"{'.'.join(self.keys)}: {self.problem}" if self.keys else self.problem


@dataclass(frozen=True)
class Damaged:
    """A file that exists but does not hold the value it should."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def sound(found: T | Damaged) -> T:
    """Return what was read. Raise UserError if the file is damaged."""
    if isinstance(found, Damaged):
        raise UserError(str(found))
    return found


class Value:
    """Base of the dataclasses that are written as JSON."""

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the value of a parsed JSON object. Raise UserError, naming the key, where it does not fit."""
        read: Callable[[object], Self] = reader(cls)  # type: ignore[arg-type]  # mypy: Self is not hashable
        return read(data)

    @classmethod
    def read(cls, path: Path) -> Self | Damaged | None:
        """Return the value that a JSON file holds; None if there is no file.

        A file that `write` wrote, and that has changed since, is damaged. Files of earlier code have no checksum.
        """
        try:
            data = json.loads(path.read_text())
            return Damaged(path, CHANGED) if changed(data) else cls.from_json(data)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return Damaged(path, f"cannot be read ({error.strerror})")
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            return Damaged(path, "is not valid JSON")
        except UserError as error:
            return Damaged(path, str(error))

    def write(self, path: Path) -> None:
        """Write the value as JSON with a checksum, atomically."""
        write_json(path, sealed(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Return the value as plain lists, dictionaries, texts and numbers."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass


def plain(value: Any) -> Any:
    """Return a value in JSON's own types: a dataclass is an object, a path a text, and NaN and infinity are null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def print_json(value: Any) -> None:
    """Print a value as JSON: what the verbs do with `--json`."""
    print(json.dumps(plain(value), indent=2))


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of its other keys."""
    return data | {CHECKSUM: checksum(data)}


def changed(data: object) -> bool:
    """Take the checksum out of a JSON object, and return whether it does not fit; False where there is none."""
    return isinstance(data, dict) and data.pop(CHECKSUM, None) not in (None, checksum(data))


# --- Reading ---------------------------------------------------------------------------------------------------------

Read = Callable[[Any], Any]


@cache
def reader(kind: Any) -> Read:
    """Return the function that checks a parsed JSON value against a type and converts it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _ranged(reader(args[0]), args[1])
    if origin in (Union, UnionType):
        (inner,) = (each for each in args if each is not NoneType)
        read = reader(inner)
        return lambda value: None if value is None else read(value)
    if origin is Literal:
        return _literal(args)
    if origin in (list, tuple):
        return _sequence(origin, reader(args[0]), _length(origin, args))
    if origin is dict:
        return _mapping(reader(args[1]))
    return _dataclass(kind) if is_dataclass(kind) else _plain(kind)


def _refuse(value: object, expected: str) -> NoReturn:
    raise Misfit(f"{reprlib.repr(value)} was found; expected {expected}")


def _part(read: Read, value: Any, key: str) -> Any:
    """Read the part of a value that stands under `key`; a misfit names it."""
    try:
        return read(value)
    except Misfit as misfit:
        misfit.keys.insert(0, key if key.isprintable() and len(key) < 80 else reprlib.repr(key))
        raise


def _plain(kind: Any) -> Read:
    expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Any: ""}[kind]

    def read(value: Any) -> Any:
        if kind is float and type(value) is float and not math.isfinite(value):  # Python reads NaN and Infinity too
            _refuse(value, "a finite number")
        if type(value) is kind or kind is Any:
            return value
        if kind is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                _refuse(value, "a number below 1e308")
        return _refuse(value, expected)

    return read


def _ranged(read: Read, limits: AtLeast | Between | InIsoFormat) -> Read:
    what = "a time" if isinstance(limits, InIsoFormat) else "a number"

    def ranged(value: Any) -> Any:
        found = read(value)
        return found if found in limits else _refuse(value, f"{what} {limits}")

    return ranged


def _literal(allowed: tuple[Any, ...]) -> Read:
    def read(value: Any) -> Any:
        return value if value in allowed else _refuse(value, " or ".join(map(repr, allowed)))

    return read


def _length(origin: Any, args: tuple[Any, ...]) -> int | None:
    """Return the length of a tuple type; None for a sequence of any length."""
    return None if origin is list or args[-1] is Ellipsis else len(args)


def _sequence(kind: type, read: Read, length: int | None) -> Read:
    def sequence(value: Any) -> Any:
        if not isinstance(value, list):
            _refuse(value, "a list")
        if length is not None and len(value) != length:
            _refuse(value, f"a list of {length}")
        return kind(_part(read, each, str(number)) for number, each in enumerate(value))

    return sequence


def _mapping(read: Read) -> Read:
    def mapping(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse(value, "an object")
        return {key: _part(read, each, key) for key, each in value.items()}

    return mapping


def _dataclass(kind: Any) -> Read:
    hints = get_type_hints(kind, include_extras=True)
    parts = [(item.name, reader(hints[item.name]), _needed(item)) for item in fields(kind)]

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse(value, "an object")
        found = {}
        for name, part, needed in parts:
            if name in value:
                found[name] = _part(part, value[name], name)
            elif needed:
                raise Misfit(f"the key {name!r} is missing")
        return kind(**found)

    return read


def _needed(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


# --- Describing ------------------------------------------------------------------------------------------------------


@cache
def descriptions(kind: type) -> dict[str, str]:
    """Return each field's attribute docstring: the text literal under it in the source, on one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            for item, below in pairwise(body.body):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    match below:
                        case ast.Expr(ast.Constant(str(text))):
                            found[item.target.id] = " ".join(text.split())
    return found


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a type that `reader` reads."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return schema_of(args[0]) | args[1].schema
    if origin in (Union, UnionType):
        (inner,) = (each for each in args if each is not NoneType)
        schema = schema_of(inner)
        if "enum" in schema:
            return {"enum": [*schema["enum"], None]}
        return schema | {"type": [schema["type"], "null"]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (list, tuple):
        length = _length(origin, args)
        limits = {} if length is None else {"minItems": length, "maxItems": length}
        return {"type": "array", "items": schema_of(args[0])} | limits
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    if is_dataclass(kind) and isinstance(kind, type):
        hints, said = get_type_hints(kind, include_extras=True), descriptions(kind)
        return {
            "type": "object",
            "description": inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0],
            "properties": {
                item.name: schema_of(hints[item.name]) | ({"description": said[item.name]} if item.name in said else {})
                for item in fields(kind)
            },
            "required": [item.name for item in fields(kind) if _needed(item)],
        }
    if kind is Any:
        return {}
    return {"type": {int: "integer", float: "number", str: "string", bool: "boolean"}[kind]}


def schema_file(kind: type, title: str) -> dict[str, Any]:
    """Return the schema as a document of its own, for a file called `title`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title} | schema_of(kind)
