"""Running jobs."""

from __future__ import annotations

import itertools
import os
import platform
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from suite import attach, compiling, forward, importing, many, memory, merging, rows, switching, training
from suite.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from suite.job import Job
    from suite.scale import Scale

FAMILIES = (importing, attach, switching, merging, forward, training, rows, memory, many, compiling)
JOBS: tuple[Job, ...] = tuple(job for family in FAMILIES for job in family.JOBS)


def choose(patterns: Sequence[str]) -> list[Job]:
    """Return the jobs whose names are, or begin with, one of some words; all jobs if there are none.

    Raises:
        ValueError: A word names no job.
    """
    for pattern in patterns:
        if not any(_named(job, pattern) for job in JOBS):
            msg = f"No job's name begins with {pattern!r}; there are {', '.join(job.name for job in JOBS)}."
            raise ValueError(msg)
    return [job for job in JOBS if not patterns or any(_named(job, pattern) for pattern in patterns)]


def _named(job: Job, pattern: str) -> bool:
    return job.name == pattern or job.name.startswith(f"{pattern}.")


def run(job: Job, scale: Scale, rounds: int | None = None, tell: Callable[[], object] | None = None) -> Result:
    """Measure a job with one thread.

    Args:
        job: What to do.
        scale: How large.
        rounds: How many rounds; the job's own number if not given.
        tell: Called after every round.

    Raises:
        DifferentWorkError: The sides do not compute the same.
    """
    result, count = Result(job), job.rounds if rounds is None else rounds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT and we have to say is not what is measured
            for figures in itertools.islice(job.measure(scale), count):
                result.rounds.append(figures)
                if tell is not None:
                    tell()
    finally:
        torch.set_num_threads(threads)
    return result


def surroundings() -> dict[str, Any]:
    """Return on what the figures were measured."""
    packages = ("tunerkit", "tunerkit-lora", "peft", "torch")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": {package: version(package) for package in packages},
    }
