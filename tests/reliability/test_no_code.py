"""No file makes tunerkit run code: none is imported by a name in it, and nothing is unpickled."""

from __future__ import annotations

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import PeftConfig, PeftModel, TunerkitError, get_peft_model
from tunerkit.checkpoint.card import Card, update
from tunerkit.checkpoint.files import read_checkpoint
from tunerkit.errors import CheckpointNotFoundError, PluginError
from tunerkit.offline.inspection import inspect_checkpoint
from tunerkit_lora import LoraConfig

SOURCES = sorted(Path(tunerkit.__file__).parent.rglob("*.py"))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=1, target_modules=["0"])).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "leaves_a_mark.py").write_text("import pathlib\npathlib.Path(__file__).with_name('mark').touch()\n")
    monkeypatch.syspath_prepend(str(place))
    return place / "mark"


def edit(folder, **values):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **values}), encoding="utf-8")


def use(folder):
    """Do with a checkpoint all that can be done."""
    inspect_checkpoint(folder)
    PeftConfig.from_pretrained(folder)
    base = nn.Sequential(nn.Linear(3, 4))
    model = PeftModel.from_pretrained(base, folder)
    model.load_adapter(folder, "other")
    model.save_pretrained(folder / "again")
    return model


def test_auto_mapping_imports_nothing(folder, mark):
    edit(folder, auto_mapping={"base_model_class": "leaves_a_mark.X", "parent_library": "leaves_a_mark"})
    use(folder)
    assert not mark.exists()
    assert "leaves_a_mark" not in sys.modules
    __import__("leaves_a_mark")
    assert mark.exists()


@pytest.mark.parametrize("name", ["leaves_a_mark", "LEAVES_A_MARK", "leaves_a_mark:X", "../leaves_a_mark", "os.path"])
def test_a_method_that_is_not_installed_is_not_imported(folder, mark, name):
    edit(folder, peft_type=name)
    with pytest.raises(TunerkitError):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 4)), folder)
    inspect_checkpoint(folder)
    assert not mark.exists()


def test_only_allowed_methods_are_imported(environment, monkeypatch, tmp_path):
    module = environment.install("tunerkit-dangerous")
    monkeypatch.setenv("TUNERKIT_PLUGINS", "harmless")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "DANGEROUS"}), encoding="utf-8")
    with (
        pytest.warns(match="harmless"),
        pytest.raises(PluginError, match="TUNERKIT_PLUGINS='harmless' leaves it out"),
    ):
        PeftConfig.from_pretrained(tmp_path)
    assert module not in sys.modules
    monkeypatch.setenv("TUNERKIT_PLUGINS", "dangerous")
    PeftConfig.from_pretrained(tmp_path)
    assert module in sys.modules


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_a_pickle_is_refused_with_what_to_do(folder, ending):
    (folder / WEIGHTS).rename(folder / f"adapter_model{ending}")
    with pytest.raises(CheckpointNotFoundError) as raised:
        read_checkpoint(folder)
    assert str(raised.value) == (
        f"'{folder}' holds its tensors as 'adapter_model{ending}', a pickle, and loading a pickle can run any code, so "
        f"tunerkit reads '{WEIGHTS}' only. If you trust the file, convert it once: load the checkpoint with PEFT and "
        "write it again with PEFT's `save_pretrained`, which saves safetensors by default."
    )


def test_nothing_is_unpickled(folder, monkeypatch):
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")

    def refuse(*_args, **_options):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    use(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointNotFoundError, match="a pickle"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 4)), folder)


def test_the_source_unpickles_and_evaluates_nothing():
    """The conformance kit pickles models itself, to see that they come back."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module)
            if isinstance(node, ast.Call):
                names.append(ast.unparse(node.func))
            bad = {
                "pickle",
                "marshal",
                "shelve",
                "dill",
                "cloudpickle",
                "joblib",
                "torch.load",
                "eval",
                "exec",
                "compile",
            }
            found |= {(path.name, name) for name in bad & set(names) | {"__import__"} & set(names)}
    assert found == {("state.py", "pickle")}
    assert len(SOURCES) > 50


@pytest.mark.parametrize(
    "line", ["tags: [a", "tags: [", "tags: &x [*x", "tags:" + " " * 200_000 + "x", "tags: !!python/x", "- a", ":"]
)
def test_a_card_s_text_breaks_nothing(line):
    text = f"---\n{line}\n---\n# Mine\n"
    card = Card(title="x", text="", base_model="b", tags=("t",), versions={"tunerkit": "1"})
    new = update(text, card)
    assert line.removeprefix("tags:").strip() in new
    assert "# Mine" in new
    assert update(new, card) == new


def test_a_card_with_a_broken_list_is_kept(folder):
    (folder / "README.md").write_text("---\ntags: [mine\n---\nbody\n", encoding="utf-8")
    use(folder).save_pretrained(folder)
    assert "tags: [mine\n" in (folder / "README.md").read_text(encoding="utf-8")
