"""Print what `embedscale fit` found: optima, laws with their intervals, hold-outs, the frontier, and the notes."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from analysis.columns import parse_assignments
from analysis.fits import Fits, Frontier, MethodFit, read
from analysis.simulate import Simulated
from embedscale.errors import UserError
from embedscale.files import check_folder, write_json
from embedscale.terminal import console, shortened
from embedscale.texts import measured, number, spread
from embedscale.values import print_json

if TYPE_CHECKING:
    import pandas as pd

    from analysis.design.replay import Replay
    from analysis.fitting.laws import StatedLaw

WIDTH = 160  # columns where the output is no terminal: no column of a table is cut
MOST_LINES = 20  # lines about damaged files
SIGNS = {"n_opt": "N*", "d_opt": "D*", "loss": "L*"}  # how a reader sees the quantities of an optimum


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def show_fits(fits: Fits, console: Console) -> None:
    """Print fits. A coefficient that the data do not fix is named, without digits."""
    counts, percent = fits.runs, fits.settings.percent
    console.print(
        f"{counts.used} runs of {len(counts.budgets)} budgets and {len(counts.sizes)} sizes; {counts.excluded} left out"
    )
    reasons: dict[str, int] = {}
    for row in fits.excluded:
        reasons[row.reason] = reasons.get(row.reason, 0) + 1
    for reason, count in reasons.items():
        console.print(f"  left out: {count} {reason}")
    damaged = [f"{row.run}: {row.detail}" for row in fits.excluded if row.reason == "unreadable"]
    for line in shortened(damaged, MOST_LINES):
        console.print(f"  damaged: {line}", soft_wrap=True)
    console.print(f"noise of ln L: {number(fits.noise.log_loss)} ({fits.noise.told})")
    for name, method in fits.methods.items():
        if method.noise:
            console.print(f"  {name}: {number(method.noise.log_loss)} ({method.noise.told})")
    if fits.chance:
        console.print(f"chance level: {fits.chance}")
    for name, method in fits.methods.items():
        _show_optima(name, method, percent, console)
        _show_laws(name, method, percent, console)
    _show_frontier(fits.frontier, percent, console)
    for note in [*([fits.miniature] if fits.miniature else []), *merged(fits.notes, list(fits.methods))]:
        console.print(f"note: {note}", soft_wrap=True)


def merged(notes: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Return the notes in their order; those that say the same of several methods are one note of all of them."""
    said: dict[str, list[str]] = {}
    for note in notes:
        name = next((each for each in methods if note.startswith((f"{each}:", f"{each},"))), "")
        said.setdefault(note.removeprefix(name), []).append(name)
    return [f"{', '.join(names)}{text}" for text, names in said.items()]


def _show(table: Table, console: Console) -> None:
    """Print a table without the columns in which no row has a value; print nothing if it has no rows."""
    columns = [(column.header, list(column.cells)) for column in table.columns]
    columns = [(header, cells) for header, cells in columns if set(cells) - {"–", ""}]
    if columns:
        shown = _table(str(table.title), *(str(header) for header, _ in columns))
        for cells in zip(*(cells for _, cells in columns), strict=True):
            shown.add_row(*cells)
        console.print(shown)


def _show_optima(name: str, method: MethodFit, percent: str, console: Console) -> None:
    table = _table(f"\n{name}: optima", "budget", "state", "N*", percent, "D*", "loss", percent, "Akima N*", "law N*")
    for row in method.optima:
        others = [number(each.n_opt if each else None) for each in (row.akima, row.law)]
        own = *measured(row.n_opt, row.n_opt_interval, 3), number(row.d_opt)
        table.add_row(number(row.budget_flop), row.state, *own, *measured(row.loss, row.loss_interval), *others)
    if any(row.n_opt or row.law for row in method.optima):  # else the notes say all that there is
        _show(table, console)


def _show_laws(name: str, method: MethodFit, percent: str, console: Console) -> None:
    table = _table(f"\n{name}: laws", "law", "coefficient", "value", percent)
    for quantity, sign in SIGNS.items():
        line = getattr(method.power_laws, quantity)
        if line:
            table.add_row(f"{sign} = k C^a", "a", *measured(line.exponent, line.exponent_interval))
            table.add_row("", "k", *measured(line.coefficient, line.coefficient_interval))
    for law, fitted in method.joint_laws.items():
        rows = [
            (name, *measured(fitted.coefficients[name], ends))
            for name, ends in fitted.intervals.items()
            if name not in fitted.not_fixed
        ]
        if fitted.not_fixed:
            rows.append((", ".join(fitted.not_fixed), "not fixed by the data", ""))
        for i, cells in enumerate(rows):
            table.add_row("" if i else law, *cells)
        done = fitted.convergence
        told = f"{done.agreeing} of {done.starts} starts agree, gradient {number(done.gradient, 1)}"
        table.add_row("", "fit", told, f"spread of ln L {number(fitted.log_residual)}")
    _show(table, console)
    table = _table(f"\n{name}: held out", "without", "law", "predicted", "found", "error")
    for row in method.hold_out:
        error = f"{100 * row.bias:+.2f} %"
        if not math.isclose(row.error, abs(row.bias)):
            error = f"{100 * row.error:.2f} % (mean {error})"
        law = f"{SIGNS[row.law]} = k C^a" if row.law in SIGNS else row.law
        table.add_row(f"{row.left_out} {number(row.value)}", law, number(row.predicted, 4), number(row.found, 4), error)
    _show(table, console)


