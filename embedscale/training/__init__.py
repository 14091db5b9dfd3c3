"""One training run: plan, step, loss, callbacks, record.

The function that trains a run is `embedscale.train`.
"""

from embedscale.imports import lazy

_PLACES = {
    "Contrastive": "embedscale.training.module:Contrastive",
    "TrainingPlan": "embedscale.training.plan:TrainingPlan",
    "accumulate_gradient": "embedscale.training.gradcache:accumulate_gradient",
    "evaluate_held_out": "embedscale.training.held_out:evaluate_held_out",
    "info_nce": "embedscale.training.loss:info_nce",
    "plan_run": "embedscale.training.plan:plan_run",
}
__all__ = [*_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
