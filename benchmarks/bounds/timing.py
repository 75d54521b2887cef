"""How the bounds are timed: as the jobs of the suite are, without needing it."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def timed(work: Callable[[], Any], layers: int) -> tuple[float, Any]:
    """Return microseconds of CPU time a layer with the garbage collector off, and what the work returned."""
    gc.collect()
    gc.disable()
    start = time.process_time()
    result = work()
    taken = time.process_time() - start
    gc.enable()
    return taken / layers * 1e6, result
