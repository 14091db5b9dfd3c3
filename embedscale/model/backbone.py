"""Load decoders from the hub or a local folder: configuration, shape, float32 weights, digest."""

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from embedscale.errors import UserError
from embedscale.run.config import Backbone
from embedscale.run.families import refuse_missing_folder, refuse_quantised, shape_by_name, short_name
from embedscale.run.layouts import context_of, shape_from
from embedscale.run.shape import BackboneShape, Linear

# The name of a dense layer in a decoder → its role.
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
    """Return the shape of a decoder by its name, or by the `config.json` of a folder or of the hub.

    Raises UserError if the backbone cannot be found, or if its layers or its attention are not supported.
    """
    shape = shape_by_name(backbone.name, backbone.revision)
    if shape is None:
        try:
            shape = shape_from(short_name(backbone.name), hub_config(backbone).to_dict())
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("backbone.name") else f"backbone.name: {text}") from None
    return shape


def hub_config(backbone: Backbone) -> Any:
    """Return the transformers configuration. Raise UserError if there is none."""
    from transformers import AutoConfig

    refuse_missing_folder("backbone.name", backbone.name)
    try:
        config = AutoConfig.from_pretrained(backbone.name, revision=backbone.revision, trust_remote_code=False)
    except Exception as error:  # transformers and the hub's client raise many classes for a wrong file
        if "trust_remote_code" in str(error):
            raise UserError(
                f"backbone.name: {backbone.name!r} needs code of its own (auto_map in its config.json), which is never "
                "run; allowed: models whose code is in transformers"
            ) from None
        if Path(backbone.name).is_dir():
            found = "is a folder that holds no model known to transformers"
        else:
            found = "is neither a local folder nor a model that the hub or its local cache has"
        reason = str(error).split("\n")[0]
        raise UserError(f"backbone.name: {backbone.name!r} {found} ({reason})") from None
    refuse_quantised(backbone.name, config.to_dict())
    return config


def empty_body(backbone: Backbone) -> nn.Module:
    """Return the decoder on the meta device: its tensors have shapes and take no memory."""
    from transformers import AutoModel

    with torch.device("meta"):
        body: nn.Module = AutoModel.from_config(hub_config(backbone), dtype=torch.float32, trust_remote_code=False)
    return body


def blocks_of(body: nn.Module, name: str = "") -> nn.ModuleList:
    """Return the list of the decoder's blocks: its only direct child that is a ModuleList. Raise UserError if none."""
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        raise UserError(
            f"backbone.name: {name or type(body).__name__}: the model has {len(lists)} lists of blocks; expected a "
            "decoder, which has one"
        )
    return lists[0]


def drops(body: nn.Module) -> bool:
    """Return whether the model uses dropout in training. Then chunks must not be split, nor blocks merged."""
    config: Any = body.config
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in body.modules())
    return layers or getattr(config, "attention_dropout", 0) > 0  # dropout of scores is not a module


def shape_of(body: nn.Module, name: str) -> BackboneShape:
    """Return the shape of a decoder. Raise UserError if its blocks differ or if it has an unknown dense layer."""
    blocks = blocks_of(body, name)
    first = blocks[0]
    linears = []
    known: set[int] = set()
    for path, module in first.named_modules():
        if isinstance(module, nn.Linear):
            last = path.rsplit(".", 1)[-1]
            if last not in ROLES:
                raise UserError(
                    f"backbone.name: {name}: the cost of the dense layer {path!r} is not known; docs/extending.md says "
                    "how to add a family"
                )
            known.add(id(module.weight))
            linears.append(Linear(last, module.in_features, module.out_features, module.bias is not None, ROLES[last]))
    for key, parameter in first.named_parameters():
        if (
            parameter.dim() > 1 and id(parameter) not in known and "norm" not in key
        ):  # a mixture of experts, or another class than nn.Linear
            raise UserError(
                f"backbone.name: {name}: the weight {key!r} is in no dense layer (nn.Linear), so its cost is not known"
            )
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
    config = body.config.to_dict()  # type: ignore[operator, union-attr]
    told = shape_from(name, config)
    return BackboneShape(
        name=short_name(name),
        blocks=len(blocks),
        width=embedding.embedding_dim,
        attention_width=next(li.inputs for li in linears if li.role == "attention_out"),
        vocabulary=embedding.num_embeddings,
        context=context_of(config),
        linears=tuple(sorted(linears, key=lambda li: _FORWARD.index(li.role))),
        norm_weights=weights,
        norm_biases=biases,
        final_weights=sum(final.values()) - final_biases,
        final_biases=final_biases,
        parallel_residual=told.parallel_residual,
        trained_norm_first=told.trained_norm_first,
        norm_last=told.norm_last,
    )


_FORWARD = ("query_key_value", "query", "key", "value", "attention_out", "mlp_in", "mlp_out")


def load_body(backbone: Backbone, seed: int) -> nn.Module:
    """Return the decoder with float32 master weights, for a checkpoint of any dtype.

    `random` weights follow from the configuration and `seed`. Raises UserError if weights are missing, damaged or have
    other shapes than the configuration says.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # no report of unused weights, such as the head of a language model
    logging.disable_progress_bar()  # transformers draws it into pipes too
    config = hub_config(backbone)
    if backbone.weights == "random":
        torch.manual_seed(seed)
        body: nn.Module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    else:
        try:
            body, loading = AutoModel.from_pretrained(
                backbone.name,
                revision=backbone.revision,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # loading reports them, and the check below names them
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"backbone.name: {backbone.name!r}: its weights cannot be read ({reason}); download the model again"
            ) from None
        if other := sorted(loading["mismatched_keys"]):
            key, stored, wanted = other[0]
            raise UserError(
                f"backbone.name: {backbone.name!r}: {key} has the shape {tuple(stored)}, but config.json says "
                f"{tuple(wanted)}; give a folder whose files belong together"
            )
        if missing := sorted(loading["missing_keys"]):
            raise UserError(
                f"backbone.name: {backbone.name!r} lacks {len(missing)} weights ({missing[0]} …); "
                "for random weights, set backbone.weights=random"
            )
    kinds = {parameter.dtype for parameter in body.parameters()}
    assert kinds == {torch.float32}, f"master weights are {kinds}"
    return body


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return a hash of the names, the shapes and every bit of the values."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
