"""What a run is: `RunConfig`, read from a YAML file and `key=value` words, checked, and named by its science.

A run's id hashes the fields that change its result, and only where they differ from the default.
Paths, hardware, logging and the speed settings stay outside: the same run may move between machines.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from embedscale.errors import UserError
from embedscale.run.families import short_name
from embedscale.run.method import Method

SOURCES = ("jsonl", "parquet", "dataset", "installed-python")
WEIGHTS = ("pretrained", "random")
POOLINGS = ("mean", "last", "weighted")
LOSSES = ("symmetric", "one_directional", "gte")
PRECISIONS = ("float32", "bf16")
LOGGERS = ("tensorboard", "wandb")


def allowed(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name}: {value!r} is unknown; allowed: {', '.join(choices)}")


def bounded(name: str, value: float | None, low: float, high: float = float("inf"), above: bool = False) -> None:
    """Refuse a number outside [low, high], or (low, high] where `above`; None passes. NaN is outside of everything."""
    if value is None:
        return
    if not (low < value if above else low <= value) or not value <= high:
        limit = f"above {low:g}" if above else f"at least {low:g}"
        raise UserError(
            f"{name}: {value} is out of range; allowed: {limit}"
            + (f", at most {high:g}" if high < float("inf") else "")
        )


@dataclass(frozen=True)
class Source:
    """One corpus of text pairs."""

    kind: str = "jsonl"  # jsonl, parquet, dataset (a Hugging Face name or folder), or installed-python
    path: str = ""  # a file, a folder or a glob; for dataset, the hub name or a folder
    query: str = "query"  # column of one text a row
    positive: str = "pos"  # column; where it holds a list, its first text
    negative: str | None = None  # column of hard negatives: a text or a list of texts
    subset: str | None = None  # dataset: its configuration
    split: str = "train"  # dataset
    weight: float | None = None  # share in the mixture, which ends with the source that first runs out; default all

    def __post_init__(self) -> None:
        allowed("data.sources.kind", self.kind, SOURCES)
        bounded("data.sources.weight", self.weight, 0, above=True)
        if not self.path and self.kind != "installed-python":
            raise UserError(f"data.sources.path: nothing is given; a source of kind {self.kind!r} needs one")


@dataclass(frozen=True)
class Data:
    """Text pairs and the store they are prepared into (paper, section 4.1)."""

    store: str = "stores/pairs"  # folder of the PairStore; its last component names the data in run ids
    sources: list[Source] = field(default_factory=list)
    tokenizer: str | None = None  # hub name or folder; default the backbone's
    context: int = 75  # tokens a text is cut at
    held_out: float = 0.01  # share of the queries, by content hash
    repeat: bool = False  # allow a budget of more than one epoch

    def __post_init__(self) -> None:
        bounded("data.context", self.context, 1)
        bounded("data.held_out", self.held_out, 0, 0.5, above=True)


@dataclass(frozen=True)
class Backbone:
    """The decoder that becomes an embedding model."""

    name: str = "EleutherAI/pythia-14m"  # hub name or local folder in the hub's format
    revision: str | None = None
    weights: str = "pretrained"  # or random: initialised from the configuration and the seed
    pooling: str = "mean"  # mean, last (token) or weighted (by position)

    def __post_init__(self) -> None:
        allowed("backbone.weights", self.weights, WEIGHTS)
        allowed("backbone.pooling", self.pooling, POOLINGS)


@dataclass(frozen=True)
class Loss:
    """InfoNCE over in-batch negatives (paper, section 3.3)."""

    form: str = "symmetric"  # symmetric, one_directional (query to positive) or gte (all similarities)
    temperature: float = 0.025
    hard_negatives: int = 0  # a pair
    mask_equal_texts: bool = False  # a text equal to the positive is no negative

    def __post_init__(self) -> None:
        allowed("loss.form", self.form, LOSSES)
        bounded("loss.temperature", self.temperature, 0, above=True)
        bounded("loss.hard_negatives", self.hard_negatives, 0)


@dataclass(frozen=True)
class Training:
    """Optimisation (paper, section 4.1 and appendix E)."""

    batch_size: int = 1024  # pairs, over all GPUs
    learning_rate: float | None = None  # peak; default the paper's rule (cost.peak_learning_rate)
    weight_decay: float = 0.1
    warmup_fraction: float = 0.1  # of the steps
    final_fraction: float = 0.0  # of the peak, at the last step
    clip: float | None = None  # gradient norm
    precision: str = "float32"  # or bf16 autocast; master weights are float32 either way
    seed: int = 0

    def __post_init__(self) -> None:
        bounded("training.batch_size", self.batch_size, 2)
        bounded("training.learning_rate", self.learning_rate, 0, above=True)
        bounded("training.weight_decay", self.weight_decay, 0)
        bounded("training.warmup_fraction", self.warmup_fraction, 0, 1)
        bounded("training.final_fraction", self.final_fraction, 0, 1)
        bounded("training.clip", self.clip, 0, above=True)
        bounded("training.seed", self.seed, 0, 2**31 - 1)
        allowed("training.precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss that decides: same pool, negatives and temperature for every run of a store."""

    pool: int = 4096  # held-out pairs
    negatives: int = 1023  # a query, beside its positive
    temperature: float = 0.025
    at: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # fractions of the budget; the end always

    def __post_init__(self) -> None:
        bounded("evaluation.negatives", self.negatives, 1)
        bounded("evaluation.temperature", self.temperature, 0, above=True)
        for fraction in self.at:
            bounded("evaluation.at", fraction, 0, 1, above=True)
        if self.pool < self.negatives + 1 or self.pool % (self.negatives + 1):
            raise UserError(
                f"evaluation.pool: {self.pool} pairs do not divide into groups of evaluation.negatives + 1; "
                f"allowed: multiples of {self.negatives + 1}"
            )


