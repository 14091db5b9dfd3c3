"""embedscale: compute-optimal recipes for turning language models into text-embedding models.

This package is one run; many runs are in `slurm`, and what the runs say is in `analysis`. The names below are the
public interface. They are imported when they are first used, so `import embedscale` is fast and loads neither torch nor
transformers. Errors that a user can cause are a `UserError`, whose text is one line.

    import embedscale

    config = embedscale.load_config("configs/quickstart.yaml", ["budget=1e10"])
    embedscale.prepare(config)
    embedscale.train(config)
    embeddings = embedscale.Embedder.load(config.folder).encode(["a text", "another"])
"""

from embedscale.imports import lazy

__version__ = "0.2.0"

_PLACES = {
    "Embedder": "embedscale.serving.embedder:Embedder",
    "Method": "embedscale.run.method:Method",
    "PairStore": "embedscale.data.store:PairStore",
    "RunConfig": "embedscale.run.config:RunConfig",
    "RunDirectory": "embedscale.run.directory:RunDirectory",
    "RunRecord": "embedscale.run.record:RunRecord",
    "UserError": "embedscale.errors:UserError",
    "encode": "embedscale.serving.encode:encode",
    "evaluate": "embedscale.serving.evaluate:evaluate",
    "export": "embedscale.serving.export:export",
    "load_config": "embedscale.run.settings:load",
    "prepare": "embedscale.data.prepare:prepare",
    "train": "embedscale.training.train:train",
}
__all__ = ["__version__", *_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
