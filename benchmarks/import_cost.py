"""What importing tunerkit and a method costs, as a share of importing torch.

CPU time inside one process, torch first; the median of nine processes. Prints one line.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

PROBE = """
import time
start = time.process_time()
import torch
torch_in = time.process_time()
import tunerkit, tunerkit_lora
print(torch_in - start, time.process_time() - torch_in)
"""


def measure() -> tuple[float, float]:
    """Return the seconds of CPU time that importing torch, and then tunerkit, took in a fresh process."""
    output = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout
    torch_seconds, own_seconds = map(float, output.split())
    return torch_seconds, own_seconds


def main() -> None:
    """Measure and print."""
    measure()  # the first process compiles and fills the disk's cache
    runs = [measure() for _ in range(9)]
    torch_seconds, own_seconds = (statistics.median(column) for column in zip(*runs, strict=True))
    share = 100 * own_seconds / torch_seconds
    print(f"torch {torch_seconds:.3f} s, tunerkit and tunerkit_lora {own_seconds:.3f} s: {share:.1f} %")


if __name__ == "__main__":
    main()
