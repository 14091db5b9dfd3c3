"""Write the study's finished runs as two small tables: all fits and figures can be made from them.

    python configs/study/table.py runs/study docs/study

runs.csv has one row per run with all columns that `embedscale fit` reads. Columns without a value and paths of this
machine are left out. curves.csv has up to twelve training losses of each run, and its held-out losses. Rows are in the
order of the run ids, so that a new run changes no other line. Rows of runs whose folders are not on this machine stay.
"""

import argparse
from io import StringIO
from pathlib import Path

import pandas as pd

from analysis import runs
from embedscale.run.directory import RunDirectory

POINTS = 12  # points of a training curve, at equal distances in steps


def curve(directory: RunDirectory) -> pd.DataFrame:
    """Return a thinned curve: run, spent_flop, train_loss (a step's batch) and loss (held out), nats.

    The last step's training loss is left out: its batch is cut to the budget, so it has fewer negatives.
    """
    rows = directory.read_metrics()
    last = max(row.step for row in rows)
    train = [row for row in rows if row.train_loss is not None and row.step < last]
    every = max(1, -(-len(train) // POINTS))
    kept = [*train[::-1][::every][::-1], *(row for row in rows if row.loss is not None)]
    return pd.DataFrame(
        {
            "run": directory.path.name,
            "spent_flop": row.spent_flop,
            "train_loss": None if row.train_loss is None else round(row.train_loss, 4),
            "loss": None if row.loss is None else round(row.loss, 6),
        }
        for row in sorted(kept, key=lambda row: (row.spent_flop, row.loss is not None))
    )


def update(path: Path, table: pd.DataFrame) -> int:
    """Add the rows of `table` to a file, in place of older rows of the same runs. Returns the number of rows in it.

    All cells are text, so that older rows stay the same to the last digit.
    """
    new = pd.read_csv(StringIO(table.to_csv(index=False)), dtype=str)
    old = pd.read_csv(path, dtype=str) if path.exists() else new
    whole = pd.concat([old[~old["run"].isin(new["run"])], new]).sort_values("run", kind="stable")
    whole.to_csv(path, index=False)
    return len(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="a folder of run directories")
    parser.add_argument("out", type=Path, help="the folder of runs.csv and curves.csv")
    args = parser.parse_args()
    table = runs.load(args.runs).table.sort_values("run")
    curves = pd.concat([curve(RunDirectory(path)) for path in table["path"]])
    args.out.mkdir(parents=True, exist_ok=True)
    kept = table.drop(columns="path").dropna(axis="columns", how="all")
    whole = [name for name in kept.select_dtypes(float) if (kept[name].dropna() % 1 == 0).all()]
    kept = kept.astype(dict.fromkeys(whole, "Int64"))
    rows, points = update(args.out / "runs.csv", kept), update(args.out / "curves.csv", curves)
    print(f"{args.out}: {rows} runs, {len(table)} of them from {args.runs}; {points} points of curves")


if __name__ == "__main__":
    main()
