"""One attempt at a run, as a value: what trains, where it is written, and what may stop it."""

from dataclasses import dataclass
from functools import cached_property

from embedscale.data.store import PairStore
from embedscale.run.config import RunConfig
from embedscale.run.directory import Attempt, MetricsLog, RunDirectory
from embedscale.run.lease import Lease
from embedscale.run.record import CodeVersion
from embedscale.run.stop import StopRequest
from embedscale.training.held_out import HeldOut
from embedscale.training.module import Contrastive
from embedscale.training.plan import PlanFile, TrainingPlan


class Diverged(Exception):
    """The loss is not finite since `step`, counted from 1."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite since step {step}")
        self.step = step


class Stopped(Exception):
    """A stop was requested before an evaluation left unfinished by the previous attempt was made."""


@dataclass
class TrainingRun:
    """All that one process knows of the run that it trains."""

    config: RunConfig
    directory: RunDirectory
    store: PairStore
    module: Contrastive
    facts: PlanFile  # the content of plan.json
    stop: StopRequest
    attempt: Attempt
    versions: dict[str, str]  # of the packages
    code: CodeVersion
    lease: Lease | None = None  # None in every process of a run but the first
    evaluated: HeldOut | None = None  # by the last evaluation, if it was not interrupted

    @cached_property
    def metrics(self) -> MetricsLog:
        """What writes metrics.jsonl; first used when the file holds the rows of the checkpoint and no others."""
        return MetricsLog(self.directory)

    @property
    def plan(self) -> TrainingPlan:
        return self.facts.plan

    @property
    def done(self) -> bool:
        """Return whether all planned steps are made."""
        return self.module.step == self.plan.steps

    def may_write(self) -> bool:
        """Return whether this process may write into the run directory: it holds the lease, and nobody took it over."""
        return self.lease is not None and self.lease.held()

    def refuse_divergence(self) -> None:
        """Raise Diverged if a loss so far was not finite. On a GPU, this waits for the step to end."""
        bad = float(self.module.first_bad_step)
        if bad != float("inf"):
            raise Diverged(int(bad))
