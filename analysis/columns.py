"""The columns of a table of runs: what each one means, its unit, and which column of a user's table it is.

A column is found by its name: ours, or one that people use (`ALIASES`). A user names others (`parse_assignments`), with
a unit where the cells are not in ours. Amounts such as "1.3B" and "6e18 FLOP" are read here too. No pandas here, since
`embedscale recipe` starts without it. The price is that `tables` and `runs` do the work on the table.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

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
    "n_opt": "N*, best size of a budget, in a table of optima without runs",
    "d_opt": "D*, tokens of the best size, in a table of optima",
    "n_opt_spread": "standard deviation of ln N*, in a table of optima",
    "evaluation.pool": "held-out pairs",
    "evaluation.negatives": "negatives of a held-out query",
    "evaluation.temperature": "temperature of the held-out loss",
}
TEXTS = {
    "run": "id of the run; default: the number of the row",
    "method": "full, freeze, bias, lora or any other name; default: full",
    "status": "done or diverged; default: done",
    "backbone": "short name of the backbone",
    "family": "family of the backbone: Pythia, Qwen 3, …, or its model_type",
    "backbone_weights": "pretrained or random",
    "backbone_revision": "revision of the hub's model, where one was asked for",
    "targets": "LoRA: layers with an adapter",
    "embedding": "LoRA: whether the token embedding has an adapter",
    "blocks": "freezing: which blocks train: last, first or one",
    "precision": "precision of training",
    "pooling": "pooling of the encoder",
    "attention": "attention of the encoder: causal or bidirectional",
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

# Names that people use, as `_plain` writes them.
ALIASES = {
    "n_parameters": (
        *("n", "params", "parameters", "n_params", "num_params", "num_parameters", "model_size", "model_params"),
        *("non_embedding_params", "non_embedding_parameters"),
    ),
    "tokens": ("d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "tokens_seen"),
    "budget_flop": (
        *("c", "flop", "flops", "compute", "budget", "training_flop", "training_flops", "train_flops", "total_flops"),
        *("training_compute", "compute_budget"),
    ),
    "loss": (
        "val_loss",
        "eval_loss",
        "valid_loss",
        "validation_loss",
        "test_loss",
        "held_out_loss",
        "loss_star",
        "final_loss",
    ),
    "n_opt": ("n_star", "nstar", "n*", "n_optimal", "optimal_n", "optimal_params", "optimal_parameters"),
    "d_opt": ("d_star", "dstar", "d*", "t_star", "d_optimal", "optimal_d", "optimal_tokens"),
    "n_opt_spread": ("n_star_log_std",),
    "learning_rate": ("lr", "peak_lr", "max_lr"),
    "weight_decay": ("wd",),
    "seed": ("random_seed", "rng_seed"),
    "status": ("state",),
    "run": ("run_id", "run_name", "name"),
}
OURS = {alias: ours for ours, aliases in ALIASES.items() for alias in (ours, *aliases)} | {
    name: name for name in COLUMNS
}
# Exports of trackers put what was set and what was found under names of their own.
SET, FOUND = ("config", "params"), ("summary", "metrics")
AXES = {"n_parameters", "tokens", "budget_flop", "loss"}
MEASURED = ("loss", "train_loss", "recall_at_1", "recall_at_10", "gpu_hours", "wall_seconds", "status")

# Losses of runs that differ in one of these columns cannot be compared.
COMPARABLE = (
    *("evaluation.pool", "evaluation.negatives", "evaluation.temperature", "evaluation.digest"),
    *("family", "attention", "data_digest", "batch_size", "context", "backbone_weights"),
)
# Why not, by the column in which they differ.
NOT_ALIKE = "their losses cannot be compared"
NO_LAW = {
    "family": "one law would mean nothing: N counts the parameters of one architecture, D the tokens of one tokenizer"
}
# The best setting of these columns is chosen for each size and budget, before sizes are compared (paper, section 4.2).
# Runs that are equal in all of them are replicates. Two backbones may have the same size.
BACKBONE = ("backbone", "backbone_revision")
HYPERPARAMETERS = (
    *("learning_rate", "rank", "trainable_fraction", "alpha", "dropout", "targets", "embedding"),
    *("blocks", "active_blocks", "weight_decay", "clip", "warmup_fraction", "final_fraction", "temperature"),
    *("precision", "pooling", "hard_negatives", "loss_function", "mask_equal_texts"),
)
EXCLUDED = ("run", "reason", "detail", "method", "n_parameters", "budget_flop")  # of a run that is left out


# --- Amounts ---------------------------------------------------------------------------------------------------------

_LETTERS = "kmgtpezy"  # 10^3, 10^6, … before FLOP
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "bn": 1e9, "g": 1e9, "t": 1e12}
for _word, _scale in (("thousand", 1e3), ("million", 1e6), ("billion", 1e9), ("trillion", 1e12)):
    _SCALES |= {_word: _scale, f"{_word}s": _scale}
FLOP = {
    f"{letter}{word}": 10.0 ** (3 * power) * seconds
    for power, letter in enumerate(("", *_LETTERS))
    for word, seconds in (("flop", 1.0), ("flops", 1.0), ("flop-day", 86400.0), ("flop-days", 86400.0))
} | {f"{scale}flop{plural}": value for scale, value in _SCALES.items() for plural in ("", "s")}
FLOP |= {unit.replace("flop", "f"): value for unit, value in FLOP.items() if "flop-day" in unit or unit[0] in "pez"}
TOKENS = {scale + noun: value for scale, value in _SCALES.items() for noun in ("", "token", "tokens")}
_PARAMETERS = {scale + noun: value for scale, value in _SCALES.items() for noun in ("param", "params", "parameters")}
UNITS = FLOP | TOKENS | _PARAMETERS


def amount(text: str, units: Mapping[str, float] = UNITS) -> float:
    """Return a number such as 1e17, 1,500,000, 1.3B, 6×10^18 FLOP or 2 PFLOP-days, with a unit of `units` or none.

    Raises ValueError, which says what to write, for other texts and for a comma that does not separate thousands.
    """
    try:
        return float(text)
    except ValueError:
        pass
    plain = re.sub(r"\s*[x×*·]\s*10\^?([-+]?\d+)", r"e\1", text.strip().lower())
    plain = re.sub(r"(?<=\d)[\s\u00a0\u202f](?=\d{3}(?!\d))", "", plain)  # a space may separate thousands too
    found = re.fullmatch(r"([-+]?[\d.,_]+(?:e[-+]?\d+)?)\s*([a-z][a-z -]*)?", plain)
    unit = (found[2] or "").replace(" ", "") if found else ""
    if not found or (unit and unit not in units):
        raise ValueError("write a number such as 1.5e17, 1,500,000, 1.3B or 100 PFLOP")
    digits = found[1]
    if "," in digits:
        if not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?(e[-+]?\d+)?", digits):  # else it is a decimal comma
            raise ValueError("the comma does not separate thousands: write 1.5 or 1,500,000")
        digits = digits.replace(",", "")
    try:
        return float(digits) * (units[unit] if unit else 1.0)
    except ValueError:
        raise ValueError("write a number such as 1.5e17, 1,500,000, 1.3B or 100 PFLOP") from None


def _factor(unit: str) -> float | None:
    """Return the factor of a unit such as 1e9, B, GFLOP or billion; None for another text."""
    for text in (unit, f"1 {unit}"):
        try:
            return amount(text)
        except ValueError:
            pass
    return None


# --- Which column is which -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a column of ours comes from: the table's name of it, and the factor to our unit."""

    name: str
    factor: float = 1.0
    named: bool = True
    """Whether the user named it, or it has our name. Else its name was recognised."""


