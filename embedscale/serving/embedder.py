"""A finished run as an embedding model: load and check its weights, and embed texts.

Texts are tokenised, sorted by length and embedded in batches without padding, as in training. The price of sorting:
results come in groups of up to 16,384 texts, not one by one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from embedscale.data.manifest import AddedTokens
from embedscale.data.store import as_numpy
from embedscale.data.tokens import load_tokenizer, token_ids, tokenizer_of
from embedscale.errors import UserError
from embedscale.model.backbone import digest_of, load_body
from embedscale.model.body import Inference
from embedscale.model.encoder import Encoder
from embedscale.model.hardware import allow_tf32
from embedscale.model.methods import apply_method, merge_adapters
from embedscale.model.packing import pack
from embedscale.run.config import RunConfig
from embedscale.run.directory import RunDirectory, finished
from embedscale.run.record import RunRecord
from embedscale.run.settings import load

TEXTS_AT_ONCE = 16384  # texts tokenised and sorted by length together
# Tokens in one forward pass. On a CPU, so few that the activations stay in a core's cache.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 32768}


class Embedder:
    """A model that turns texts into unit vectors, cutting and pooling them as in the run's training."""

    def __init__(
        self,
        body: nn.Module,
        config: RunConfig,
        record: RunRecord,
        device: str | None = None,
        precision: str | None = None,
    ):
        self.config, self.record = config, record
        precision = precision or config.training.precision
        allow_tf32(precision)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder = Encoder(body, config.backbone.pooling, precision, config.backbone.attention)
        self.encoder = self.encoder.to(self.device).eval()
        self._inference = Inference(self.encoder)
        name, revision = tokenizer_of(config)
        self.tokenizer, digest = load_tokenizer(name, revision)
        if record.tokenizer_digest not in (None, digest):  # early records have no digest
            raise UserError(
                f"data.tokenizer: {name!r} is {digest}, but the run was trained with {record.tokenizer_digest}"
            )
        self.added = AddedTokens(tuple(record.tokens_before), tuple(record.tokens_after))
        self.width = record.width

    @classmethod
    def load(cls, run: str | Path, device: str | None = None, precision: str | None = None) -> "Embedder":
        """Load the model of a run directory. LoRA adapters are merged in float32.

        `device` is by default the GPU, if there is one; `precision` is float32, tf32 or bf16, by default that of the
        training. Raises UserError if the run is not done, or if its settings, backbone, weights or tokenizer differ
        from its record.
        """
        directory = RunDirectory(run)
        record = finished(directory)
        config = load(directory.config)
        _check_settings(directory, config, record)
        body = load_body(config.backbone, config.training.seed)
        if (found := digest_of(dict(body.named_parameters()))) != record.backbone_digest:
            raise UserError(
                f"{config.backbone.name}: has other weights than the backbone of {directory.record} (digest {found}, "
                f"there {record.backbone_digest}); restore them"
            )
        torch.manual_seed(config.training.seed)
        apply_method(body, config.method)
        _load_weights(body, directory, record)
        merge_adapters(body)
        return cls(body.requires_grad_(False), config, record, device, precision)

    def encode(self, texts: Sequence[str], progress: Callable[[int], object] = lambda texts: None) -> np.ndarray:
        """Embed texts: float32 [texts, width], in the given order.

        Each embedding has length 1, except that a text without a token becomes the zero vector. `progress` is called
        after each forward pass with the number of texts it finished.
        """
        found = np.zeros((len(texts), self.width), np.float32)
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[first : first + TEXTS_AT_ONCE]
            found[first : first + len(some)] = self._encode(some, progress)
        return found

    def _encode(self, texts: Sequence[str], progress: Callable[[int], object]) -> np.ndarray:
        ids = token_ids(texts, self.tokenizer, self.config.data.context, np.int32, self.added)
        lengths = np.diff(as_numpy(ids.offsets))
        full = np.flatnonzero(lengths)
        found = np.zeros((len(texts), self.width), np.float32)
        progress(len(texts) - len(full))
        if len(full):
            self._inference.expect(len(ids.values))
            chunks = pack(as_numpy(ids.values), lengths[full], FORWARD_TOKENS[self.device.type])
            for chunk, embeddings in zip(chunks, self._inference.embed(chunks), strict=True):
                found[full[chunk.order.numpy()]] = embeddings.cpu().numpy()
                progress(len(chunk.order))
        return found


def _check_settings(directory: RunDirectory, config: RunConfig, record: RunRecord) -> None:
    """Raise UserError if config.yaml has changed since the run in a setting that embeddings depend on."""
    known, method = record.hyperparameters, config.method
    for name, here, recorded in (
        ("data.context", config.data.context, known.context),
        ("backbone.pooling", config.backbone.pooling, known.pooling),
        ("backbone.attention", config.backbone.attention, known.attention),
        ("training.precision", config.training.precision, known.precision),
        ("method", method.label, known.method_label),
        ("method.alpha", method.alpha, method.alpha if known.alpha is None else known.alpha),  # None in early records
    ):
        if here != recorded:
            raise UserError(
                f"{directory.config}: {name} is {here}, but the run was trained with {recorded}; restore it"
            )


def _load_weights(body: nn.Module, directory: RunDirectory, record: RunRecord) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory.weights
    try:
        weights = load_file(path)
    except (OSError, SafetensorError):
        raise UserError(f"{path}: is missing or damaged; train the run again") from None
    if (found := digest_of(weights)) != record.weights_digest:
        raise UserError(f"{path}: is damaged: its digest is {found}, the record's {record.weights_digest}; train again")
    trainable = {name: parameter for name, parameter in body.named_parameters() if parameter.requires_grad}
    if trainable.keys() != weights.keys():
        other = sorted(trainable.keys() ^ weights.keys())
        raise UserError(f"{path}: holds other tensors than the run's method trains ({other[0]} …); train it again")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
