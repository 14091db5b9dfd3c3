"""One run, from a RunConfig to its record: planned before it starts, resumed where it was left, recorded at its end."""

import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from embedscale.data.store import PairStore
from embedscale.data.tokens import tokenizer_digest
from embedscale.errors import DONE, FAILED, INTERRUPTED, UserError
from embedscale.files import write_atomically, write_json
from embedscale.model.backbone import digest_of, load_body, shape_of, shape_without_weights
from embedscale.model.hardware import keep_freed_memory, training_device
from embedscale.run.config import RunConfig
from embedscale.run.directory import Attempt, RunDirectory
from embedscale.run.families import short_name
from embedscale.run.lease import Lease, leased
from embedscale.run.record import CodeVersion, Device, EvaluationRecord, Hyperparameters, Metric, RunRecord, sound
from embedscale.run.settings import load, to_yaml
from embedscale.run.stop import STOP_SIGNALS, StopRequest, end_with_parent
from embedscale.training.batches import Batches
from embedscale.training.callbacks import (
    Budget,
    Checkpoints,
    Diverged,
    HeldOut,
    LastCheckpoint,
    Log,
    Show,
    Signals,
    Stopped,
    newest_checkpoint,
)
from embedscale.training.memory import fitting_chunk
from embedscale.training.module import Contrastive, assemble
from embedscale.training.plan import PlanFile, TrainingPlan, plan_run

# Lightning sets it too, but the first product on a GPU, which reads it, may come before: `calibrate` measures the peak.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

PACKAGES = ("embedscale", "torch", "lightning", "transformers", "peft", "numpy", "pyarrow", "omegaconf")


def train(config: RunConfig, stop: StopRequest | None = None, sharing: int = 1, beside: int = 1) -> int:
    """Train a run to its budget, or go on with it, or say that it is done.

    It is one of `sharing` runs on its device, whose hours and memory they share, and, on a machine without GPUs, one of
    `beside` that have cores of their own but share the machine's memory.

    Returns DONE, FAILED (diverged, or an error, whose traceback lies in the attempt) or INTERRUPTED (resumable).
    Raises UserError, before anything is written, for whatever the user can mend.
    """
    if stop is None:
        stop = StopRequest()
        stop.on_signals()
    directory = RunDirectory(config.folder)
    record = sound(directory.read_record())
    if record is not None:
        _say_outcome(directory, record)
        return DONE if record.status == "done" else FAILED
    _refuse_another_config(directory, config)
    shape = shape_without_weights(config.backbone)  # a mistyped backbone is no tokenizer's fault
    store = PairStore.open(config.data.store)
    tokenizer = config.data.tokenizer or config.backbone.name
    revision = None if config.data.tokenizer else config.backbone.revision
    if tokenizer_digest(tokenizer, revision) != store.tokenizer_digest:
        raise UserError(
            f"data.store: {config.data.store} was made with tokenizer {store.manifest.tokenizer.name!r}; "
            f"{tokenizer!r} gives other tokens"
        )
    plan = plan_run(config, shape, store)
    store.held_out_batch(0, config.evaluation.pool)  # damaged, it must not be found out after the training
    quieten()
    keep_freed_memory()
    module, facts = _build(config, plan, store)
    _refuse_another_plan(directory, facts)
    module.sharing = sharing * beside
    chunk = _chunk_tokens(config, directory, module)
    if _rank() > 0:
        attempt = directory.attempt(0)
        return _fit(config, directory, store, module, chunk, facts, stop, attempt, None)
    with leased(directory, lambda: stop.request("another process has taken this run over")) as lease:
        if directory.record.exists():  # another process ended it since the first look
            return train(config, stop, sharing, beside)
        write_atomically(directory.config, lambda file: file.write(to_yaml(config).encode()))
        write_json(directory.plan, replace(facts, chunk_tokens=chunk).to_json())
        directory.clear_up(lease.left_behind)
        attempt = directory.begin_attempt(sharing=sharing)
        return _fit(config, directory, store, module, chunk, facts, stop, attempt, lease)