@dataclass(frozen=True)
class Resources:
    """How a run runs. Nothing here changes its result beyond rounding, or its id."""

    devices: int = 1  # processes, one a GPU
    nodes: int = 1
    workers: int = 0  # loader processes
    chunk_tokens: int | None = None  # GradCache: most tokens in one forward pass; default what the memory takes
    memory_gb: float | None = None  # of a GPU, or of this process on a CPU; default its share of what there is
    activation_checkpointing: bool = False
    shard: bool = False  # FSDP2: each process keeps a part of weights, gradients and moments
    compile: bool = False  # torch.compile of the blocks, for GPUs: a CPU has its own faster way
    checkpoint_minutes: float = 10.0
    log_every: int = 10  # steps
    loggers: list[str] = field(default_factory=list)  # tensorboard, wandb (WANDB_MODE is offline unless set)

    def __post_init__(self) -> None:
        bounded("resources.devices", self.devices, 1)
        bounded("resources.nodes", self.nodes, 1)
        bounded("resources.workers", self.workers, 0)
        bounded("resources.chunk_tokens", self.chunk_tokens, 1)
        bounded("resources.memory_gb", self.memory_gb, 0, 1e6, above=True)
        if self.shard and self.devices * self.nodes == 1:
            raise UserError("resources.shard: one process has nothing to share; allowed: with several devices or nodes")
        if self.shard and self.compile:
            raise UserError("resources.compile: does not go with resources.shard; allowed: one of the two")
        bounded("resources.checkpoint_minutes", self.checkpoint_minutes, 0)
        bounded("resources.log_every", self.log_every, 1)
        for logger in self.loggers:
            allowed("resources.loggers", logger, LOGGERS)


@dataclass(frozen=True)
class RunConfig:
    """One run, completely."""

    budget: float = 1.5e15  # FLOP, by the paper's convention
    output: str = "runs"  # the run directory is output/RUN_ID
    backbone: Backbone = field(default_factory=Backbone)
    method: Method = field(default_factory=Method)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        bounded("budget", self.budget, 0, 1e30, above=True)

    def science(self) -> dict[str, Any]:
        """The fields that change the result, as plain values. Two configs with equal science are one run."""
        # Not asdict, which copies everything: a sweep asks ten thousand times.
        values: dict[str, Any] = {
            name: dict(vars(getattr(self, name))) for name in ("backbone", "method", "loss", "training", "evaluation")
        }
        values["budget"] = self.budget
        values["backbone"]["name"] = short_name(self.backbone.name)
        if self.method.active_fraction is not None:
            values["method"]["active_fraction"] = round(self.method.active_fraction, 3)  # 1/6, 0.1667: the same blocks
        values["data"] = {
            "store": short_name(self.data.store),
            "context": self.data.context,
            "repeat": self.data.repeat,
        }
        del values["evaluation"]["at"]
        return values

    @property
    def run_id(self) -> str:
        """A readable name and a hash of the scientific fields that differ from the defaults.

        Fields at their default are left out, so that a new setting does not rename old runs.
        """
        differing = _without(self.science(), _default_science())
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
        return (
            f"{short_name(self.backbone.name)}_{self.method.label}_{self.budget:.3g}_s{self.training.seed}_{digest}"
        ).replace("+", "")

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.run_id


