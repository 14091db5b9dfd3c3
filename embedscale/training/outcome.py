"""What ends a run: the record, and what the attempt says of its end.

The record is written last of all files. Whoever finds a record knows that everything else is complete.
"""

import platform
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedscale import __version__
from embedscale.code import ROOT, source_of
from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import write_atomically
from embedscale.model.backbone import digest_of
from embedscale.model.hardware import device_name, training_device
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.families import family_name, short_name
from embedscale.run.record import CodeVersion, Device, EvaluationRecord, Hyperparameters, Metric, RunRecord, sound
from embedscale.training.run import Diverged, TrainingRun

# What a record repeats of plan.json.
FROM_PLAN = (
    "backbone_digest",
    "n_forward",
    "n_backward",
    "n_updated",
    "n_parameters",
    "blocks",
    "width",
    "tokenizer_digest",
    "tokens_before",
    "tokens_after",
)
PACKAGES = ("torch", "lightning", "transformers", "peft", "numpy", "pyarrow", "omegaconf")


def end_of_steps(run: TrainingRun) -> int:
    """Record a run whose steps are all made and evaluated; say that any other was interrupted."""
    weights = run.module.weights() if run.done else {}  # with shards, a call that all processes make
    if run.lease is None:
        return DONE if run.done else INTERRUPTED
    evaluated = run.evaluated is not None or last_evaluation(run) is not None
    if not run.done or not evaluated or not run.may_write():
        return interrupted(run, run.stop.reason)
    run.attempt.end("done", to_step=run.module.step, to_flop=run.module.flop)
    say_outcome(run.directory, write_record(run, weights, None))
    return DONE


def interrupted(run: TrainingRun, reason: str | None) -> int:
    """Say in the attempt and to the user that the run can be resumed."""
    if run.lease is not None:
        run.attempt.end("interrupted", reason=reason, to_step=run.module.step, to_flop=run.module.flop)
        print(f"{run.config.run_id}: interrupted ({reason}) at step {run.module.step}; run it again to go on")
    return INTERRUPTED


def diverged(run: TrainingRun, error: Diverged) -> int:
    """Record a run whose loss is not finite any more; it is not resumed."""
    weights = run.module.weights()
    if run.lease is not None:
        run.attempt.end("diverged", reason=str(error), to_step=error.step, to_flop=run.module.flop)
        if run.may_write():
            write_record(run, weights, error.step)
        print(f"{run.config.run_id}: diverged, {error}", file=sys.stderr)
    return FAILED


def failed(run: TrainingRun, error: Exception) -> int:
    """Write the traceback into the attempt, and one line for the user. Without an attempt, print the traceback."""
    if run.lease is None:
        traceback.print_exception(error)
        return FAILED
    reason = f"{type(error).__name__}: {error}"
    end = {"reason": reason, "to_step": run.module.step, "to_flop": run.module.flop}
    run.attempt.end("failed", "".join(traceback.format_exception(error)), **end)
    print(f"{run.config.run_id}: failed, {reason} (traceback in {run.attempt.path})", file=sys.stderr)
    return FAILED


def say_outcome(directory: RunDirectory, record: RunRecord) -> None:
    loss = "" if record.loss is None else f"held-out loss {record.loss:.4g}, "
    print(f"{record.run_id} is {record.status}: {loss}record {directory.record}")


def last_evaluation(run: TrainingRun) -> Metric | None:
    """Return the row of the evaluation after the last planned step."""
    rows = [row for row in run.directory.read_metrics() if row.loss is not None and row.step == run.plan.steps]
    return rows[-1] if rows else None


def write_record(run: TrainingRun, weights: dict[str, Tensor], diverged_at_step: int | None) -> RunRecord:
    """Write the final weights and then the record, and remove the checkpoints.

    `gpu_hours` counts each device once: the seconds of an attempt are divided by the number of runs that its device was
    planned to serve at the same time, although the last runs of a bundle may have had the device for themselves.
    """
    config, directory, module, facts, plan = run.config, run.directory, run.module, run.facts, run.plan
    evaluation, device = config.evaluation, training_device()
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    done = diverged_at_step is None
    final = last_evaluation(run) if done else None
    attempts = sound(directory.read_attempts())
    wall = sum(attempt.seconds for attempt in attempts)
    device_seconds = sum(attempt.seconds / attempt.sharing for attempt in attempts)
    if done:
        directory.model.mkdir(exist_ok=True)
        write_atomically(directory.weights, lambda file: save_file(weights, file.name))
    record = RunRecord(
        format=1,
        status="done" if done else "diverged",
        run_id=config.run_id,
        backbone=short_name(config.backbone.name),
        backbone_weights=config.backbone.weights,
        backbone_revision=config.backbone.revision,
        family=family_name(config.backbone.name, getattr(module.encoder.body.config, "model_type", None)),
        **{name: getattr(facts, name) for name in FROM_PLAN},
        method=config.method.name,
        hyperparameters=_hyperparameters(config, plan.learning_rate),
        trainable_fraction=module.cost.trainable_fraction,
        trainable_tensors=len(facts.trainable),
        seed=config.training.seed,
        data=short_name(config.data.store),
        data_digest=plan.data_digest,
        budget_flop=plan.budget_flop,
        spent_flop=module.flop,
        flop_per_token=plan.flop_per_token,
        spent_flop_exact=module.flop_exact,
        tokens=module.tokens,
        pairs=min(module.step * plan.batch_size, plan.pairs),
        steps=module.step,
        loss=final.loss if final else None,
        train_loss=float(module.averaged) / len(plan.averaged_steps) if final else None,
        recall_at_1=final.recall_at_1 if final else None,
        recall_at_10=final.recall_at_10 if final else None,
        evaluation=EvaluationRecord(
            evaluation.pool, evaluation.negatives, evaluation.temperature, plan.evaluation_digest
        ),
        weights_digest=digest_of(weights),
        wall_seconds=round(wall, 1),
        gpu_hours=round(device_seconds * plan.world_size / 3600, 5),
        device=Device(device_name(device), plan.world_size, device.type, torch.get_num_threads()),
        attempts=attempts,
        versions=run.versions,
        code=run.code,
        diverged_at_step=diverged_at_step,
    )
    run.metrics.secure()
    run.metrics.check()
    directory.write_record(record)
    directory.remove_checkpoints()
    return record


def _hyperparameters(config: RunConfig, learning_rate: float) -> Hyperparameters:
    """Return every setting of training, loss and method, so that a new one cannot be forgotten."""
    training, loss, method = asdict(config.training), asdict(config.loss), asdict(config.method)
    del training["seed"], training["learning_rate"], method["name"]
    return Hyperparameters(
        **training,
        **method,
        learning_rate=learning_rate,
        loss=loss.pop("form"),
        **loss,
        context=config.data.context,
        pooling=config.backbone.pooling,
        attention=config.backbone.attention,
        method_label=config.method.label,
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages; asked before the first step, because a package may lack its metadata.

    Raises UserError for a package without metadata. embedscale itself needs none: a checkout may run uninstalled.
    """
    found = {"embedscale": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise UserError(f"the package {name!r} has no metadata, which the record needs; install it again") from None
    return found | {"python": platform.python_version()}


def code_version() -> CodeVersion:
    """Return the version, the digest of the code and, for a checkout, its commit and whether it was changed."""
    return CodeVersion(__version__, **asdict(source_of(ROOT)))