def canonical(name: str) -> str:
    """Return our name of a column that is written as people do: `N` is n_parameters. Other texts are returned."""
    return name if name in COLUMNS else OURS.get(_plain(name)[1], name)


def prefix_of(name: str) -> str:
    """Return the prefix that an export of a tracker gives a column, "config" in "config.lr", or an empty text."""
    head = re.split(r"[./]", name.strip().lower(), maxsplit=1)[0]
    return head if head in (*SET, *FOUND) and len(head) < len(name.strip()) else ""


def _plain(name: str) -> tuple[str, str, float]:
    """Return a tracker's prefix, the rest of a column's name in lower case, and the factor of a unit in brackets.

    "config.Tokens (B)" is ("config", "tokens", 1e9).
    """
    prefix, text, factor = prefix_of(name), name.strip(), 1.0
    text = text[len(prefix) + 1 :] if prefix else text
    if bracketed := re.fullmatch(r"(.+?)\s*[(\[]([^()\[\]]+)[)\]]", text):
        text, factor = bracketed[1], _factor(bracketed[2]) or 1.0
    return prefix, re.sub(r"[\s/.-]+", "_", text.lower()), factor


def parse_assignments(option: str, words: str | Iterable[str] | None) -> dict[str, str]:
    """Return `a=x,b=y`, or several such texts, as {a: x, …}. A comma that no `name=` follows belongs to the value.

    Raises UserError, naming `option`, for a word without "=" and for a name that is given twice.
    """
    result: dict[str, str] = {}
    for text in [words] if isinstance(words, str) else words or ():
        for word in re.split(r",(?=[^,=]*=)", text):
            name, equals, value = (part.strip() for part in word.strip().strip(",").partition("="))
            if not name and not equals:
                continue
            if not equals or not name or not value:
                raise UserError(f"{option}: {word!r} was found; write NAME=VALUE")
            if name in result:
                raise UserError(f"{option}: {name!r} is given twice; give it once")
            result[name] = value
    return result


