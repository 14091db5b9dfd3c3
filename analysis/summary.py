"""What `embedscale fit` prints: optima, laws with their intervals, hold-outs, the frontier, and what to know."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis.fits import miniature


def console() -> Console:
    """Standard output; where that is no terminal, wide enough that no column is cut."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def spread(ends: Any, digits: int = 3) -> str:
    return "–" if ends is None else f"{ends[0]:.{digits}g} … {ends[1]:.{digits}g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def show_fits(fits: Mapping[str, Any], console: Console) -> None:
    """Print the fits of `fit.fit`. A coefficient that the data do not fix is named, without digits."""
    counts = fits["runs"]
    console.print(
        f"{counts['used']} runs of {len(counts['budgets'])} budgets and {len(counts['sizes'])} sizes; "
        f"{counts['excluded']} left out"
    )
    reasons: dict[str, int] = {}
    for row in fits["excluded"]:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    for reason, count in reasons.items():
        console.print(f"  left out: {count} {reason}")
    noise = fits["noise"]
    console.print(f"noise of ln L: {number(noise['log_loss'])} ({noise['source']})")
    percent = f"{100 * fits['settings']['confidence']:.0f} %"
    for name, method in fits["methods"].items():
        _show_optima(name, method, percent, console)
        _show_laws(name, method, percent, console)
    _show_frontier(fits["frontier"], percent, console)
    if miniature(fits):
        console.print(f"note: {miniature(fits)}", soft_wrap=True)
    for note in fits["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _show_optima(name: str, method: Mapping[str, Any], percent: str, console: Console) -> None:
    table = _table(f"\n{name}: optima", "budget", "state", "N*", percent, "D*", "loss", percent, "Akima N*", "law N*")
    for row in method["optima"]:
        other = [number(row[each] and row[each]["n_opt"]) for each in ("akima", "law")]
        ends = spread(row["n_opt_interval"]), spread(row["loss_interval"], 4)
        own = number(row["n_opt"]), ends[0], number(row["d_opt"]), number(row["loss"], 4), ends[1]
        table.add_row(number(row["budget"]), row["state"], *own, *other)
    console.print(table)


def _show_laws(name: str, method: Mapping[str, Any], percent: str, console: Console) -> None:
    table = _table(f"\n{name}: laws", "law", "coefficient", "value", percent)
    for law, facts in method["power_laws"].items():
        if facts:
            sign = {"n_opt": "N*", "d_opt": "D*", "loss": "L*"}[law]
            table.add_row(f"{sign} = k C^a", "a", number(facts["exponent"], 4), spread(facts["exponent_interval"]))
            table.add_row("", "k", number(facts["coefficient"], 4), spread(facts["coefficient_interval"]))
    for law, facts in method["joint_laws"].items():
        if "refused" in facts:
            continue
        for i, (coefficient, ends) in enumerate(facts["intervals"].items()):
            fixed = coefficient not in facts["not_fixed"]
            shown = (number(facts[coefficient], 4), spread(ends)) if fixed else ("not fixed by the data", "")
            table.add_row(law if i == 0 else "", coefficient, *shown)
        done = facts["convergence"]
        told = f"{done['agreeing']} of {done['starts']} starts agree, gradient {done['gradient']:.1g}"
        table.add_row("", "fit", told, f"spread of ln L {number(facts['log_residual'])}")
    if table.row_count:
        console.print(table)
    table = _table(f"\n{name}: held out", "without", "law", "predicted", "found", "error", "bias")
    for row in method["hold_out"]:
        left = f"{row['left_out']} {number(row['value'])}"
        errors = (f"{100 * row[each]:.2f} %" for each in ("error", "bias"))
        table.add_row(left, row["law"], number(row["predicted"], 4), number(row["found"], 4), *errors)
    if table.row_count:
        console.print(table)


def _show_frontier(frontier: Mapping[str, Any], percent: str, console: Console) -> None:
    table = _table("\nfrontier", "from", "to", "method")
    for row in frontier["segments"]:
        table.add_row(number(row["from"]), number(row["to"]), row["method"])
    if table.row_count:
        console.print(table)
    for row in frontier["crossings"]:
        console.print(
            f"{row['below']} to {row['above']} at {number(row['budget'])} FLOP, {percent}: {spread(row['interval'])}"
        )


def show_simulation(result: Mapping[str, Any], console: Console) -> None:
    """Print what `simulate.simulate` found."""
    for name, method in result.items():
        console.print(f"\n{name}: {method['runs']} runs, noise of ln L {number(method['noise'])}", style="bold")
        if "refused" in method:
            console.print(f"refused: {method['refused']}")
            continue
        table = _table(f"{method['law']} law, {method['repeats']} sweeps", "coefficient", "truth", "mean", "95 %")
        for coefficient, facts in method["coefficients"].items():
            table.add_row(
                coefficient, *(number(facts[each], 4) for each in ("truth", "mean")), spread(facts["interval"])
            )
        exponents = method["n_exponent"]
        for each in ("law", "parabola"):
            if exponents[each]:
                facts = exponents[each]
                shown = number(exponents["truth"], 4), number(facts["median"], 4), spread(facts["interval"])
                table.add_row(f"exponent of N*, {each}", *shown)
        console.print(table)
        table = _table(
            "optima, as shares of the truth", "budget", "true N*", "parabola", "95 %", "without noise", "law", "95 %"
        )
        for row in method["optima"]:
            pairs = []
            for each in ("parabola", "law"):
                facts = row[each] or {"median": None, "interval": None}
                pairs.append((number(facts["median"]), spread(facts["interval"])))
            bias = row["bias_without_noise"]
            clean = "–" if bias is None else number(1 + bias)
            table.add_row(
                number(row["budget"]), number(row["truth"]) if row["truth"] else "edge", *pairs[0], clean, *pairs[1]
            )
        console.print(table)
        table = _table("loss above the best, at the advised size", "budget", "law", "at worst", "parabola", "at worst")
        for row in method["recipe"]:
            cells = []
            for each in ("law", "parabola"):
                facts = row[each] or {"mean": math.nan, "high": math.nan}
                cells += [f"{100 * facts['mean']:.3f} %", f"{100 * facts['high']:.3f} %"]
            table.add_row(number(row["budget"]), *cells)
        console.print(table)
