"""An adaptive sweep: the runs of a grid are chosen in rounds, until the recipe is good enough or the money is spent.

The grid of a sweep file is the pool. `analysis.design` chooses, `slurm` runs; only this module knows both. A round is
written to choices.json before its runs go out, and the next round is chosen when all of them have ended. So stopping
and starting anywhere gives the same choices. The price is that nodes wait for the longest run of a round.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from analysis.advice.evidence import parse_limit
from analysis.design.choice import Answer, Candidate, Design, Pool
from analysis.fitting.laws import Chinchilla
from embedscale.adaptive.choices import FILE, Choices, ChosenRun, Round
from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.run.config import RunConfig
from embedscale.run.cost import cost_of
from embedscale.run.directory import RunDirectory
from embedscale.run.families import family_of
from embedscale.run.record import RunRecord
from embedscale.texts import counted, number
from slurm import grid
from slurm.cluster import shape_of
from slurm.grid import Sweep
from slurm.plan import Estimate, SweepPlan, plan_sweep
from slurm.scheduler.choice import scheduler_of
from slurm.scheduler.over import tell_if_over
from slurm.scheduler.submissions import Submissions
from slurm.status import ENDED, RunState, survey
from slurm.submit import Wish, destination, run_here, submit

# Settings in which the runs of an adaptive sweep may differ, or that do not change a loss.
FREE = {"backbone.name", "backbone.revision", "method", "budget", "training.learning_rate", "training.seed"}
FREE |= {"resources", "output"}
SETTINGS = ("rank", "active fraction", "learning rate")
WIDEST = 16  # runs of a round at most: a wider one is chosen from too little
ENOUGH = 5e-4  # expected regret, as a share of the loss, at which the recipe is good enough
ROUNDS = 3  # rounds in a row that have to say so
POLL_SECONDS = 10.0

Runner = Callable[[Sweep], int]
"""Brings the runs of a part of the sweep to their ends. Returns an exit status, INTERRUPTED where some did not end."""


# --- The question ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Money:
    """What may be spent, in one of two units."""

    amount: float
    hours: bool

    @property
    def unit(self) -> Literal["FLOP", "device-hours"]:
        return "device-hours" if self.hours else "FLOP"

    def cost(self, estimate: Estimate) -> float:
        """Return what a run costs by the plan."""
        return estimate.gpu_hours if self.hours else float(estimate.spent_flop)

    @staticmethod
    def of(text: str, plan: SweepPlan) -> "Money":
        """Return the money of a text such as 1e18, "24 device-hours" or "15 %" of the grid's FLOP.

        Raises UserError for other texts.
        """
        share = text.strip().removesuffix("%")
        if share != text.strip():
            try:
                value = float(share) / 100
            except ValueError:
                raise UserError(f"--spend: {text!r} is not a share; write it as 15%") from None
            if not 0 < value <= 1:
                raise UserError(f"--spend: {text} is out of range; allowed: above 0 %, at most 100 %")
            return Money(value * plan.spent_flop, False)
        try:
            limit = parse_limit(text)
        except UserError as error:
            raise UserError(f"--spend: {str(error).removeprefix('budget: ')}, or a share of the grid: 15%") from None
        return Money(limit.flop or limit.gpu_hours or 0.0, limit.flop is None)


def pool_of(plan: SweepPlan, budget: float, money: Money) -> Pool:
    """Return the runs of a plan as a pool that is asked for the best run at a budget (FLOP).

    The options are the grid's runs at this budget or, if it has none, those of its largest budget moved there. Raises
    UserError if runs differ in more than size, method, budget, learning rate and seed: their losses would too.
    """
    runnable = plan.runnable
    if not runnable:
        raise UserError(f"{plan.sweep.name}: no run of the grid can be run; `embedscale sweep plan` says why")
    first: dict[str, Any] = {}
    for each in runnable:
        if differing := [key for key, value in _rest(each.run).items() if value != first.setdefault(key, value)]:
            raise UserError(
                f"--adaptive: runs differ in {differing[0]} too; allowed: backbone.name, method, budget, "
                "training.learning_rate and training.seed, so that losses can be compared"
            )
    rates: dict[Any, set[float]] = {}
    for each in runnable:  # a rate that follows from the size is no choice
        rates.setdefault(_place(each), set()).add(each.learning_rate)
    candidates = tuple(_candidate(each, money, len(rates[_place(each)]) > 1) for each in runnable)
    options = tuple(each for each in candidates if abs(each.budget_flop / budget - 1) < 1e-6)
    if not options:
        largest = max(each.budget_flop for each in candidates)
        scale = budget / largest
        options = tuple(
            replace(each, run=f"{each.run} at {number(budget)}", budget_flop=budget, tokens=each.tokens * scale)
            for each in candidates
            if each.budget_flop == largest
        )
    if len(options) < 2:
        raise UserError(
            "--adaptive: the grid has one method and size at its largest budget; there is nothing to choose"
        )
    return Pool(candidates, options, "recipe", SETTINGS)


def _rest(run: RunConfig) -> dict[str, Any]:
    """Return all settings of a run that no run of an adaptive sweep may change; each backbone has one revision."""
    found = dict(vars(run))
    for section in ("backbone", "training"):
        found |= {f"{section}.{key}": value for key, value in vars(found.pop(section)).items()}
    name, family = run.backbone.name, family_of(run.backbone.name)
    found |= {"backbone.family": family and family.name, f"backbone.revision of {name}": run.backbone.revision}
    return {key: value for key, value in found.items() if key not in FREE}


def _place(estimate: Estimate) -> tuple[object, ...]:
    return estimate.run.backbone.name, repr(estimate.run.method), estimate.run.budget


def _candidate(estimate: Estimate, money: Money, with_rate: bool) -> Candidate:
    run = estimate.run
    cost = cost_of(shape_of(run.backbone.name, run.backbone.revision), run.method)
    rank, share = run.method.rank, run.method.active_fraction
    settings = (rank and float(rank), share, estimate.learning_rate if with_rate else None)
    size, price = float(cost.n_parameters), money.cost(estimate)
    return Candidate(estimate.run_id, run.method.name, size, float(estimate.tokens), run.budget, price, settings)


# --- The rounds ------------------------------------------------------------------------------------------------------


def go_on(
    sweep: Sweep,
    plan: SweepPlan,
    budget: float,
    money: Money,
    run: Runner,
    retry_failed: bool = False,
    dry: bool = False,
) -> int:
    """Choose and run rounds until the recipe is good enough or the money is spent; print each choice.

    All runs of the grid that have finished count, whoever made them; the money pays those that are chosen here. Returns
    an exit status, that of `run` where it was interrupted. Raises UserError if the choices so far do not fit this call.
    The cluster's `on_done` runs when the sweep has ended, not when a round has. With `dry`, only the next round is
    chosen and given to `run`, which shows it, and nothing is written.
    """
    design, choices = Design(pool_of(plan, budget, money)), _begun(sweep, plan, budget, money)
    silent = replace(sweep, cluster=replace(sweep.cluster, on_done=None))
    retried: Collection[str] = ()
    while True:
        losses, states = _outcomes(sweep, plan)
        again = {RunState.FAILED} if retry_failed else set()
        left = [
            each.run for each in choices.runs
            if states[each.run] not in ENDED or (states[each.run] in again and each.run not in retried)
        ]  # fmt: skip
        if left:
            retried = {*retried, *left}
            choices = replace(choices, end=None)
            code = run(replace(silent, by_id={run_id: sweep.by_id[run_id] for run_id in left}))
            if code == INTERRUPTED or dry:
                return code
            ended = {run_id: state for run_id, state in _outcomes(sweep, plan)[1].items() if state in ENDED}
            if set(left) - set(ended):
                print("some chosen runs have not ended; the same command goes on with them")
                return code or INTERRUPTED
            if all(ended[run_id] in (RunState.FAILED, RunState.DAMAGED) for run_id in left):
                print("every run of this round failed; `embedscale sweep status` says why")
                _tell_end(sweep, choices)
                return FAILED
            continue
        answer = design.answer(design.belief(losses)) if losses else None
        lost = [run_id for run_id, state in states.items() if state in ENDED and run_id not in losses]
        recent = [each.regret for each in choices.rounds[1 - ROUNDS :]] + [answer.regret if answer else None]
        sure = len(recent) == ROUNDS and all(each is not None and each < ENOUGH for each in recent)
        batch = [] if sure else design.next_batch(losses, choices.money - choices.spent, choices.width, lost)
        if not batch:
            end = "the recipe is good enough" if sure else "the money is spent"
            print(_told(design, choices, end, answer, losses))
            if not dry:
                _keep(sweep, replace(choices, end=end))
                if choices.end is None:  # else an earlier call has told it
                    _tell_end(sweep, choices)
            return DONE
        price = {each.run: each.cost for each in design.pool.candidates}
        chosen = tuple(ChosenRun(each.run, each.why, price[each.run], each.is_check) for each in batch)
        best, regret = (describe(answer.best), answer.regret) if answer else (None, None)
        choices = replace(choices, rounds=(*choices.rounds, Round(chosen, len(losses), best, regret)), end=None)
        if not dry:
            _keep(sweep, choices)
        print("\n".join(choices.round_lines(-1 % len(choices.rounds))), flush=True)


def _begun(sweep: Sweep, plan: SweepPlan, budget: float, money: Money) -> Choices:
    """Return the choices so far, with the money of this call.

    Raises UserError if they were made for another budget, or if the grid no longer has one of the chosen runs.
    """
    width = min(sweep.cluster.max_gpus, WIDEST)
    choices = Choices.of(sweep.folder) or Choices(budget, money.amount, money.unit, width)
    if (choices.budget_flop, choices.unit) != (budget, money.unit):
        raise UserError(
            f"{sweep.folder / FILE}: the runs were chosen for {number(choices.budget_flop)} FLOP and paid in "
            f"{choices.unit}; give the same --for and unit of --spend, or another name to the sweep"
        )
    if gone := {each.run for each in choices.runs} - {each.run_id for each in plan.runnable}:
        raise UserError(
            f"{sweep.folder / FILE}: {min(gone)} was chosen, but is no run of the grid that can be run; restore the "
            "sweep file, or give another name to the sweep"
        )
    return replace(choices, money=money.amount)


def _keep(sweep: Sweep, choices: Choices) -> None:
    sweep.folder.mkdir(parents=True, exist_ok=True)
    choices.write(sweep.folder / FILE)


def _tell_end(sweep: Sweep, choices: Choices) -> None:
    """Run the cluster's `on_done` if all chosen runs have ended."""
    tell_if_over(Submissions(sweep.folder), sweep.cluster.on_done, [each.run for each in choices.runs])


