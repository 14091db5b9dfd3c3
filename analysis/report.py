"""`embedscale report`: one self-contained HTML page, the recipe first, with every figure and what it stands on.

The figures lie beside it as PNG, PDF and CSV, and inside it as data, so that the page alone can be sent.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import evidence, recipe, study
from analysis import fits as fits_file
from analysis.fits import HYPERPARAMETERS
from analysis.runs import EXCLUDED
from analysis.study import Study
from analysis.summary import number, spread
from embedscale.errors import UserError
from embedscale.files import write_atomically

FILE = "report.html"
FOLDER = "figures"
SHOWN_ROWS = 60  # of the runs left out; all of them are in excluded.csv

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1.2rem 4rem; color: #1c1c1c; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; } .quiet { color: #555; font-size: .88rem; }
.warning { background: #fff4d6; border-left: 4px solid #c98a00; padding: .5rem .8rem; }
#recipe { background: #eef4fa; border: 1px solid #b8cfe4; border-radius: 6px; padding: .6rem 1rem 1rem;
  margin-top: .8rem; }
#recipe h2 { border: 0; margin: .2rem 0; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1rem; margin: .4rem 0; }
dt { color: #555; } dd { margin: 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .18rem .7rem .18rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top;
  overflow-wrap: normal; } th { border-bottom-color: #999; white-space: nowrap; }
figure { margin: 1.4rem 0; } figcaption { font-size: .88rem; color: #333; max-width: 46rem; }
figure img { display: block; max-width: 100%; height: auto; }
nav a { margin-right: .9rem; } .missing { color: #8a4b00; }
@media (max-width: 640px) { body { padding: .6rem .7rem 3rem; font-size: 15px; }
  dl { grid-template-columns: 1fr; gap: 0; } dt { margin-top: .35rem; font-size: .85rem; }
  figure img.two { max-width: none; width: 44rem; } }
"""