def _say_outcome(directory: RunDirectory, record: RunRecord) -> None:
    print(f"{record.run_id} is {record.status}: held-out loss {record.loss}, record {directory.record}")


def _chunk_tokens(config: RunConfig, directory: RunDirectory, module: Contrastive) -> int | None:
    """As configured; or as this run was begun with, so that it rounds as it did; or what the memory takes."""
    if config.resources.chunk_tokens is not None:
        return config.resources.chunk_tokens
    begun = sound(PlanFile.read(directory.plan)) if directory.checkpoint_paths() else None
    if begun is not None:
        return begun.chunk_tokens
    return fitting_chunk(module)


def _rank() -> int:
    """This process's number, before torch.distributed knows it."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return int(os.environ.get("NODE_RANK", 0)) * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + local


def quieten() -> None:
    """Leave the terminal to the progress line."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _build(config: RunConfig, plan: TrainingPlan, store: PairStore) -> tuple[Contrastive, PlanFile]:
    """The module at its first step, and the facts that a resumed run must meet again."""
    body = load_body(config.backbone, config.training.seed)
    shape = shape_of(body, config.backbone.name)
    digest = digest_of(dict(body.named_parameters()))
    module = assemble(body, config, plan)
    if module.cost.flop_per_token != plan.flop_per_token:  # a hub name that ends as that of a known size
        raise UserError(
            f"backbone.name: {config.backbone.name!r} has other layers than the known model of its name: a token costs "
            f"{module.cost.flop_per_token:,} FLOP, not {plan.flop_per_token:,}; allowed: a local folder of it"
        )
    return module, PlanFile(
        backbone_digest=digest,
        n_forward=module.cost.n_forward,
        n_backward=module.cost.n_backward,
        n_updated=module.cost.n_updated,
        n_parameters=module.cost.n_parameters,
        blocks=shape.blocks,
        width=shape.width,
        trainable=list(module.trainable),
        plan=plan,
        tokenizer_digest=store.tokenizer_digest,
    )


def _refuse_another_config(directory: RunDirectory, config: RunConfig) -> None:
    if not directory.config.exists():
        return
    found = load(directory.config).science()
    wanted = config.science()
    for part in wanted:
        if found[part] != wanted[part]:
            raise UserError(f"{directory.path}: is the directory of another run: {part} is {found[part]} there")


def _refuse_another_plan(directory: RunDirectory, facts: PlanFile) -> None:
    """A run goes on only with the data, the weights and the number of processes that it began with."""
    before = sound(PlanFile.read(directory.plan)) if directory.checkpoint_paths() else None
    if before is not None and (found := before.difference(facts)):
        raise UserError(f"{directory.path}: {found}")


def bare_trainer(**options: Any) -> lightning.Trainer:
    """Lightning's loop, the same to the last bit at every call, without what `callbacks` does here."""
    # Filling every new buffer would cost a pass over memory and helps only to find reads of garbage.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lightning.Trainer(
        max_epochs=1,
        plugins=[LightningEnvironment()],  # it starts the processes, also inside of a SLURM job
        deterministic=True,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


class _Gathered(DDPStrategy):
    """Processes and devices from Lightning; gradients are summed, or the model sharded, by `parallel`, not by DDP."""

    def configure_ddp(self) -> None:
        pass


