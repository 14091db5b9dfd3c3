"""What a finished run is used for: embed texts, evaluate with MTEB, export.

The functions behind the verbs are `embedscale.encode`, `embedscale.evaluate` and `embedscale.export`.
"""

from embedscale.imports import lazy

_PLACES = {
    "Embedder": "embedscale.serving.embedder:Embedder",
    "Encoding": "embedscale.serving.encode:Encoding",
    "adapter_of": "embedscale.serving.evaluate:adapter_of",
    "held_out_task": "embedscale.serving.evaluate:held_out_task",
    "texts_of": "embedscale.serving.encode:texts_of",
}
__all__ = [*_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
