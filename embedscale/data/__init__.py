"""From text pairs to a store of tokenised pairs.

The function that makes a store is `embedscale.prepare`.
"""

from embedscale.imports import lazy

_PLACES = {
    "Manifest": "embedscale.data.manifest:Manifest",
    "Pair": "embedscale.data.pair:Pair",
    "PairBatch": "embedscale.data.store:PairBatch",
    "PairStore": "embedscale.data.store:PairStore",
    "load_tokenizer": "embedscale.data.tokens:load_tokenizer",
    "read": "embedscale.data.corpora:read",
    "tokenizer_digest": "embedscale.data.tokens:tokenizer_digest",
    "tokenizer_of": "embedscale.data.tokens:tokenizer_of",
    "units_of": "embedscale.data.corpora:units_of",
}
__all__ = [*_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
