"""Running on the CPU what asks for a GPU."""

import torch
from torch.overrides import TorchFunctionMode


class OnTheCpu(TorchFunctionMode):
    """What is sent to a GPU meanwhile goes to the CPU; PEFT's LoftQ computes on nothing but a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: _place(value) for name, value in (kwargs or {}).items()}
        return function(*map(_place, args), **kwargs)


def _place(value):
    if isinstance(value, str):
        return "cpu" if value == "cuda" else value
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value
