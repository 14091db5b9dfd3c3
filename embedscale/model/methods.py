"""Fine-tuning methods on a torch module: which of its parameters train (paper, section 4.1, appendix H).

`embedscale.run.method` says what a method costs and which blocks and layers it touches; each function here makes a body
train so. `APPLY` names them.
"""

from collections.abc import Callable

from torch import nn

from embedscale.model.backbone import blocks_of
from embedscale.run.method import Method


def apply_method(body: nn.Module, method: Method) -> list[str]:
    """Mark the parameters that train, insert adapters for LoRA, and return the trainable names, in order.

    Everything else gets `requires_grad=False`, so that frozen blocks below the first trainable tensor run without
    autograd: they keep no activations and cost nothing in the backward pass.
    """
    APPLY[method.name](body, method)
    return [name for name, parameter in body.named_parameters() if parameter.requires_grad]


def _train_all(body: nn.Module, method: Method) -> None:
    body.requires_grad_(True)


def _train_biases(body: nn.Module, method: Method) -> None:
    for name, parameter in body.named_parameters():
        parameter.requires_grad = name.endswith("bias")


def _train_blocks(body: nn.Module, method: Method) -> None:
    """Train some blocks. The token embedding stays frozen even with every block active, as in the paper."""
    blocks = blocks_of(body)
    training = method.training_blocks(len(blocks))
    # The last normalisation trains with the last block, and only with it.
    body.requires_grad_(method.blocks == "last")
    body.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    for number, block in enumerate(blocks):
        block.requires_grad_(number in training)


def _train_adapters(body: nn.Module, method: Method) -> None:
    """Insert LoRA adapters, which train alone."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    blocks = blocks_of(body)
    dense = {path.rsplit(".", 1)[-1] for path, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(method.targets or dense)
    if method.embedding:
        embedding = body.get_input_embeddings()  # type: ignore[operator]
        targets += [path for path, module in body.named_modules() if module is embedding]
    adapted = LoraModel(
        body,
        LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha if method.alpha is not None else method.rank,
            lora_dropout=method.dropout,
            target_modules=targets,
        ),
        "default",
    )
    # PEFT copies each layer's input to float32, of which autocast makes bf16 again: same numbers, thrice the memory
    # traffic. With dropout, which scales them in between, the numbers are not the same.
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = method.dropout > 0


APPLY: dict[str, Callable[[nn.Module, Method], None]] = {
    "full": _train_all,
    "freeze": _train_blocks,
    "bias": _train_biases,
    "lora": _train_adapters,
}


def merge_adapters(body: nn.Module) -> None:
    """Add the adapters to the float32 weights and remove the adapters. Bodies without adapters are not changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(body.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = path.rpartition(".")
            setattr(body.get_submodule(parent), last, module.get_base_layer())
