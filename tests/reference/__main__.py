"""Writes the pages anew; with `--check` says whether they are up to date."""

import sys

from cogapp import Cog

from reference import PAGES

START = "from reference import show, show_checks, show_places, show_reasons"

if __name__ == "__main__":
    sys.exit(Cog().main(["cog", "-r", "-P", "-p", START, *sys.argv[1:], *map(str, PAGES)]))
