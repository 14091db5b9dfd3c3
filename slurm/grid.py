"""The sweep file: a YAML file that describes a grid of runs. Every run has its id before it starts.

    name: quickstart
    output: runs                          # a run directory is runs/quickstart/RUN_ID
    cluster: configs/cluster/local.yaml   # resource classes and limits; optional
    base: {data: {store: stores/pairs}}   # settings that all runs share
    axes:                                 # settings that combine with each other and with the rows below
      budget: [1e11, 4e11]
      training.seed: [0, 1]
    backbones:
      - {name: EleutherAI/pythia-14m}
      - {name: models/own, learning_rate: 3e-4}   # of full and freeze, in place of the paper's rule
    methods:                              # a list is an axis of that method alone
      - {name: full}
      - {name: lora, rank: [8, 32], learning_rate: 1e-2}
      - {name: freeze, active_fraction: [1/2, 1], only: {backbone.name: pythia-14m}}
    include: [{budget: 1e12, backbone.name: models/own}]   # further runs, with these settings over base
    exclude: [{budget: 1e11, method.rank: [32]}]           # leaves out runs that have all of these values

Learning rates follow the paper's rule (section 4.1) unless they are given. A run that is described twice is one run.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_origin, get_type_hints

from embedscale.errors import UserError, bounded
from embedscale.run.config import Backbone, RunConfig
from embedscale.run.cost import PAPER_PAIR
from embedscale.run.families import short_name
from embedscale.run.method import METHODS, Method
from embedscale.run.settings import beside, blaming, read_yaml, structured, typed, unknown
from slurm import cluster as clusters
from slurm.cluster import Cluster, ResourceClass

Row = dict[str, Any]  # dotted setting → value


@dataclass(frozen=True)
class SweepFile:
    """The settings of a sweep file, as they are written."""

    listed_by: ClassVar[str] = "embedscale config --of sweep"

    name: str = ""
    """Name of the sweep and of its folder; default: the file's name."""
    output: str = "runs"
    """Folder of sweeps; a run directory is output/name/RUN_ID."""
    cluster: str | None = None
    """YAML file with the cluster's settings; default: an A100 cluster with SLURM."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings of a run that all runs share, nested or with dots."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Lists of values by setting; the grid has a run for every combination."""
    backbones: list[Any] = field(default_factory=list)
    """Backbones, by name or as settings of `backbone`; combined with the axes."""
    methods: list[Any] = field(default_factory=list)
    """Methods, by name or as settings of `method`; a list of values is an axis of this method alone."""
    include: list[Any] = field(default_factory=list)
    """Further runs, as settings over `base`."""
    exclude: list[Any] = field(default_factory=list)
    """Settings; a run that has all of them is left out."""
    expected_pairs: int | None = None
    """Training pairs of the store, for a plan before the store exists."""
    expected_tokens_per_pair: float = PAPER_PAIR
    """Mean tokens of a pair, for a plan before the store exists; default: the paper's means (section 4.1)."""

    def __post_init__(self) -> None:
        bounded("expected_pairs", self.expected_pairs, 1)
        bounded("expected_tokens_per_pair", self.expected_tokens_per_pair, 0, above=True)
        if not self.name.isprintable():
            raise UserError(f"name: {self.name!r} has invisible characters; expected letters, digits and signs")
        if "/" in self.name or self.name in (".", ".."):
            raise UserError(f"name: {self.name!r} cannot be the name of a folder; allowed: any text without a slash")


@dataclass(frozen=True)
class Sweep:
    """A grid of runs, the folder of their run directories, and the cluster that they are meant for."""

    name: str
    """Name of the sweep."""
    folder: Path
    """Folder of the run directories."""
    by_id: dict[str, RunConfig]
    """The runs by run id, in the order of the grid."""
    cluster: Cluster
    """The cluster that the runs are meant for."""
    cluster_file: str | None
    """File that describes the cluster; None for the default cluster."""
    excluded: int
    """Number of runs that `exclude` left out."""
    idle: list[str]
    """Rows of `exclude` that match no run."""
    expected_pairs: int | None
    """Training pairs of the store, for a plan before the store exists."""
    expected_tokens_per_pair: float
    """Mean tokens of a pair, for a plan before the store exists."""

    @property
    def runs(self) -> list[RunConfig]:
        return list(self.by_id.values())

    def resource_class(self, run: RunConfig) -> ResourceClass:
        """Return the class that gives a run its memory, time, partition and constraint."""
        return self.cluster.class_of(_parameters(run.backbone.name, run.backbone.revision))


