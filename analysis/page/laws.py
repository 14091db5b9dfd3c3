"""The tables of the page about what the fits say: laws, hold-outs, methods compared, and optima."""

import numpy as np

from analysis.fits import Fits
from analysis.fitting.laws import LAWS
from analysis.page.table import Link, Rows, Table
from analysis.study import Study
from analysis.summary import SIGNS
from embedscale.texts import measured, number

SHOWN_OPTIMA = 80  # above which budgets with too few sizes are not listed
SHOWN_COMPARISONS = 20  # budgets above which methods are not compared at each
EXACT = 3  # points that a parabola goes through exactly


def laws(found: Study) -> list[Table]:
    """Return what the fits say, a table a kind; a table without rows is not shown."""
    fits = found.fits
    percent = fits.settings.percent
    return [
        Table(
            "Power laws of the optima",
            ["method", "law", "a", percent, "k", percent, "a, weighted", "optima"],
            _power_laws(fits),
        ),
        Table("Joint laws", ["method", "law", "coefficient", "value", percent, "fit"], _joint_laws(fits)),
        Table("Held out", ["method", "without", "law", "predicted", "found", "error", "bias"], _held_out(fits)),
        Table(
            "Where the best method changes",
            ["up to", "from", "budget (FLOP)", percent],
            [
                [each.below, each.above, *measured(each.budget_flop, each.interval, 3)]
                for each in fits.frontier.crossings
            ],
        ),
        _compared(fits),
        Table(
            "Optima",
            ["method", "budget", "state", "N*", percent, "D*", "loss", percent, "N*, Akima", "N*, law", "remark"],
            _optima(found),
        ),
    ]


def _power_laws(fits: Fits) -> Rows:
    rows = []
    for name, method in fits.methods.items():
        for quantity, sign in SIGNS.items():
            law = getattr(method.power_laws, quantity)
            if law:
                exponent = measured(law.exponent, law.exponent_interval)
                coefficient = measured(law.coefficient, law.coefficient_interval)
                weighted = number(law.weighted.exponent if law.weighted else None, 4)
                told = f"{law.points}: exact, no residual" if law.points < EXACT else law.points
                rows.append([name, f"{sign} = k C^a", *exponent, *coefficient, weighted, told])
    return rows


def _joint_laws(fits: Fits) -> Rows:
    rows = []
    for name, method in fits.methods.items():
        for law in LAWS:
            if law in method.refused:
                rows.append([name, law, "none", method.refused[law], "", ""])
            if law not in method.joint_laws:
                continue
            fitted = method.joint_laws[law]
            done = fitted.convergence
            told = f"{done.agreeing} of {done.starts} starts agree, spread of ln L {number(fitted.log_residual, 2)}"
            for coefficient, ends in fitted.intervals.items():
                value, within = measured(fitted.coefficients[coefficient], ends)
                if coefficient in fitted.not_fixed:
                    value, within = "not fixed by the data", ""
                rows.append([name, law, coefficient, value, within, told])
                told = ""
    return rows


def _held_out(fits: Fits) -> Rows:
    return [
        [
            name,
            f"{row.left_out} {number(row.value)}",
            row.law,
            number(row.predicted, 4),
            number(row.found, 4),
            f"{100 * row.error:.2f} %",
            f"{100 * row.bias:+.2f} %",
        ]
        for name, method in fits.methods.items()
        for row in method.hold_out
    ]


def _compared(fits: Fits) -> Table:
    """Return the pairs that noise separates, a row each, and one sentence on the others."""
    alike: dict[tuple[str, str], list[str]] = {}
    unknown, rows = 0, []
    for each in fits.frontier.comparisons:
        if each.distinguishable is False:
            alike.setdefault((each.a, each.b), []).append(number(each.budget_flop))
        elif each.distinguishable is None:
            unknown += 1
        else:
            rows.append([number(each.budget_flop), each.a, each.b, f"{100 * np.expm1(each.difference):+.2f} %"])
    told = "; ".join(f"{a} and {b} at {', '.join(budgets)} FLOP" for (a, b), budgets in alike.items())
    more = [f"Not distinguishable within the noise: {told}." if alike else ""]
    more.append(f"Without a known noise, {unknown} pairs cannot be told apart or alike." if unknown else "")
    if len(fits.runs.budgets) > SHOWN_COMPARISONS:
        rows = []
    return Table("Methods compared", ["budget", "a", "b", "loss of a over b"], rows, " ".join(filter(None, more)))


def _optima(found: Study) -> Rows:
    every = [(name, row) for name, method in found.fits.methods.items() for row in method.optima]
    rows = []
    for name, row in every:
        if len(every) > SHOWN_OPTIMA and row.state == "too few":
            continue
        remark = row.why
        if row.interior and found.fits.settings.optimum == "parabola":
            points = found.window(found.profile(name, row.budget_flop)).sum()
            remark = f"{points} points" + (": exact, no residual" if points == EXACT else "")
        others = [number(each.n_opt if each else None) for each in (row.akima, row.law)]
        own = *measured(row.n_opt, row.n_opt_interval, 3), number(row.d_opt)
        state = Link(row.state, f"#word-{row.state.replace(' ', '-')}")
        loss = measured(row.loss, row.loss_interval)
        rows.append([name, number(row.budget_flop), state, *own, *loss, *others, remark])
    return rows
