"""The command: `python -m suite`, or `tox -e bench`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from suite import report, runner
from suite.plot import draw
from suite.profiling import profile as profile_job
from suite.scale import FULL, SHORT

if TYPE_CHECKING:
    from suite.result import Result


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="A family of jobs or one job; may be given several times.")
@click.option("--rounds", type=click.IntRange(1), help="How many rounds every job is measured.")
@click.option("--short", is_flag=True, help="Small models and few rounds: shows that everything runs.")
@click.option("--slow", is_flag=True, help="Run PEFT also where it takes many minutes.")
@click.option("--profile", is_flag=True, help="Instead of measuring, show where our side spends its time.")
@click.option("--list", "listed", is_flag=True, help="Only list the jobs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="tunerkit-bench",
    show_default=True,
    help="The folder for the table, the JSON and the plot.",
)
def main(
    only: tuple[str, ...], rounds: int | None, out: Path, *, short: bool, slow: bool, profile: bool, listed: bool
) -> None:
    """Run tunerkit, PEFT and a floor written by hand side by side, and compare."""
    try:
        jobs = runner.choose(only)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None
    scale = dataclasses.replace(SHORT if short else FULL, slow=slow)
    console = Console()
    if listed:
        for job in jobs:
            click.echo(f"{job.name:24}{job.title}")
        return
    if profile:
        for job in jobs:
            click.echo(f"{job.name}\n{profile_job(job, scale)}")
        return
    around = {"scale": scale.name, **runner.surroundings()}
    results: list[Result] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        whole = progress.add_task("jobs", total=len(jobs))
        for job in jobs:
            count = rounds or (min(job.rounds, 3) if short else job.rounds)
            task = progress.add_task(job.name, total=count)
            results.append(runner.run(job, scale, count, partial(progress.advance, task)))
            progress.advance(whole)
            report.write(out, results, around)  # what is measured is not lost if a later job is interrupted
    for suffix in ("svg", "png"):
        draw(out / f"ratios.{suffix}", results)
    console.print(report.screen_table(results))
    console.print(report.verdict(results))
    console.print(f"Written to {out}: table.md, results.json, ratios.svg, ratios.png.")


if __name__ == "__main__":
    main()
