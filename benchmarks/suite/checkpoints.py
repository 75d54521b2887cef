"""Checkpoints that every side loads."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from suite.libraries import library
from suite.models import mixture, stack

if TYPE_CHECKING:
    from torch import nn


@cache
def scratch() -> Path:
    """Return a folder that is there as long as this process is."""
    folder = Path(tempfile.mkdtemp(prefix="tunerkit-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def of_mixture(layers: int, experts: int) -> Path:
    """Return the folder of an adapter for `mixture(layers, experts)`."""
    return _save(mixture(layers, experts), f"mixture-{layers}-{experts}")


@cache
def of_stack(width: int, depth: int) -> Path:
    """Return the folder of an adapter for `stack(width, depth)`."""
    return _save(stack(width, depth), f"stack-{width}-{depth}")


def _save(base: nn.Module, name: str) -> Path:
    ours = library("ours")
    model = ours.attach(base)
    ours.fill(model, "default")
    folder = scratch() / name
    model.save_pretrained(folder)
    return folder
