"""Several processes train one model: they stay in step, or say why they would not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)


def run(what, folder, processes=2):
    script = Path(__file__).parent / "training.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*torchrun, str(script), what, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )


def succeed(what, folder, processes=2):
    done = run(what, folder, processes)
    assert done.returncode == 0, done.stderr


class TestDistributedDataParallel:
    def test_stays_in_step(self, tmp_path):
        succeed("in_step", tmp_path)

    def test_adapters_that_trained_when_it_was_made_can_be_switched(self, tmp_path):
        succeed("unused", tmp_path)

    def test_what_would_let_processes_differ_is_refused(self, tmp_path):
        succeed("refused", tmp_path)

    def test_switching_by_process_ends_them_all(self, tmp_path):
        done = run("by_rank", tmp_path)
        assert done.returncode != 0
        assert "would not be averaged" in done.stderr


class TestFullyShard:
    def test_trains_saves_and_loads_as_one_process_does(self, tmp_path):
        succeed("reload_alone", tmp_path)

    @pytest.mark.long
    @pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1), (2, 3)])
    def test_loads_on_another_number_of_processes(self, saving, loading, tmp_path):
        succeed("fsdp", tmp_path, saving)
        succeed("reload", tmp_path, loading)