def _fit(
    config: RunConfig,
    directory: RunDirectory,
    store: PairStore,
    module: Contrastive,
    chunk_tokens: int | None,
    facts: PlanFile,
    stop: StopRequest,
    attempt: Attempt,
    lease: Lease | None,
) -> int:
    """Train from the newest checkpoint to the end, a stop request, or a failure; say which in the attempt."""
    state = newest_checkpoint(directory, config.run_id, mapped=config.resources.shard)
    if state is not None:
        module.restore(state)
    if lease is not None:
        directory.truncate_metrics(module.step)
        attempt.write(from_step=module.step, from_flop=module.flop)
    log = Log(directory, lease, attempt.record.number, config.resources.log_every)
    held_out = HeldOut(store, log, stop)
    checkpoints = Checkpoints(directory, lease, config.run_id, config.resources.checkpoint_minutes, stop)
    callbacks: list[lightning.Callback] = [
        Budget(),
        log,
        LastCheckpoint(checkpoints),
        held_out,
        checkpoints,
        Signals(),
    ]
    if lease is not None:
        callbacks.append(Show(lease, held_out))

    def interrupted(reason: str | None) -> int:
        if lease is not None:
            attempt.end("interrupted", reason=reason, to_step=module.step, to_flop=module.flop)
            print(f"{config.run_id}: interrupted ({reason}) at step {module.step}; run it again to go on")
        return INTERRUPTED

    try:
        _run(config, directory, store, module, chunk_tokens, held_out, callbacks, stop)
        weights = module.weights() if module.step == module.plan.steps else {}
        if lease is None:
            return DONE if module.step == module.plan.steps else INTERRUPTED
        evaluated = held_out.last is not None or _last_evaluation(directory, module) is not None
        if module.step < module.plan.steps or not evaluated or not lease.held():
            return interrupted(stop.reason)
        attempt.end("done", to_step=module.step, to_flop=module.flop)
        _say_outcome(directory, _record(config, directory, module, weights, facts, None))
        return DONE
    except Stopped:
        return interrupted(stop.reason)
    except Diverged as error:
        weights = module.weights()
        if lease is not None:
            attempt.end("diverged", reason=str(error), to_step=error.step, to_flop=module.flop)
            if lease.held():
                _record(config, directory, module, weights, facts, error.step)
            print(f"{config.run_id}: diverged, {error}", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, SystemExit) as error:  # the latter is what Lightning makes of the former
        return interrupted(stop.reason or type(error).__name__)
    except Exception as error:
        if lease is not None:
            reason = f"{type(error).__name__}: {error}"
            attempt.end("failed", traceback.format_exc(), reason=reason, to_step=module.step, to_flop=module.flop)
            print(f"{config.run_id}: failed, {reason} (traceback in {attempt.path})", file=sys.stderr)
        return FAILED


def _run(
    config: RunConfig,
    directory: RunDirectory,
    store: PairStore,
    module: Contrastive,
    chunk_tokens: int | None,
    held_out: HeldOut,
    callbacks: list[lightning.Callback],
    stop: StopRequest,
) -> None:
    """The steps that are left, and the evaluations that are missing."""
    resources, plan = config.resources, module.plan
    strategy: Any = "auto"
    if plan.world_size > 1:
        strategy = _Gathered(process_group_backend=None if torch.cuda.is_available() else "gloo")
    trainer = bare_trainer(
        devices=resources.devices,
        num_nodes=resources.nodes,
        strategy=strategy,
        callbacks=callbacks,
        logger=_loggers(config, directory),
    )
    if module.step == plan.steps:
        held_out.catch_up(trainer, module.to(trainer.strategy.root_device))
    elif not stop.requested:
        batches = Batches(store, plan, config, chunk_tokens)
        trainer.fit(module, datamodule=_Steps(batches, module.step, resources.workers))


class _Steps(lightning.LightningDataModule):
    """The loader of the steps that are left."""

    def __init__(self, batches: Batches, first: int, workers: int):
        super().__init__()
        self.batches, self.first, self.workers = batches, first, workers

    def train_dataloader(self) -> DataLoader[Any]:
        # What the first process found to fit, and wrote down, holds for all.
        self.batches.chunk_tokens = self.trainer.strategy.broadcast(self.batches.chunk_tokens)
        self.batches.rank = self.trainer.global_rank
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.first, len(self.batches)),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=begin_worker,
            # Forked, a worker imports nothing anew.
            multiprocessing_context="fork" if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )


def begin_worker(worker: int) -> None:
    """SLURM signals every process of a job; a loader's parent ends it when the step is done, or by its own end.

    torch's worker notices that too, but then waits for ever to hand over its last batches, which nobody takes.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _loggers(config: RunConfig, directory: RunDirectory) -> list[Any]:
    found: list[Any] = []
    if "tensorboard" in config.resources.loggers:
        from lightning.pytorch.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(directory.path, name=directory.tensorboard.name, version=""))
    if "wandb" in config.resources.loggers:
        from lightning.pytorch.loggers import WandbLogger

        os.environ.setdefault("WANDB_MODE", "offline")  # a node seldom reaches the internet
        found.append(WandbLogger(name=config.run_id, id=config.run_id, project="embedscale", save_dir=directory.path))
    return found


def _last_evaluation(directory: RunDirectory, module: Contrastive) -> Metric | None:
    rows = [row for row in directory.read_metrics() if row.loss is not None and row.step == module.plan.steps]
    return rows[-1] if rows else None


def _record(
    config: RunConfig,
    directory: RunDirectory,
    module: Contrastive,
    weights: dict[str, torch.Tensor],
    facts: PlanFile,
    diverged_at_step: int | None,
) -> RunRecord:
    """Write the final weights and, last of all, the record; then the checkpoints have served.

    `gpu_hours` are hours of devices, each counted once: an attempt's are divided by the number of runs that its device
    was to take side by side, though the last ones of a bundle may have had it to themselves.
    """
    plan, evaluation, method = module.plan, config.evaluation, config.method
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    done = diverged_at_step is None
    final = _last_evaluation(directory, module) if done else None
    attempts = sound(directory.read_attempts())
    wall = sum(attempt.seconds for attempt in attempts)
    of_a_device = sum(attempt.seconds / attempt.sharing for attempt in attempts)
    if done:
        directory.model.mkdir(exist_ok=True)
        write_atomically(directory.weights, lambda file: save_file(weights, file.name))
    training = asdict(config.training)
    del training["seed"]
    training["learning_rate"] = plan.learning_rate
    record = RunRecord(
        format=1,
        status="done" if done else "diverged",
        run_id=config.run_id,
        backbone=short_name(config.backbone.name),
        backbone_weights=config.backbone.weights,
        backbone_revision=config.backbone.revision,
        backbone_digest=facts.backbone_digest,
        n_forward=facts.n_forward,
        n_backward=facts.n_backward,
        n_updated=facts.n_updated,
        n_parameters=facts.n_parameters,
        blocks=facts.blocks,
        width=facts.width,
        tokenizer_digest=facts.tokenizer_digest,
        method=method.name,
        hyperparameters=Hyperparameters(
            **training,
            context=config.data.context,
            temperature=config.loss.temperature,
            loss=config.loss.form,
            hard_negatives=config.loss.hard_negatives,
            mask_equal_texts=config.loss.mask_equal_texts,
            pooling=config.backbone.pooling,
            **{key: value for key, value in asdict(method).items() if key != "name"},
            method_label=method.label,
        ),
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
        gpu_hours=round(of_a_device * plan.world_size / 3600, 5),
        device=_device(training_device(), plan.world_size),
        attempts=attempts,
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        code=code_version(),
        diverged_at_step=diverged_at_step,
    )
    directory.secure_metrics()
    directory.write_record(record)
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    return record


def _device(device: torch.device, count: int) -> Device:
    known = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = known or platform.machine()
    return Device(name, count, device.type, torch.get_num_threads())


def code_version() -> CodeVersion:
    """The package's version and, where it runs from a checkout, its commit."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return CodeVersion(version("embedscale"), git("rev-parse", "HEAD"), bool(status))
