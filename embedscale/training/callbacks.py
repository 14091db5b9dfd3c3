"""What happens between two steps, in one visible order (`BetweenSteps.after_step`), and before the first.

Lightning calls one callback. A list of callbacks would hide the order in the list, and the order matters: a row of
metrics must be written before the checkpoint that makes it final, and the last checkpoint before the last evaluation,
which may fail.
"""

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from embedscale.errors import UserError
from embedscale.files import seal_fits
from embedscale.model.hardware import compile_seconds, matrix_product_peak
from embedscale.model.parallel import world_size
from embedscale.progress import Bar
from embedscale.run.directory import RunDirectory
from embedscale.run.record import Metric
from embedscale.terminal import console
from embedscale.training.batches import Batch
from embedscale.training.held_out import evaluate_held_out
from embedscale.training.run import Diverged, Stopped, TrainingRun

LINE_SECONDS = 20.0  # between two lines of progress in a log file
BAR_SECONDS = 0.5  # between two looks of a progress bar
HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class BetweenSteps(lightning.Callback):
    """Does all that is due between two steps, and before the first."""

    def __init__(self, run: TrainingRun):
        self.run = run
        self.rows, self.checkpoints = Log(run), Checkpoints(run)
        # Every process makes one, but only the process with the lease reports progress.
        self.heartbeat = Heartbeat(run) if run.lease is not None else None
        self.progress = ProgressLine(run, self.heartbeat) if self.heartbeat is not None else None
        self._handlers = {number: signal.getsignal(number) for number in HANDLED}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # Lightning's own SIGTERM handler, set in `fit`, would end a run as if it had succeeded.
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        refuse_different_starts(self.run)
        self.rows.start()
        self.catch_up(trainer)
        if self.heartbeat is not None:
            self.heartbeat.start()
        if self.progress is not None:
            self.progress.start()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        refuse_overspending(self.run, batch)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.after_step(trainer)

    def after_step(self, trainer: lightning.Trainer) -> None:
        """Do all that is due after a step, in this order."""
        run = self.run
        if run.done:
            check_spent(run)
        self.rows.after_step(trainer)
        if run.done:
            self.checkpoints.take()
        if run.module.step in run.plan.evaluate_after:
            self.evaluate(trainer)
        asked, due = (False, False) if run.done else self.checkpoints.wishes()
        if asked or due:
            self.checkpoints.take()
        if asked or run.done:
            trainer.should_stop = True
        if self.heartbeat is not None:
            self.heartbeat.note()
        if self.progress is not None:
            self.progress.show()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if self.progress is not None:
            self.progress.stop()

    def catch_up(self, trainer: lightning.Trainer) -> None:
        """Make the evaluation that the previous attempt left unfinished. Raises Stopped if interrupted by a stop."""
        run = self.run
        made = {row.step for row in run.directory.read_metrics() if row.loss is not None}
        if run.module.step in run.plan.evaluate_after and run.module.step not in made:
            self.evaluate(trainer)
            if run.evaluated is None:
                raise Stopped

    def evaluate(self, trainer: lightning.Trainer) -> None:
        """Measure the held-out loss and log it. Raises Diverged if it is not finite."""
        run = self.run
        run.refuse_divergence()
        run.evaluated = evaluate_held_out(run.module.encoder, run.store, run.config.evaluation, run.stop)
        if run.evaluated is not None:
            if not math.isfinite(run.evaluated.loss):  # the last step's weights have no later training loss
                raise Diverged(run.module.step)
            self.rows.write(trainer, **vars(run.evaluated))


