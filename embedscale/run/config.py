"""The settings of a run as frozen dataclasses, checked when they are built, and the run's id.

A run's id is a hash of the settings that change its result, and only where they differ from the default. Paths,
hardware, logging and the speed settings stay outside: the same run may move between machines. `embedscale.run.settings`
reads these dataclasses from YAML files and from the command line.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from embedscale.errors import UserError, allowed, bounded
from embedscale.run.families import short_name
from embedscale.run.method import Method

SOURCES = ("jsonl", "csv", "parquet", "dataset", "installed-python")
WEIGHTS = ("pretrained", "random")
SPECIAL_TOKENS = ("auto", "none", "template")
ATTENTIONS = ("causal", "bidirectional")
POOLINGS = ("mean", "last", "weighted")
LOSSES = ("symmetric", "one_directional", "gte")
PRECISIONS = ("float32", "tf32", "bf16")
LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Source:
    """One corpus of text pairs."""

    kind: str = "jsonl"
    """Where the pairs are: jsonl, csv or parquet files, dataset (of the hub, or a folder), installed-python."""
    path: str = ""
    """A file, a folder or a glob; for a dataset, its hub name or folder."""
    query: str = "query"
    """Column of the query: one text a row."""
    positive: str = "pos"
    """Column of the positive: a text, or a list whose first text is used."""
    negative: str | None = None
    """Column of hard negatives: a text, or a list of texts; default: none."""
    least_negatives: int | None = None
    """Leave out rows with fewer hard negatives; default: leave out no row."""
    subset: str | None = None
    """Configuration of a dataset; default: the dataset's own default."""
    split: str = "train"
    """Split of a dataset."""
    weight: float | None = None
    """Share in the mixture, which ends when the first source is used up; default: all pairs of every source."""

    def __post_init__(self) -> None:
        allowed("data.sources.kind", self.kind, SOURCES)
        bounded("data.sources.weight", self.weight, 0, above=True)
        bounded("data.sources.least_negatives", self.least_negatives, 1)
        if not self.path and self.kind != "installed-python":
            raise UserError(f"data.sources.path: no path is given; a source of kind {self.kind!r} needs one")


