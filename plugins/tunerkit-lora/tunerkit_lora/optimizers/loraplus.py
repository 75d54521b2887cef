"""LoRA+: the second factors learn faster than the first."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from tunerkit.errors import ArgumentError, KeywordError
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.optimizers.training import check_number, training_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimiser under which the second factors, ``B``, learn faster than the first ones, ``A``.

    From "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv 2402.12354). What trains when it is called is put
    into four groups, of which any may be empty:

    0. the first factors, and what else is no vector, at `lr`;
    1. both factors of embeddings, at `loraplus_lr_embedding`;
    2. the second factors and the vectors (DoRA's magnitudes, ...), at `lr` times `loraplus_lr_ratio`;
    3. biases and what belongs to a `LayerNorm`, at the same rate and never decayed.

    Args:
        model: The model with the adapters, or a module that contains it.
        optimizer_cls: The class of the optimiser, for example `torch.optim.AdamW`.
        lr: The learning rate of ``A``.
        loraplus_lr_ratio: How many times higher that of ``B`` is; the paper advises 16, and a lower `lr` than for LoRA.
        loraplus_weight_decay: The weight decay of the first three groups.
        loraplus_lr_embedding: The learning rate for embeddings.
        kwargs: Passed on to the class.

    Returns:
        The optimiser.

    Raises:
        ArgumentError: The model holds no LoRA adapter, the class is none of optimisers or has not what the groups set,
            or a number is not one it can be.
        AdapterStateError: No LoRA adapter trains.
        KeywordError: `weight_decay` is given, which no group would follow.
    """
    if "weight_decay" in kwargs:
        msg = "weight_decay would be overruled by that of the groups. Pass it as loraplus_weight_decay."
        raise KeywordError(msg)
    check_number("loraplus_lr_ratio", loraplus_lr_ratio, above_zero=True)
    check_number("loraplus_weight_decay", loraplus_weight_decay)
    check_number("loraplus_lr_embedding", loraplus_lr_embedding)
    _check_class(optimizer_cls, ("lr", "weight_decay") if loraplus_weight_decay else ("lr",))
    firsts, embeddings, seconds, undecayed = _grouped(model)
    faster = lr * loraplus_lr_ratio
    make: Callable[..., Optimizer] = optimizer_cls
    optimizer = make(
        [
            {"params": firsts, "lr": lr, "weight_decay": loraplus_weight_decay},
            {"params": embeddings, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
            {"params": seconds, "lr": faster, "weight_decay": loraplus_weight_decay},
            {"params": undecayed, "lr": faster, "weight_decay": 0.0},
        ],
        lr=lr,
        **kwargs,
    )
    _keep_embeddings_in_32_bits(model, optimizer)
    return optimizer


def _check_class(optimizer_cls: object, needed: tuple[str, ...]) -> None:
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        msg = f"optimizer_cls must be a class of optimisers, for example torch.optim.AdamW; it is {optimizer_cls!r}."
        raise ArgumentError(msg)
    taken = inspect.signature(optimizer_cls).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        return
    for name in needed:
        if name not in taken:
            msg = (
                f"The optimiser {optimizer_cls.__name__} takes no {name}, which each group here has its own of. Take "
                "another, for example torch.optim.AdamW."
            )
            raise ArgumentError(msg)


def _grouped(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Return what trains: first factors and the like, embeddings' factors, second factors and vectors, undecayed ones.

    Which factor a tensor is, its adapter says and not its name, so that names of modules and adapters are free.
    """
    of_embeddings, second_factors = set(), set()
    for _, adapter in training_adapters(model):
        own = dict(adapter.named_parameters())
        first, second = (own[key] for key in adapter.factor_keys)
        if isinstance(adapter, LoraEmbedding):
            of_embeddings |= {first, second}
        else:
            second_factors.add(second)
    within_norms = {
        own for module in model.modules() if isinstance(module, nn.LayerNorm) for own in module.parameters()
    }
    firsts: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    seconds: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for leaf, parameter in _training_parameters(model):
        if parameter in of_embeddings:
            embeddings.append(parameter)
        elif parameter in second_factors:
            seconds.append(parameter)
        elif parameter.dim() != 1:
            firsts.append(parameter)
        else:
            (undecayed if "bias" in leaf or parameter in within_norms else seconds).append(parameter)
    return firsts, embeddings, seconds, undecayed


def _training_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Go through what trains, with the last part of its name: `in_proj_bias` is a bias too."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.rpartition(".")[2], parameter


def _keep_embeddings_in_32_bits(model: nn.Module, optimizer: Optimizer) -> None:
    """Let an optimiser of bitsandbytes keep 32 bits of state for embeddings that train whole, which 8 are too few for.

    It is told of the parameters by their modules, as it wants to be.
    """
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None or not isinstance(optimizer, bitsandbytes.optim.optimizer.Optimizer8bit):
        return
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