def _e(value: Any) -> str:
    return html.escape(str(value))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_e(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _definitions(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_e(name)}</dt><dd>{_e(text)}</dd>" for name, text in rows) + "</dl>"


def _percent(fits: Mapping[str, Any]) -> str:
    return f"{100 * fits['settings']['confidence']:.0f} %"


# --- Sections --------------------------------------------------------------------------------------------------------


def _recipes(fits: Mapping[str, Any], runs: list[dict[str, str]], budgets: Sequence[str]) -> str:
    """The recipe of the first budget in full, and of all budgets as a table."""
    every = [float(budget) for budget in fits["runs"]["budgets"]]
    if len(every) > 8:
        every = [float(each) for each in np.geomspace(every[0], every[-1], 6)]
    asked = [evidence.parse_limit(budget) for budget in budgets]
    limits = asked + [evidence.Limit(flop=budget) for budget in [*every, 4 * every[-1]]]
    columns = ["budget (FLOP)", "method", "model", "best size", "tokens", "pairs", "steps", "peak rate"]
    columns += [f"expected loss ({_percent(fits)})", "next best loses", "extrapolates"]
    rows, first = [], None
    for limit in limits:
        try:
            found = recipe.recipe(fits, limit, runs)
        except UserError as error:
            rows.append([limit.text, str(error), *[""] * (len(columns) - 2)])
            continue
        best = found.best
        if limit is (asked[0] if asked else limits[-2]):
            first = found
        rival = min((each for each in found.others if each["lost"] > 0), key=lambda each: each["lost"], default=None)
        rows.append(
            [
                limit.text.removesuffix(" FLOP"),
                best.label,
                best.backbone,
                f"{found.n_opt:.3g}",
                f"{best.tokens:.3g}",
                f"{best.pairs:,.0f}",
                f"{best.steps:,}",
                "–" if best.learning_rate is None else f"{best.learning_rate:.2g}",
                f"{best.loss:.4g} ({spread(best.loss_interval, 4)})",
                f"{rival['what']}: +{100 * rival['lost']:.1f} %" if rival else "–",
                "; ".join(found.extrapolates) or "no",
            ]
        )
    full = _definitions(recipe.lines(first, fits["settings"]["confidence"])) if first else ""
    title = f"What to train for {first.limit.text}" if first else "What to train"
    return f'<section id="recipe"><h2>{_e(title)}</h2>{full}</section>\n<h3>Every budget</h3>{_table(columns, rows)}'


def _figures(written: Sequence[Any]) -> str:
    parts = []
    for each in written:
        if each.png is None:
            continue
        data = each.png.read_bytes()
        width = int.from_bytes(data[16:20])
        image = base64.b64encode(data).decode()
        kind = "two" if width > 1000 else "one"
        style = f"width:{width // 2 if kind == 'one' else int(width / 1.6)}px"
        parts.append(
            f'<figure id="{each.name}"><h3>{_e(each.title)}</h3><div class="wide"><img class="{kind}" style="{style}" '
            f'alt="{_e(each.caption)}" src="data:image/png;base64,{image}"></div>'
            f"<figcaption>{_e(each.caption)} <span class=quiet>{FOLDER}/{each.name}.csv</span></figcaption></figure>"
        )
    return "\n".join(parts) or "<p>No figure could be drawn.</p>"


def _laws(fits: Mapping[str, Any]) -> str:
    power, joint, held, optima = [], [], [], []
    for name, method in fits["methods"].items():
        for row in method["optima"]:
            optima.append(
                [name, number(row["budget"]), row["state"], number(row["n_opt"]), spread(row["n_opt_interval"])]
                + [number(row["d_opt"]), number(row["loss"], 4), spread(row["loss_interval"], 4)]
                + [number(row[each] and row[each]["n_opt"]) for each in ("akima", "law")] + [row["why"]]
            )  # fmt: skip
        for key, sign in (("n_opt", "N*"), ("d_opt", "D*"), ("loss", "L*")):
            law = method["power_laws"][key]
            if law:
                weighted = law["weighted"] or {}
                power.append(
                    [
                        name,
                        f"{sign} = k C^a",
                        number(law["exponent"], 4),
                        spread(law["exponent_interval"]),
                        number(law["coefficient"], 4),
                        spread(law["coefficient_interval"]),
                        number(weighted.get("exponent"), 4),
                        law["points"],
                    ]
                )
        for key, law in method["joint_laws"].items():
            if "refused" in law:
                joint.append([name, key, "none", law["refused"], "", ""])
                continue
            done = law["convergence"]
            for i, (coefficient, ends) in enumerate(law["intervals"].items()):
                fixed = coefficient not in law["not_fixed"]
                value = number(law[coefficient], 4) if fixed else "not fixed by the data"
                told = f"{done['agreeing']} of {done['starts']} starts agree, spread of ln L {law['log_residual']:.2g}"
                joint.append([name, key, coefficient, value, spread(ends) if fixed else "", told if not i else ""])
        for row in method["hold_out"]:
            held.append(
                [
                    name,
                    f"{row['left_out']} {number(row['value'])}",
                    row["law"],
                    number(row["predicted"], 4),
                    number(row["found"], 4),
                    f"{100 * row['error']:.2f} %",
                    f"{100 * row['bias']:+.2f} %",
                ]
            )
    percent = _percent(fits)
    shown = optima if len(optima) <= 80 else [row for row in optima if row[2] != "too few"]
    compared = [
        [
            number(each["budget"]),
            each["a"],
            each["b"],
            f"{100 * np.expm1(each['difference']):+.2f} %",
            {True: "yes", False: "no", None: "unknown"}[each["distinguishable"]],
        ]
        for each in fits["frontier"]["comparisons"]
        if len(fits["runs"]["budgets"]) <= 20
    ]
    crossings = [
        [each["below"], each["above"], number(each["budget"]), spread(each["interval"])]
        for each in fits["frontier"]["crossings"]
    ]
    parts = [
        ("Power laws of the optima", ["method", "law", "a", percent, "k", percent, "a, weighted", "optima"], power),
        ("Joint laws", ["method", "law", "coefficient", "value", percent, "fit"], joint),
        ("Held out", ["method", "without", "law", "predicted", "found", "error", "bias"], held),
        ("Where the best method changes", ["up to", "from", "budget (FLOP)", percent], crossings),
        ("Methods compared", ["budget", "a", "b", "loss of a over b", "distinguishable"], compared),
        (
            "Optima",
            ["method", "budget", "state", "N*", percent, "D*", "loss", percent, "N*, Akima", "N*, law", "why"],
            shown,
        ),
    ]
    return "".join(f"<h3>{_e(title)}</h3>{_table(columns, rows)}" for title, columns, rows in parts if rows)


def _left_out(found: Study, written: Sequence[Any]) -> str:
    counts = found.excluded["reason"].value_counts()
    told = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
    rows = found.excluded.head(SHOWN_ROWS).fillna("").to_numpy().tolist()
    more = len(found.excluded) - len(rows)
    parts = [f"<p>{len(found.table)} runs are used. Left out: {_e(told)}.</p>"]
    if rows:
        parts.append(_table(EXCLUDED, rows))
    if more > 0:
        parts.append(f'<p class="quiet">and {more} more, in excluded.csv</p>')
    missing = [[each.title, each.missing] for each in written if each.missing]
    if missing:
        parts.append("<h3>Figures that could not be drawn</h3>" + _table(["figure", "why"], missing))
    return "".join(parts)


def _distinct(table: pd.DataFrame, name: str, most: int = 8) -> str:
    if name not in table or table[name].isna().all():
        return ""
    values = sorted(table[name].dropna().unique())
    told = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:most])
    return told + (f", … ({len(values)} values)" if len(values) > most else "")


