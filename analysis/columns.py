"""The columns of a table of runs: what each one means, its unit, and how a column of another name is mapped to it.

No pandas here, because `embedscale recipe` starts without it. The price is that `runs` does the work on the table.
"""

from collections.abc import Collection, Mapping

from embedscale.errors import UserError

NUMBERS = {
    "n_parameters": "N, non-embedding parameters of the backbone",
    "tokens": "D, tokens processed",
    "budget_flop": "C, FLOP paid for; runs of one IsoFLOP profile share it",
    "loss": "held-out contrastive loss, nats",
    "trainable_fraction": "S: active blocks / blocks for freezing, updated / all parameters for other methods",
    "flop_per_token": "2 (N_F + N_B + N_U), the paper's convention",
    "learning_rate": "peak learning rate",
    "rank": "LoRA: rank of the adapters",
    "alpha": "LoRA: scale × rank",
    "dropout": "LoRA: dropout on the adapters' input",
    "active_fraction": "freezing: fraction of the blocks that train, where it was given as a fraction",
    "active_blocks": "freezing: number of blocks that train, where it was given as a number",
    "weight_decay": "AdamW's weight decay",
    "clip": "largest norm of the gradient",
    "warmup_fraction": "fraction of the steps in which the learning rate rises",
    "final_fraction": "learning rate at the end / peak learning rate",
    "batch_size": "pairs a step",
    "context": "longest text, tokens",
    "temperature": "temperature of the training loss",
    "hard_negatives": "hard negatives of a pair",
    "seed": "seed; replicates differ in it alone",
    "pairs": "pairs processed",
    "steps": "optimiser steps",
    "train_loss": "mean training loss of the last steps, nats",
    "recall_at_1": "held-out recall@1",
    "recall_at_10": "held-out recall@10",
    "gpu_hours": "device-hours",
    "wall_seconds": "seconds over all attempts",
    "spent_flop": "FLOP spent, the paper's convention",
    "spent_flop_exact": "FLOP spent, the exact convention",
    "evaluation.pool": "held-out pairs",
    "evaluation.negatives": "negatives of a held-out query",
    "evaluation.temperature": "temperature of the held-out loss",
}
TEXTS = {
    "run": "id of the run; default: the number of the row",
    "method": "full, freeze, bias, lora or any other name; default: full",
    "status": "done or diverged; default: done",
    "backbone": "short name of the backbone",
    "backbone_weights": "pretrained or random",
    "backbone_revision": "revision of the hub's model, where one was asked for",
    "targets": "LoRA: layers with an adapter",
    "embedding": "LoRA: whether the token embedding has an adapter",
    "blocks": "freezing: which blocks train: last, first or one",
    "precision": "precision of training",
    "pooling": "pooling of the encoder",
    "loss_function": "training loss",
    "mask_equal_texts": "whether a text equal to the positive is left out of the negatives",
    "data": "folder of the store",
    "data_digest": "digest of the store",
    "evaluation.digest": "digest of the held-out pool",
    "device": "name of the device",
    "path": "run directory",
}
COLUMNS = NUMBERS | TEXTS
FIRST_VERSION = {"params": "n_parameters", "budget": "budget_flop"}  # names in tables of the first version

# Losses of runs that differ in one of these columns cannot be compared.
COMPARABLE = (
    *("evaluation.pool", "evaluation.negatives", "evaluation.temperature", "evaluation.digest"),
    *("data_digest", "batch_size", "context", "backbone_weights"),
)
# The best setting of these columns is chosen for each size and budget, before sizes are compared (paper, section 4.2).
# Runs that are equal in all of them are replicates. Two backbones may have the same size.
BACKBONE = ("backbone", "backbone_revision")
HYPERPARAMETERS = (
    *("learning_rate", "rank", "trainable_fraction", "alpha", "dropout", "targets", "embedding"),
    *("blocks", "active_blocks", "weight_decay", "clip", "warmup_fraction", "final_fraction", "temperature"),
    *("precision", "pooling", "hard_negatives", "loss_function", "mask_equal_texts"),
)
EXCLUDED = ("run", "reason", "detail", "method", "n_parameters", "budget_flop")  # of a run that is left out


def parse_assignments(option: str, text: str | None) -> dict[str, str]:
    """Return `a=x,b=y` as {column: x, …}, with the columns' present names.

    Raises UserError, naming `option`, for a word without "=", an unknown column or a column that is given twice.
    """
    result: dict[str, str] = {}
    for word in (text or "").split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not name and not equals:
            continue
        if not equals or not value:
            raise UserError(f"{option}: {word!r} was found; write NAME=VALUE")
        column = FIRST_VERSION.get(name, name)
        if column not in COLUMNS:
            raise UserError(f"{option}: {name!r} is unknown; allowed: {', '.join(COLUMNS)}")
        if column in result:
            raise UserError(f"{option}: {name!r} is given twice; give it once")
        result[column] = value
    return result


def present_names(mapping: Mapping[str, str]) -> dict[str, str]:
    """Return the mapping with its keys, which are columns, under their present names."""
    return {FIRST_VERSION.get(name, name): value for name, value in mapping.items()}


def renames(names: Collection[str], mapping: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return {name in the table: our name} for `mapping` {our name: name in the table}.

    A table of the first version is mapped too, unless it also has the present name. Raises UserError for one of our
    names that is unknown, and for a column that the table does not have.
    """
    result = {}
    for ours, theirs in (mapping or {}).items():
        if ours not in COLUMNS:
            raise UserError(f"columns: {ours!r} is unknown; allowed: {', '.join(COLUMNS)}")
        if theirs not in names:
            raise UserError(f"column {theirs!r} ({ours}) is missing; it has {', '.join(map(str, names))}")
        result[theirs] = ours
    for former, ours in FIRST_VERSION.items():
        if former in names and ours not in names and ours not in result.values():
            result.setdefault(former, ours)
    return result
