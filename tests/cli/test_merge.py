from __future__ import annotations

import json
import warnings

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tunerkit import cli, get_peft_model
from tunerkit.errors import CheckpointError
from tunerkit.offline import skeleton
from tunerkit_lora import LoraConfig

# One side of a tie is what is merged here.
pytestmark = pytest.mark.filterwarnings("ignore::tunerkit.errors.TyingWarning")


@pytest.fixture
def run(monkeypatch):
    """Run the command as a shell would."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(cli.main, ["merge", *map(str, args)], prog_name="tunerkit")


@pytest.fixture
def folders(tmp_path):
    """A base model whose embeddings are tied, and an adapter for its head."""
    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.onnx").touch()
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    torch.nn.init.normal_(peft.base_model.model.lm_head.lora_B["default"].weight)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]


def test_text(run, folders, tmp_path):
    result = run(*folders)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:-1] == [
        f"Merged {tmp_path / 'adapter'} (lora) into {tmp_path / 'base'} (LlamaForCausalLM).",
        "  1 tensors merged, 11 untouched",
        "  lm_head.weight was tied to another tensor and now has values of its own; the config says so",
        "  model.onnx was left out: the adapter is not in it",
    ]
    assert lines[-1].startswith("Wrote 0.0 MB to ")
    assert result.stderr == ""
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False


def test_json(run, folders, tmp_path):
    result = run(*folders, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert list(report) == [
        "base", "adapter", "out", "method", "model", "merged", "replaced", "untouched", "untied",
        "lacking", "bytes", "left_out", "seconds",
    ]  # fmt: skip
    assert report["merged"] == report["untied"] == ["lm_head.weight"]
    assert report["out"] == str(tmp_path / "out")


def test_progress_goes_to_the_standard_error_of_a_terminal(run, folders, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    result = run(*folders, "--json")
    assert json.loads(result.stdout)["method"] == "lora"
    assert "merging" in result.stderr


def test_overwrite(run, folders):
    assert run(*folders).exit_code == 0
    result = run(*folders)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: '")
    assert "is there and not empty" in result.stderr
    assert run(*folders, "--overwrite").exit_code == 0


def test_errors_are_told_plainly(run, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(skeleton, "find_spec", lambda _: None)
    result = run(*folders)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: To know a base model from its folder, tunerkit needs transformers, which is not installed. Install "
        "with: pip install 'tunerkit[merge]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_repeated_layers_are_refused(run, folders, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    result = run(*folders)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: The adapter in '{tmp_path / 'adapter'}' repeats layers of the base model")
    assert not (tmp_path / "out").exists()


def test_usage(run):
    result = run()
    assert result.exit_code == 2
    assert "Missing option '--base'" in result.output


def test_help(run):
    output = " ".join(run("--help").output.split())
    assert "Usage: tunerkit merge [OPTIONS]" in output
    assert "The new folder appears whole or not at all." in output
    assert "pip install 'tunerkit[merge]'" in output


@pytest.mark.filterwarnings("default::tunerkit.errors.LoadWarning")
def test_modules_trained_as_a_whole_and_what_is_lacking(run, folders, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "v_proj" not in key}, path)
    result = run(*folders)
    assert result.exit_code == 0, result.output
    assert "  1 tensors merged, 1 replaced, 9 untouched\n" in result.stdout
    assert result.stderr.startswith(
        f"Warning: The adapter in '{tmp_path / 'adapter'}': The config means 1 more modules"
    )


def test_warnings_of_others_are_shown_as_ever(run, folders, monkeypatch):
    from tunerkit.offline import merging

    def warn(*_, **__):
        warnings.warn("something else", UserWarning, stacklevel=1)
        raise CheckpointError("the end")

    monkeypatch.setattr(merging, "merge_folder", warn)
    with pytest.warns(UserWarning, match="something else"):
        assert run(*folders).exit_code == 1
