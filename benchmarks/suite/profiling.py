"""Where our side of a job spends its time."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
import warnings
from typing import TYPE_CHECKING

import torch

from suite.job import TimedJob

if TYPE_CHECKING:
    from suite.job import Job
    from suite.scale import Scale


def profile(job: Job, scale: Scale, lines: int = 25) -> str:
    """Return the functions that take most of the time by themselves, then those that take most with what they call.

    A profile makes calls of functions dearer than they are, so it says where to look and not how much there is to gain.
    """
    if not isinstance(job, TimedJob):
        return f"{job.name} is measured in other processes.\n"
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turn = job.turn("ours", scale)
        turn.run()
        turn.reset()
        calls = max(1, round(job.calls * scale.effort))
        recorder = cProfile.Profile(time.process_time)
        recorder.enable()
        for _ in range(calls):
            turn.run()
        recorder.disable()
    text = io.StringIO()
    statistics = pstats.Stats(recorder, stream=text).strip_dirs()
    statistics.sort_stats("tottime").print_stats(lines)
    statistics.sort_stats("cumulative").print_stats(lines)
    return text.getvalue()
