"""End the jobs of a sweep, and its processes on this machine. What they have saved stays for the next submit."""

from argparse import Namespace
from collections.abc import Sequence

from embedscale.errors import DONE, UserError
from embedscale.texts import counted
from slurm import grid
from slurm.grid import Sweep
from slurm.scheduler.choice import scheduler_of
from slurm.scheduler.local import Local
from slurm.scheduler.scheduler import Job, Scheduler
from slurm.scheduler.submissions import Submissions


def cancel(sweep: Sweep, scheduler: Scheduler, confirmed: bool = False) -> None:
    """Cancel the sweep's jobs and ask its processes of this machine to save and stop; asks first unless `confirmed`.

    A job is cancelled as a whole. The question says how many runs share a job with a run of this sweep file, but do
    not belong to the file. Raises UserError if nothing can be asked here, or if the scheduler refuses.
    """
    here = Local(sweep.folder)
    processes = [job for job in here.jobs() if job.host == here.host]
    for job in here.jobs():
        if job.host != here.host:
            print(f"process {job.id} on {job.host} works at this sweep; cancel it there")
    jobs = Submissions(sweep.folder).jobs_by_run(scheduler.jobs())
    if jobs is None and not processes:
        raise UserError(
            f"{sweep.cluster.scheduler}: the queue cannot be asked from this machine; nothing was cancelled"
        )
    handles = sorted({job.handle for run_id, job in (jobs or {}).items() if run_id in sweep.by_id})
    if not handles and not processes:
        print(f"{sweep.name}: no job in the queue; nothing to cancel")
        return
    what = [f"{counted(len(processes), 'process')} on this machine"] if processes else []
    if handles:
        what += _described(sweep, {run_id: job for run_id, job in (jobs or {}).items() if job.handle in handles})
    print(f"{sweep.name}: {'; '.join(what)}.")
    print("Their checkpoints stay; the next submit goes on with them.")
    if not (confirmed or _agreed()):
        print("nothing was cancelled")
        return
    here.cancel([job.id for job in processes])
    scheduler.cancel(handles)
    asked = f", asked {counted(len(processes), 'process')} to save and stop" if processes else ""
    print(f"cancelled {counted(len(handles), 'job')}{asked}")


def _described(sweep: Sweep, going: dict[str, Job]) -> Sequence[str]:
    """Return what would be cancelled: jobs, their runs, and how many of these runs the sweep file does not have."""
    jobs = len({job.handle for job in going.values()})
    running = sum(job.running for job in going.values())
    what = f"{counted(jobs, 'job')} with {counted(len(going), 'run')}"
    parts = [f"{what}, {running:,} of them in jobs that run now"]
    if others := len(going.keys() - sweep.by_id.keys()):
        parts.append(f"{others:,} of these runs are not in this command, but share a job with one that is")
    return parts


def _agreed() -> bool:
    try:
        return input("Cancel them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise UserError("cancel: the question cannot be answered without a terminal; add --yes") from None


def command(args: Namespace) -> int:
    """`embedscale sweep cancel SWEEP.yaml [key=value …] [--yes]`."""
    sweep = grid.load(args.sweep, args.words)
    cancel(sweep, scheduler_of(sweep.cluster.scheduler, sweep.folder), confirmed=args.yes)
    return DONE
