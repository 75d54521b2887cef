"""Figures from processes of their own: `probe` starts one, and this module, run as a script, is what it runs."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from suite.libraries import Library, Side

KIB = 1024
MIB = 1024 * KIB
_RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""Makes glibc give large tensors back when they are freed; by itself it keeps some, in one run and not in another."""

MODULES = {"ours": ("tunerkit", "tunerkit_lora"), "peft": ("peft",), "floor": ()}


def probe(what: str, side: Side, **settings: Any) -> float:
    """Return what a new process measures.

    Args:
        what: One of `PROBES`.
        side: Whose work it does.
        settings: What the function there takes.
    """
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    command = (sys.executable, "-m", "suite.probes", what, side, json.dumps(settings))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **_RETURNS_MEMORY}
    # What is installed has its bytecode; a working tree without it would be compiled anew in every process.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_import(side: Side) -> float:
    """Return the CPU time of importing torch and then a library, as a multiple of the first."""
    gc.disable()  # as in all timings: a full collection takes as long as importing us, and falls where it will
    start = time.process_time()
    __import__("torch")
    torch = time.process_time() - start
    for module in MODULES[side]:
        __import__(module)
    return (time.process_time() - start) / torch


def held() -> int:
    """Return how many bytes of memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Return how many bytes it held when it held most.

    It is what `ru_maxrss` counts, without what the process that started this one held.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * KIB


def ready(side: Side) -> Library:
    """Return a side that has attached an adapter once, for what it imports only then is no part of the work."""
    from suite.libraries import library  # noqa: PLC0415 - the process imports what it measures, in its order
    from suite.models import stack  # noqa: PLC0415 - the same

    used = library(side)
    used.attach(stack(16, 1))
    return used


def measure_train(side: Side, width: int, depth: int, folder: str) -> float:
    """Return the peak of attaching and one step of training."""
    del folder
    from suite.models import inputs, stack  # noqa: PLC0415 - the same

    used = ready(side)

    def work() -> None:
        model = used.attach(stack(width, depth))
        layers = model.get_base_model().train()
        layers(inputs(64, width)).square().mean().backward()

    return above(work)


def measure_load(side: Side, width: int, depth: int, folder: str) -> float:
    """Return the peak of making a base model and loading an adapter into it."""
    from suite.models import stack  # noqa: PLC0415 - the same

    used = ready(side)
    return above(lambda: used.from_pretrained(stack(width, depth), Path(folder)))


def measure_merge(side: Side, width: int, depth: int, folder: str) -> float:
    """Return the peak of attaching and merging."""
    del folder
    from suite.models import stack  # noqa: PLC0415 - the same

    used = ready(side)
    return above(lambda: used.attach(stack(width, depth)).merge_adapter())


def measure_given_up(side: Side, width: int, depth: int, folder: str) -> float:
    """Return the peak of attaching and merging; ours keeps no originals."""
    del folder
    from suite.models import stack  # noqa: PLC0415 - the same

    used, options = ready(side), {"keep_base": "none"} if side == "ours" else {}
    return above(lambda: used.attach(stack(width, depth)).merge_adapter(**options))


def measure_unload(side: Side, width: int, depth: int, folder: str) -> float:
    """Return the peak of attaching and merging for good."""
    del folder
    from suite.models import stack  # noqa: PLC0415 - the same

    used = ready(side)
    return above(lambda: used.attach(stack(width, depth)).merge_and_unload())


def above(work: Callable[[], object]) -> float:
    """Return the peak of some work in MiB, above what the process holds before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # a peak of importing is forgotten
    before = held()
    work()
    return (peak() - before) / MIB


def measure_adapters(side: Side, adapters: int, width: int, depth: int) -> float:
    """Return how many KiB each of many adapters takes beyond its tensors, a layer."""
    from suite.libraries import library  # noqa: PLC0415 - the same
    from suite.models import RANK, stack  # noqa: PLC0415 - the same

    used = library(side)
    model = used.attach(stack(width, depth), "first")
    used.add(model, "second")
    before = held()
    for number in range(adapters):
        used.add(model, f"a{number}")
    tensors = 2 * RANK * width * 4
    return ((held() - before) / adapters / depth - tensors) / KIB


PROBES: dict[str, Callable[..., float]] = {
    "adapters": measure_adapters,
    "given-up": measure_given_up,
    "import": measure_import,
    "load": measure_load,
    "merge": measure_merge,
    "train": measure_train,
    "unload": measure_unload,
}

if __name__ == "__main__":
    what, side, settings = sys.argv[1:]
    print(PROBES[what](side, **json.loads(settings)))
