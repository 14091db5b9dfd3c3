"""Tell which rows of a table are replicates: neither checkpoints of one run nor runs of different settings.

Rows of one name in the column `run` are checkpoints of a run (`repeated`). Rows that are equal in all known columns
would be averaged, so a column that is not known must not set them apart (`refuse`). It is no setting, and is passed
over, if one of these rules holds among the rows that are used:

1. It has one value.
2. It tells rows apart by name: nearly every row has a text of its own, or all its cells are times.
3. It is a measurement: a number that nearly never recurs, or one whose name says so (`MEASURES`) with many values.
   A tracker's prefix decides where there is one: what is under `config` or `params` is never a measurement.
4. It only renames a known column, or size and budget: rows have equal values in both or in neither.
5. It follows from N, D or C: a number that one of them sets (layers, width), or a power law of N and D to 5 % (steps,
   tokens a parameter).

Every other column is taken for a setting, and the user decides. The limits: a setting under an unknown name that has
another value in each row passes for a measurement, and one that changes together with the size or the budget cannot be
told from a label of it.
"""

import re

import numpy as np
import pandas as pd

from analysis import tables
from analysis.columns import BACKBONE, FOUND, HYPERPARAMETERS, SET, prefix_of, short_list
from embedscale.errors import UserError

OWN = 0.9  # share of rows with a value of their own from which on a column names rows or measures
MANY = 1 / 3  # number of values / number of rows from which on a column with a measure's name measures
FOLLOWS = 0.05  # largest relative distance from a power law of N and D
MEASURES = {
    *("loss", "ppl", "perplexity", "nll", "bpb", "acc", "accuracy", "recall", "ndcg", "mrr", "f1", "auc", "score"),
    *("time", "seconds", "minutes", "hours", "runtime", "duration", "timestamp", "memory", "throughput", "mfu"),
}
BOOKKEEPING = {"user", "username", "host", "hostname"}
SHOWN = 4  # values of a column in a message


def repeated(origin: str, table: pd.DataFrame) -> pd.Series:
    """Return for each row "duplicate" or "checkpoint" if another row stands for it, else an empty text.

    Of the rows with one name in the column `run`, the one with the most tokens counts. Without names, rows that are
    equal in all columns are duplicates. Raises UserError for a name whose rows cannot be one run.
    """
    if table["run"].str.startswith("row ").all():
        again = table.drop(columns="run").astype(str).duplicated()
        return again.map({True: "duplicate", False: ""})
    most = table.groupby("run")["tokens"].transform("max")
    final = np.isclose(table["tokens"], most, rtol=1e-9)
    fixed = [name for name in ("method", "n_parameters", *BACKBONE, *HYPERPARAMETERS, "seed") if name in table]
    for rows, names in ((table, fixed), (table[final], ["loss"])):
        for run, same in rows[rows["run"].duplicated(keep=False)].groupby("run"):
            if found := [name for name in names if same[name].nunique(dropna=False) > 1]:
                values = short_list(same[found[0]].unique(), SHOWN)
                raise UserError(
                    f"{origin}: run: the rows of {run!r} differ in {found[0]} ({values}), so it names several runs; "
                    "name another column by --columns run=NAME, or leave this one out by --ignore run"
                )
    again = pd.Series(final, table.index) & table[final].duplicated("run").reindex(table.index, fill_value=False)
    return pd.Series(np.where(~final, "checkpoint", np.where(again, "duplicate", "")), table.index)


