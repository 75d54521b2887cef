"""Every code block of the documentation is run, or checked as far as running it is sensible.

The Python blocks of one file are run in order, as a reader would. A block that cannot be run here has the comment
`<!-- not run: reason -->` on the line above it.
"""

import configparser
import json
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import reference
import torch
from click.testing import CliRunner
from wheels import TUTORIALS

from suite.__main__ import main as benchmarks
from tunerkit.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
    *sorted(page for page in ROOT.glob("docs/**/*.md") if page.stem not in TUTORIALS),
]
FOLLOWED = [ROOT / "docs" / f"{page}.md" for page in TUTORIALS]  # by `tests/packaging/test_tutorial.py`
CHECKED = ("python", "sh", "toml", "json")
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence) *$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\n\Z")
SET_UP = "python3 -m venv .venv && .venv/bin/python -m pip install -q tox && .venv/bin/tox"


@dataclass
class Block:
    """One fenced block: where it stands, its language and its text."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"].strip(), match["code"])
        for match in FENCE.finditer(text)
        if not NOT_RUN.search(text[: match.start()])
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def having(*languages):
    return [block for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Dataclasses look up the module in which they are defined.
    module = types.ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    from tunerkit.plugins import loader

    monkeypatch.setattr(loader, "registered", dict(loader.registered))
    monkeypatch.setattr(loader, "loaded", dict(loader.loaded))
    with torch.random.fork_rng():
        for block in blocks_of(page):
            if block.language == "python":
                # Blank lines put the code at its line in the page, for tracebacks.
                exec(compile("\n" * block.line + block.code, page, "exec", dont_inherit=True), vars(module))  # noqa: S102 - our own documentation


def test_every_block_names_a_language_that_is_checked():
    assert {str(block) for block in BLOCKS} == {str(block) for block in having(*CHECKED, "text", "py", "{toctree}")}


def test_only_signatures_are_not_run():
    assert {block.page for block in having("py")} <= set(reference.PAGES)


@pytest.mark.parametrize("block", having("toml", "json"), ids=str)
def test_data_can_be_parsed(block):
    assert {"toml": tomllib.loads, "json": json.loads}[block.language](block.code)


@pytest.mark.parametrize("block", having("sh"), ids=str)
def test_commands_are_right(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes into the folder in which it is called
    for line in block.code.splitlines():
        if line not in ("", SET_UP, f"{SET_UP} -e demo"):
            check(shlex.split(line, comments=True))


def check(command):
    match command:
        case []:
            pass
        case ["tunerkit", *arguments]:
            check_own(arguments)
        case [".venv/bin/tox", "-e", name]:
            assert f"testenv:{name}" in tox().sections()
        case [".venv/bin/tox", "-e", "bench", "--", *arguments]:
            benchmarks.make_context("bench", arguments)
        case ["pip", "install", *what]:
            # Nothing is published: what is installed is a folder of the checkout.
            assert all((ROOT / path / "pyproject.toml").is_file() for path in what), what
        case _:
            pytest.fail(f"no check is known for the command {command}")


def check_own(arguments):
    """Run a command of tunerkit's; of those that take long or read folders, check that the arguments are understood."""
    if arguments[0] not in ("demo", "inspect", "merge", "migrate"):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return
    command = main.get_command(click.Context(main), arguments[0])
    # Parsed whole, so that an argument that is missing or left over is seen too.
    command.make_context(arguments[0], list(arguments[1:]))


def tox():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini", encoding="utf-8")
    return config


def test_two_commands_do_all_the_set_up():
    first, second, *_ = [block for block in blocks_of(ROOT / "README.md") if block.language == "sh"]
    assert first.code == f"{SET_UP} -e demo\n"
    assert second.code == f"{SET_UP}\n"
    assert SET_UP in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_demo_is_not_part_of_a_plain_run():
    assert tox()["tox"]["env_list"] == "py, isolated, lint, types, docs"
    assert tox()["testenv:demo"]["commands"].startswith("tunerkit demo --method lora")


@pytest.mark.parametrize(
    "page", [*PAGES, *FOLLOWED, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_inside_the_repository_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["pip", "install", "tunerkit-lora"], "tunerkit-lora"),
        (["curl", "x"], "no check is known"),
        ([".venv/bin/tox", "-e", "none"], "testenv:none"),
        ([".venv/bin/tox", "-e", "bench", "--", "--nothing"], "No such option"),
        (["tunerkit", "nothing"], "No such command"),
        (["tunerkit", "demo", "x"], "unexpected extra argument"),
        (["tunerkit", "merge", "--base", "x"], "Missing parameter: adapter"),
    ],
)
def test_a_wrong_command_is_seen(command, reason):
    with pytest.raises((AssertionError, click.UsageError, pytest.fail.Exception), match=reason):
        check(command)