def _show_frontier(frontier: Frontier, percent: str, console: Console) -> None:
    table = _table("\nfrontier", "from", "to", "method")
    for row in frontier.segments:
        table.add_row(number(row.from_flop), number(row.to_flop), row.method)
    if table.row_count:
        console.print(table)
    for each in frontier.crossings:
        console.print(
            f"{each.below} to {each.above} at {number(each.budget_flop)} FLOP, {percent}: {spread(each.interval)}"
        )


def show_simulation(result: Mapping[str, Simulated], console: Console) -> None:
    """Print the result of `simulate.simulate`."""
    for name, found in result.items():
        console.print(f"\n{name}: {found.runs} runs, noise of ln L {number(found.noise)}", style="bold")
        if found.refused:
            console.print(f"refused: {found.refused}")
            continue
        table = _table(f"{found.law} law, {found.repeats} sweeps", "coefficient", "truth", "mean", "95 %")
        for coefficient, each in found.coefficients.items():
            table.add_row(coefficient, number(each.truth, 4), *measured(each.mean, each.interval))
        exponent = found.n_exponent
        for estimator, by in (("law", exponent.law), ("parabola", exponent.parabola)):
            if by:
                shown = number(exponent.truth, 4), *measured(by.median, by.interval)
                table.add_row(f"exponent of N*, {estimator}", *shown)
        console.print(table)
        table = _table(
            "optima, as shares of the truth", "budget", "true N*", "parabola", "95 %", "without noise", "law", "95 %"
        )
        for row in found.optima:
            shares = [measured(by.median, by.interval, 3) if by else ("–", "–") for by in (row.parabola, row.law)]
            clean = number(None if row.bias_without_noise is None else 1 + row.bias_without_noise)
            truth = number(row.truth) if row.truth else "edge"
            table.add_row(number(row.budget_flop), truth, *shares[0], clean, *shares[1])
        console.print(table)
        table = _table("loss above the best, at the advised size", "budget", "law", "at worst", "parabola", "at worst")
        largest = max(row.budget_flop for row in found.optima)
        for advice in found.recipe:
            lost: list[str] = []
            for advised in (advice.law, advice.parabola):
                lost += [f"{100 * value:.3f} %" for value in (advised.mean, advised.high)] if advised else ["–", "–"]
            where = ", beyond the grid" if advice.budget_flop > largest else ""
            table.add_row(number(advice.budget_flop) + where, *lost)
        console.print(table)


FIT_OPTIONS = ("residual", "delta", "optimum", "window", "bins", "law", "noise", "bootstrap", "seed")


def _given(args: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options of these names that the user gave."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _refuse_unused(args: Namespace, mode: str, used: Sequence[str]) -> None:
    """Raise UserError for an option of the fit that a simulation or a replay would not look at."""
    for name in _given(args, [name for name in FIT_OPTIONS if name not in used]):
        raise UserError(f"--{name}: has no meaning with {mode}; leave it out")


def command(args: Namespace) -> int:
    """Run `embedscale fit`: load, fit, write fits.json, and print what it says."""
    from analysis import runs as loading
    from analysis import study
    from analysis.fitting.fit import fit
    from embedscale.progress import Bar

    out = _folder(args)
    study.check_out(out)
    where = parse_assignments("where", args.where)
    ignore = tuple(name.strip() for word in args.ignore or () for name in word.split(","))
    runs = loading.load(args.runs, parse_assignments("columns", args.columns), where, ignore)
    # A refit far off the data may leave a float's range; it is left out, and numpy need not tell the terminal.
    with Bar("fit") as bar, np.errstate(all="ignore"):
        fits = fit(runs, where=where, advance=bar.say, **_given(args, FIT_OPTIONS))
    path = study.write(fits, runs, out)
    if args.json:
        print_json(read(path).to_json())
        return 0
    output = console(WIDTH)
    show_fits(fits, output)
    output.print(f"\nwritten: {path}", soft_wrap=True)
    return 0


def _folder(args: Namespace) -> Path:
    """Return the folder for results: the one that is named, or else that of the runs."""
    return Path(args.out or (args.runs if Path(args.runs).is_dir() else "."))


def simulation(args: Namespace, rows: "pd.DataFrame | None") -> int:
    """Run `embedscale fit SWEEP --simulate LAW`: print what the sweep would find; `rows` are a sweep file's runs."""
    from analysis import simulate
    from analysis.runs import load_grid

    if args.where:
        raise UserError("--where: selects finished runs; change the sweep file to select runs of a sweep")
    if args.out:
        check_folder(args.out, "--out")
    laws = simulate.stated_laws(args.simulate)  # first, so that a mistyped law is told at once
    if rows is None:
        rows = load_grid(args.runs, parse_assignments("columns", args.columns))
    noise = simulate.stated_noise(args.simulate) if args.noise is None else args.noise
    if args.replay is not None:
        _refuse_unused(args, "--simulate and --replay", ["noise"])
        return _tried(rows, laws, noise, args)
    _refuse_unused(args, "--simulate", ["noise", "window", "seed"])
    result = simulate.simulate(rows, laws, noise, **_given(args, ["window", "seed"]))
    if args.json:
        print_json({name: found.to_json() for name, found in result.items()})
    else:
        show_simulation(result, console(WIDTH))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "simulation.json", {name: found.to_json() for name, found in result.items()})
        print(f"\nwritten: {Path(args.out) / 'simulation.json'}")
    return 0


