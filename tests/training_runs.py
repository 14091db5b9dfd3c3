"""Helpers for tests of whole runs: settings of each method, a short run, a stop at a chosen moment."""

from embedscale.run.directory import RunDirectory
from embedscale.run.settings import load
from embedscale.run.stop import StopRequest

METHODS = {
    "full": ["method.name=full"],
    "freeze": ["method.name=freeze", "method.active_fraction=0.5"],
    "bias": ["method.name=bias"],
    "lora": ["method.name=lora", "method.rank=4"],
}


BUDGET = "budget=5e9"


def run_of(tmp_path, tiny_run, *words):
    config = load(None, [*tiny_run, f"output={tmp_path / 'runs'}", BUDGET, *words])
    return config, RunDirectory(config.folder)


def comparable(directory: RunDirectory):
    """Return what two runs of one configuration must have in common: everything but times and attempts."""
    times = {"attempt", "tokens_per_second", "seconds"}
    metrics = [{k: v for k, v in row.to_json().items() if k not in times} for row in directory.read_metrics()]
    record = directory.read_record().to_json()
    for key in ("attempts", "wall_seconds", "gpu_hours", "code"):  # the commit may move while tests run
        record.pop(key)
    return metrics, record, (directory.model / "trainable.safetensors").read_bytes()


class StopAfter(StopRequest):
    """A stop request that is made at the n-th look."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        if self.looks < 0:
            self.request("test")
        return self.reason is not None
