"""What the demo prints."""

from __future__ import annotations

import contextlib
import sysconfig
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tunerkit.demo.encoder import MODEL_NAME
from tunerkit.demo.evaluation import Estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from tunerkit.demo.data import Pair, Split
    from tunerkit.demo.evaluation import Retrieval

EXAMPLES = 3


class Report:
    """Shows the steps of the job and their results, in the order in which they come."""

    def __init__(self, console: Console | None = None) -> None:
        """Make a report.

        Args:
            console: Where to print; the standard output if not given.
        """
        # Numbers in the text are results of one kind and another; coloured by their looks they would only distract.
        self.console = console or Console(highlight=False)

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line as it is: brackets are no markup, and the terminal wraps it, so that paths can be copied."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def show_data(self, split: Split, used: int) -> None:
        """Say what the task is and how many pairs there are."""
        self.say(f"{MODEL_NAME} learns to find the function that a sentence describes", "bold")
        self.say(f"Sentences and functions from Python {sysconfig.get_python_version()}'s standard library:")
        self.say(f"  {used:,} pairs to train on, {len(split.held_out):,} held out; no package is on both sides.")
        self.say(f"  For example: {split.train[0].sentence}")
        self.say(f"               {split.train[0].line}\n")

    def show_adapter(self, method: str, modules: Sequence[tuple[str, int]], parameters: tuple[int, int]) -> None:
        """Say what was adapted, and how many numbers are trained."""
        trained, total = parameters
        self.say(f"Method {method}: {sum(count for _, count in modules)} modules are adapted", "bold")
        for name, count in modules:
            self.say(f"  {name} ({count})")
        self.say(f"  Trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})")

    def wait(self, what: str) -> contextlib.AbstractContextManager[object]:
        """Show that something takes a while."""
        return self.console.status(f"{what} ...")

    @contextlib.contextmanager
    def progress(self, name: str, steps: int) -> Iterator[Callable[[float], None]]:
        """Show a progress bar with the latest loss; call the function it gives after each step."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, loss {task.fields[loss]:.3f},"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=steps, loss=float("nan"))
            yield lambda loss: progress.update(task, advance=1, loss=loss)

    def show_scores(self, frozen: Retrieval, mapped: Retrieval, adapted: Retrieval) -> None:
        """Show the three results side by side, each as it was after its last step."""
        n = frozen.scores.n
        self.say(f"\n{n} held-out sentences, {n} functions to choose from", "bold")
        table = Table("", "R@1", "R@5", "MRR")
        for name, result in (("frozen model", frozen), ("linear map on it", mapped), ("adapter", adapted)):
            scores = result.scores
            table.add_row(name, *map(format_estimate, (scores.recall_at_1, scores.recall_at_5, scores.mrr)))
        self.console.print(table)
        # Both models answered the same sentences, so their difference is known better than either figure.
        gain = Estimate.of((adapted.ranks <= 1).double() - (frozen.ranks <= 1).double())
        self.say(f"n = {n}; ± is the standard error. Every figure is that of the last training step.")
        self.say(f"R@1, adapter minus frozen model, sentence by sentence: {gain.mean:+.3f} ± {gain.error:.3f}\n")

    def show_examples(self, pairs: Sequence[Pair], before: Retrieval, after: Retrieval) -> None:
        """Show a few sentences with what was found before and after."""
        changed = ((before.ranks <= 1) != (after.ranks <= 1)).tolist()
        # A stable sort: those that changed come first, otherwise the order stays that of the hashes.
        chosen = sorted(range(len(pairs)), key=lambda index: not changed[index])[:EXAMPLES]
        self.say(f"{len(chosen)} held-out sentences", "bold")
        self.say(
            f"For {sum(changed)} of {len(pairs)} sentences only one of the two models found the right function. Shown "
            "are the first of these,\nfor better or worse (filled up with others if they are too few), in the fixed "
            "order of the pairs' hashes. # is the right one's rank."
        )
        for index in chosen:
            self.say(f"  {pairs[index].sentence}")
            self.show_line("right:", pairs[index].line)
            for name, result in (("before", before), ("after", after)):
                rank = int(result.ranks[index])
                self.show_line(f"{name} (#{rank}):", pairs[int(result.first[index])].line)
        self.say()

    def show_line(self, name: str, line: str) -> None:
        """Print a function's line, cut where the terminal ends: some signatures are very long."""
        self.console.print(Text(f"    {name:<14} {line}"), no_wrap=True, overflow="ellipsis")

    def show_checkpoint(self, folder: Path) -> None:
        """Say how large the checkpoint's files are."""
        files = sorted(path for path in folder.iterdir() if path.name.startswith("adapter_"))
        size = sum(path.stat().st_size for path in files)
        self.say(f"Saved the checkpoint, {size / 1e6:.2f} MB", "bold")
        for path in files:
            self.say(f"  {path.name}: {path.stat().st_size:,} bytes")

    def show_change(self, frozen: Tensor, trained: Tensor) -> None:
        """Say how far the adapter moved the vectors that the checks compare."""
        self.say(f"  The adapter moved the vectors by up to {largest_difference(frozen, trained):.2e}.")

    def show_check(self, name: str, found: Tensor, wanted: Tensor, tolerance: float) -> bool:
        """Compare vectors with those of the trained model, and say whether they are equal."""
        difference = largest_difference(found, wanted)
        equal = difference <= tolerance
        verdict, style = ("equal", "green") if equal else ("NOT EQUAL", "bold red")
        self.say(f"  {verdict} when {name}: largest difference {difference:.2e} (allowed: {tolerance:.0e})", style)
        return equal

    def show_unmerged(self, error: Exception) -> None:
        """Say that the method cannot be merged, and why."""
        self.say(f"  not merged: {error}", "yellow")

    def show_end(self, folder: Path, seconds: float) -> None:
        """Say where the files are."""
        self.say(f"\nDone in {seconds:.0f} s. The checkpoint is in {folder.resolve()}")
        self.say(f"Load it with: PeftModel.from_pretrained(model, {str(folder)!r})")


def format_estimate(estimate: Estimate) -> str:
    """A mean and its standard error, as text."""
    return f"{estimate.mean:.3f} ± {estimate.error:.3f}"


def largest_difference(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference of any entry; NaN if there is one, which no tolerance allows."""
    return (first - second).abs().max().item()
