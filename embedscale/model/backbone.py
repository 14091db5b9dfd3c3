"""Decoders from the hub or a local folder: configuration, shape, float32 weights, digest."""

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from embedscale.errors import UserError
from embedscale.model.attention import attend_packed, refuse_other_attention
from embedscale.run.config import Backbone
from embedscale.run.families import shape_by_name, short_name
from embedscale.run.shape import BackboneShape, Linear

# What a dense layer does, by the names that decoders give it.
ROLES = {
    "query_key_value": "query_key_value",
    "qkv_proj": "query_key_value",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_out",
    "dense": "attention_out",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "gate_up_proj": "mlp_in",
    "dense_h_to_4h": "mlp_in",
    "fc1": "mlp_in",
    "down_proj": "mlp_out",
    "dense_4h_to_h": "mlp_out",
    "fc2": "mlp_out",
}


def shape_without_weights(backbone: Backbone) -> BackboneShape:
    """Return the shape of a known family's decoder by its name or `config.json`; others are built on the meta device.

    Raises UserError for a backbone that cannot be found or is no decoder whose layers and attention are known.
    """
    shape = shape_by_name(backbone.name)
    if shape is None:
        body = empty_body(backbone)
        attend_packed(body)
        shape = shape_of(body, backbone.name)
        refuse_other_attention(body)
    return shape


def hub_config(backbone: Backbone) -> Any:
    """The transformers configuration. Raises UserError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(backbone.name, revision=backbone.revision)
    except Exception as error:  # transformers and the hub's client have many classes for what is wrong with a file
        if Path(backbone.name).is_dir():
            found = "the folder holds no model that transformers knows"
        else:
            found = "is neither a local folder nor a model that the hub or its local cache has"
        reason = str(error).split("\n")[0]
        raise UserError(f"backbone.name: {backbone.name!r} {found} ({reason})") from None


def empty_body(backbone: Backbone) -> nn.Module:
    """The decoder on the meta device: every shape, no memory."""
    from transformers import AutoModel

    with torch.device("meta"):
        body: nn.Module = AutoModel.from_config(hub_config(backbone), dtype=torch.float32)
    return body


def blocks_of(body: nn.Module, name: str = "") -> nn.ModuleList:
    """The list of the decoder's blocks: its only direct ModuleList of equal layers."""
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        raise UserError(f"backbone.name: {name or type(body).__name__}: no single list of blocks; expected a decoder")
    return lists[0]


def drops(body: nn.Module) -> bool:
    """Whether training drops numbers at random, which then are those of a chunk, and of the blocks as they are."""
    config: Any = body.config
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in body.modules())
    return layers or getattr(config, "attention_dropout", 0) > 0  # of scores, inside the attention


def shape_of(body: nn.Module, name: str) -> BackboneShape:
    """The shape of any decoder whose blocks are equal and whose dense layers are known.

    Raises UserError for others.
    """
    blocks = blocks_of(body, name)
    first = blocks[0]
    linears = []
    known: set[int] = set()
    for path, module in first.named_modules():
        if isinstance(module, nn.Linear):
            last = path.rsplit(".", 1)[-1]
            if last not in ROLES:
                raise UserError(f"backbone.name: {name}: the dense layer {path!r} is not known, nor its cost")
            known.add(id(module.weight))
            linears.append(Linear(last, module.in_features, module.out_features, module.bias is not None, ROLES[last]))
    for key, parameter in first.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in known:  # of experts, or of a layer that is no nn.Linear
            raise UserError(f"backbone.name: {name}: the weight {key!r} is in no dense layer, nor is its cost known")
    dense = sum(linear.weights + linear.outputs * linear.bias for linear in linears)
    other = {key: p.numel() for key, p in first.named_parameters()}
    biases = sum(n for key, n in other.items() if key.endswith("bias")) - sum(li.outputs for li in linears if li.bias)
    weights = sum(other.values()) - dense - biases
    sizes = {sum(p.numel() for p in block.parameters()) for block in blocks}
    if len(sizes) != 1:
        raise UserError(f"backbone.name: {name}: its blocks differ in size ({sorted(sizes)}); expected equal blocks")
    embedding = body.get_input_embeddings()  # type: ignore[operator]
    inside = set(map(id, blocks.parameters())) | set(map(id, embedding.parameters()))
    final = {key: p.numel() for key, p in body.named_parameters() if id(p) not in inside}
    final_biases = sum(n for key, n in final.items() if key.endswith("bias"))
    config: Any = body.config
    queries = next(li for li in linears if li.role in ("query", "query_key_value"))
    attention_width = queries.outputs if queries.role == "query" else linears[0].inputs
    # Within their windows, layers attend as plain causal ones do.
    window = getattr(config, "sliding_window", None)
    return BackboneShape(
        name=short_name(name),
        blocks=len(blocks),
        width=embedding.embedding_dim,
        attention_width=attention_width,
        vocabulary=embedding.num_embeddings,
        context=min(config.max_position_embeddings, window or config.max_position_embeddings),
        linears=tuple(sorted(linears, key=lambda li: _FORWARD.index(li.role))),
        norm_weights=weights,
        norm_biases=biases,
        final_weights=sum(final.values()) - final_biases,
        final_biases=final_biases,
        parallel_residual=bool(getattr(config, "use_parallel_residual", False)),
    )


_FORWARD = ("query_key_value", "query", "key", "value", "attention_out", "mlp_in", "mlp_out")


def load_body(backbone: Backbone, seed: int) -> nn.Module:
    """The decoder with float32 master weights, whatever the checkpoint's dtype (traps of `dtype="auto"`).

    `random` weights are drawn from the configuration and `seed`. Raises UserError where weights are missing, damaged or
    of other shapes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # its report of a checkpoint's other weights, such as a language model's head
    logging.disable_progress_bar()  # it is drawn into pipes too
    config = hub_config(backbone)
    if backbone.weights == "random":
        torch.manual_seed(seed)
        body: nn.Module = AutoModel.from_config(config, dtype=torch.float32)
    else:
        try:
            body, loading = AutoModel.from_pretrained(
                backbone.name,
                revision=backbone.revision,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # which then are told, and refused, by name
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"backbone.name: {backbone.name!r}: its weights cannot be read ({reason})") from None
        if other := sorted(loading["mismatched_keys"]):
            key, stored, wanted = other[0]
            raise UserError(
                f"backbone.name: {backbone.name!r}: {key} is {tuple(stored)}, by its config.json {tuple(wanted)}"
            )
        if missing := sorted(loading["missing_keys"]):
            raise UserError(
                f"backbone.name: {backbone.name!r} lacks {len(missing)} weights ({missing[0]} …); "
                "for random ones ask for backbone.weights=random"
            )
    kinds = {parameter.dtype for parameter in body.parameters()}
    assert kinds == {torch.float32}, f"master weights are {kinds}"
    return body


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names, shapes and every bit of the values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
