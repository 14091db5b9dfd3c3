"""The four fine-tuning methods: which of a backbone's parameters train (paper, section 4.1, appendix H)."""

from torch import nn

from embedscale.model.backbone import blocks_of
from embedscale.run.cost import Method


def apply_method(body: nn.Module, method: Method) -> list[str]:
    """Mark the parameters that train, insert adapters for LoRA, and return the trainable names, in order.

    Everything else gets `requires_grad=False`, so that frozen blocks below the first trainable tensor run without
    autograd: they keep no activations and cost nothing in the backward pass.
    """
    if method.name == "lora":
        _insert_adapters(body, method)
    elif method.name == "bias":
        for name, parameter in body.named_parameters():
            parameter.requires_grad = name.endswith("bias")
    elif method.name == "freeze":
        blocks = blocks_of(body)
        training = method.training_blocks(len(blocks))
        # The token embedding stays frozen even with every block active, as in the paper; what follows the last
        # block trains with it, and with it alone.
        body.requires_grad_(method.blocks == "last")
        body.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        for number, block in enumerate(blocks):
            block.requires_grad_(number in training)
    return [name for name, parameter in body.named_parameters() if parameter.requires_grad]


def _insert_adapters(body: nn.Module, method: Method) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    blocks = blocks_of(body)
    dense = {path.rsplit(".", 1)[-1] for path, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(method.targets or dense)
    if method.embedding:
        embedding = body.get_input_embeddings()  # type: ignore[operator]
        targets += [path for path, module in body.named_modules() if module is embedding]
    LoraModel(
        body,
        LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha if method.alpha is not None else method.rank,
            lora_dropout=method.dropout,
            target_modules=targets,
        ),
        "default",
    )


def merge_adapters(body: nn.Module) -> None:
    """Fold LoRA's adapters into the float32 weights and take them out; nothing to do for other methods."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(body.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = path.rpartition(".")
            setattr(body.get_submodule(parent), last, module.get_base_layer())