@dataclass(frozen=True)
class Data:
    """The text pairs, and the store that they are prepared into (paper, section 4.1)."""

    store: str = "stores/pairs"
    """Folder of the prepared pairs; its last component names the data in run ids."""
    sources: list[Source] = field(default_factory=list)
    """Corpora that the store is prepared from."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer; default: the backbone's."""
    context: int = 75
    """Tokens after which a text is cut."""
    held_out: float = 0.01
    """Share of the queries that is held out, chosen by a hash of their text."""
    repeat: bool = False
    """Allow a budget that needs more than one epoch."""
    special_tokens: str = "auto"
    """Tokens around each text: template (those of the tokenizer's own template), none, or auto: template for backbones
    that need it, such as Gemma, else none."""

    def __post_init__(self) -> None:
        bounded("data.context", self.context, 1)
        allowed("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        bounded("data.held_out", self.held_out, 0, 0.5, above=True)


@dataclass(frozen=True)
class Backbone:
    """The decoder that becomes an embedding model."""

    name: str = "EleutherAI/pythia-14m"
    """Hub name, or a local folder in the hub's format."""
    revision: str | None = None
    """Revision on the hub; default: its main one."""
    weights: str = "pretrained"
    """pretrained, or random: initialised from the model's configuration and the seed."""
    pooling: str = "mean"
    """How token states become one vector: mean, last (the last token's), or weighted (by position)."""
    attention: str = "causal"
    """What a token attends to: causal (itself and earlier tokens), or bidirectional (all tokens of its text)."""

    def __post_init__(self) -> None:
        allowed("backbone.weights", self.weights, WEIGHTS)
        allowed("backbone.pooling", self.pooling, POOLINGS)
        allowed("backbone.attention", self.attention, ATTENTIONS)


@dataclass(frozen=True)
class Loss:
    """InfoNCE over the negatives of a batch (paper, section 3.3)."""

    form: str = "symmetric"
    """symmetric, one_directional (query to positive), or gte (all similarities of the batch)."""
    temperature: float = 0.025
    """Temperature that similarities are divided by."""
    hard_negatives: int = 0
    """Hard negatives of each pair."""
    mask_equal_texts: bool = False
    """Leave texts that equal the positive out of the negatives."""

    def __post_init__(self) -> None:
        allowed("loss.form", self.form, LOSSES)
        bounded("loss.temperature", self.temperature, 0, above=True)
        bounded("loss.hard_negatives", self.hard_negatives, 0)


@dataclass(frozen=True)
class Training:
    """Optimisation with AdamW (paper, section 4.1 and appendix E)."""

    batch_size: int = 1024
    """Pairs in a step, over all GPUs."""
    learning_rate: float | None = None
    """Peak of the schedule; default: the paper's rule, from the method and the backbone (section 4.1)."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    warmup_fraction: float = 0.1
    """Fraction of the steps in which the learning rate rises."""
    final_fraction: float = 0.0
    """Learning rate of the last step, as a fraction of the peak."""
    clip: float | None = None
    """Largest norm of the gradient; default: no clipping."""
    precision: str = "float32"
    """float32, tf32 (float32 whose products a GPU rounds to 10 bits) or bf16 (autocast); weights are float32."""
    seed: int = 0
    """Seed of the order of the pairs, of dropout and of random weights."""

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
    """The held-out loss that the laws use: same pool, negatives and temperature for every run of a store."""

    pool: int = 4096
    """Held-out pairs; a multiple of negatives + 1."""
    negatives: int = 1023
    """Negatives of each query, beside its positive."""
    temperature: float = 0.025
    """Temperature of the held-out loss."""
    at: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Fractions of the budget after which to evaluate; the end is always evaluated."""

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
    """How a run uses the machine. Nothing here changes its id, or its result beyond rounding."""

    devices: int = 1
    """Processes on each node, one a GPU."""
    nodes: int = 1
    """Nodes."""
    workers: int | None = None
    """Processes that load batches, for each training process; 0: the training process loads them; default: 2 for a
    GPU, else 0."""
    chunk_tokens: int | None = None
    """Most tokens in one forward pass of GradCache; default: as many as the memory holds."""
    memory_gb: float | None = None
    """Memory to use, GB, of a GPU or of this process on a CPU; default: its share of the machine."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    shard: bool = False
    """Share weights, gradients and moments among the processes (FSDP2); needs several."""
    compile: bool = False
    """Compile the blocks with torch.compile; for GPUs."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    loggers: list[str] = field(default_factory=list)
    """Loggers beside metrics.jsonl: tensorboard, wandb (offline unless WANDB_MODE says otherwise)."""

    def __post_init__(self) -> None:
        bounded("resources.devices", self.devices, 1)
        bounded("resources.nodes", self.nodes, 1)
        bounded("resources.workers", self.workers, 0)
        bounded("resources.chunk_tokens", self.chunk_tokens, 1)
        bounded("resources.memory_gb", self.memory_gb, 0, 1e6, above=True)
        if self.shard and self.devices * self.nodes == 1:
            raise UserError("resources.shard: one process has nothing to share; allowed: with several devices or nodes")
        if self.shard and self.compile:
            raise UserError("resources.compile: cannot be combined with resources.shard; allowed: one of the two")
        bounded("resources.checkpoint_minutes", self.checkpoint_minutes, 0)
        bounded("resources.log_every", self.log_every, 1)
        for logger in self.loggers:
            allowed("resources.loggers", logger, LOGGERS)


@dataclass(frozen=True)
class RunConfig:
    """One run, completely."""

    listed_by: ClassVar[str] = "embedscale config"

    budget: float = 1.5e15
    """FLOP to spend, by the paper's convention 2 (N_F + N_B + N_U) D (section 3.5)."""
    output: str = "runs"
    """Folder of run directories; the run directory is output/RUN_ID."""
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
        """Return the settings that change the result, as plain values. Two configs with equal science are one run."""
        values: dict[str, Any] = {
            name: _plain(getattr(self, name)) for name in ("backbone", "method", "loss", "training", "evaluation")
        }
        values["budget"] = float(self.budget)
        values["backbone"]["name"] = short_name(self.backbone.name)
        if (fraction := values["method"]["active_fraction"]) is not None:
            values["method"]["active_fraction"] = round(fraction, 3)  # 1/6, 0.1667: the same blocks
        values["data"] = {
            "store": short_name(self.data.store),
            "context": self.data.context,
            "repeat": self.data.repeat,
            "special_tokens": self.data.special_tokens,
        }
        del values["evaluation"]["at"]
        return values

    @property
    def run_id(self) -> str:
        """A readable name and a hash of the scientific settings that differ from the defaults.

        Settings at their default are left out, so that a new setting does not rename old runs.
        """
        differing = _without(self.science(), _default_science())
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
        return (
            f"{short_name(self.backbone.name)}_{self.method.label}_{self.budget:.3g}_s{self.training.seed}_{digest}"
        ).replace("+", "")

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.output) / self.run_id


def _plain(settings: Any) -> dict[str, Any]:
    """Return settings by name. An integer that Python code gave becomes a float where a file's would be one."""
    values = dict(vars(settings))  # asdict would copy everything, and a sweep asks ten thousand times
    return values | {name: float(values[name]) for name in _floats(settings.__class__) if isinstance(values[name], int)}


@cache
def _floats(kind: type) -> list[str]:
    return [name for name, hint in get_type_hints(kind).items() if float in (hint, *get_args(hint))]


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
