"""The choices of an adaptive sweep: choices.json in the sweep's folder says which runs were chosen, when, and why.

It is written before the runs of a round go out, so a sweep that is stopped anywhere goes on with the same round.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedscale.errors import UserError
from embedscale.texts import counted, number
from embedscale.values import Amount, Count, Damaged, Positive, Value

FILE = "choices.json"


@dataclass(frozen=True)
class ChosenRun(Value):
    """A run that was chosen, and why."""

    run: str
    """Id of the run."""
    why: str
    """Reason, in one line."""
    cost: Amount
    """What the run costs by the plan, in the unit of the money."""
    check: bool = False
    """Whether the run was chosen because it could prove the law wrong."""


@dataclass(frozen=True)
class Round(Value):
    """Runs that were chosen together."""

    runs: tuple[ChosenRun, ...]
    """The runs, the most valuable first."""
    known: Count
    """Finished runs that the choice rests on."""
    best: str | None = None
    """The best method, size and setting by these finished runs, in words."""
    regret: Amount | None = None
    """How far it is expected to lie above the lowest loss, as a share of the loss."""


@dataclass(frozen=True)
class Choices(Value):
    """All choices of an adaptive sweep, and the question they answer."""

    budget_flop: Amount
    """Budget for which the recipe is wanted."""
    money: Amount
    """What may be spent."""
    unit: Literal["FLOP", "device-hours"]
    """Unit of the money."""
    width: Positive
    """Fewest runs of a round."""
    rounds: tuple[Round, ...] = ()
    """The rounds, in order."""
    end: str | None = None
    """Why the sweep has ended; null while it goes on."""

    @property
    def runs(self) -> tuple[ChosenRun, ...]:
        """The chosen runs, in order."""
        return tuple(run for each in self.rounds for run in each.runs)

    @property
    def spent(self) -> float:
        """What the chosen runs cost."""
        return sum(each.cost for each in self.runs)

    @staticmethod
    def of(folder: Path) -> "Choices | None":
        """Return the choices of a sweep's folder; None if it has none. Raise UserError for a damaged file."""
        found = Choices.read(folder / FILE)
        if isinstance(found, Damaged):
            raise UserError(f"{found}; without it the sweep would choose anew: move it away to allow that")
        return found

    def lines(self) -> list[str]:
        """Return a line for each round and for each of its runs, and one for the end."""
        told = [f"chosen for {number(self.budget_flop)} FLOP:"]
        for count in range(len(self.rounds)):
            told += self.round_lines(count)
        return [*told, self.end or "the sweep goes on"]

    def round_lines(self, index: int) -> list[str]:
        """Return a line for a round, counted from 0, and one for each of its runs."""
        each = self.rounds[index]
        best = f"; best so far: {each.best}, expected regret {100 * (each.regret or 0):.2g} %" if each.best else ""
        known = f"{counted(each.known, 'run')} known"
        return [f"round {index + 1}, {known}{best}", *(f"  {run.run}: {run.why}" for run in each.runs)]
