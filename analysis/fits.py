"""fits.json as values: what `embedscale fit` found, and `read`, which checks a file and returns its `Fits`.

No pandas here, because `embedscale recipe` starts without it. Loss is in nats. Budgets are FLOP of the paper's
convention. Sizes are non-embedding parameters. None stands where the data do not tell a value. `FORMAT` is raised when
the layout changes; a file of format 1 (version 0.1) is translated when it is read (`first_version`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from analysis import first_version
from analysis.noise import Noise
from embedscale.errors import UserError
from embedscale.files import digest_file, read_json
from embedscale.values import CHANGED, Amount, Count, Share, Value, changed

FORMAT = 2
FILE = "fits.json"
LEAST = 1500.0  # parameters; smaller sizes are in another unit: the models that people train have 14 to 70,000 million
MINIATURE = 1e6  # parameters; results of sweeps below this size do not carry over to the sizes that people use

Interval = tuple[float, float]
"""Low and high end of a percentile interval; `settings.confidence` says which."""
Draws = tuple[tuple[float | None, ...], ...]
"""One row for each bootstrap draw that is kept."""
State = Literal["interior", "edge", "too few", "diverged", "too narrow", "below all runs", "uneven"]
"""Whether a budget has an optimum, and why not (`fitting.optima` states the rules)."""
Estimator = Literal["parabola", "akima", "law", "best-run"]


# --- What was run ----------------------------------------------------------------------------------------------------


def same_budget(a: float, b: float) -> bool:
    """Return whether runs of these budgets can be compared: within 10 %, as in `grouping.group_budgets`."""
    return math.isclose(a, b, rel_tol=0.1)


@dataclass(frozen=True)
class Point(Value):
    """The best setting of a method at one budget and size; its replicates are averaged."""

    budget_flop: Amount
    n_parameters: Amount
    tokens: Amount
    loss: Amount
    flop_per_token: Amount
    seeds: Count
    """Number of replicates."""
    tried: Count
    """Number of settings that this one was chosen from."""
    at_grid_end: tuple[str, ...] = ()
    """Hyper-parameters whose best value is the first or the last of at least three values."""
    backbone: str | None = None
    backbone_revision: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The chosen value of each hyper-parameter that the runs state."""
    pairs: Amount | None = None
    steps: Amount | None = None
    batch_size: Amount | None = None
    gpu_hours: Amount | None = None
    train_loss: float | None = None
    run: str | None = None
    off: float | None = None
    """ln L less that of the joint law, for a run that lies far off the law of the others (`joint.far_off`)."""

    def setting(self, name: str) -> Any:
        """Return the value of a hyper-parameter, or None where the runs do not state it."""
        return self.hyperparameters.get(name)


@dataclass(frozen=True)
class Exclusion(Value):
    """A run that is left out of the fit."""

    run: str
    reason: str
    """"unfinished", "diverged", "duplicate", "checkpoint", "no optimum", "unreadable" or "another COLUMN"."""
    detail: str | None = None
    method: str | None = None
    n_parameters: float | None = None
    budget_flop: float | None = None


@dataclass(frozen=True)
class Counts(Value):
    """How many runs there are, at which budgets and sizes."""

    used: Count
    excluded: Count
    budgets: tuple[float, ...]
    sizes: tuple[float, ...]


# --- Optima ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate(Value):
    """The optimum of one budget by one estimator: size, tokens and loss."""

    n_opt: float
    d_opt: float
    loss: float


@dataclass(frozen=True)
class Curve(Value):
    """The parabola ln L = loss + curvature (ln N − log_n)² through a profile's points near the best size."""

    log_n: float
    curvature: float


@dataclass(frozen=True)
class Optimum(Value):
    """The best size of a method at one budget, and whether the grid of sizes can tell it."""

    budget_flop: Amount
    state: State
    n_opt: float | None = None
    """N* by the estimator in `settings.optimum`; None unless the state is "interior". So are `d_opt` and `loss`."""
    d_opt: float | None = None
    loss: float | None = None
    n_opt_interval: Interval | None = None
    d_opt_interval: Interval | None = None
    loss_interval: Interval | None = None
    valid_share: Share | None = None
    """Share of bootstrap draws whose minimum lies inside the grid."""
    parabola: Estimate | None = None
    akima: Estimate | None = None
    law: Estimate | None = None
    curve: Curve | None = None
    best: Point | None = None
    add_size: float | None = None
    """Parameters of the size to add to the grid."""
    why: str = ""
    """Why there is no optimum, in one line."""

    @property
    def interior(self) -> bool:
        return self.state == "interior"

    @property
    def lowest_loss(self) -> float | None:
        """The loss of the optimum or, where there is none, of the best run."""
        return self.loss if self.interior else self.best.loss if self.best else None


