"""What happens between the steps: log, evaluate, checkpoint, stop, show. One order, the order of `between_steps`."""

import math
import signal
import sys
import time
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from embedscale.data.store import PairStore
from embedscale.files import write_atomically
from embedscale.model.hardware import compile_seconds, matrix_product_peak
from embedscale.model.parallel import world_size
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import Lease
from embedscale.run.record import Metric
from embedscale.run.stop import StopRequest
from embedscale.training.batches import Batch
from embedscale.training.held_out import evaluate_held_out
from embedscale.training.module import Contrastive

KEPT = 2  # checkpoints: should the newest turn out damaged, there is one before


class Diverged(Exception):
    """The loss is no longer finite, since `step`."""

    def __init__(self, step: int):
        super().__init__(f"the loss is not finite since step {step}")
        self.step = step


class Stopped(Exception):
    """A stop was requested before the evaluation that the last attempt left open was made."""


class Log(lightning.Callback):
    """metrics.jsonl, a row every `log_every` steps and at the last; and the optional loggers.

    Written by the process that has the lease, which only the first of a run's has, and while it holds it.
    """

    def __init__(self, directory: RunDirectory, lease: Lease | None, attempt: int, every: int):
        self.directory, self.lease, self.attempt, self.every = directory, lease, attempt, every

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._since, self._tokens = time.perf_counter(), module.tokens

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if module.step % self.every and module.step < module.plan.steps:
            return
        refuse_divergence(module)
        seconds = time.perf_counter() - self._since
        self.write(
            trainer,
            module,
            train_loss=float(module.loss),
            learning_rate=module.plan.learning_rate_at(batch.step),
            tokens_per_second=round((module.tokens - self._tokens) / seconds, 1),
            seconds=round(seconds, 4),
        )
        self._since, self._tokens = time.perf_counter(), module.tokens

    def write(self, trainer: Any, module: Contrastive, **values: Any) -> None:
        if self.lease is None or not self.lease.held():
            return
        row = Metric(module.step, self.attempt, module.tokens, module.flop, **values)
        self.directory.append_metric(row)
        for logger in trainer.loggers:
            logger.log_metrics({"tokens": row.tokens, "spent_flop": row.spent_flop} | values, step=row.step)


def refuse_divergence(module: Contrastive) -> None:
    bad = float(module.first_bad_step)
    if bad != float("inf"):
        raise Diverged(int(bad))


class HeldOut(lightning.Callback):
    """The held-out loss after the planned steps; a resumed run catches up on one that its stop cut short."""

    def __init__(self, store: PairStore, log: Log, stop: StopRequest):
        self.store, self.writer, self.stop = store, log, stop
        self.last: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.step in module.plan.evaluate_after:
            self.evaluate(trainer, module)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.catch_up(trainer, module)

    def catch_up(self, trainer: Any, module: Contrastive) -> None:
        """Evaluate if this step's row is due and missing. Raises Stopped where a stop is requested meanwhile."""
        done = {row.step for row in self.writer.directory.read_metrics() if row.loss is not None}
        if module.step in module.plan.evaluate_after and module.step not in done:
            self.evaluate(trainer, module)
            if self.last is None:
                raise Stopped

    def evaluate(self, trainer: Any, module: Contrastive) -> None:
        refuse_divergence(module)
        self.last = evaluate_held_out(module.encoder, self.store, module.config.evaluation, self.stop)
        if self.last is not None:
            if not math.isfinite(self.last["loss"]):  # the last step's weights have no later loss to tell
                raise Diverged(module.step)
            self.writer.write(trainer, module, **self.last)