def load(path: str | Path, words: Sequence[str] = ()) -> Sweep:
    """Return the `Sweep` of a YAML file, with `key=value` words over it (`axes.budget=[1e11]`, `base.data.store=…`).

    Raises UserError, with one line that names the file and the setting, for anything wrong in the file.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give the YAML file of the sweep, such as configs/sweep/paper.yaml")
    given = read_yaml(path)
    file: SweepFile = structured(SweepFile, given, words, origin=str(path))
    if file.cluster == given.get("cluster"):  # else a word names it, from the current folder
        file = replace(file, cluster=beside(path, file.cluster))
        if file.cluster and not Path(file.cluster).is_absolute() and not Path(file.cluster).exists():
            raise UserError(
                f"{path}: cluster: {file.cluster}: there is no such file in {Path(path).resolve().parent} and in "
                f"{Path.cwd()}; give its path from one of them, or the whole one"
            )
    name = file.name or Path(path).stem
    try:
        return _sweep(file, name)
    except UserError as error:
        short = [re.sub(r"^(axes|base)\.", "", word) for word in words]  # the names that its runs give to the settings
        raise UserError(blaming(str(error), str(path), [*words, *short])) from None


def _sweep(file: SweepFile, name: str) -> Sweep:
    cluster = clusters.load(file.cluster)
    base = _flat("base", file.base)
    exclude = {f"exclude[{i}]": _condition(f"exclude[{i}]", row) for i, row in enumerate(file.exclude)}
    matched: set[str] = set()
    parse = _Parser(cluster, f"{file.output}/{name}")
    runs: dict[str, RunConfig] = {}
    excluded = 0
    for origin, row, only in itertools.chain(_grid(file), _included(file)):
        try:
            run = parse(base | row)
        except UserError as error:
            raise UserError(f"{origin}: {error}" if origin else str(error)) from None
        if not _matches(only, run):
            continue
        if matching := [name for name, condition in exclude.items() if _matches(condition, run)]:
            matched.update(matching)
            excluded += 1
            continue
        run_id = run.run_id
        if runs.setdefault(run_id, run) != run:
            raise UserError(
                f"{run_id} names two runs that differ only in paths or resources; "
                "give their stores or backbones different last names"
            )
    if not runs:
        raise UserError("no run is left; add axes, backbones, methods or include rows, or remove exclude rows")
    return Sweep(
        name=name,
        folder=Path(file.output) / name,
        by_id=runs,
        cluster=cluster,
        cluster_file=file.cluster,
        excluded=excluded,
        idle=[name for name in exclude if name not in matched],
        expected_pairs=file.expected_pairs,
        expected_tokens_per_pair=file.expected_tokens_per_pair,
    )


def _grid(file: SweepFile) -> Iterator[tuple[str, Row, Row]]:
    """Yield every combination of axes, backbones and methods: its place in the file (""), its settings, its `only`."""
    if not (file.axes or file.backbones or file.methods):
        return
    axes = _flat("axes", file.axes)
    backbones = [_short("backbones", i, row, Backbone) for i, row in enumerate(file.backbones)] or [{}]
    methods = [_short("methods", i, row, Method) for i, row in enumerate(file.methods)] or [{}]
    for where, rows in (("backbones", backbones), ("methods", methods)):
        for key in axes:
            if any(key in row for row in rows):
                raise UserError(f"axes.{key}: is given in {where} too; remove one of the two")
    for i, method in enumerate(methods):
        only = _condition(f"methods[{i}].only", method.pop("only", {}))
        # By the paper's rule (section 4.1) the learning rate depends on the backbone for full and freeze only.
        kind = METHODS.get(str(method.get("method.name", Method().name)))
        for outer in _expanded(axes):
            for backbone in itertools.chain.from_iterable(map(_expanded, backbones)):
                if kind is not None and not kind.rate_of_backbone:
                    backbone.pop("training.learning_rate", None)
                for inner in _expanded(method):
                    yield "", outer | backbone | inner, only


def _included(file: SweepFile) -> Iterator[tuple[str, Row, Row]]:
    for i, given in enumerate(file.include):
        for row in _expanded(_flat(f"include[{i}]", given)):
            yield f"include[{i}]", row, {}


def _short(section: str, index: int, given: Any, schema: type) -> Row:
    """Return a row of `backbones` or `methods` with full names; in the file its own settings have short names."""
    origin = f"{section}[{index}]"
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict) or "name" not in given:
        raise UserError(f"{origin}: {given} has no name; expected a mapping such as {{name: …}}")
    own = {item.name: f"{section[:-1]}.{item.name}" for item in fields(schema)}
    own["learning_rate"] = "training.learning_rate"
    only = {"only": given["only"]} if section == "methods" and "only" in given else {}
    return _flat(origin, {own.get(key, key): value for key, value in given.items() if key not in only}) | only


def _flat(origin: str, given: Any, prefix: str = "") -> Row:
    """Return nested or dotted settings by their full dotted names; an active fraction may be written as 5/6.

    Raises UserError for an unknown setting, with the nearest known one.
    """
    if not isinstance(given, dict):
        raise UserError(f"{origin}: {given} is not a mapping; expected settings and values")
    row: Row = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            row |= _flat(origin, value, f"{name}.")
        elif name == "output":
            raise UserError(f"{origin}.output: is the same for all runs; set output at the top of the file")
        elif name not in _setting_types():
            raise UserError(f"{origin}: {unknown(name, list(_setting_types()), RunConfig.listed_by)}")
        else:
            value = typed(_setting_types()[name], value)
            row[name] = _fractions(value) if name.endswith("active_fraction") else value
    return row


def _fractions(value: Any) -> Any:
    if isinstance(value, list):
        return [_fractions(each) for each in value]
    parts = re.fullmatch(r"(\d+)/([1-9]\d*)", value) if isinstance(value, str) else None
    value = int(parts[1]) / int(parts[2]) if parts else value
    return round(value, 4) if isinstance(value, float) else value  # 1/6 and 0.1667 are one run


def _expanded(row: Row) -> Iterator[Row]:
    """Yield every combination of the row's lists. For a setting whose value is a list, an axis is a list of lists."""
    axes = []
    for key, value in row.items():
        nested = get_origin(_setting_types().get(key)) is list
        is_axis = isinstance(value, list) and (not nested or any(isinstance(each, list) for each in value))
        if is_axis and not value:
            raise UserError(f"{key}: is an empty list; expected one value or more")
        axes.append(value if is_axis else [value])
    for values in itertools.product(*axes):
        yield dict(zip(row, values, strict=True))


