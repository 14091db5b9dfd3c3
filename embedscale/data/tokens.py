"""Texts into token ids: a store's tokenizer, and pairs as Arrow columns.

`tokenizer.json` is loaded by the tokenizers library directly, without transformers around it. So no setting of a
tokenizer class can change the ids. The price: only fast tokenizers work. Texts are hashed whole, before they are cut.
Special tokens are added as the tokenizer's template says, or not at all (`added_tokens_of`).
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from embedscale.data.manifest import NO_TOKENS, AddedTokens
from embedscale.data.pair import Pair
from embedscale.data.store import as_numpy
from embedscale.errors import UserError
from embedscale.run.config import RunConfig
from embedscale.run.families import needs_first_token, refuse_missing_folder

SPARE_TOKENS = 16  # tokens beyond the context, so that cutting a long text early does not change the tokens kept
TEXTS_AT_ONCE = 1024
CHARACTERS = 8  # characters read per wanted token; multiplied by this again while the text is too short

# Text on which tokenizers differ: case, accents, digits, white space, code and several scripts.
PROBE = (
    "The café's 12,345 naïve TESTS:\n\n\tdef f(x):\n        return x**2  # don't "
    "straße 北京 東京 한국 مرحبا Здравствуй 🙂 \u00a0ﬁ"
)


def tokenizer_of(config: RunConfig) -> tuple[str, str | None]:
    """Return the name and the hub revision of a run's tokenizer: `data.tokenizer`, or the backbone's own."""
    if config.data.tokenizer:
        return config.data.tokenizer, None
    return config.backbone.name, config.backbone.revision


def added_tokens_of(config: RunConfig, tokenizer: Any) -> AddedTokens:
    """Return the tokens that `data.special_tokens` asks for around each text.

    Raises UserError if the tokenizer's template does not only add tokens before and after a text, or if the context has
    no room for a token of the text.
    """
    asked, backbone = config.data.special_tokens, config.backbone
    if asked == "none" or (asked == "auto" and not needs_first_token(backbone.name, backbone.revision)):
        return NO_TOKENS
    tokenizer.no_truncation()  # `token_ids` may have cut texts with the same object
    plain, whole = (tokenizer.encode(PROBE, add_special_tokens=add).ids for add in (False, True))
    starts = [n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain]
    if not starts:
        raise UserError(
            "data.special_tokens: the tokenizer's template does not only add tokens before and after a text; set none"
        )
    found = AddedTokens(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :]))
    if len(whole) - len(plain) >= config.data.context:
        raise UserError(
            f"data.context: {config.data.context} tokens have no room beside the {len(whole) - len(plain)} special "
            "tokens of each text; set a longer context, or data.special_tokens=none"
        )
    return found


@lru_cache
def load_tokenizer(name: str, revision: str | None = None) -> tuple[Any, str]:
    """Load the tokenizer of a hub name or folder. Returns it and a digest of its behaviour.

    The digest covers the vocabulary and the ids of `PROBE`. It does not cover the file's text, because different
    releases save the same tokenizer differently. Raises UserError if there is no readable `tokenizer.json`.
    """
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else _from_hub(name, revision)
    if not file.is_file():
        raise UserError(f"data.tokenizer: {name} holds no tokenizer.json; only fast tokenizers can be used")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"data.tokenizer: {file} is not a readable tokenizer ({reason})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    behaviour = repr((sorted(tokenizer.get_vocab().items()), ids))
    return tokenizer, hashlib.sha256(behaviour.encode()).hexdigest()[:16]


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    refuse_missing_folder("data.tokenizer", name)
    try:
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    except Exception as error:  # the hub's client raises many unrelated classes
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data.tokenizer: {name!r} is neither a local folder nor a model of the hub or its local cache ({reason})"
        ) from None


def tokenizer_digest(name: str, revision: str | None = None) -> str:
    """Return the digest of a tokenizer's behaviour. Raises UserError as `load_tokenizer` does."""
    return load_tokenizer(name, revision)[1]


def vocabulary(tokenizer: Any) -> int:
    """Return the rows that an embedding table needs: the largest id plus one, as ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Hash each text to a uniform 64-bit number, uint64 [texts]; equal on every machine."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(joined, dtype="<u8")


def mixed(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit hashes again, independently of the first hash (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pair_hashes(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Combine the text hashes of each pair, uint64 [pairs]. A store's shuffled order is the order of these hashes."""
    return mixed(queries ^ mixed(positives))


def schema(token: Any, **more: Any) -> Any:
    """Return the Arrow schema of a store's files, with token ids of NumPy type `token`, and `more` columns behind."""
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


def tokenised(
    pairs: list[Pair], tokenizer: Any, context: int, token: Any, added: AddedTokens = NO_TOKENS
) -> dict[str, Any]:
    """Tokenise pairs into the columns of `schema`, in order.

    Texts are cut at `context` tokens, with the added ones. Pairs whose query or positive has no token are left out, and
    so are negatives without a token.
    """
    import pyarrow

    n = len(pairs)
    texts = [pair.query for pair in pairs] + [pair.positive for pair in pairs]
    texts += [negative for pair in pairs for negative in pair.negatives]
    ids, hashes = token_ids(texts, tokenizer, context, token, added), text_hashes(texts)
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


def token_ids(texts: Sequence[str], tokenizer: Any, context: int, token: Any, added: AddedTokens = NO_TOKENS) -> Any:
    """Return the first `context` ids of each text, `added` included, as a pyarrow.ListArray of NumPy type `token`.

    A text without a token of its own gets none.

    Only the beginning of a long text is tokenised: enough characters for `context` and SPARE_TOKENS more tokens.
    """
    import pyarrow

    room = context + SPARE_TOKENS
    first = room * min(CHARACTERS, _longest_symbol(tokenizer))
    tokenizer.enable_truncation(room)

    def encoded(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    flat, lengths = [np.empty(0, token)], [0]
    # Few texts at a time: as Python integers, ids take twenty times the memory.
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = [text if text and not text.isspace() else "" for text in texts[start : start + TEXTS_AT_ONCE]]
        cut = first
        ids = encoded([text[:cut] for text in some])
        while short := [i for i, text in enumerate(some) if len(text) > cut and len(ids[i]) < room]:
            cut *= CHARACTERS
            for i, found in zip(short, encoded([some[i][:cut] for i in short]), strict=True):
                ids[i] = found
        ids = [added.around(found, context) for found in ids]
        lengths += map(len, ids)
        flat.append(np.fromiter(chain.from_iterable(ids), token))
    offsets = np.cumsum(lengths, dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(flat)))


@lru_cache
def _longest_symbol(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))