def _outcomes(sweep: Sweep, plan: SweepPlan) -> tuple[dict[str, float], dict[str, RunState]]:
    """Return the losses of finished runs of the grid, and the state of every run that can be run."""
    runnable = {each.run_id for each in plan.runnable}
    states = {each.run_id: each.state for each in survey(sweep, None) if each.run_id in runnable}
    losses = {}
    for run_id, state in states.items():
        if state == RunState.DONE:
            record = RunDirectory(sweep.folder / run_id).read_record()
            if isinstance(record, RunRecord) and record.loss is not None and 0 < record.loss < float("inf"):
                losses[run_id] = record.loss
    return losses, states


def describe(option: Candidate) -> str:
    """Return a method with its size and settings in words."""
    known = [
        f"{name} {number(value)}" for name, value in zip(SETTINGS, option.settings, strict=True) if value is not None
    ]
    return ", ".join([option.method, f"{number(option.n_parameters)} parameters", *known])


def _told(design: Design, choices: Choices, end: str, answer: Answer | None, losses: Mapping[str, float]) -> str:
    """Return what was spent and what was found, in three lines."""
    if answer is None:
        return f"{end}: no run has finished, so there is no recipe"
    checks = sum(each.cost for each in choices.runs if each.check)
    chances = ", ".join(f"{name} {100 * share:.0f} %" for name, share in answer.chances.items() if share >= 0.005)
    return (
        f"{end}: {counted(len(choices.runs), 'run')} chosen for {number(choices.spent)} {choices.unit}, "
        f"{100 * choices.spent / design.pool.cost:.3g} % of the grid; {number(checks)} of it for checks of the law\n"
        f"at {number(choices.budget_flop)} FLOP, by {counted(len(losses), 'run')}: {describe(answer.best)}, loss "
        f"{_loss(design.pool, answer, losses)}\n"
        f"expected to lie {100 * answer.regret:.2g} % above the lowest loss; best method: {chances}"
    )