# --- Laws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line(Value):
    """y = coefficient × C^exponent."""

    coefficient: float
    exponent: float
    coefficient_interval: Interval | None = None
    exponent_interval: Interval | None = None


@dataclass(frozen=True)
class PowerLaw(Value):
    """y = coefficient × C^exponent through the interior optima."""

    coefficient: float
    exponent: float
    points: Count
    coefficient_interval: Interval | None = None
    exponent_interval: Interval | None = None
    weighted: Line | None = None
    """The same law with each optimum weighted by its inverse variance (Porian et al. 2024)."""
    draws: Draws = ()
    """Rows of (ln coefficient, exponent)."""

    def at(self, budget_flop: Any) -> Any:
        """Return y at one budget or at an array of budgets."""
        return self.coefficient * budget_flop**self.exponent


@dataclass(frozen=True)
class PowerLaws(Value):
    """The power laws of a method; each is None below two interior optima."""

    n_opt: PowerLaw | None = None
    d_opt: PowerLaw | None = None
    loss: PowerLaw | None = None


@dataclass(frozen=True)
class Convergence(Value):
    """How the fit of a joint law ended."""

    starts: Count
    agreeing: Count
    """Starts that ended within 1e-6 of the best objective."""
    gradient: float | None
    """Largest component; 1 is a slope as large as the objective."""
    iterations: Count
    condition: float | None
    """Condition of the scaled normal matrix."""
    missed_refits: Count = 0
    """Bootstrap refits that did not converge, which are left out of the draws."""


@dataclass(frozen=True)
class Span(Value):
    """Smallest and largest value that a joint law was fitted to."""

    n_parameters: Interval
    tokens: Interval
    trainable_fraction: tuple[float | None, ...]


@dataclass(frozen=True)
class JointLaw(Value):
    """A law of the loss in N, D and, for some, S (`fitting.laws`)."""

    law: str
    coefficients: dict[str, float | None]
    intervals: dict[str, Interval | None]
    not_fixed: tuple[str, ...]
    """Coefficients that the data do not fix."""
    residual: str
    delta: float | None
    """Huber's δ on ln L."""
    objective: float | None
    runs: Count
    log_residual: float | None
    """Standard deviation of ln L about the law."""
    convergence: Convergence
    span: Span
    draws: Draws = ()
    """Rows of coefficients."""
    n_exponent: float | None = None
    """N* ∝ C^n_exponent; None where a token's cost is not proportional to N."""
    n_exponent_interval: Interval | None = None


@dataclass(frozen=True)
class HoldOut(Value):
    """A fit without the largest budget or size, and how well it predicts what was left out."""

    left_out: Literal["largest budget", "largest size"]
    value: float
    law: str
    """A joint law, or the power law of "n_opt" or "loss"."""
    predicted: float
    found: float
    error: float
    """Mean of |predicted / found − 1|."""
    bias: float
    """Mean of predicted / found − 1."""
    points: Count


@dataclass(frozen=True)
class MethodFit(Value):
    """All that the runs of one method say."""

    points: tuple[Point, ...]
    optima: tuple[Optimum, ...]
    power_laws: PowerLaws
    joint_laws: dict[str, JointLaw]
    refused: dict[str, str]
    """Joint laws that could not be fitted, with the reason."""
    hold_out: tuple[HoldOut, ...] = ()
    noise: Noise | None = None
    """The noise of this method's runs, where methods differ in it; else that of all runs counts."""

    @property
    def interior(self) -> tuple[Optimum, ...]:
        return tuple(optimum for optimum in self.optima if optimum.interior)


# --- Methods compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment(Value):
    """The method with the lowest loss between two budgets, or at one between gaps, by the power laws of the loss."""

    method: str
    from_flop: float
    to_flop: float


@dataclass(frozen=True)
class Crossing(Value):
    """The budget at which the best method changes."""

    budget_flop: float
    below: str
    above: str
    interval: Interval | None = None
    share: Share | None = None
    """Share of bootstrap draws in which the two laws meet near the budgets that were run."""