def sources(names: Collection[str], mapping: Mapping[str, str] | None = None) -> dict[str, Source]:
    """Return {our name: where it comes from} for a table's `names` and `mapping` {our name: name in the table}.

    The name in the table may have a unit: `D:1e9`, `tokens seen:B`, `C:EFLOP`. Columns that are not mapped are found by
    our name, or else by a name that people use. Raises UserError for one of our names that is unknown or given twice, a
    column that the table does not have, an unknown unit, a column that is used twice, and for two columns that could
    be the same.
    """
    result: dict[str, Source] = {}
    for name, theirs in (mapping or {}).items():
        ours = canonical(name)
        if ours not in COLUMNS:
            raise UserError(f"columns: {name!r} is unknown; allowed: {', '.join(COLUMNS)}")
        if ours in result:
            raise UserError(f"columns: {ours!r} is given twice; give it once")
        result[ours] = _named(ours, theirs, names)
        for other, source in result.items():
            if source.name == result[ours].name and other != ours:
                raise UserError(
                    f"columns: {source.name!r} is given for {other} and for {ours}; a column can be one of the two"
                )
    taken = {source.name: ours for ours, source in result.items()}
    candidates: dict[str, list[Source]] = {}
    for name in names:
        prefix, plain, factor = _plain(name)
        ours = name if name in COLUMNS else OURS.get(plain, "")
        if not ours or (prefix in SET and ours in MEASURED) or (prefix in FOUND and ours not in MEASURED):
            continue
        if {ours, taken.get(name)} <= AXES and ours not in result and name != ours:
            raise UserError(
                f"columns: {name!r} is given for {taken[name]}, and its name says {ours}; "
                f"name the column of {ours} too: {ours}=NAME"
            )
        if ours not in result and name not in taken:
            candidates.setdefault(ours, []).append(Source(name, factor, named=name == ours))
    for ours, found in candidates.items():
        exact = [source for source in found if source.named] or found
        if ours == "loss":  # beside "eval_loss", trainers call that of a training step "loss"
            exact = found
        if len(exact) > 1 and ours != "run":
            told = ", ".join(source.name for source in exact)
            raise UserError(f"{ours} may be any of {told}; choose by --columns {ours}={exact[0].name}")
        result[ours] = exact[0]
    return result


def _named(ours: str, theirs: str, names: Collection[str]) -> Source:
    if theirs in names:
        return Source(theirs)
    name, colon, unit = (part.strip() for part in theirs.rpartition(":"))
    if colon and name in names:
        factor = _factor(unit)
        if factor is None:
            raise UserError(
                f"columns: {theirs!r} has the unit {unit!r}; allowed: a factor or a unit: {name}:1e9, {name}:B"
            )
        return Source(name, factor)
    raise UserError(f"column {theirs!r} ({ours}) is missing; the table has {short_list(names)}")


def missing(names: Iterable[object], wanted: Collection[str]) -> str:
    """Return the words to add for columns that were not found: a guess where a name ends in one that is known."""
    texts = [str(name) for name in names]
    ends = {OURS.get(_plain(re.split(r"[./]", name)[-1])[1]): name for name in reversed(texts)}
    guessed = [f"{ours}={ends[ours]}" for ours in wanted if ours in ends]
    words = ",".join(guessed or [f"{ours}=NAME" for ours in wanted])
    return f"name it by --columns {words}; the table has {short_list(texts)}"


def short_list(values: Iterable[object], most: int = 30) -> str:
    """Return values with commas between them; of very many, the first ones."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (f", … ({len(texts)} in all)" if len(texts) > most else "")
