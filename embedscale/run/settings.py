"""Settings from YAML files and `key=value` words into dataclasses, and back: with every default and its meaning.

YAML guesses types: it reads `no` as False, `0123` as 83 and `695e0514` as infinity. Here every scalar stays the text
that is written, and the type of its setting decides what the text means. OmegaConf merges and converts; this module
adds messages that name the setting, the file and the nearest known setting, and prints a configuration as commented
YAML or as a Markdown table.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError
from yaml.constructor import ConstructorError

from embedscale.errors import UserError
from embedscale.run.config import RunConfig
from embedscale.values import descriptions

T = TypeVar("T")

KEY = re.compile(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[\d+\])*")  # a setting: training.seed, data.sources[0].path
MOST_VALUES = 1_000_000  # of a file; aliases can make a few lines stand for more than any memory holds


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping of a YAML file. Raise UserError for a file that is missing, unreadable or malformed."""
    try:
        loaded = _loaded(Path(path).read_bytes())
        if loaded is None:
            raise UserError(f"{path}: is empty; expected settings, or {{}} for none")
        if not isinstance(loaded, dict):
            raise UserError(f"{path}: holds a {type(loaded).__name__}; expected a mapping of settings")
        found = OmegaConf.to_container(OmegaConf.create(loaded), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def beside(file: str | Path, path: str | None) -> str | None:
    """Return a path that a file names. Where it is not absolute, it begins at the file's folder if something is there,
    else at the current folder."""
    near = Path(file).parent / (path or "")
    return str(near) if path and near.exists() else path


class _Loader(yaml.SafeLoader):
    """YAML whose scalars stay texts. Only null, infinity and NaN have no other spelling; `~/` is the home folder."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise ConstructorError(None, None, f"found the key {repeated[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        return str(Path(text).expanduser()) if text.startswith("~/") else text


_YAML = "tag:yaml.org,2002:"
_Loader.add_implicit_resolver(f"{_YAML}null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_YAML}merge", re.compile("<<$"), ["<"])
_Loader.add_implicit_resolver(f"{_YAML}float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), ["-", "+", "."])
_CONSTRUCTORS: dict[str | None, Any] = {
    f"{_YAML}null": _Loader.construct_yaml_null,
    f"{_YAML}float": _Loader.construct_yaml_float,
    f"{_YAML}str": _Loader.construct_text,
    f"{_YAML}seq": _Loader.construct_yaml_seq,
    f"{_YAML}map": _Loader.construct_yaml_map,
    None: _Loader.construct_undefined,
}
for _tag, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(_tag, _construct)


def _loaded(text: str | bytes) -> Any:
    """Return what YAML holds. Raise YAMLError for what is not YAML or repeats itself without end."""
    loaded = yaml.load(text, Loader=_Loader)
    waiting, seen = [loaded], 0
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        seen += 1
        if value == "???":  # OmegaConf would take the default in silence
            raise YAMLError("??? stands for a value that is missing")
        if seen > MOST_VALUES:
            raise YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return loaded


def typed(kind: Any, value: Any) -> Any:
    """Return the text of a setting, or a list of texts, as its type says; what does not fit stays as it is."""
    parts = get_args(kind)
    if isinstance(value, list):
        inner = parts[0] if get_origin(kind) is list else kind
        return [typed(kind if isinstance(each, list) else inner, each) for each in value]
    kinds = parts or (kind,)
    if isinstance(value, str) and str not in kinds:
        if bool in kinds:
            return {"true": True, "false": False}.get(value.lower(), value)
        for each in (int, float):
            if each in kinds or (each is float and int in kinds):
                with suppress(ValueError):
                    return each(value)
    return value


class WrongWord(UserError):
    """A word of the command line that names or gives nothing; the file is not to blame."""


def structured(schema: type, values: dict[str, Any], words: Sequence[str] = (), origin: str = "") -> Any:
    """Return the dataclass `schema` with `values` and then `key=value` words merged into its defaults.

    `origin` is the file that the values are from, for messages. Raise UserError with one line that names the setting,
    and for an unknown setting the nearest known one.
    """
    layers = [_defaults(schema), OmegaConf.create(values)]
    try:
        layers.append(_of_words(words, layers))
        return OmegaConf.to_object(OmegaConf.merge(*layers))
    except ConfigKeyError as error:
        message = unknown(str(error.full_key or error.key), known_keys(schema), getattr(schema, "listed_by", ""))
    except WrongWord:
        raise
    except UserError as error:
        message = str(error)
    except (OmegaConfBaseException, TypeError) as error:
        key = str(getattr(error, "full_key", None) or "")
        # Below a list, OmegaConf names a setting by its last part alone.
        inside = [name for name in known_keys(schema) if name.endswith(f".{key}")]
        key = inside[0] if len(inside) == 1 and key not in get_type_hints(schema) else key
        misfits = (_misfit(*pair) for pair in combinations(map(OmegaConf.to_container, layers), 2))
        if isinstance(error.__cause__, UserError):
            message = str(error.__cause__)
        elif not key and (found := next(filter(None, misfits), None)):
            message = found
        elif isinstance(error, InterpolationResolutionError | GrammarParseError):
            message = f"{key}: refers by ${{…}} to a setting that does not exist"
        elif isinstance(error, OmegaConfBaseException):  # whose words name parts of OmegaConf
            message = _mistyped(schema, key, layers) or f"{key or 'settings'}: the value does not fit the setting"
        else:
            raise
    raise UserError(blaming(message, origin, words))


def unknown(key: str, known: Sequence[str], listed_by: str = "") -> str:
    """Return the message for an unknown setting: the nearest known one, and the command that lists all of them."""
    last = {name: name.rsplit(".", 1)[-1] for name in known}
    mine = key.rsplit(".", 1)[-1]
    # "lr" stands for "learning_rate". OmegaConf's own hint knows only names on the same level.
    short = [name for name in known if "_" in last[name] and mine == "".join(word[0] for word in last[name].split("_"))]
    similar = difflib.get_close_matches(mine, last.values(), n=1)
    nearest = short or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    nearest = nearest or [name for name in known if last[name] in similar]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{key}: unknown setting{hint}" + (f" (`{listed_by}` lists all)" if listed_by else "")


A_MAPPING = "a mapping of settings to values"
NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: A_MAPPING,
}


def _mistyped(schema: Any, key: str, layers: Sequence[Any]) -> str | None:
    """Describe a setting whose value has the wrong type: its full name, the value and the type. None if unknown."""
    kind, values = schema, [OmegaConf.to_container(each) for each in layers[1:]]
    for part in re.findall(r"[^.\[\]]+", key):
        if kind is Any:
            return None
        origin, args = get_origin(kind), get_args(kind)
        if part.isdigit():
            kind = args[0]
            values = [each[int(part)] for each in values if isinstance(each, list)]
        else:
            kind = args[1] if origin is dict else get_type_hints(args[0] if origin is list else kind)[part]
            values = [each[part] for each in values if isinstance(each, dict) and part in each]
        if NoneType in get_args(kind):
            (kind,) = (each for each in get_args(kind) if each is not NoneType)
    expected = A_MAPPING if is_dataclass(kind) else NAMES.get(get_origin(kind) or kind)
    found = f"{values[-1]!r} is given; " if values else ""
    return f"{key}: {found}expected {expected}" if expected else None


def blaming(message: str, origin: str, words: Sequence[str]) -> str:
    """Return the message after the file's name, unless the setting that it begins with is one of the `words`."""
    key = re.split(r"[:\[]", message, maxsplit=1)[0]
    given = [re.split(r"[=\[]", word, maxsplit=1)[0] for word in words]
    mine = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
    return message if mine or not origin else f"{origin}: {message}"


def _of_words(words: Sequence[str], below: Sequence[DictConfig]) -> DictConfig:
    """Return the settings of `key=value` words; `below` are the layers that they are merged into, for `list[0]=x`."""
    config = OmegaConf.create()
    for word in words:
        if word.find("=") < 1:
            raise WrongWord(f"{word!r} is not a key=value word; only the first word may be a file")
        key, _, text = word.partition("=")
        if not KEY.fullmatch(key):
            raise WrongWord(f"{key!r} cannot name a setting; write it as training.seed or data.sources[0].path")
        try:
            value = _loaded(text)
        except (YAMLError, RecursionError):
            raise WrongWord(f"{word!r}: the value after the '=' is not valid YAML") from None
        # Entries of a list replace those of the layers below, which a merge alone cannot say.
        if "[" in key:
            key, value = _list_with(OmegaConf.to_container(OmegaConf.merge(*below, config)), key, value)
        try:
            OmegaConf.update(config, key, value)
        except GrammarParseError:
            raise WrongWord(f"{word!r}: ${{ begins a reference to another setting, which ends with }}") from None
        except (OmegaConfBaseException, ValueError):
            raise WrongWord(f"{word!r}: does not fit to what an earlier word gives") from None
    return config


def _list_with(settings: Any, key: str, value: Any) -> tuple[str, Any]:
    """Return the name of the list whose entry `key` names, as in data.sources[0].path, and the list with this entry."""
    name, config = key[: key.index("[")], OmegaConf.create(settings)
    for start in (place.start() for place in re.finditer(r"\[", key)):
        found, number = OmegaConf.select(config, key[:start]), int(key[start + 1 : key.index("]", start)])
        if not OmegaConf.is_list(found):
            raise WrongWord(f"{key[:start]}: is not a list, so it has no entry [{number}]")
        if number >= len(found):
            there = f"its last entry is [{len(found) - 1}]" if len(found) else "the list is empty"
            raise WrongWord(f"{key[:start]}: has no entry [{number}]; {there}")
    if not key.endswith("]") and not OmegaConf.is_dict(OmegaConf.select(config, key.rpartition(".")[0])):
        raise WrongWord(f"{key}: {key.rpartition('.')[0]} is not a mapping of settings to values")
    OmegaConf.update(config, key, value)
    return name, OmegaConf.to_container(OmegaConf.select(config, name))


def _misfit(known: Any, given: Any, key: str = "") -> str | None:
    """Describe the first setting that is a mapping in one and not in the other; OmegaConf does not name it."""
    if isinstance(known, dict) and isinstance(given, dict):
        names = (name for name in known if name in given)
        found = (_misfit(known[name], given[name], f"{key}.{name}".lstrip(".")) for name in names)
        return next(filter(None, found), None)
    if isinstance(known, dict):
        return f"{key}: {given} is given; expected {A_MAPPING}"
    return (
        f"{key}: a mapping is given; expected a list" if isinstance(known, list) and isinstance(given, dict) else None
    )


@cache
def _defaults(schema: type) -> Any:
    """Return the defaults, to be merged into. OmegaConf before 2.4 needs the parts of a frozen dataclass writable."""
    config = OmegaConf.structured(schema)
    for node in (config, *config.values()):
        if OmegaConf.is_config(node):
            OmegaConf.set_readonly(node, None)
    return config


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a dataclass."""
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        for part in (item.type, *get_args(item.type)):
            if is_dataclass(part) and isinstance(part, type):
                keys += known_keys(part, f"{prefix}{item.name}.")
    return keys


def read(schema: type[T], path: str | Path | None = None, words: Sequence[str] = ()) -> T:
    """Return the dataclass `schema` with the settings of a YAML file and then `key=value` words. Raise UserError."""
    found: T = structured(schema, read_yaml(path) if path else {}, words, origin=str(path or ""))
    return found


def load(path: str | Path | None = None, words: Sequence[str] = ()) -> RunConfig:
    """Return the `RunConfig` of a YAML file, or of the defaults, with `key=value` words over it. Raise UserError."""
    return read(RunConfig, path, words)


def to_yaml(config: RunConfig) -> str:
    """Return the complete configuration as YAML; `load` reads an equal one back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


# --- Every setting with its meaning ----------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: large numbers as 1.5e+15."""


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    short = f"{value:g}" if "." in f"{value:g}" else f"{value:g}".replace("e", ".0e")  # 1.0e+15: YAML wants the dot
    if 1e6 <= abs(value) < float("inf") and float(short) == value:
        return dumper.represent_scalar("tag:yaml.org,2002:float", short)
    return dumper.represent_float(value)


_Dumper.add_representer(float, _number)


def on_one_line(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()


def commented(value: Any, indent: str = "") -> str:
    """Return a dataclass as YAML with a comment behind each setting: its meaning, and its default where it differs.

    The text is a configuration file: `read` gives an equal dataclass back.
    """
    lines: list[str] = []
    schema: Any = type(value)
    for item in fields(schema):
        found, part, listed = getattr(value, item.name), *_part_of(schema, item)
        if part is not None and not listed:
            lines += [f"{indent}{item.name}:  # {_first_line(part)}", commented(found, indent + "  ")]
            continue
        meaning, default = _meaning_of(schema, item), _default_of(item)
        if found != default and (default not in (None, [], {}, "") or "default:" not in meaning):
            meaning += f" Default: {_written(default, listed) or 'none'}."
        if part is not None and found:
            lines.append(_comment(f"{indent}{item.name}:", meaning))
            for each in found:
                first, *rest = commented(each, indent + "    ").splitlines()
                lines += [f"{indent}  - {first.lstrip()}", *rest]
        else:
            lines.append(_comment(f"{indent}{item.name}: {on_one_line(found)}", meaning))
    return "\n".join(lines)


def markdown(schema: type, prefix: str = "", nested: bool = True) -> str:
    """Return the settings of a dataclass as Markdown: a table, then with `nested` a section for each nested one."""
    rows, sections = [], []
    for item in fields(schema):
        part, listed = _part_of(schema, item)
        key = f"{prefix}{item.name}"
        if part is None or listed:
            default = _written(_default_of(item), listed)
            rows.append(f"| `{key}` | {f'`{default}`' if default else '–'} | {_meaning_of(schema, item)} |")
        if part is not None and nested:
            title = f"Each element of `{key}`" if listed else f"`{key}`"
            sections += [f"### {title}", "", _first_line(part), "", markdown(part, "" if listed else f"{key}.")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows, "", *sections])


def _part_of(schema: type, item: Field[Any]) -> tuple[type | None, bool]:
    """Return the dataclass that a setting holds, and whether it holds a list of them."""
    kind = get_type_hints(schema)[item.name]
    if is_dataclass(kind) and isinstance(kind, type):
        return kind, False
    inner = next((each for each in get_args(kind) if is_dataclass(each) and isinstance(each, type)), None)
    return inner, inner is not None


def _default_of(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _written(default: Any, listed: bool) -> str:
    """Return a default for a reader: empty if nothing is set, and for a list of dataclasses their number."""
    if default in (None, "", [], {}):
        return ""
    return f"{len(default)} of them" if listed else on_one_line(default)


def _meaning_of(schema: Any, item: Field[Any]) -> str:
    return descriptions(schema).get(item.name, "")


def _comment(line: str, text: str) -> str:
    return f"{line:<40}  # {text}" if text else line


def _first_line(schema: type) -> str:
    return (schema.__doc__ or "").strip().splitlines()[0]
