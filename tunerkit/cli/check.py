"""`tunerkit check`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tunerkit.testing.failures import Finding
    from tunerkit.testing.installed import Result

_STYLES = {"failed": "red", "absent": "yellow", "expected to fail": "yellow"}


@click.command
@click.argument("method")
@click.option("--verbose", is_flag=True, help="Print also what pytest printed.")
def check(*, method: str, verbose: bool) -> None:
    """Run the conformance kit on an installed METHOD; exit with 1 if a check fails.

    The checks run with the method's default settings, or as the class says that its plugin names. This needs the extra
    `testing`.
    """
    try:
        from tunerkit.testing import installed  # noqa: PLC0415 - imports pytest, and keeps --help quick
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error

    results, found, printed = installed.check(method)
    if verbose or not results:
        click.echo(printed)
    if not results:
        msg = f"No check ran for the method {method!r}; what pytest printed stands above."
        raise click.ClickException(msg)
    _print_table(results, found)
    _print_findings(found)
    count = Counter[str]()
    for result in results.values():
        count.update(result.outcomes)
    click.echo(
        f"{method}: {len(results)} checks, {count['passed']} runs passed and {count['failed']} failed; "
        f"{count['absent']} were declared absent, and {count['expected to fail']} failed as expected."
    )
    if count["failed"]:
        raise SystemExit(1)


def _print_table(results: dict[str, Result], found: list[Finding]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow, and --help needs none of it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table("Check", "Outcome", "Why", box=None)
    table.columns[0].no_wrap = True
    for name, result in sorted(results.items()):
        outcome = ", ".join(f"{outcome}: {number}" for outcome, number in result.outcomes.items())
        style = next((_STYLES[one] for one in _STYLES if one in result.outcomes), None)
        below = ", ".join(f"({number})" for number, one in enumerate(found, 1) if name in one.checks)
        reasons = [*result.reasons, *([f"see {below} below"] if below else [])]
        # As text, because square brackets in a reason would be taken for markup.
        table.add_row(*map(Text, (name, outcome, "; ".join(reasons))), style=style)
    Console().print(table)


def _print_findings(found: list[Finding]) -> None:
    if found:
        click.echo("\nWhat failed, the most basic first; mend that, for what follows may come from it:\n")
    for number, finding in enumerate(found, 1):
        click.secho(f"({number}) {finding.title}", bold=True)
        for line in finding.lines():
            click.echo(f"    {line}")
        click.echo()
