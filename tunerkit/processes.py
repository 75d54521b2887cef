"""Several processes that train one model: what torch's wrappers do not see by themselves.

`DistributedDataParallel` averages the gradients of those parameters that train when it is made. `fully_shard` holds
parameters as DTensors, of which every process has a part, and knows those that are there when it is called.

What a wrapper does is private to torch. Where a version of torch does not show which wrapper calls, nothing is checked;
where it does not show which gradients that averages, what trains in the first call stands for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tunerkit.errors import AdapterStateError
from tunerkit.modules import modules_in, parameters_in
from tunerkit.naming import listing

if TYPE_CHECKING:
    from torch import Tensor, nn


_AVERAGED: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""The parameters whose gradients each `DistributedDataParallel` averages."""

_SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
"""Where `fully_shard` is: from torch 2.6 on, and before."""


def refuse_unaveraged() -> None:
    """Raise if this is a call of a `DistributedDataParallel`, and something trains that did not when it was made.

    The processes would come to differ without a word: gradients of such parameters are not averaged. The first such
    call also compares over the processes what trains, for which all of them make it.

    Raises:
        AdapterStateError: Something trains whose gradients are not averaged, or not the same on all processes.
    """
    wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or not torch.is_grad_enabled():
        return
    if wrapper not in _AVERAGED:
        _AVERAGED[wrapper] = _averaged(wrapper)
    averaged = {id(parameter) for parameter in _AVERAGED[wrapper]}
    others = {id(own) for own in parameters_in(wrapper.module) if own.requires_grad and id(own) not in averaged}
    named = wrapper.module.named_parameters() if others else ()
    lost = [name for name, own in named if id(own) in others and name not in wrapper.parameters_to_ignore]
    if lost:
        msg = (
            f"{listing(lost, 2)} trains and did not when DistributedDataParallel was made, so its gradient would not "
            "be averaged and the processes would come to differ. Call set_adapter, add_adapter and load_adapter first, "
            "then DistributedDataParallel(model) anew."
        )
        raise AdapterStateError(msg)


def _averaged(wrapper: Any) -> list[Tensor]:
    """Return the parameters whose gradients are averaged; they have to be the same on all processes."""
    found = _in_buckets(wrapper)
    known = {id(tensor) for tensor in found}
    names = [name for name, parameter in wrapper.module.named_parameters() if id(parameter) in known]
    everywhere: list[Any] = [None] * wrapper.process_group.size()
    distributed.all_gather_object(everywhere, names, group=wrapper.process_group)
    for others in everywhere:
        if others != names:
            differing = sorted(set(names) ^ set(others))
            msg = (
                f"{listing(differing, 2)} does not train on all processes, and DistributedDataParallel would average "
                "the gradients of different tensors. Call set_adapter with the same names on every process, then "
                "DistributedDataParallel(model) anew."
            )
            raise AdapterStateError(msg)
    return found


def _in_buckets(wrapper: Any) -> list[Tensor]:
    try:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    except AttributeError:
        named = wrapper.module.named_parameters()
        return [own for name, own in named if own.requires_grad and name not in wrapper.parameters_to_ignore]
    return [tensor for bucket in buckets for tensor in bucket.parameters()]


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise if `fully_shard` was applied to a model, for it shards and trains only what was there then.

    Args:
        model: The model.
        what: What is not possible then.

    Raises:
        AdapterStateError: The model is sharded.
    """
    # Where none of them is imported nothing is sharded, and nor is it where no module was ever made one of its class.
    imported = [sys.modules[name] for name in _SHARDING if name in sys.modules]
    found = (module.FSDPModule for module in imported if hasattr(module, "FSDPModule"))
    kinds = tuple(kind for kind in found if kind.__subclasses__())
    if kinds and any(isinstance(module, kinds) for module in modules_in(model)):
        msg = f"The model is sharded (fully_shard), and {what}. Do that first, then call fully_shard."
        raise AdapterStateError(msg)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which each process holds a part; all processes have to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, told without importing what defines it."""
    return hasattr(tensor, "full_tensor")


def copy_into(own: Tensor, value: Tensor) -> None:
    """Copy numbers into a tensor, or into this process's part of it; then all processes have to call this."""
    if is_sharded(own) and not is_sharded(value):
        # Beside the class, wherever that is: the module was private before torch 2.5.
        distribute: Any = sys.modules[type(own).__module__].distribute_tensor
        mesh, placements = own.device_mesh, own.placements  # type: ignore[attr-defined]
        value = distribute(value.to(device=mesh.device_type, dtype=own.dtype), mesh, placements)
    own.copy_(value)
