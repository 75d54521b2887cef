from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tunerkit import cli

pytest.importorskip("libcst", reason="the extra `migrate` brings it")

BEFORE = "import os\n\nfrom peft import LoraConfig, PeftModel\n"
AFTER = "import os\n\nfrom tunerkit_lora import LoraConfig\nfrom tunerkit import PeftModel\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.main, ["migrate", *map(str, args)], prog_name="tunerkit")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path):
    return path.read_text(encoding="utf-8")


class TestPrinted:
    def test_difference(self, run, tmp_path):
        script = write(tmp_path / "a.py", BEFORE)
        result = run("a.py")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines() == [
            "--- a.py",
            "+++ a.py",
            "@@ -1,3 +1,4 @@",
            " import os",
            " ",
            "-from peft import LoraConfig, PeftModel",
            "+from tunerkit_lora import LoraConfig",
            "+from tunerkit import PeftModel",
            "1 file: 1 to change. Nothing was written: --write does.",
        ]
        assert read(script) == BEFORE

    def test_what_needs_a_look(self, run, tmp_path):
        write(tmp_path / "a.py", "from peft import VeraConfig\nx = ['peft']\n")
        result = run("a.py")
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [
            "Needs a look:",
            "a.py:1: peft.VeraConfig: of a method that is not built yet",
            "a.py:2: 'peft': a text that may mean a module or a name of PEFT's",
            "1 file: nothing to change.",
        ]

    def test_check(self, run, tmp_path):
        script = write(tmp_path / "a.py", BEFORE)
        assert run("--check", "a.py").exit_code == 1
        assert read(script) == BEFORE
        write(script, AFTER)
        assert run("--check", "a.py").exit_code == 0

    def test_check_and_write(self, run):
        result = run("--check", "--write", "a.py")
        assert result.exit_code == 2
        assert "--check writes nothing, and --write does: choose one of them." in result.output


class TestWritten:
    def test_files_and_folders(self, run, tmp_path):
        names = ["a.py", "src/b.py", "src/c/d.py"]
        others = ["src/.hidden/e.py", "src/venv/lib/f.py", "src/notes.txt"]
        for name in (*names, *others):
            write(tmp_path / name, BEFORE)
        write(tmp_path / "src" / "venv" / "pyvenv.cfg", "")
        result = run("--write", "a.py", "src", "src/b.py")
        assert result.exit_code == 0
        assert result.stdout.endswith("3 files: 3 written.\n")
        assert {read(tmp_path / name) for name in names} == {AFTER}
        assert {read(tmp_path / name) for name in others} == {BEFORE}
        assert run("--write", "a.py", "src").stdout == "3 files: nothing to change.\n"

    @pytest.mark.skipif(os.name == "nt", reason="Windows has neither, or asks for rights")
    def test_a_link_and_the_mode_stay(self, run, tmp_path):
        script = write(tmp_path / "real" / "a.py", BEFORE)
        script.chmod(0o750)
        link = tmp_path / "b.py"
        link.symlink_to(script)
        assert run("--write", "b.py").exit_code == 0
        assert link.is_symlink()
        assert read(script) == AFTER
        assert script.stat().st_mode & 0o777 == 0o750
        assert list(script.parent.iterdir()) == [script]

    def test_a_file_that_cannot_be_read_keeps_no_other(self, run, tmp_path):
        broken = write(tmp_path / "broken.py", "from peft import (\n")
        script = write(tmp_path / "z.py", BEFORE)
        result = run("--write", ".", "missing.py")
        assert result.exit_code == 1
        assert "broken.py is left as it is: '(' was never closed" in result.stderr
        assert "missing.py is left as it is: [Errno 2] No such file" in result.stderr
        assert result.stdout.endswith("3 files: 1 written, 2 left as they are.\n")
        assert read(broken) == "from peft import (\n"
        assert read(script) == AFTER

    def test_a_file_that_cannot_be_written(self, run, tmp_path, monkeypatch):
        script = write(tmp_path / "a.py", BEFORE)

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        result = run("--write", "a.py")
        assert result.exit_code == 1
        assert "a.py is left as it is: [Errno 28] No space left on device" in result.stderr
        assert result.stdout == "1 file: nothing to change, 1 left as it is.\n"
        assert read(script) == BEFORE
        assert list(tmp_path.iterdir()) == [script]


def test_without_libcst(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "libcst", None)
    result = run("a.py")
    assert result.exit_code == 1
    assert "tunerkit migrate needs libcst, which is not installed: pip install 'tunerkit[migrate]'" in result.output


def test_help_needs_nothing():
    code = (
        "import sys; from tunerkit.cli import main; from click.testing import CliRunner\n"
        "assert 'needs a look' in CliRunner().invoke(main, ['--help']).output\n"
        "assert '--write' in CliRunner().invoke(main, ['migrate', '--help']).output\n"
        "print(sorted({'libcst', 'tunerkit.migration', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- Whole scripts, which run with PEFT, and with tunerkit once they are migrated.

TRAIN = '''
"""Train an adapter, and load it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import (
    LoraConfig,  # the method
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    from peft import PeftConfig


def make_base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def make_config() -> PeftConfig:
    return LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)


model = get_peft_model(make_base(), make_config())
assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 2
x = torch.linspace(-1, 1, 12).reshape(3, 4)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(make_base(), "adapter")
torch.testing.assert_close(loaded(x), model(x))
LIBRARY = LoraConfig.__module__.partition(".")[0]
'''
ATTRIBUTES = """
import peft
import peft.utils as utils
import torch

try:
    from peft import IA3Config
except ImportError:
    IA3Config = None


class Owner:
    kinds = (peft.LoraConfig, IA3Config)

    def attach(self, base: torch.nn.Module) -> peft.PeftModel:
        from peft.utils.hotswap import hotswap_adapter

        self.swap = hotswap_adapter
        config = peft.LoraConfig(r=1, target_modules=["0"], task_type=peft.TaskType.CAUSAL_LM)
        return peft.get_peft_model(base, config, mixed=True)


owner = Owner()
model = owner.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)))
assert utils.SAFETENSORS_WEIGHTS_NAME == "adapter_model.safetensors"
assert callable(owner.swap)
LIBRARY = type(model).__module__.partition(".")[0]
"""


@pytest.mark.parametrize("script", [TRAIN, ATTRIBUTES], ids=["train", "attributes"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's
def test_whole_scripts(run, tmp_path, script):
    pytest.importorskip("peft", reason="it is what the scripts are for")
    path = write(tmp_path / "script.py", script.lstrip())
    assert runpy.run_path(str(path))["LIBRARY"] == "peft"
    result = run("--write", path)
    assert result.exit_code == 0, result.output
    assert "Needs a look" not in result.output
    assert "import peft" not in read(path)
    assert "from peft" not in read(path)
    assert runpy.run_path(str(path))["LIBRARY"].startswith("tunerkit")