@cache
def _setting_types() -> dict[str, Any]:
    """Return every dotted setting of a run and its type."""

    def types(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in get_type_hints(schema).items():
            if is_dataclass(kind) and isinstance(kind, type):
                yield from types(kind, f"{prefix}{name}.")
            else:
                yield prefix + name, kind

    return dict(types(RunConfig, ""))


def _condition(origin: str, given: Any) -> Row:
    row = _flat(origin, given)
    if not row and not origin.endswith("only"):
        raise UserError(f"{origin}: is empty and would match every run; add a setting")
    return row


def _matches(condition: Row, run: RunConfig) -> bool:
    """Return whether the run has all of the given values. A list matches if the run has one of its values."""
    return all(
        any(_same(key, _setting(run, key), value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for key, wanted in condition.items()
    )


def _setting(run: RunConfig, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _same(key: str, found: Any, wanted: Any) -> bool:
    if key == "backbone.name":
        return wanted in (found, short_name(found))
    if isinstance(found, float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return bool(found == wanted)


class _Parser:
    """Turns flat rows into `RunConfig`s. Each part of a configuration is checked once, also if many runs share it."""

    def __init__(self, cluster: Cluster, output: str):
        self.cluster = cluster
        self.output = output
        self.parts: dict[str, Any] = {}
        self.size_of = cache(_parameters)

    def __call__(self, row: Row) -> RunConfig:
        nested: dict[str, Any] = {}
        for key, value in row.items():
            *sections, last = key.split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        name, revision = str(row.get("backbone.name", Backbone().name)), row.get("backbone.revision")
        defaults = self.cluster.class_of(self.size_of(name, revision)).resources()
        nested["resources"] = defaults | nested.get("resources", {})
        return RunConfig(output=self.output, **{key: self._part(key, value) for key, value in nested.items()})

    def _part(self, key: str, value: Any) -> Any:
        text = f"{key}={value!r}"
        if text not in self.parts:
            self.parts[text] = getattr(structured(_schema(key), {key: value}), key)
        return self.parts[text]


@cache
def _schema(section: str) -> type:
    """Return a dataclass with one section of RunConfig. It checks as RunConfig does, in a tenth of the time, and errors
    name settings in full."""
    (item,) = (item for item in fields(RunConfig) if item.name == section)
    default: Any = item.default if item.default_factory is MISSING else field(default_factory=item.default_factory)
    return make_dataclass("Run", [(section, item.type, default)])


def _parameters(backbone: str, revision: str | None = None) -> int | None:
    """Return the non-embedding parameters, or None while the backbone is unknown."""
    try:
        return clusters.shape_of(backbone, revision).parameters
    except UserError:
        return None