def refuse_different_starts(run: TrainingRun) -> None:
    """Raise UserError in all processes if they begin at different steps: they would add gradients of other batches."""
    if world_size() == 1:
        return
    ends = torch.tensor([run.module.step, -run.module.step], device=run.module.device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    latest, earliest = int(ends[0]), -int(ends[1])
    if earliest != latest:
        raise UserError(
            f"{run.directory.checkpoints}: the processes found different checkpoints, after step {earliest} and after "
            f"step {latest}; run it again when all nodes see the same files"
        )


def refuse_overspending(run: TrainingRun, batch: Batch) -> None:
    """Raise RuntimeError if a step would spend beyond the budget."""
    if run.module.flop + batch.tokens * run.plan.flop_per_token > run.plan.budget_flop:
        raise RuntimeError(f"step {batch.step + 1} would spend more than the budget: the store is not the planned one")


def check_spent(run: TrainingRun) -> None:
    """Raise RuntimeError if the run did not spend exactly what was planned."""
    if run.module.flop != run.plan.spent_flop:
        raise RuntimeError(f"{run.module.flop} FLOP were spent, {run.plan.spent_flop} planned")


class Log:
    """Writes metrics.jsonl and the optional loggers: a row every `resources.log_every` steps and after the last."""

    def __init__(self, run: TrainingRun):
        self.run, self.every = run, run.config.resources.log_every

    def start(self) -> None:
        """Begin to measure the speed of the next row's steps."""
        self._since, self._tokens = time.perf_counter(), self.run.module.tokens

    def after_step(self, trainer: lightning.Trainer) -> None:
        """Write a row if one is due. Raises Diverged instead of writing a loss that is not finite."""
        module = self.run.module
        if module.step % self.every and not self.run.done:
            return
        self.run.refuse_divergence()
        seconds = time.perf_counter() - self._since
        self.write(
            trainer,
            train_loss=float(module.loss),
            learning_rate=self.run.plan.learning_rate_at(module.step - 1),
            tokens_per_second=round((module.tokens - self._tokens) / seconds, 1),
            seconds=round(seconds, 4),
        )

    def write(self, trainer: lightning.Trainer, **values: Any) -> None:
        run, module = self.run, self.run.module
        self.start()  # also after an evaluation, which is not training
        if not run.may_write():
            return
        row = Metric(module.step, run.attempt.record.number, module.tokens, module.flop, **values)
        run.metrics.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({"tokens": row.tokens, "spent_flop": row.spent_flop} | values, step=row.step)


class Checkpoints:
    """Saves trainable weights, optimiser and counters: by the clock, at a stop request, and after the last step."""

    def __init__(self, run: TrainingRun):
        self.run, self.seconds = run, 60 * run.config.resources.checkpoint_minutes
        self._saved = time.monotonic()
        self._sent: tuple[torch.Tensor, Any] | None = None

    def wishes(self) -> tuple[bool, bool]:
        """Return whether a stop was requested, and whether a checkpoint is due; the same in all processes."""
        # The request is read once: a signal between two reads would stop the run without a checkpoint.
        asked, due = self.run.stop.requested, time.monotonic() - self._saved >= self.seconds
        if world_size() > 1:
            asked, due = self._agreed(asked, due, self.run.module.device)
            if asked:
                self.run.stop.request("another process was asked to stop")
        return asked, due

    def _agreed(self, asked: bool, due: bool, device: torch.device) -> tuple[bool, bool]:
        """Return what any process wished one step ago, so that all processes stop or save after the same step.

        The wishes of this step would be known only when the GPU has done all of the step's work.
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

    def take(self) -> None:
        """Save a checkpoint. A process that has lost the lease takes part, but writes nothing."""
        self.run.refuse_divergence()
        state = self.run.module.state()
        if self.run.may_write():
            self.save(self.run.module.step, state)
        self._saved = time.monotonic()

    def save(self, step: int, state: dict[str, Any]) -> None:
        run = self.run
        run.metrics.secure()
        state |= {"run_id": run.config.run_id, "rows": run.metrics.rows, "rows_digest": run.metrics.digest}
        run.directory.write_checkpoint(step, lambda file: save_state(state, file))


def save_state(state: dict[str, Any], file: Any) -> None:
    """Write the state of a checkpoint, without torch's own checksums."""
    # The seal covers every byte. Torch's own checksum would take longer, and torch never looks at it.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(before)


def newest_checkpoint(directory: RunDirectory, run_id: str, mapped: bool = False) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint that is whole and that agrees with metrics.jsonl; None without one.

    A checkpoint that does not serve is named, and the one before is tried. With `mapped`, all processes of a node share
    one copy in memory. Raises UserError if there are whole checkpoints, but metrics.jsonl lacks rows of all of them.
    """
    paths, without_rows = directory.checkpoint_paths(), 0
    for path in reversed(paths):
        state, found = _read_checkpoint(path, run_id, mapped)
        if state is not None and "rows" in state and not directory.has_metrics(state["rows"], state["rows_digest"]):
            without_rows += 1
            state, found = None, f"is whole, but {directory.metrics} has lost or changed rows that it had then"
        if state is not None:
            return state
        print(f"embedscale: {path} {found}; falling back to the one before", file=sys.stderr)
    if without_rows:
        raise UserError(
            f"{directory.metrics}: is damaged or has lost rows, also those of the oldest checkpoint; restore it, or "
            f"remove it and {directory.checkpoints} to train from the first step again"
        )
    if paths:
        print(
            f"embedscale: {directory.path} has no checkpoint that serves; training from the first step", file=sys.stderr
        )
    return None


def _read_checkpoint(path: Path, run_id: str, mapped: bool) -> tuple[dict[str, Any] | None, str]:
    """Return the state of a checkpoint, or None and what is wrong with it."""
    whole = None
    try:
        whole = seal_fits(path)
        if whole is False:
            return None, "is damaged (its digest does not fit)"
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    except Exception as error:  # torch has no common class of errors for damaged files
        if whole or isinstance(error, MemoryError):  # nothing is wrong with the file
            raise
        return None, f"is damaged ({type(error).__name__})"
    if whole is None:  # of early code, unless it says otherwise
        if "rows" in state:
            return None, "is damaged (its digest is missing)"
        print(
            f"embedscale: {path} is of an earlier version, without a digest: damage cannot be noticed", file=sys.stderr
        )
    return (state, "") if state["run_id"] == run_id else (None, f"is of run {state['run_id']}")


class Heartbeat:
    """Tells how far the run is, through its lease: `sweep status` reads it there."""

    def __init__(self, run: TrainingRun):
        self.run = run

    def start(self) -> None:
        self._begun, self._flop, self._tokens = time.monotonic(), self.run.module.flop, self.run.module.tokens

    def note(self) -> None:
        """Update what the lease's thread writes with its next beat."""
        run, module = self.run, self.run.module
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self.tokens_per_second = (module.tokens - self._tokens) / seconds
        flop_per_second = max((module.flop - self._flop) / seconds, 1e-9)
        self.seconds_left = (run.plan.spent_flop - module.flop) / flop_per_second
        assert run.lease is not None
        run.lease.report(
            step=module.step,
            steps=run.plan.steps,
            spent_flop=module.flop,
            budget_flop=run.plan.budget_flop,
            tokens_per_second=round(self.tokens_per_second, 1),
            seconds_left=round(self.seconds_left, 1),
        )


class ProgressLine:
    """Shows FLOP spent, losses, speed and time left: a bar on a terminal, else a line every LINE_SECONDS.

    The training loss is that of the last full batch: a batch cut short has few negatives, and says little.
    """

    def __init__(self, run: TrainingRun, heartbeat: Heartbeat):
        self.run, self.heartbeat = run, heartbeat
        self.console = console(stderr=True)
        self.bar: Bar | None = None

    def start(self) -> None:
        run, module = self.run, self.run.module
        self._peak = matrix_product_peak(module.device, run.config.training.precision)
        self._begun = self._shown = time.monotonic()
        self._exact = module.flop_exact
        self._loss: torch.Tensor | None = None  # of the last full batch
        self._compiled = False
        self.bar = Bar(run.config.run_id, run.plan.spent_flop, module.flop, share=True)
        self.bar.start()

    def show(self) -> None:
        run, module, now = self.run, self.run.module, time.monotonic()
        assert self.bar is not None
        if module.step <= run.plan.averaged_steps.stop:
            self._loss = module.loss
        if now - self._shown < (BAR_SECONDS if self.bar.drawn else LINE_SECONDS) and not run.done:
            return
        self._shown = now
        if run.config.resources.compile and not self._compiled:
            self._compiled = True
            self._print(f"torch.compile took {compile_seconds():.0f} s")
        exact = (module.flop_exact - self._exact) / max(now - self._begun, 1e-9)
        share = exact / (self._peak * run.plan.world_size)
        held_out = f"{run.evaluated.loss:.4f}" if run.evaluated else "–"
        losses = f"loss {'–' if self._loss is None else f'{float(self._loss):.4f}'}, held-out {held_out}"
        speed = f"{self.heartbeat.tokens_per_second:,.0f} tokens/s, {share:.0%} of peak"
        if self.bar.drawn:
            self.bar.say(f"of {run.plan.budget_flop:.3g} FLOP, {losses}, {speed}", completed=module.flop)
            return
        self._print(
            f"{module.flop / run.plan.spent_flop:4.0%} of {run.plan.budget_flop:.3g} FLOP, "
            f"step {module.step}/{run.plan.steps}, {losses}, {speed}, {self.heartbeat.seconds_left:.0f} s left"
        )

    def _print(self, text: str) -> None:
        self.console.print(f"{self.run.config.run_id}: {text}", soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
