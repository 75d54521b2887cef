from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from tunerkit.demo import adapting, job
from tunerkit.demo.data import Pair
from tunerkit.demo.errors import DemoError
from tunerkit.demo.evaluation import Retrieval
from tunerkit.demo.report import Report
from tunerkit.errors import MergeError

PAIRS = [Pair(f"sentence {i}", f"def f{i}():", f"m{i}") for i in range(70)]


@pytest.fixture
def report():
    return Report(Console(file=io.StringIO(), width=100))


def printed(report):
    return report.console.file.getvalue()


class TestChoosePairs:
    def test_a_whole_epoch_holds_every_pair(self):
        pairs = job.choose_pairs(PAIRS, None, seed=0)
        assert pairs != PAIRS
        assert sorted(pairs, key=PAIRS.index) == PAIRS

    def test_fewer_steps_are_the_first_of_the_epoch(self):
        epoch = job.choose_pairs(PAIRS, None, seed=0)
        assert job.choose_pairs(PAIRS, 2, seed=0) == epoch[:64]
        assert job.choose_pairs(PAIRS, 3, seed=0) == epoch

    def test_the_seed_decides(self):
        assert job.choose_pairs(PAIRS, None, seed=0) != job.choose_pairs(PAIRS, None, seed=1)

    def test_more_than_an_epoch(self):
        with pytest.raises(DemoError) as caught:
            job.choose_pairs(PAIRS, 4, seed=0)
        assert str(caught.value) == (
            "--steps 4 is more than one epoch. Give 1 to 3, or leave it out for the whole epoch."
        )


class TestPrepareFolder:
    def test_is_made_with_its_parents_and_left_empty(self, tmp_path):
        job.prepare_folder(tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []

    def test_may_be_there(self, tmp_path):
        job.prepare_folder(tmp_path)

    def test_a_file(self, tmp_path):
        path = tmp_path / "taken"
        path.write_text("")
        with pytest.raises(DemoError) as caught:
            job.prepare_folder(path)
        assert str(caught.value) == (
            f"The checkpoint cannot be written to the folder {str(path)!r}: there is a file of that name. Choose "
            "another with --out."
        )

    def test_below_a_file(self, tmp_path):
        (tmp_path / "taken").write_text("")
        with pytest.raises(DemoError, match=r"'.*taken.inside': Not a directory\. Choose another with --out\.$"):
            job.prepare_folder(tmp_path / "taken" / "inside")

    def test_not_writable(self, tmp_path, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(job.tempfile, "TemporaryFile", refuse)
        with pytest.raises(DemoError, match=r": Permission denied\. Choose another with --out\.$"):
            job.prepare_folder(tmp_path)


class Model(nn.Module):
    """Stands in for the encoder: `model` is what it gives for every text."""

    def __init__(self):
        super().__init__()
        self.model = torch.zeros(2, 3)

    def encode(self, texts):
        return self.model


class TestCheckCheckpoint:
    def check(self, monkeypatch, report, tmp_path, loaded, merged):
        def merge(_):
            if isinstance(merged, Exception):
                raise merged
            return torch.full((2, 3), merged)

        monkeypatch.setattr(adapting, "load", lambda *_: torch.full((2, 3), loaded))
        monkeypatch.setattr(adapting, "merge", merge)
        return job.check_checkpoint(tmp_path, Model(), ["a", "b"], torch.ones(2, 3), report)

    def test_equal(self, monkeypatch, report, tmp_path):
        assert self.check(monkeypatch, report, tmp_path, 1.0, 1.0 + 1e-6)
        assert "  equal when loaded into a fresh base: largest difference 0.00e+00 (allowed: 1e-05)" in printed(report)
        assert "  equal when merged into the base: largest difference 9.54e-07 (allowed: 1e-05)" in printed(report)

    @pytest.mark.parametrize(
        ("loaded", "merged", "where"),
        [(1.1, 1.0, "loaded into a fresh base"), (1.0, 1.1, "merged into the base"), (1.0, float("nan"), "merged")],
    )
    def test_not_equal(self, monkeypatch, report, tmp_path, loaded, merged, where):
        assert not self.check(monkeypatch, report, tmp_path, loaded, merged)
        assert f"  NOT EQUAL when {where}" in printed(report)
        assert printed(report).count("NOT EQUAL") == 1

    def test_a_method_that_cannot_be_merged(self, monkeypatch, report, tmp_path):
        assert self.check(monkeypatch, report, tmp_path, 1.0, MergeError("it has its own forward [really]"))
        assert "  not merged: it has its own forward [really]" in printed(report)


class TestReport:
    def test_scores(self, report):
        right, wrong = Retrieval.of(torch.eye(4), torch.eye(4)), Retrieval.of(torch.ones(4, 4), torch.ones(4, 4))
        report.show_scores(wrong, right, right)
        assert "4 held-out sentences, 4 functions to choose from" in printed(report)
        rows = [line.split("│")[1:-1] for line in printed(report).splitlines() if line.startswith("│")]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["frozen model", "0.000 ± 0.000", "1.000 ± 0.000", "0.250 ± 0.000"],
            ["linear map on it", "1.000 ± 0.000", "1.000 ± 0.000", "1.000 ± 0.000"],
            ["adapter", "1.000 ± 0.000", "1.000 ± 0.000", "1.000 ± 0.000"],
        ]
        assert "adapter minus frozen model, sentence by sentence: +1.000 ± 0.000" in printed(report)

    def test_examples_are_the_first_that_changed(self, report):
        before = Retrieval.of(torch.eye(5), torch.eye(5))
        after = Retrieval.of(torch.eye(5)[[0, 2, 1, 3, 0]], torch.eye(5))
        report.show_examples(PAIRS[:5], before, after)
        text = printed(report)
        assert "For 3 of 5 sentences only one of the two models found the right function." in text
        assert [line.strip() for line in text.splitlines() if line.startswith("  sentence")] == [
            "sentence 1",
            "sentence 2",
            "sentence 4",
        ]
        assert "    right:         def f1():" in text
        assert "    before (#1):   def f1():" in text
        assert "    after (#5):    def f2():" in text

    def test_examples_are_filled_up(self, report):
        before = Retrieval.of(torch.eye(5), torch.eye(5))
        after = Retrieval.of(torch.eye(5)[[0, 1, 2, 3, 0]], torch.eye(5))
        report.show_examples(PAIRS[:5], before, after)
        assert [line.strip() for line in printed(report).splitlines() if line.startswith("  sentence")] == [
            "sentence 4",
            "sentence 0",
            "sentence 1",
        ]

    def test_progress_shows_steps_and_loss(self, report):
        with report.progress("Adapter", 2) as on_step:
            on_step(0.5)
            on_step(0.25)
        assert "2/2 steps, loss 0.250" in printed(report)
