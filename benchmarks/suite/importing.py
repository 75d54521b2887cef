"""What importing costs: CPU time inside one process, as a multiple of importing torch there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.job import ProbedJob
from suite.probes import probe

if TYPE_CHECKING:
    from suite.job import Job
    from suite.libraries import Side
    from suite.scale import Scale


def shares(scale: Scale) -> dict[Side, float]:
    """Return the figures of one round."""
    del scale
    return {"ours": probe("import", "ours"), "peft": probe("import", "peft"), "floor": 1.0}


JOBS: tuple[Job, ...] = (
    ProbedJob(
        name="importing.all",
        title="import the core and LoRA",
        reference="`import torch`",
        unit="x torch",
        probe=shares,
        peft=0.45,
        floor=1.05,
        rounds=9,
    ),
)