def _loss(pool: Pool, answer: Answer, losses: Mapping[str, float]) -> str:
    """Return the loss of the answer and where it is from, and the lowest measured loss of an option if that is lower.

    Where the runs of its method are too few for a law, the prior decides how wide the interval is. So none is told.
    """
    best, (low, high) = answer.best, answer.interval
    places = {
        (each.n_parameters, each.tokens)
        for each in pool.candidates
        if each.method == best.method and each.run in losses
    }
    loss = losses.get(best.run, answer.loss)
    if best.run in losses:
        source = "measured"
    elif len(places) > len(Chinchilla.coefficients):
        source = f"95 %: {number(low, 4)} to {number(high, 4)}"
    else:
        source = "too few runs for an interval"
    there = {losses[each.run]: describe(each) for each in pool.options if each.run in losses}
    lowest = min(there, default=loss)
    lower = f"; the lowest measured there: {number(lowest, 4)}, {there[lowest]}" if lowest < loss else ""
    return f"{number(loss, 4)} ({source}){lower}"


# --- The command -----------------------------------------------------------------------------------------------------


def _queued(part: Sweep, plan: SweepPlan, wish: Wish) -> int:
    """Send runs to the scheduler and wait for their ends."""
    scheduler, submissions = scheduler_of(part.cluster.scheduler, part.folder), Submissions(part.folder)
    submit(part, plan, scheduler, wish)
    while not wish.dry:
        jobs = submissions.jobs_by_run(scheduler.jobs())
        states = {each.state for each in survey(part, jobs)}
        if jobs is not None and not states & {RunState.RUNNING, RunState.QUEUED, RunState.PREEMPTED}:
            break
        time.sleep(POLL_SECONDS)
    return DONE


def command(args: Namespace) -> int:
    """`embedscale sweep submit SWEEP.yaml --adaptive --spend MONEY [--for BUDGET]`."""
    if args.evaluate:
        raise UserError("--evaluate: scores finished runs; submit again with it, without --adaptive")
    if args.spend is None:
        raise UserError("--adaptive: what may be spent? Give --spend 15% (of the grid), 1e18 or '24 device-hours'")
    sweep = grid.load(args.sweep, args.words)
    plan = plan_sweep(sweep)
    budget = max((each.run.budget for each in plan.runnable), default=0.0)
    if args.budget is not None:
        limit = parse_limit(args.budget)
        if limit.flop is None:
            raise UserError(f"--for: {args.budget} is not a number of FLOP; write 1e18 or 100 PFLOP")
        budget = limit.flop
    wish = Wish(args.retry_failed, args.max_gpu_hours, dry=args.dry_run)
    run = partial(run_here if destination(sweep, args.to) == "here" else _queued, plan=plan, wish=wish)
    return go_on(sweep, plan, budget, Money.of(args.spend, plan), run, args.retry_failed, args.dry_run)
