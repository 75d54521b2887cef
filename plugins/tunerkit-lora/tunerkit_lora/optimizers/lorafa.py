"""LoRA-FA: the first factors stay as they are, and the gradients of the second make up for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from tunerkit.errors import AdapterStateError, ArgumentError
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.experts import LoraExperts
from tunerkit_lora.optimizers.training import check_number, training_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from tunerkit_lora.base import LowRankAdapter


class LoraFAOptimizer(Optimizer):
    """AdamW that projects the gradients of LoRA's second factors, for first ones that do not train.

    From "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning" (arXiv 2308.03303). The
    gradient ``g`` of ``B`` becomes ``g (A A^T)^-1 / s^2``: of all steps that ``B`` alone can take, the one by which the
    update ``s B A`` changes most like the weight would if it were trained whole.

    A group with `scaling_factors`, the scales ``s``, has pairs as its parameters: ``A``, ``B``, ``A``, ``B``, and so
    on. Of each the ``A`` is only read. Its `experts` says for each pair how many experts it is for, and is 1 if not
    given. Any other group is one for AdamW. Moments have the dtype of the parameter; a projection is computed in
    float32 at least. `create_lorafa_optimizer` makes the groups of a model.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate.
        betas: How much of the running averages of the gradient and of its square stays at each step.
        eps: Added to the root of the latter.
        weight_decay: The share, times `lr`, that is taken off each parameter after a step.
        correct_bias: Whether the averages are corrected for having started at zero.

    Raises:
        ArgumentError: A number is not one it can be, or a group's pairs are not as many as its scales.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            check_number(name, value)
        if not all(0 <= beta < 1 for beta in betas):
            msg = f"betas must be two numbers of at least zero and below one; they are {betas}."
            raise ArgumentError(msg)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, or of pairs if it has `scaling_factors`.

        Raises:
            ArgumentError: There are not two parameters for each scale.
        """
        if "scaling_factors" in param_group:
            params, scales = list(param_group["params"]), list(param_group["scaling_factors"])
            if len(params) != 2 * len(scales):
                msg = (
                    f"A group with scaling_factors has two parameters, A and B, for each; there are {len(params)} "
                    f"parameters and {len(scales)} scaling_factors. create_lorafa_optimizer makes a model's groups."
                )
                raise ArgumentError(msg)
            experts = param_group.get("experts", [1] * len(scales))
            param_group = {**param_group, "params": params, "scaling_factors": scales, "experts": experts}
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, gradient in _gradients(group):
                _step(parameter, gradient, self.state[parameter], group)
        return loss


def _gradients(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through what a group steps on, with the gradient that it follows."""
    params = group["params"]
    if "scaling_factors" not in group:
        yield from ((parameter, parameter.grad) for parameter in params if parameter.grad is not None)
        return
    for first, second, scale, experts in zip(
        params[::2], params[1::2], group["scaling_factors"], group["experts"], strict=True
    ):
        if second.grad is not None:
            yield second, project(second.grad, first, scale, experts)