def _tried(rows: "pd.DataFrame", laws: "Mapping[str, StatedLaw]", noise: float, args: Namespace) -> int:
    """Print what an adaptive sweep over this grid would find, and what it would miss."""
    from analysis import simulate
    from analysis.design import replay
    from embedscale.progress import Bar

    if args.replay != "largest":
        raise UserError(f"--replay: {args.replay!r} selects rows of a table; with --simulate, allowed: largest")
    if not 0 < noise <= 1:
        raise UserError(f"noise: {noise} is out of range; allowed: above 0, at most 1, the standard deviation of ln L")
    drawn = simulate.draw(rows, laws, 0.0)
    if "run" not in drawn:
        drawn["run"] = [f"row {i + 1}" for i in drawn.index]
    given = replay.replay_of(drawn)
    settings = given.pool.settings
    pool = dataclasses.replace(given.pool, candidates=replay.candidates_of(drawn.sort_values("run"), settings))
    found = []
    with Bar("sweeps", replay.REPEATS * (len(replay.SHARES) + 1)) as bar:
        for row in replay.trial(pool, given.losses, noise):
            found.append(row)
            bar.advance()
    return _told(dataclasses.replace(given, pool=pool), found, args)


def replayed(args: Namespace) -> int:
    """Run `embedscale fit TABLE --replay WHAT`: print what each way to spend finds; write a CSV and figures."""
    from analysis import runs as loading
    from analysis.design import replay
    from embedscale.progress import Bar

    _refuse_unused(args, "--replay", [])
    check_folder(_folder(args), "--out")
    columns, where = parse_assignments("columns", args.columns), parse_assignments("where", args.where)
    ignore = tuple(name.strip() for word in args.ignore or () for name in word.split(","))
    asked = None
    if args.replay != "largest":
        chosen = parse_assignments("replay", [args.replay])
        asked = list(loading.load(args.runs, columns, where | chosen, ignore).table["run"])
        ignore += tuple(chosen) if Path(args.runs).is_file() else ()
    given = replay.replay_of(loading.load(args.runs, columns, where, ignore).table, asked)
    rows = []
    with Bar("replay", replay.steps()) as bar:
        for row in replay.replay(given):
            rows.append(row)
            bar.advance()
    return _told(given, rows, args)


def _told(given: "Replay", rows: list[dict[str, Any]], args: Namespace) -> int:
    """Write the rows of a replay as a CSV and a figure, and print them."""
    import pandas as pd

    from analysis.figures.catalogue import save
    from analysis.figures.replay import replayed as drawn
    from analysis.figures.style import style

    out, found = _folder(args), pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    with style():
        save(drawn(found), out / "replay")
    if args.json:
        print_json(rows)
        return 0
    output = console(WIDTH)
    show_replay(given, found, output)
    output.print(f"\nwritten: {out / 'replay.csv'}, replay.png and replay.pdf", soft_wrap=True)
    return 0


def show_replay(given: "Replay", found: "pd.DataFrame", console: Console) -> None:
    """Print the means over repeats of `design.replay.replay`."""
    pool = given.pool
    budgets = sorted({each.budget_flop for each in pool.options})
    asked = "losses" if pool.question == "forecast" else "best size"
    console.print(
        f"asked: the {asked} of {len(pool.options)} rows of {number(budgets[0])} to {number(budgets[-1])} FLOP; "
        f"{len(pool.candidates)} rows of {number(pool.cost)} FLOP may be run"
    )
    names = {"r2": "R²", "error": "error of ln L", "regret": "loss above the best"}
    shown = [name for name in names if name in found and not (name == "r2" and "regret" in found)]
    table = _table("\nreplay", "spends by", "share", "runs", *(names[name] for name in shown), "worst")
    for _, rows in found.groupby(["spender", "share"], sort=False):
        spender, share = str(rows["spender"].iloc[0]), float(rows["share"].iloc[0])
        means = [number(rows[name].mean()) if name == "r2" else f"{100 * rows[name].mean():.2f} %" for name in shown]
        last = rows[shown[-1]].max() if shown[-1] != "r2" else rows["r2"].min()
        table.add_row(spender, f"{100 * share:g} %", f"{rows['runs'].mean():.0f}", *means, f"{100 * last:.2f} %")
    console.print(table)
