"""Texts into token ids: the tokenizer of a store, and its pairs as columns of Arrow.

A fast tokenizer is used as it lies in `tokenizer.json`, without transformers around it: no special token is added, and
no setting of a class in between can change the ids. Texts are hashed whole, before they are cut.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data.corpora import Pair
from embedscale.data.store import as_numpy
from embedscale.errors import UserError

SPARE_TOKENS = 16  # beyond the context, so that cutting a long text early does not change the tokens that are kept
TEXTS_AT_ONCE = 1024
CHARACTERS = 8  # a token, at first; of a text that turns out to need more, so many times as much is read

# Letters, case, accents, digits, runs of white space, code and scripts on which tokenizers are known to differ.
PROBE = (
    "The café's 12,345 naïve TESTS:\n\n\tdef f(x):\n        return x**2  # don't "
    "straße 北京 東京 한국 مرحبا Здравствуй 🙂 \u00a0ﬁ"
)


@lru_cache
def load_tokenizer(name: str, revision: str | None = None) -> tuple[Any, str]:
    """The tokenizer of a hub name or folder, and a digest of its behaviour: the vocabulary and a probe's ids.

    The file's text is no part of the digest: the same tokenizer saved by another release reads differently.
    Raises UserError where there is no `tokenizer.json`.
    """
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else _from_hub(name, revision)
    if not file.is_file():
        raise UserError(f"data.tokenizer: {name} holds no tokenizer.json; a fast tokenizer is needed")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"data.tokenizer: {file} is no tokenizer that can be read ({reason})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    behaviour = repr((sorted(tokenizer.get_vocab().items()), ids))
    return tokenizer, hashlib.sha256(behaviour.encode()).hexdigest()[:16]


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    except Exception as error:  # the hub's client has a class of its own for each way of not finding a file
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data.tokenizer: {name!r} is neither a local folder nor a model that the hub or its local cache has "
            f"({reason})"
        ) from None


def tokenizer_digest(name: str, revision: str | None = None) -> str:
    """What two tokenizers of equal behaviour share. Raises UserError as `load_tokenizer` does."""
    return load_tokenizer(name, revision)[1]


def vocabulary(tokenizer: Any) -> int:
    """Rows that an embedding table needs: the largest id and one. Ids need not be dense."""
    return 1 + max(tokenizer.get_vocab().values())


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64, uniform, the same everywhere."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8")


def mixed(x: np.ndarray) -> np.ndarray:
    """A second, independent hash of 64-bit hashes (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pair_hashes(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """uint64 of each pair from those of its texts; their order is the shuffle of a store."""
    return mixed(queries ^ mixed(positives))


def schema(token: Any, **more: Any) -> Any:
    """The columns of a store's files, with token ids of NumPy type `token`."""
    import pyarrow

    tokens, text = pyarrow.list_(pyarrow.from_numpy_dtype(token)), pyarrow.uint64()
    columns = {
        "query": tokens,
        "positive": tokens,
        "negatives": pyarrow.list_(tokens),
        "query_text": text,
        "positive_text": text,
        "negative_text": pyarrow.list_(text),
    }
    return pyarrow.schema(list((columns | more).items()))


def tokenised(pairs: list[Pair], tokenizer: Any, context: int, token: Any) -> dict[str, Any]:
    """The columns of `schema` for the pairs whose query and positive have tokens, in order.

    Texts are cut at `context` tokens; negatives without a token are left out.
    """
    import pyarrow

    n = len(pairs)
    texts = [pair.query for pair in pairs] + [pair.positive for pair in pairs]
    texts += [negative for pair in pairs for negative in pair.negatives]
    ids, hashes = token_ids(texts, tokenizer, context, token), text_hashes(texts)
    full = np.diff(as_numpy(ids.offsets)) > 0
    kept = np.flatnonzero(full[:n] & full[n : 2 * n])
    owner = np.repeat(np.arange(n), [len(pair.negatives) for pair in pairs])
    chosen = np.flatnonzero(full[2 * n :] & np.isin(owner, kept))
    bounds = pyarrow.array(np.searchsorted(owner[chosen], [*kept, n]).astype(np.int32))
    return {
        "query": ids.take(pyarrow.array(kept)),
        "positive": ids.take(pyarrow.array(n + kept)),
        "negatives": pyarrow.ListArray.from_arrays(bounds, ids.take(pyarrow.array(2 * n + chosen))),
        "query_text": hashes[kept],
        "positive_text": hashes[n + kept],
        "negative_text": pyarrow.ListArray.from_arrays(bounds, pyarrow.array(hashes[2 * n + chosen])),
    }


def token_ids(texts: Sequence[str], tokenizer: Any, context: int, token: Any) -> Any:
    """The first `context` ids of each text, as a pyarrow.ListArray. Of a long text only the beginning is tokenised."""
    import pyarrow

    room = context + SPARE_TOKENS
    first = room * min(CHARACTERS, _longest_symbol(tokenizer))
    tokenizer.enable_truncation(room)

    def encoded(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    flat, lengths = [np.empty(0, token)], [0]
    # A few texts at a time: as Python's integers, ids take twenty times the room.
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = [text if text and not text.isspace() else "" for text in texts[start : start + TEXTS_AT_ONCE]]
        cut = first
        ids = encoded([text[:cut] for text in some])
        while short := [i for i, text in enumerate(some) if len(text) > cut and len(ids[i]) < room]:
            cut *= CHARACTERS
            for i, found in zip(short, encoded([some[i][:cut] for i in short]), strict=True):
                ids[i] = found
        ids = [found[:context] for found in ids]
        lengths += map(len, ids)
        flat.append(np.fromiter(chain.from_iterable(ids), token))
    offsets = np.cumsum(lengths, dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(flat)))


@lru_cache
def _longest_symbol(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))
