"""The command `tunerkit`: one file per command, imported only when it is run."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import click

from tunerkit.errors import TunerkitError, TunerkitWarning
from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    from collections.abc import Mapping


class LazyGroup(click.Group):
    """A group that can list its commands without importing them.

    So `--help` is quick, and works when something that a command needs is broken or not installed.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        """Make the group.

        Args:
            lazy: For each command, where it is (`"module:name"`) and a line of help.
            args: For `click.Group`.
            kwargs: For `click.Group`.
        """
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of the commands."""
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import a command and return it; None if there is no such command."""
        if cmd_name not in self.lazy:
            return None
        module, _, name = self.lazy[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ImportError as error:
            extra = f" Try `pip install tunerkit[{cmd_name}]`." if isinstance(error, ModuleNotFoundError) else ""
            msg = f"The command {cmd_name!r} cannot be used: {type(error).__name__}: {error}.{extra}"
            raise click.ClickException(msg) from error
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name; the closest names are shown for one that is not there."""
        name = args[0]
        if name not in self.lazy and (near := closest(name, self.lazy)):
            ctx.fail(f"No such command {name!r}. Did you mean {listing(near)}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and their lines of help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error or a warning of tunerkit's is shown as its message alone."""
        with warnings.catch_warnings():
            shown = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if issubclass(category, TunerkitWarning):
                    click.echo(f"Warning: {message}", err=True)
                else:
                    shown(message, category, *place, **more)

            warnings.showwarning = show
            try:
                return super().invoke(ctx)
            except TunerkitError as error:
                raise click.ClickException(str(error)) from error


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    lazy={
        "check": ("tunerkit.cli.check:check", "Run the checks that every method has to pass on an installed one."),
        "demo": ("tunerkit.cli.demo:demo", "Train, save, load and merge an adapter on a real model."),
        "doctor": ("tunerkit.cli.doctor:doctor", "Say what is installed, what is wrong with it and what to do."),
        "inspect": (
            "tunerkit.cli.inspect:inspect",
            "Say what an adapter's checkpoint holds, and whether it fits a model.",
        ),
        "merge": ("tunerkit.cli.merge:merge", "Fold an adapter into a model's folder, tensor by tensor."),
        "migrate": ("tunerkit.cli.migrate:migrate", "Rewrite scripts for PEFT, and list what needs a look."),
        "new": ("tunerkit.cli.new:new", "Write a package for a new method, ready to be tested and published."),
        "plugins": ("tunerkit.cli.plugins:plugins", "List the installed methods and how they stand."),
    },
)
@click.version_option(package_name="tunerkit", prog_name="tunerkit")
def main() -> None:
    """Parameter-efficient fine-tuning: attach, train, save, load and merge adapters."""