@cache
def _default_science() -> dict[str, Any]:
    return RunConfig().science()


def _without(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    differing: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _without(value, defaults.get(key, {}))
            if value:
                differing[key] = value
        elif key not in defaults or value != defaults[key]:
            differing[key] = value
    return differing


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises UserError for a missing, unreadable or malformed file."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; expected a mapping of settings")
    return {str(key): value for key, value in loaded.items()}


def structured(schema: type, values: dict[str, Any], words: Sequence[str] = (), origin: str = "") -> Any:
    """`values` and then `key=value` words merged into the dataclass `schema`, checked.

    Raises UserError with one line naming the field, for unknown keys with the nearest known one.
    """
    layers = [_defaults(schema), OmegaConf.create(values), _of_words(words)]
    try:
        return OmegaConf.to_object(OmegaConf.merge(*layers))
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        # OmegaConf knows its own nearest key only in later releases, and only within one level.
        known = known_keys(schema)
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
            name
            for last in difflib.get_close_matches(key, [name.rsplit(".", 1)[-1] for name in known], n=1)
            for name in known
            if name.rsplit(".", 1)[-1] == last
        ]
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        message = f"{key}: unknown setting{hint}"
    except UserError as error:
        message = str(error)
    except (OmegaConfBaseException, TypeError) as error:
        key = str(getattr(error, "full_key", None) or "")
        misfits = (_misfit(*pair) for pair in combinations(map(OmegaConf.to_container, layers), 2))
        if isinstance(error.__cause__, UserError):
            message = str(error.__cause__)
        elif not key and (found := next(filter(None, misfits), None)):
            message = found
        elif isinstance(error, OmegaConfBaseException):
            said = str(getattr(error, "msg", None) or error).split("\n")[0]
            message = f"{key}: {said}" if key else said
        else:
            raise
    raise UserError(blaming(message, origin, words))


def blaming(message: str, origin: str, words: Sequence[str]) -> str:
    """The message behind the file's name, unless the setting that it begins with is one of the `words`."""
    key = re.split(r"[:\[]", message, maxsplit=1)[0]
    given = [re.split(r"[=\[]", word, maxsplit=1)[0] for word in words]
    mine = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
    return message if mine or not origin else f"{origin}: {message}"


def _of_words(words: Sequence[str]) -> DictConfig:
    for word in words:
        if word.find("=") < 1:
            raise UserError(f"{word!r} is no key=value word; one configuration file may stand before these")
        try:
            OmegaConf.from_dotlist([word])
        except (OmegaConfBaseException, YAMLError):
            raise UserError(f"{word!r}: is no valid YAML behind the '='") from None
    return OmegaConf.from_dotlist(list(words))


def _misfit(known: Any, given: Any, key: str = "") -> str | None:
    """What is wrong with the first setting that is a mapping in one and no mapping in the other.

    OmegaConf refuses it too, but without its name.
    """
    if isinstance(known, dict) and isinstance(given, dict):
        names = (name for name in known if name in given)
        found = (_misfit(known[name], given[name], f"{key}.{name}".lstrip(".")) for name in names)
        return next(filter(None, found), None)
    if isinstance(known, dict):
        return f"{key}: {given!r} is given; expected a mapping of settings to values"
    return (
        f"{key}: a mapping is given; expected a list" if isinstance(known, list) and isinstance(given, dict) else None
    )


@cache
def _defaults(schema: type) -> Any:
    """To merge into, which copies it. Before 2.4, OmegaConf lets nothing be merged into parts of a frozen dataclass."""
    config = OmegaConf.structured(schema)
    for node in (config, *config.values()):
        if OmegaConf.is_config(node):
            OmegaConf.set_readonly(node, None)
    return config


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass."""
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        for part in (item.type, *get_args(item.type)):
            if is_dataclass(part) and isinstance(part, type):
                keys += known_keys(part, f"{prefix}{item.name}.")
    return keys


def load(path: str | Path | None = None, words: Sequence[str] = ()) -> RunConfig:
    """The `RunConfig` of a YAML file (or of the defaults alone) with `key=value` words over it."""
    values = read_yaml(path) if path else {}
    config: RunConfig = structured(RunConfig, values, words, origin=str(path) if path else "")
    return config


def to_yaml(config: RunConfig) -> str:
    """The complete, resolved configuration; `load` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