class Checkpoints(lightning.Callback):
    """Trainable weights, optimiser and counters: by the clock and at a stop request.

    Written as the log is: a process that has lost the lease was asked to stop, but must leave no checkpoint.
    """

    def __init__(self, directory: RunDirectory, lease: Lease | None, run_id: str, minutes: float, stop: StopRequest):
        self.directory, self.lease, self.run_id, self.seconds, self.stop = directory, lease, run_id, 60 * minutes, stop
        self._saved = time.monotonic()
        self._sent: tuple[torch.Tensor, Any] | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.step == module.plan.steps:
            return  # LastCheckpoint has seen to it
        # Looked at once: a signal between two looks would stop the run without a checkpoint.
        asked, due = self.stop.requested, time.monotonic() - self._saved >= self.seconds
        if world_size() > 1:
            asked, due = self._agreed(asked, due, module.device)
            if asked:
                self.stop.request("another process was asked to stop")
        if asked or due:
            self.take(module)
        if asked:
            trainer.should_stop = True

    def _agreed(self, asked: bool, due: bool, device: torch.device) -> tuple[bool, bool]:
        """What any process wished for a step ago: a signal or a clock of one stops or saves all after the same step.

        This step's wishes would be known on a GPU only when it has done all of its work.
        """
        flags = torch.tensor([asked, due], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        arrived = torch.cuda.Event() if device.type == "cuda" else None
        before, self._sent = self._sent, (flags.to("cpu", non_blocking=True), arrived)
        if arrived is not None:
            arrived.record()
        if before is None:
            return False, False
        if before[1] is not None:
            before[1].synchronize()
        asked, due = map(bool, before[0].tolist())
        return asked, due

    def take(self, module: Any) -> None:
        refuse_divergence(module)
        state = module.state()
        if self.lease is not None and self.lease.held():
            self.save(module.step, state)
        self._saved = time.monotonic()

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.directory.secure_metrics()
        self.directory.checkpoints.mkdir(exist_ok=True)
        path = self.directory.checkpoint(step)
        write_atomically(path, lambda file: torch.save(state | {"run_id": self.run_id}, file))
        for old in self.directory.checkpoint_paths()[:-KEPT]:
            old.unlink()


class LastCheckpoint(lightning.Callback):
    """The last step's, before its evaluation: were that to fail, the training would not be lost."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.step == module.plan.steps:
            self.checkpoints.take(module)


def newest_checkpoint(directory: RunDirectory, run_id: str, mapped: bool = False) -> dict[str, Any] | None:
    """The newest complete checkpoint's state; a damaged one is named and passed over for the one before.

    `mapped`, all processes of a node read one copy of it in memory, but no checksum is looked at.
    """
    for path in reversed(directory.checkpoint_paths()):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if state["run_id"] == run_id:
                return state
            found = f"is of run {state['run_id']}"
        except Exception as error:  # torch raises whatever the damage leads to
            found = f"is damaged ({type(error).__name__})"
        print(f"embedscale: {path} {found}; falling back to the one before", file=sys.stderr)
    return None


class Budget(lightning.Callback):
    """No step may spend beyond the budget, and the last must spend exactly what was planned."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        if module.flop + batch.tokens * module.plan.flop_per_token > module.plan.budget_flop:
            raise RuntimeError(
                f"step {batch.step + 1} would spend more than the budget: the store is not the planned one"
            )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if module.step == module.plan.steps:
            if module.flop != module.plan.spent_flop:
                raise RuntimeError(f"{module.flop} FLOP were spent, {module.plan.spent_flop} planned")
            trainer.should_stop = True


class Signals(lightning.Callback):
    """Put back the handlers from before `fit`: Lightning's own SIGTERM handler ends a run as if it had succeeded."""

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.handlers = {number: signal.getsignal(number) for number in self.NUMBERS}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Show(lightning.Callback):
    """FLOP spent of the budget, loss, tokens a second, share of the hardware's peak, time left."""

    LINE_SECONDS = 20.0  # between lines where the output is no terminal

    def __init__(self, lease: Lease, held_out: HeldOut):
        self.lease, self.held_out = lease, held_out
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} % of {task.fields[budget]}"),
            TextColumn("loss {task.fields[loss]}  held-out {task.fields[held_out]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.peak = matrix_product_peak(module.device, module.config.training.precision)
        self.begun = self.shown = time.monotonic()
        self.compiled = 0.0  # seconds
        self.start, self.start_exact, self.start_tokens = module.flop, module.flop_exact, module.tokens
        self.task = self.bar.add_task(
            module.config.run_id,
            total=module.plan.spent_flop,
            completed=module.flop,
            budget=f"{module.plan.budget_flop:.3g} FLOP",
            loss="–",
            held_out="–",
            speed="",
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        plan, waiting = module.plan, self.LINE_SECONDS if not self.console.is_terminal else 0.5
        if now - self.shown < waiting and module.step < plan.steps:
            return
        self.shown, seconds = now, max(now - self.begun, 1e-9)
        if module.config.resources.compile and not self.compiled:
            self.compiled = compile_seconds()
            self.console.print(f"{module.config.run_id}: torch.compile took {self.compiled:.0f} s", highlight=False)
        rate = (module.tokens - self.start_tokens) / seconds
        share = (module.flop_exact - self.start_exact) / seconds / (self.peak * plan.world_size)
        left = (plan.spent_flop - module.flop) / max((module.flop - self.start) / seconds, 1e-9)
        self.lease.report(
            step=module.step,
            steps=plan.steps,
            spent_flop=module.flop,
            budget_flop=plan.budget_flop,
            tokens_per_second=round(rate, 1),
            seconds_left=round(left, 1),
        )
        loss = f"{float(module.loss):.4f}"
        held_out = f"{self.held_out.last['loss']:.4f}" if self.held_out.last else "–"
        speed = f"{rate:,.0f} tokens/s, {share:.0%} of peak"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=module.flop, loss=loss, held_out=held_out, speed=speed)
        else:
            done = module.flop / plan.spent_flop
            self.console.print(
                f"{module.config.run_id}: {done:4.0%} of {plan.budget_flop:.3g} FLOP, step {module.step}/{plan.steps}, "
                f"loss {loss}, held-out {held_out}, {speed}, {left:.0f} s left",
                soft_wrap=True,
                highlight=False,
            )

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if self.console.is_terminal:  # else it was never started, and would print an empty line
            self.bar.stop()
