"""`tunerkit new`: what it writes, and what it refuses. That the packages work is shown in `tests/packaging`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tunerkit import cli
from tunerkit.cli import new

pytest.importorskip("copier", reason="the extra `testing` brings it")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.main, ["new", *args], prog_name="tunerkit")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", new.KINDS)
class TestWritten:
    def test_files(self, run, tmp_path, kind):
        assert run("my-method", "--kind", kind).exit_code == 0
        assert files(tmp_path / "tunerkit-my-method") == [
            ".github/workflows/tests.yml",
            ".gitignore",
            "LICENSE",
            "README.md",
            "pyproject.toml",
            "tests/test_adapter.py",
            "tests/test_conformance.py",
            "tunerkit_my_method/__init__.py",
            "tunerkit_my_method/adapter.py",
            "tunerkit_my_method/config.py",
            "tunerkit_my_method/py.typed",
        ]

    def test_nothing_is_left_to_fill_in(self, run, tmp_path, kind):
        run("my-method", "--kind", kind)
        for path in (tmp_path / "tunerkit-my-method").rglob("*"):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                assert "{%" not in text
                assert "{{ " not in text.replace("${{ matrix.python }}", "")
                assert text == "" or text.endswith("\n")
                assert not text.endswith("\n\n")
                if path.suffix == ".py":
                    assert ast.get_docstring(ast.parse(text))


class TestNames:
    @pytest.mark.parametrize("name", ["my-method", "tunerkit-my-method", "tunerkit_my_method", "MY_METHOD"])
    def test_every_spelling_of_a_method(self, run, tmp_path, name):
        assert run(name).exit_code == 0
        text = (tmp_path / "tunerkit-my-method" / "tunerkit_my_method" / "config.py").read_text(encoding="utf-8")
        assert "class MyMethodConfig(PeftConfig):" in text
        assert '"MY_METHOD"' in text

    @pytest.mark.parametrize(
        ("title", "name"), [("SSF", "SSF"), ("Scale & Shift", "ScaleShift"), ("2 sides", "Ssf"), ("?", "Ssf")]
    )
    def test_classes_are_called_as_people_write_it(self, run, tmp_path, title, name):
        assert run("ssf", "--title", title).exit_code == 0
        text = (tmp_path / "tunerkit-ssf" / "tunerkit_ssf" / "__init__.py").read_text(encoding="utf-8")
        assert f"import {name}Config\n" in text
        assert text.startswith(f'"""{title} for tunerkit."""\n')

    def test_what_is_given_is_taken(self, run, tmp_path):
        given = ("--description", "It's C:/ - a method: 100 % mine.", "--author", 'Ann "A" O\'Hara')
        assert run("ssf", *given, "--out", "deep/down").exit_code == 0
        folder = tmp_path / "deep" / "down" / "tunerkit-ssf"
        assert 'Ann "A" O\'Hara' in (folder / "LICENSE").read_text(encoding="utf-8")
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
        assert f'description = "{given[1]}"' in project


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["lora"], "The method 'lora' is installed already, and two packages cannot offer one."),
            (["3d"], "'3d' begins with a digit"),
            (["two words"], "is not a method name: use letters, digits and single hyphens."),
            (["ssf", "--title", "a\\b"], "use no quotes, backslashes or line breaks"),
            (["ssf", "--description", 'a"b'], "use no quotes, backslashes or line breaks"),
            (["ssf", "--description", "a\nb"], "use no quotes, backslashes or line breaks"),
        ],
    )
    def test_nothing_is_written(self, run, tmp_path, arguments, message):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_there(self, run, tmp_path):
        (tmp_path / "tunerkit-ssf").mkdir()
        result = run("ssf")
        assert result.exit_code == 1
        assert "'tunerkit-ssf' is there already. Choose another name or another --out" in result.output

    def test_without_the_library(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "copier", None)
        result = run("ssf")
        assert result.exit_code == 1
        assert "pip install 'tunerkit[testing]'" in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="the terminal is a pseudo-terminal of POSIX systems")
class TestInATerminal:
    """Copier asks what is not given; each question is answered by what a user types."""

    QUESTIONS = ("What does the method do", "Its name", "in one line", "Who holds")

    @pytest.fixture
    def talk(self, tmp_path):
        import pty

        def talk(*answers):
            ours, theirs = pty.openpty()
            command = [sys.executable, "-m", "tunerkit", "new", "my-method"]
            asked = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path)
            os.close(theirs)
            said, waiting = b"", list(zip(self.QUESTIONS, answers, strict=False))
            with asked:
                while part := read(ours):
                    said += part
                    if b"\x1b[6n" in part:  # where is the cursor?
                        os.write(ours, b"\x1b[1;1R")
                    if waiting and waiting[0][0].encode() in said:
                        os.write(ours, waiting.pop(0)[1])
            os.close(ours)
            return asked.returncode, said.decode()

        return talk

    def test_questions(self, talk, tmp_path):
        code, said = talk(b"\x1b[B\r", b"\r", b"\x15Shifts and scales\r", b"\r")
        assert code == 0, said
        folder = tmp_path / "tunerkit-my-method"
        assert 'description = "Shifts and scales"' in (folder / "pyproject.toml").read_text(encoding="utf-8")
        assert "self.my_method_scale" in (folder / "tunerkit_my_method" / "adapter.py").read_text(encoding="utf-8")

    def test_broken_off(self, talk, tmp_path):
        code, said = talk(b"\r", b"\x03")
        assert code == 1
        assert "Nothing was written to 'tunerkit-my-method': the questions were broken off." in said
        assert list(tmp_path.iterdir()) == []


def read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux says that nobody writes any more
        return b""


@pytest.mark.parametrize(
    ("version", "expected"), [("0.1.0", ">=0.1,<0.2"), ("0.9.3", ">=0.9,<0.10"), ("2.4.1.dev1", ">=2.4,<3")]
)
def test_the_range_of_the_core(monkeypatch, version, expected):
    monkeypatch.setattr(new, "version", lambda _: version)
    assert new._range() == expected
