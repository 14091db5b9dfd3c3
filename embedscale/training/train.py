"""One run, from a RunConfig to its record: planned before its first step, resumed from its newest checkpoint.

Everything that a user can correct is checked before anything is written. From then on the run belongs to the process
that holds its lease (embedscale/run/lease.py).
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from embedscale.data.store import PairStore
from embedscale.data.tokens import tokenizer_digest
from embedscale.errors import DONE, FAILED, UserError
from embedscale.files import write_atomically
from embedscale.model.backbone import digest_of, load_body, shape_of, shape_without_weights
from embedscale.model.body import FROM_TOKENS, use_cpu_body
from embedscale.model.hardware import allow_tf32, keep_freed_memory, training_device
from embedscale.model.parallel import wait_for_all
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory
from embedscale.run.lease import leased, remove_what_is_left_over
from embedscale.run.record import Damaged, sound
from embedscale.run.settings import load, to_yaml
from embedscale.run.stop import STOP_SIGNALS, StopRequest, end_with_parent
from embedscale.training import outcome
from embedscale.training.batches import Batches
from embedscale.training.callbacks import BetweenSteps, newest_checkpoint
from embedscale.training.memory import fitting_chunk
from embedscale.training.module import Contrastive, assemble
from embedscale.training.plan import PlanFile, TrainingPlan, plan_run
from embedscale.training.run import Diverged, Stopped, TrainingRun

# Lightning sets this too, but cuBLAS reads it at the first product, which `calibrate` may make before.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def train(config: RunConfig, stop: StopRequest | None = None, sharing: int = 1, beside: int = 1) -> int:
    """Train a run to its budget, or resume it, or say that it is finished.

    `sharing` is the number of runs on the same device: they split its memory and its hours. `beside` is the number of
    CPU runs on other cores of the same machine: they split its memory alone.

    Returns DONE, FAILED (diverged, or an error whose traceback is in the attempt) or INTERRUPTED (can be resumed).
    Raises UserError, before anything is written, for what the user can correct.
    """
    if stop is None:
        stop = StopRequest()
        stop.on_signals()
    directory = RunDirectory(config.folder)
    record = sound(directory.read_record())
    if record is not None:
        remove_what_is_left_over(directory)
        outcome.say_outcome(directory, record)
        return DONE if record.status == "done" else FAILED
    _refuse_another_config(directory, config)
    begun = _begun(directory)
    with _as_many_threads(directory, begun):
        return _train(config, directory, begun, stop, sharing, beside)


def _train(
    config: RunConfig, directory: RunDirectory, begun: PlanFile | None, stop: StopRequest, sharing: int, beside: int
) -> int:
    versions, code = outcome.versions(), outcome.code_version()
    store, plan = _planned(config)
    quieten()
    keep_freed_memory()
    allow_tf32(config.training.precision)
    module, facts = _build(config, plan, store)
    module.sharing = sharing * beside
    if begun is not None:
        _refuse_another_plan(directory, begun, facts, module)
    facts = replace(facts, chunk_tokens=_chunk_tokens(config, begun, module), threads=torch.get_num_threads())
    if _rank() > 0:
        state = newest_checkpoint(directory, config.run_id, mapped=config.resources.shard)
        attempt = directory.attempt(0)
        return _fit(TrainingRun(config, directory, store, module, facts, stop, attempt, versions, code), state)
    with leased(directory.lease, lambda: stop.request("another process has taken this run over")) as lease:
        if directory.record.exists():  # another process ended the run since the first look
            return train(config, stop, sharing, beside)
        state = newest_checkpoint(directory, config.run_id, mapped=config.resources.shard)
        write_atomically(directory.config, lambda file: file.write(to_yaml(config).encode()))
        facts.write(directory.plan)
        directory.clear_up(lease.left_behind)
        attempt = directory.begin_attempt(sharing=sharing)
        return _fit(TrainingRun(config, directory, store, module, facts, stop, attempt, versions, code, lease), state)


def _begun(directory: RunDirectory) -> PlanFile | None:
    """Return what a run with checkpoints began with, else None. Raises UserError if it is not known any more."""
    if not directory.checkpoint_paths():
        return None
    begun = PlanFile.read(directory.plan)
    if begun is None or isinstance(begun, Damaged):
        why = f"{directory.plan}: is missing" if begun is None else str(begun)
        raise UserError(
            f"{why}; without it, no checkpoint can be continued: restore it, or remove {directory.checkpoints} "
            "to begin the run again"
        )
    return begun


@contextmanager
def _as_many_threads(directory: RunDirectory, begun: PlanFile | None) -> Iterator[None]:
    """Compute with as many threads as the run began with: another number rounds differently on a CPU.

    Raises UserError if torch does not take that number.
    """
    before = torch.get_num_threads()
    if begun is None or begun.threads in (None, before):
        yield
        return
    torch.set_num_threads(begun.threads)
    if torch.get_num_threads() != begun.threads:
        raise UserError(f"{directory.path}: this run began with {begun.threads} threads, which torch refuses here")
    said = f"{directory.path} goes on with {begun.threads} threads, as it began, not {before}"
    print(f"embedscale: {said}", file=sys.stderr)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _planned(config: RunConfig) -> tuple[PairStore, TrainingPlan]:
    """Return the store and the plan, without weights. Raises UserError if they do not fit the configuration."""
    shape = shape_without_weights(config.backbone)  # first, so that a mistyped backbone is not blamed on the tokenizer
    store = PairStore.open(config.data.store)
    tokenizer = config.data.tokenizer or config.backbone.name
    revision = None if config.data.tokenizer else config.backbone.revision
    if tokenizer_digest(tokenizer, revision) != store.tokenizer_digest:
        raise UserError(
            f"data.store: {config.data.store} was made with tokenizer {store.manifest.tokenizer.name!r}; "
            f"{tokenizer!r} gives other tokens"
        )
    plan = plan_run(config, shape, store)
    # Damaged pairs must be found now, not after hours of training.
    store.held_out_batch(0, config.evaluation.pool)
    store.verify(plan.first_pair, plan.first_pair + plan.pairs)
    if store.manifest.digests is None:
        print(
            f"embedscale: {config.data.store} has no digests of its files (earlier version): damage cannot be noticed; "
            "`embedscale prepare` with this configuration adds them",
            file=sys.stderr,
        )
    return store, plan


def _chunk_tokens(config: RunConfig, begun: PlanFile | None, module: Contrastive) -> int | None:
    """Return the configured value, else the one that the run started with (same rounding), else what fits in memory."""
    if config.resources.chunk_tokens is not None:
        return config.resources.chunk_tokens
    return fitting_chunk(module) if begun is None else begun.chunk_tokens


def _rank() -> int:
    """Return this process's number, before torch.distributed knows it."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    return int(os.environ.get("NODE_RANK", 0)) * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + local