def _settings(found: Study) -> str:
    fits = found.fits
    rows = [(f"fit: {name}", str(value)) for name, value in fits["settings"].items()]
    rows += [(f"same for all: {name}", f"{value}") for name, value in fits["comparable"].items()]
    rows += [(f"varied or fixed: {name}", _distinct(found.table, name)) for name in HYPERPARAMETERS]
    return _definitions((name, value) for name, value in rows if value)


def _costs(found: Study) -> str:
    table, rows = found.table, []
    for method in [*found.methods, None]:
        part = table if method is None else table[table["method"] == method]
        row: list[Any] = [method or "all", len(part)]
        for name in ("budget", "spent_flop", "spent_flop_exact", "tokens", "gpu_hours"):
            known = name in part and part[name].notna().any()
            row.append(f"{part[name].sum():.4g}" if known else "not recorded")
        rows.append(row)
    columns = ["method", "runs", "budgets (FLOP)", "spent (FLOP, paper)", "spent (FLOP, exact)", "tokens", "GPU-hours"]
    return _table(columns, rows) + "<p class=quiet>Used runs alone; what was left out is not counted.</p>"


def _checklist(found: Study) -> str:
    """What a reader needs to do it again, each with its answer or the word that it is not recorded."""
    fits, table = found.fits, found.table
    settings, same, noise = fits["settings"], fits["comparable"], fits["noise"]
    seeds = table["seed"].nunique() if "seed" in table and table["seed"].notna().any() else 0
    starts = {
        law["convergence"]["starts"]
        for method in fits["methods"].values()
        for law in method["joint_laws"].values()
        if "convergence" in law
    }
    evaluation = [f"{name.split('.')[1]} {value}" for name, value in same.items() if name.startswith("evaluation.")]
    varied = [name for name in HYPERPARAMETERS if name in table and table[name].nunique() > 1]
    reasons = found.excluded["reason"].value_counts()
    schedule = [f"{name} {_distinct(table, name)}" for name in ("warmup_fraction", "final_fraction") if name in table]
    answers = [
        ("Form of the laws", "N*, D*, L* = k C^a; L(N, D) = E + A/N^α + B/D^β; "
         "L(S, N, D) = E + (a_d ln D + b_d)/N^α + (a_s (1−S)^b_s + c_s)/D^β"),
        ("N", "parameters of the backbone without the token embedding"),
        ("D", "real tokens of queries and positives that were processed, padding not included"),
        ("C", "2 (N_F + N_B + N_U) D, the paper's convention; budgets group the runs"),
        ("Loss", "contrastive, held out, in nats; " + ", ".join(evaluation) if evaluation else ""),
        ("Data", _distinct(table, "data_digest") or _distinct(table, "data")),
        ("Batch size and context", ", ".join(f"{same[name]:g}" for name in ("batch_size", "context") if name in same)),
        ("Which checkpoints", "the end of a finished schedule alone; unfinished runs are left out"),
        ("Learning rates", _distinct(table, "learning_rate")),
        ("Schedule", "; ".join(schedule)),
        ("Hyper-parameters compared", ", ".join(varied) or "none: one value each"),
        ("Seeds", f"{seeds}" if seeds else ""),
        ("Noise of ln L", f"{number(noise['log_loss'])}, from {noise['source']}" if noise["log_loss"] else ""),
        ("Fit", f"residual {settings['residual']}, δ {settings['delta']:g}, "
         f"{', '.join(map(str, sorted(starts))) or 'no'} starts; "
         f"optima by {settings['optimum']}, window {settings['window']:g}"),
        ("Intervals", f"{_percent(fits)} percentile, {settings['bootstrap']} draws, seed {settings['seed']}"),
        ("Left out", ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing"),
        ("Hardware", _distinct(table, "device")),
        ("Precision", _distinct(table, "precision")),
        ("Code of the runs", "; ".join(found.code)),
        ("Code of the fits", f"embedscale {fits['version']}, {fits['made']}"),
        ("Every run", "runs.csv and excluded.csv beside this page; each figure's values in its own CSV"),
    ]  # fmt: skip
    rows = [("✓" if answer else "✗", question, answer or "not recorded by these runs") for question, answer in answers]
    return _table(["", "what", "here"], rows)


def page(found: Study, written: Sequence[Any], runs: list[dict[str, str]], budgets: Sequence[str] = ()) -> str:
    """The whole page."""
    fits = found.fits
    counts = fits["runs"]
    warning = fits_file.miniature(fits)
    sections = [
        ("figures", "Figures", _figures(written)),
        ("laws", "Laws", _laws(fits)),
        ("left-out", "What was left out", _left_out(found, written)),
        ("notes", "Notes", "<ul>" + "".join(f"<li>{_e(note)}</li>" for note in fits["notes"]) + "</ul>"),
        ("settings", "Settings", _settings(found)),
        ("costs", "Costs", _costs(found)),
        ("checklist", "Reproducibility", _checklist(found)),
    ]
    links = "".join(f'<a href="#{name}">{_e(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<h2 id="{name}">{_e(title)}</h2>\n{text}\n' for name, title, text in sections)
    told = f'<p class="warning">This is {_e(warning)}.</p>' if warning else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>embedscale: {_e(Path(fits['source']).name)}</title><style>{CSS}</style></head><body>\n"
        f"<h1>Compute-optimal recipe</h1><p class=quiet>{_e(fits['source'])}: {counts['used']} runs, "
        f"{len(counts['budgets'])} budgets, {len(counts['sizes'])} sizes; {counts['excluded']} left out. "
        f"embedscale {_e(fits['version'])}, {_e(fits['made'])}.</p>{told}\n"
        f"{_recipes(fits, runs, budgets)}\n<nav>{links}</nav>\n{body}</body></html>\n"
    )


def command(args: Any) -> int:
    """`embedscale report FITS`: write report.html and the figures."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    for budget in args.budget or []:
        evidence.parse_limit(budget)
    found = study.load(args.fits)
    if args.compare:
        found = replace(found, other=study.load(args.compare))
    from analysis.figures import catalogue as figures  # matplotlib, once there is something to draw

    _, runs = recipe.read(args.fits)
    folder = Path(args.out) if args.out else Path(args.fits) if Path(args.fits).is_dir() else Path(args.fits).parent
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True)
    with bar:
        task = bar.add_task("figures")
        written = figures.write(found, folder / FOLDER, lambda what: bar.update(task, description=what))
    text = page(found, written, runs, args.budget or [])
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))
    drawn = sum(each.png is not None for each in written)
    print(f"{drawn} figures as PNG, PDF and CSV: {folder / FOLDER}")
    for each in written:
        if each.missing:
            print(f"  not drawn: {each.title}: {each.missing}")
    if fits_file.miniature(found.fits):
        print(f"note: {fits_file.miniature(found.fits)}")
    print(f"written: {folder / FILE}")
    return 0