def project(gradient: Tensor, first: Tensor, scaling: float, experts: int = 1) -> Tensor:
    """Return ``g (A A^T)^-1 / s^2``, in float32 at least.

    Where ``A`` has not the full rank it is the pseudo-inverse. Each of several experts, and each group of a
    convolution, has rows of ``A`` of its own.

    Args:
        gradient: ``g``, of the shape of ``B``, out x r with any kernel of size one.
        first: ``A``, r x in with any kernel.
        scaling: ``s``.
        experts: For how many experts there are factors, in the order of `LoraExperts`.

    Returns:
        The projected gradient, of the shape and dtype of the given one.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    down, up = first.flatten(1).to(dtype), gradient.flatten(1).to(dtype)
    groups = experts * (len(down) // up.shape[1])
    down = down.reshape(groups, -1, down.shape[1])
    # As a stack of groups x out x r, and for experts with the order in memory that theirs has.
    up = up.reshape(len(up), -1, experts).permute(2, 0, 1) if experts > 1 else up.reshape(groups, -1, up.shape[1])
    projected: Tensor = up @ torch.linalg.pinv(down @ down.mT, hermitian=True) / scaling**2
    if experts > 1:
        projected = projected.permute(1, 2, 0)
    return projected.reshape(gradient.shape).to(gradient.dtype)


def _step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take AdamW's step, with the decay after it."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    state["step"] += 1
    kept, kept_square = group["betas"]
    mean = state["exp_avg"].mul_(kept).add_(gradient, alpha=1 - kept)
    square = state["exp_avg_sq"].mul_(kept_square).addcmul_(gradient, gradient, value=1 - kept_square)
    size = group["lr"]
    if group["correct_bias"]:
        size *= math.sqrt(1 - kept_square ** state["step"]) / (1 - kept ** state["step"])
    parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze the first factors of the adapters that train, and make the optimiser for the second ones and the rest.

    Frozen, ``A`` needs neither moments nor, for its gradient, the layer's input. `set_adapter` lets it train again, and
    then its gradient is computed for nothing: call it before. Embeddings keep no input, so both of their factors train,
    as do all other parameters that do, by plain AdamW.

    Args:
        model: The model with the adapters, or a module that contains it.
        r: Accepted for PEFT's sake: each layer says its own.
        lora_alpha: The same.
        lr: The learning rate.
        weight_decay: The share, times `lr`, that is taken off each parameter after a step.
        use_rslora: If given, what the adapters must have.

    Returns:
        The optimiser, with a group of pairs and a group of what else trains; either may be empty.

    Raises:
        ArgumentError: The model holds no LoRA adapter, a number is not one it can be, or an adapter has another
            `use_rslora`.
        AdapterStateError: No LoRA adapter trains, or of one only the first factor, or its scale is zero. In any case
            the model is as it was.
    """
    del r, lora_alpha
    pairs: list[nn.Parameter] = []
    scales: list[float] = []
    experts: list[int] = []
    for name, adapter in _not_of_embeddings(training_adapters(model)):
        if use_rslora is not None and adapter.use_rslora != use_rslora:
            msg = (
                f"use_rslora={use_rslora} is given, and the adapter on {name!r} has use_rslora={adapter.use_rslora}. "
                "Leave it out: each layer says its own scale."
            )
            raise ArgumentError(msg)
        pairs += _pair(name, adapter)
        scales.append(float(adapter.scaling))
        experts.append(adapter.num_experts if isinstance(adapter, LoraExperts) else 1)
    paired = set(pairs)
    groups: list[dict[str, Any]] = [
        {"params": pairs, "scaling_factors": scales, "experts": experts},
        {"params": [each for each in model.parameters() if each.requires_grad and each not in paired]},
    ]
    optimizer = LoraFAOptimizer(groups, lr=lr, weight_decay=weight_decay)
    for first in pairs[::2]:
        first.requires_grad = False
    return optimizer


def _not_of_embeddings(adapters: list[tuple[str, LowRankAdapter]]) -> Iterator[tuple[str, LowRankAdapter]]:
    """Go through the adapters whose factors are not those of an embedding; a layer tied to one has the same."""
    embeddings = [adapter for _, adapter in adapters if isinstance(adapter, LoraEmbedding)]
    theirs = {parameter for adapter in embeddings for parameter in adapter.parameters()}
    for name, adapter in adapters:
        if theirs.isdisjoint(adapter.parameters()):
            yield name, adapter


def _pair(name: str, adapter: LowRankAdapter) -> list[nn.Parameter]:
    """Return the factors of an adapter that can be trained by the second alone."""
    first, second = (adapter.get_parameter(key) for key in adapter.factor_keys)
    why = None if second.requires_grad else "its second factor does not train, and the first one would not either"
    if adapter.scaling == 0:
        why = "its scale is 0"
    if why is not None:
        msg = f"LoRA-FA cannot train the adapter on {name!r}: {why}. Use another optimiser, or another LoraConfig."
        raise AdapterStateError(msg)
    return [first, second]