def _build(config: RunConfig, plan: TrainingPlan, store: PairStore) -> tuple[Contrastive, PlanFile]:
    """Return the module before its first step, and the facts that must be the same when the run is resumed."""
    body = load_body(config.backbone, config.training.seed)
    shape = shape_of(body, config.backbone.name)
    digest = digest_of(dict(body.named_parameters()))
    module = assemble(body, config, plan)
    if module.cost.flop_per_token != plan.flop_per_token:  # a hub name that ends as that of a known size
        raise UserError(
            f"backbone.name: {config.backbone.name!r} has other layers than the known model of its name: a token costs "
            f"{module.cost.flop_per_token:,} FLOP, not {plan.flop_per_token:,}; give a local folder with the model"
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
        tokens_before=list(store.added.before),
        tokens_after=list(store.added.after),
        body=_body(module, plan.step_tokens),
    )


def _refuse_another_config(directory: RunDirectory, config: RunConfig) -> None:
    if not directory.config.exists():
        return
    found = load(directory.config).science()
    wanted = config.science()
    for part in wanted:
        if found[part] != wanted[part]:
            raise UserError(f"{directory.path}: is the directory of another run: {part} is {found[part]} there")


def _body(module: Contrastive, step_tokens: int) -> str:
    return "cpu" if use_cpu_body(module.encoder, training_device(), step_tokens) else "plain"


def _refuse_another_plan(directory: RunDirectory, begun: PlanFile, facts: PlanFile, module: Contrastive) -> None:
    """Raise UserError if a run with checkpoints began with other data, weights, processes, or another body."""
    if begun.body is None:  # version 0.1 used the CPU body for steps of any size
        begun = replace(begun, body=_body(module, FROM_TOKENS))
    if found := begun.difference(facts):
        changed = "" if begun.backbone_digest == facts.backbone_digest else f"; restore {module.config.backbone.name}"
        raise UserError(f"{directory.path}: {found}{changed}")


def bare_trainer(**options: Any) -> lightning.Trainer:
    """Return a deterministic Trainer without Lightning's own checkpoints, progress bar and samplers."""
    # Filling every new buffer costs a pass over memory, and only helps to find reads of uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lightning.Trainer(
        max_epochs=1,
        plugins=[LightningEnvironment()],  # also inside a SLURM job, this environment starts the processes
        deterministic=True,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


class _Processes(DDPStrategy):
    """Lightning's processes and devices without DDP: model/parallel.py sums gradients or shards the model."""

    def configure_ddp(self) -> None:
        pass


