"""Methods of a few lines, as different from one another as methods come."""

from __future__ import annotations

import contextlib

import tunerkit
from tunerkit.naming import method_id
from tunerkit.plugins import unregister


@contextlib.contextmanager
def registered(*toys):
    """Within the block, the methods of these modules can be asked for."""
    with contextlib.ExitStack() as stack:
        for toy in toys:
            name = method_id(toy.Config.peft_type)
            tunerkit.register(name, toy)
            stack.callback(unregister, name)
        yield