@dataclass(frozen=True)
class Comparison(Value):
    """Two methods at one budget."""

    budget_flop: float
    a: str
    b: str
    difference: float
    """ln L of a − ln L of b."""
    interval: Interval | None = None
    distinguishable: bool | None = None


@dataclass(frozen=True)
class Gap(Value):
    """A budget that the frontier leaves out."""

    budget_flop: float
    why: str


@dataclass(frozen=True)
class Frontier(Value):
    """Which method is best at which budget."""

    segments: tuple[Segment, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    gaps: tuple[Gap, ...] = ()


# --- All of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitSettings(Value):
    """The settings of `embedscale fit`."""

    residual: str
    delta: float
    optimum: Estimator
    window: float
    bootstrap: Count
    confidence: Share
    seed: Count
    where: dict[str, str] = field(default_factory=dict)
    bins: float | None = None
    """Bins of a decade of compute; None groups nearly equal budgets."""
    law: str = "chinchilla"
    """The joint law of N and D."""

    @property
    def percent(self) -> str:
        """The confidence as a reader sees it: "95 %"."""
        return f"{100 * self.confidence:.0f} %"


@dataclass(frozen=True)
class _Layout(Value):
    """The keys of a fits.json that say how to read the others."""

    format: int
    version: str = "unknown"


@dataclass(frozen=True)
class Fits(Value):
    """All that the runs of an experiment say: the content of fits.json."""

    format: int
    version: str
    """Version of embedscale that made the fits."""
    made: str
    """Time, UTC."""
    source: str
    """What was fitted."""
    settings: FitSettings
    runs: Counts
    comparable: dict[str, Any]
    """The value of each column that has to be the same for all runs."""
    noise: Noise
    methods: dict[str, MethodFit]
    frontier: Frontier
    excluded: tuple[Exclusion, ...] = ()
    notes: tuple[str, ...] = ()
    table_digest: str | None = field(default=None, compare=False)
    """Digest of the runs.csv beside the file; missing in version 0.2. Fits that say the same are equal."""

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the fits of a parsed fits.json of format 1 or 2. Raise UserError, naming the key, for others."""
        layout = _Layout.from_json(data)
        if layout.format not in (1, FORMAT):
            raise UserError(
                f"was made by version {layout.version} in format {layout.format}; "
                f"this version reads formats 1 and {FORMAT}"
            )
        if isinstance(data, dict) and layout.format == 1:
            data = first_version.translated(data) | {"format": FORMAT}
        return super().from_json(data)

    def noise_of(self, method: str) -> Noise:
        """Return the noise of a run of a method."""
        return self.methods[method].noise or self.noise

    @property
    def chance(self) -> str:
        """The loss of a model that guesses, as a text; empty where the number of candidates is unknown."""
        negatives = self.comparable.get("evaluation.negatives")
        if negatives is None:
            return ""
        count = int(negatives) + 1  # texts among which a held-out query has to find its positive
        return f"{math.log(count):.4g} nats: the ln of {count} candidates"

    @property
    def miniature(self) -> str:
        """The warning that belongs beside results of tiny models; empty for other sweeps."""
        if not (sizes := self.runs.sizes) or max(sizes) >= MINIATURE:
            return ""
        told = f"{min(sizes):,.0f} to {max(sizes):,.0f} parameters"
        if min(sizes) < LEAST:
            return f"sizes of {told} are no models: if they are in millions, say --columns n_parameters=COLUMN:1e6"
        return f"a miniature: models of {told}, so take the pattern, not the digits, and no advice for real models"


def read(path: str | Path) -> Fits:
    """Return the fits of a folder or of a fits.json. Raise UserError where there are none, or of a later format."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    found = read_json(path)
    if found is None:
        raise UserError(f"{path}: does not exist; write it by embedscale fit RUNS")
    if not isinstance(found, dict) or not {"methods", "settings", "runs"} <= found.keys():
        raise UserError(f"{path}: holds no fits; write them by embedscale fit RUNS")
    try:
        if changed(found):
            raise UserError(CHANGED)
        return Fits.from_json(found)
    except UserError as error:
        raise UserError(f"{path}: {error}; run embedscale fit again") from None
    except (KeyError, TypeError, AttributeError) as error:  # of a file of format 1
        raise UserError(f"{path}: is damaged: {error!r}; run embedscale fit again") from None


def check_table(fits: Fits, path: Path) -> None:
    if fits.table_digest not in (None, digest_file(path)):
        raise UserError(f"{path}: has changed since the fit; run embedscale fit again")