def _fit(run: TrainingRun, state: dict[str, Any] | None) -> int:
    """Train from the state of a checkpoint to the end, a stop request or a failure; say which in the attempt."""
    if state is not None:
        run.module.restore(state)
    if run.lease is not None:
        if state is not None:
            step = run.module.step
            print(f"{run.config.run_id}: goes on from step {step} ({run.directory.checkpoint(step)})")
        if state is not None and "rows" not in state:
            run.directory.cut_metrics_after(run.module.step)
        else:
            run.directory.cut_metrics(0 if state is None else state["rows"])
        run.attempt.write(from_step=run.module.step, from_flop=run.module.flop)
    others = set(active_children())
    try:
        _make_steps(run)
        code = outcome.end_of_steps(run)
        wait_for_all()  # for the first process, which writes: who supervises them kills those that end much later
        return code
    except Stopped:
        return outcome.interrupted(run, run.stop.reason)
    except Diverged as error:
        return outcome.diverged(run, error)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns the former into the latter
        return outcome.interrupted(run, run.stop.reason or type(error).__name__)
    except Exception as error:
        code = outcome.failed(run, error)
        _end_loaders(set(active_children()) - others)
        return code


def _end_loaders(workers: Collection[BaseProcess]) -> None:
    """End the workers that an error left behind, such as one that came while their loader was built.

    They ignore SIGTERM (`begin_worker`), by which Python ends its children at its own end, and it would wait for ever.
    """
    if workers:
        with suppress(ValueError):  # torch's handler, of the main thread, takes the end of a worker for an error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
            worker.join()


def _make_steps(run: TrainingRun) -> None:
    """Make the steps that are left, and the evaluations that are missing."""
    resources = run.config.resources
    strategy: Any = "auto"
    if run.plan.world_size > 1:
        strategy = _Processes(process_group_backend=None if torch.cuda.is_available() else "gloo")
    between = BetweenSteps(run)
    trainer = bare_trainer(
        devices=resources.devices,
        num_nodes=resources.nodes,
        strategy=strategy,
        callbacks=[between],
        logger=_loggers(run),
    )
    try:
        if run.done:
            run.module.to(trainer.strategy.root_device)
            between.catch_up(trainer)
        elif not run.stop.requested:
            trainer.fit(run.module, datamodule=_Steps(run))
    finally:
        _end_loggers(run)


class _Steps(lightning.LightningDataModule):
    """The loader of the steps that are left."""

    def __init__(self, run: TrainingRun):
        super().__init__()
        self.run = run

    def train_dataloader(self) -> DataLoader[Any]:
        run, workers = self.run, loading_workers(self.run.config)
        # The first process's chunk size, which is in plan.json, holds for all processes.
        chunk = self.trainer.strategy.broadcast(run.facts.chunk_tokens)
        batches = Batches(run.store, run.plan, run.config, chunk, self.trainer.global_rank)
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(run.module.step, len(batches)),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=begin_worker,
            multiprocessing_context="fork" if workers else None,  # a forked worker imports nothing again
            pin_memory=torch.cuda.is_available(),
        )


def loading_workers(config: RunConfig) -> int:
    """Return how many processes load batches. On a CPU, a loader would take a core from the training."""
    if config.resources.workers is not None:
        return config.resources.workers
    return 2 if training_device().type == "cuda" else 0


def begin_worker(worker: int) -> None:
    """Make a loader's worker ignore stop signals, which SLURM sends to every process of a job, and end with its parent.

    Torch's worker notices its parent's end too, but then waits for ever for someone to take its last batches.
    """
    end_with_parent(STOP_SIGNALS)
    shown = sys.excepthook

    def show(kind: type[BaseException], *more: Any) -> None:
        """Print an error, but not that the training process was killed while it took a batch over."""
        if not issubclass(kind, EOFError | ConnectionError):
            shown(kind, *more)

    sys.excepthook = show


def _loggers(run: TrainingRun) -> list[Any]:
    directory, run_id, found = run.directory, run.config.run_id, list[Any]()
    if "tensorboard" in run.config.resources.loggers:
        from lightning.pytorch.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(directory.path, name=directory.tensorboard.name, version=""))
    if "wandb" in run.config.resources.loggers:
        from lightning.pytorch.loggers import WandbLogger

        os.environ.setdefault("WANDB_MODE", "offline")  # most nodes do not reach the internet
        found.append(WandbLogger(name=run_id, id=run_id, project="embedscale", save_dir=directory.path))
    return found


def _end_loggers(run: TrainingRun) -> None:
    """End W&B's run, or the next training in this process would log into it."""
    if "wandb" in run.config.resources.loggers:
        import wandb

        try:
            wandb.finish()
        except Exception as error:  # W&B's own process may have ended; the training is whole
            print(f"{run.config.run_id}: wandb could not end its run ({type(error).__name__})")


def quieten() -> None:
    """Silence Lightning's messages and warnings, which would break the progress line."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
