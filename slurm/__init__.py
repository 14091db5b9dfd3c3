"""Many runs: the grid of a sweep, its plan, its submission and its status.

sweep = slurm.load_sweep("configs/sweep/quickstart.yaml")
slurm.plan_sweep(sweep).gpu_hours
[(each.run_id, each.state) for each in slurm.survey(sweep, jobs=None)]
"""

from embedscale.imports import lazy

_PLACES = {
    "Cluster": "slurm.cluster:Cluster",
    "Estimate": "slurm.plan:Estimate",
    "Job": "slurm.scheduler.scheduler:Job",
    "ResourceClass": "slurm.cluster:ResourceClass",
    "RunState": "slurm.status:RunState",
    "RunStatus": "slurm.status:RunStatus",
    "Scheduler": "slurm.scheduler.scheduler:Scheduler",
    "Sweep": "slurm.grid:Sweep",
    "SweepPlan": "slurm.plan:SweepPlan",
    "load_sweep": "slurm.grid:load",
    "plan_sweep": "slurm.plan:plan_sweep",
    "survey": "slurm.status:survey",
}
__all__ = [*_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
