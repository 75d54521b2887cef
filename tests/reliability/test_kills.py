"""Processes that save are killed at random moments; what is read afterwards is always of one and the same save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills")


def kill(what, kills, folder):
    script = Path(__file__).parent / "killing.py"
    command = [sys.executable, str(script), what, str(kills), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(what, report)  # noqa: T201 - the figures of the long form
    assert report["kills"] == sum(report["states"].values()) == kills
    assert report["ended"] == []
    return report


@pytest.mark.parametrize(("what", "kills"), [("pairs", 6), ("models", 4)])
def test_no_torn_pair(what, kills, tmp_path):
    assert kill(what, kills, tmp_path)["torn"] == []


@pytest.mark.long
@pytest.mark.parametrize(("what", "kills"), [("pairs", 200), ("models", 200), ("merged", 60)])
def test_no_torn_pair_in_hundreds(what, kills, tmp_path):
    report = kill(what, kills, tmp_path)
    assert report["torn"] == []
    assert report["seen"] == ["1", "2", "3"]
    # Or no kill would have hit a save.
    assert report["states"].get("between two saves", 0) < kills
    assert what == "merged" or report["states"]["between the renames"] > 0
