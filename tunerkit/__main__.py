"""`python -m tunerkit`, for where the script `tunerkit` is not on the path."""

from __future__ import annotations

from tunerkit.cli import main

main(prog_name="tunerkit")