def settings(others: pd.DataFrame, known: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of `others` that are settings, each with its values as texts.

    `known` has the same rows in our columns.
    """
    log = known[["n_parameters", "tokens", "budget_flop"]].astype(float).map(np.log).round(6)
    unlike = (*log, "loss", "run", "path", "data")
    labels = [log[name] for name in log] + [known[name] for name in known if name not in unlike]
    cells = log["n_parameters"].astype(str) + " " + log["budget_flop"].astype(str)
    labels += [cells, known["method"] + " " + cells]
    found = {}
    for name in map(str, others):
        values = tables.texts(others[name])
        if _bookkeeping(name) or values.nunique(dropna=False) < 2:
            continue
        numbers, wrong = tables.numbers(others[name])
        number = wrong.empty
        if number and numbers.nunique(dropna=False) < 2:
            continue
        own = (numbers if number else values).dropna()
        if _measured(name, own) if number else _names_rows(own):
            continue
        if any(_same_partition(numbers if number else values, label) for label in labels):
            continue
        if number and (any(_set_by(numbers, log[axis]) for axis in log) or _power_law(numbers, log)):
            continue
        found[name] = [str(value) for value in pd.unique(values.fillna("none").sort_values(kind="stable"))]
    return found


def refuse(origin: str, others: pd.DataFrame, known: pd.DataFrame) -> None:
    """Raise UserError where columns that are neither mapped nor ignored are settings, with the words to add."""
    found = settings(others, known)
    if not found:
        return
    told = [f"{name} ({', '.join(each[:SHOWN])}{', …' if len(each) > SHOWN else ''})" for name, each in found.items()]
    name, values = next(iter(found.items()))
    words = {
        "uses one value": f"--where {_quoted(f'{name}={values[0]}')}",
        "compares the values as methods": f"--columns {_quoted(f'method={name}')}",
        "mixes the rows": f"--ignore {_quoted(','.join(found))}",
    }
    if tables.numbers(others[name])[1].empty:
        plain = re.sub(r"\W+", "_", name.lower())
        setting = next((each for each in HYPERPARAMETERS if each in plain), "learning_rate")
        words["takes the best value"] = f"--columns {_quoted(f'{setting}={name}')} (or another setting)"
        words["averages over replicates"] = f"--columns {_quoted(f'seed={name}')}"
    raise UserError(
        f"{origin}: rows differ in columns that are not known, so they are not replicates: {'; '.join(told)}. "
        f"Choose for each column: {'; '.join(f'{word} {does}' for does, word in words.items())}"
    )


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w.,=/:@%+-]+", text) else f"'{text}'"


def _bookkeeping(name: str) -> bool:
    return name.startswith(("_", "tags.mlflow.")) or name.strip().lower() in BOOKKEEPING


def _names_rows(cells: pd.Series) -> bool:
    """Return whether texts tell rows apart: nearly all differ, or all are times."""
    if cells.nunique() >= OWN * len(cells):
        return True
    return bool(cells.str.match(r"\d{4}-\d{2}-\d{2}([T ]|$)|\d{1,2}:\d{2}").all())


def _measured(name: str, cells: pd.Series) -> bool:
    prefix = prefix_of(name)
    if prefix in SET:
        return False
    if prefix in FOUND or cells.nunique() >= OWN * len(cells):
        return True
    return cells.nunique() >= MANY * len(cells) and bool(MEASURES & set(re.split(r"[^a-z0-9]+", name.lower())))


def _same_partition(a: pd.Series, b: pd.Series) -> bool:
    """Return whether rows that are equal in one column are equal in the other too; blank cells are a value."""
    left, right = pd.factorize(a, use_na_sentinel=False)[0], pd.factorize(b, use_na_sentinel=False)[0]
    pairs = len(set(zip(left.tolist(), right.tolist(), strict=True)))
    return pairs == left.max() + 1 == right.max() + 1


def _set_by(values: pd.Series, axis: pd.Series) -> bool:
    """Return whether a number is a function of N, D or C: in their order, its values follow one another in blocks."""
    if values.isna().any() or axis.isna().any():
        return False
    ordered = pd.DataFrame({"value": values, "axis": axis}).sort_values("axis", kind="stable")
    if (ordered.groupby("axis")["value"].nunique() > 1).any():
        return False
    return int((ordered["value"].diff().iloc[1:] != 0).sum()) == ordered["value"].nunique() - 1


def _power_law(values: pd.Series, log: pd.DataFrame) -> bool:
    """Return whether a number is k N^a D^b C^c to within `FOLLOWS`, with rows enough to tell."""
    if not (values > 0).all() or log.isna().any(axis=None):
        return False
    design = np.column_stack([np.ones(len(log)), log.to_numpy(float)])
    coefficients, _, rank, _ = np.linalg.lstsq(design, np.log(values.to_numpy(float)), rcond=None)
    if len(values) < rank + 3:
        return False
    return bool(np.abs(np.log(values) - design @ coefficients).max() < FOLLOWS)
