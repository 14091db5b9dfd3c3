"""What the files of a run directory hold, as values: the record, the rows of metrics, the attempts.

Each class reads and checks one kind of file (`from_json`), writes it (`to_json`), and gives its JSON Schema. Files of
the first version load: what they lack has a default, and rows of metrics in the old spelling are translated.
"""

import math
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, Self

from embedscale.files import now
from embedscale.values import Amount, Count, Damaged, Positive, ProcessNumber, Share, Time, Value, sound

__all__ = [
    "AttemptRecord",
    "CodeVersion",
    "Damaged",
    "Device",
    "EvaluationRecord",
    "Hyperparameters",
    "Metric",
    "RunRecord",
    "sound",
]

FIRST_SPELLING = {"flops": "spent_flop", "lr": "learning_rate", "loss": "train_loss", "held_out_loss": "loss"}


@dataclass(frozen=True)
class Metric(Value):
    """A row of metrics.jsonl: after a logged step, or after an evaluation on the held-out pairs.

    A row of a step has the training loss and the speed; a row of an evaluation has the held-out loss and the recalls.
    """

    step: Count
    """Steps made."""
    attempt: Count = 0
    """Number of the attempt that wrote the row."""
    tokens: Count = 0
    """Tokens processed so far."""
    spent_flop: Count = 0
    """FLOP spent so far, by the paper's convention."""
    train_loss: float | None = None
    """Loss of the step's batch, nats."""
    learning_rate: Amount | None = None
    """Learning rate of the step."""
    tokens_per_second: Amount | None = None
    """Mean speed since the row before, checkpoints included."""
    seconds: Amount | None = None
    """Time since the row before, checkpoints included."""
    loss: float | None = None
    """Held-out loss, nats."""
    recall_at_1: Share | None = None
    """Share of held-out queries whose positive is the nearest of its group."""
    recall_at_10: Share | None = None
    """Share of held-out queries whose positive is among the ten nearest of its group."""

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the row of a parsed JSON object; the first version's spelling is translated."""
        if isinstance(data, dict) and "flops" in data:
            data = {FIRST_SPELLING.get(key, key): value for key, value in data.items()}
        return super().from_json(data)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class AttemptRecord(Value):
    """One process's try at a run: attempts/N/attempt.json, and an element of a record's `attempts`."""

    number: Count
    """N, counted from 1."""
    start: Time
    """Time at which the attempt began, ISO 8601."""
    host: str | None = None
    """Name of the machine."""
    job_id: str | None = None
    """SLURM's number of the job; null outside SLURM."""
    pid: ProcessNumber | None = None
    """Number of the process on its machine."""
    sharing: Positive = 1
    """Runs that shared the device with this one."""
    from_step: Count | None = None
    """Step at which the attempt began."""
    from_flop: Count | None = None
    """FLOP already spent when the attempt began."""
    end: Time | None = None
    """Time at which the attempt ended, ISO 8601; if it was killed, its last heartbeat, up to 20 s before; null while it
    runs."""
    ended: Literal["done", "diverged", "interrupted", "failed", "killed"] | None = None
    """How the attempt ended; null while it runs."""
    reason: str | None = None
    """Why the attempt ended: the signal, or the last line of the error."""
    to_step: Count | None = None
    """Steps made when the attempt ended; null if it could not say."""
    to_flop: Count | None = None
    """FLOP spent when the attempt ended; null if it could not say."""

    @property
    def seconds(self) -> float:
        """Duration of an attempt; of an open attempt, until now."""
        end = datetime.fromisoformat(self.end or now())
        return (end - datetime.fromisoformat(self.start)).total_seconds()


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run that may differ between the runs of one experiment."""

    batch_size: Count
    """Pairs in a step, over all GPUs."""
    learning_rate: Amount
    """Peak of the learning-rate schedule."""
    weight_decay: Amount
    """Weight decay of AdamW."""
    warmup_fraction: Share
    """Fraction of the steps with a rising learning rate."""
    final_fraction: Share
    """Learning rate of the last step, as a fraction of the peak."""
    clip: Amount | None
    """Largest norm of the gradient; null without clipping."""
    precision: str
    """Number format of the matrix products: float32, tf32 or bf16."""
    context: Count
    """Tokens after which a text is cut."""
    temperature: Amount
    """Temperature of the training loss."""
    loss: str
    """Form of the training loss."""
    hard_negatives: Count
    """Hard negatives of a pair."""
    mask_equal_texts: bool
    """Whether texts equal to the positive are left out of the negatives."""
    pooling: str
    """How token states become one vector: mean, last or weighted."""
    method_label: str
    """Short name of the method with its settings, such as lora-r32."""
    active_blocks: Count | None = None
    """Setting `method.active_blocks`."""
    active_fraction: Share | None = None
    """Setting `method.active_fraction`."""
    blocks: str = "last"
    """Setting `method.blocks`."""
    rank: Count | None = None
    """Setting `method.rank`."""
    alpha: Amount | None = None
    """Setting `method.alpha`."""
    dropout: Share = 0.0
    """Setting `method.dropout`."""
    targets: list[str] = field(default_factory=list)
    """Setting `method.targets`."""
    embedding: bool = False
    """Setting `method.embedding`."""
    attention: str = "causal"
    """What a token attends to: causal or bidirectional."""


@dataclass(frozen=True)
class EvaluationRecord:
    """What the held-out loss was measured on."""

    pool: Count
    """Held-out pairs."""
    negatives: Count
    """Negatives of a query."""
    temperature: Amount
    """Temperature of the held-out loss."""
    digest: str
    """Digest of the pool, the negatives and the temperature on this store. Losses with other digests do not compare."""


@dataclass(frozen=True)
class Device:
    """What a run ran on."""

    name: str
    """Name of the GPU or of the processor."""
    count: Count
    """Devices used at once."""
    type: str
    """cuda or cpu."""
    threads: Count = 1
    """Threads of a process on the CPU."""


@dataclass(frozen=True)
class CodeVersion:
    """The code that wrote a record."""

    version: str
    """Version of embedscale."""
    commit: str | None = None
    """Commit of the checkout; null for an installed package."""
    dirty: bool = False
    """Whether the checkout had changes that were not committed."""
    digest: str | None = None
    """Start of the SHA-256 of the code's files, which names a job's copy of the code; null in records of 0.2.0."""


@dataclass(frozen=True, kw_only=True)
class RunRecord(Value):
    """record.json: all that is known of a finished run, written last of all its files."""

    format: Count
    """Version of this layout."""
    status: Literal["done", "diverged"]
    """done: the budget is spent; diverged: the loss is not finite any more."""
    run_id: str
    """Name of the run: backbone, method, budget, seed and a hash of the settings that change the result."""
    backbone: str
    """Short name of the backbone."""
    backbone_weights: str
    """pretrained or random."""
    backbone_revision: str | None = None
    """Revision asked of the hub; null for its main one."""
    family: str | None = None
    """Family of the backbone, such as Pythia, or its model_type; null in records of earlier code."""
    backbone_digest: str
    """Digest of the backbone's weights before training."""
    n_forward: Count
    """N_F: parameters that the forward pass uses (paper, section 3.5)."""
    n_backward: Count
    """N_B: parameters that the backward pass goes through (paper, section 3.5)."""
    n_updated: Count
    """N_U: parameters that train (paper, section 3.5)."""
    n_parameters: Positive
    """N: non-embedding parameters of the backbone, without adapters."""
    blocks: Count
    """Blocks of the backbone."""
    width: Count
    """Width of the backbone, and numbers in an embedding."""
    tokenizer_digest: str | None = None
    """Digest of the tokenizer; null in records of early code."""
    tokens_before: list[int] = field(default_factory=list)
    """Ids of the special tokens before each text."""
    tokens_after: list[int] = field(default_factory=list)
    """Ids of the special tokens after each text."""
    method: str
    """Name of the fine-tuning method."""
    hyperparameters: Hyperparameters
    """Settings of the run."""
    trainable_fraction: Amount
    """S: active blocks / blocks for block freezing, updated / all parameters for other methods."""
    trainable_tensors: Count
    """Number of tensors that train."""
    seed: Count
    """Seed of the order of the pairs, of dropout and of random weights."""
    data: str
    """Short name of the store of pairs."""
    data_digest: str
    """Digest of the store."""
    budget_flop: Amount
    """FLOP that the run was given, by the paper's convention."""
    spent_flop: Count
    """FLOP that the run spent, by the paper's convention; at most one pair's cost below the budget."""
    flop_per_token: Count
    """Cost of a token, 2 (N_F + N_B + N_U)."""
    spent_flop_exact: Count
    """FLOP of the matrix products that ran, attention and recomputation included."""
    tokens: Count
    """Tokens processed, counted."""
    pairs: Count
    """Pairs processed."""
    steps: Count
    """Steps made."""
    loss: float | None
    """Held-out loss after the last step, nats; null if diverged."""
    train_loss: float | None
    """Mean training loss over the last twentieth of the full batches, nats; null if diverged."""
    recall_at_1: Share | None
    """Share of held-out queries whose positive is the nearest of its group; null if diverged."""
    recall_at_10: Share | None
    """Share of held-out queries whose positive is among the ten nearest of its group; null if diverged."""
    evaluation: EvaluationRecord
    """What the held-out loss was measured on."""
    weights_digest: str
    """Digest of the trained weights."""
    wall_seconds: Amount
    """Duration of all attempts."""
    gpu_hours: Amount
    """Hours of devices; a device that several runs shared is counted once."""
    device: Device
    """What the run ran on."""
    attempts: list[AttemptRecord]
    """Every attempt, in order."""
    versions: dict[str, str]
    """Versions of the packages."""
    code: CodeVersion
    """The code that ran."""
    diverged_at_step: Count | None = None
    """First step whose loss was not finite; null if none."""

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the record of a parsed JSON object; a run with a loss that is not finite has diverged."""
        if isinstance(data, dict):
            losses = {name: data.get(name) for name in ("loss", "train_loss")}
            lost = [name for name, loss in losses.items() if isinstance(loss, float) and not math.isfinite(loss)]
            data = data | dict.fromkeys(lost) | ({"status": "diverged"} if lost else {})
        return super().from_json(data)
