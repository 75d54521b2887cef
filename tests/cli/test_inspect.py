from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from toys import registered, shared, tuner_by_hand
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tunerkit import cli, get_peft_model
from tunerkit.offline import skeleton
from tunerkit_lora import LoraConfig


@pytest.fixture
def run(monkeypatch):
    """Run the command as a shell would."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(cli.main, ["inspect", *map(str, args)], prog_name="tunerkit")


def llama(**changes):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, **changes}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    # Only the config is read.
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def adapter(tmp_path):
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def words(output):
    return [line.split() for line in output.splitlines()]


class TestText:
    def test_tables(self, run, adapter):
        result = run(adapter)
        assert result.exit_code == 0, result.output
        lines = words(result.stdout)
        assert lines[0] == ["Checkpoint", str(adapter)]
        assert lines[1][:3] == ["Method", "LORA", "(tunerkit-lora"]
        assert ["r", "2"] in lines
        assert ["target_modules", '["q_proj"]'] in lines
        assert not any(line[:1] == ["lora_alpha"] for line in lines)
        assert ["model.layers.*.self_attn.q_proj", "lora_A,", "lora_B", "3"] in lines
        assert [
            "base_model.model.model.layers.*.self_attn.q_proj.lora_A.weight",
            "2",
            "x",
            "8",
            "F32",
            "64",
            "3",
        ] in lines
        assert ["6", "tensors,", "96", "numbers,", "384", "bytes"] in lines
        assert ["tunerkit_plugin", "tunerkit-lora"] in lines
        assert result.stderr == ""

    def test_all(self, run, adapter):
        lines = words(run(adapter, "--all").stdout)
        assert ["lora_alpha", "8"] in lines
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        assert [key, "2", "x", "8", "F32", "64", "1"] in lines

    def test_long_keys_and_brackets_are_shown_whole(self, run, adapter, monkeypatch):
        monkeypatch.setenv("COLUMNS", "60")
        configure(adapter, revision="[red]x[/red]")
        output = run(adapter).stdout
        assert "…" not in output
        assert "[red]x[/red]" in output

    def test_base(self, run, adapter, base):
        result = run(adapter, "--base", base)
        assert result.exit_code == 0, result.output
        lines = words(result.stdout)
        assert ["In", str(base), "(LlamaForCausalLM)"] in lines
        assert ["model.layers.*.self_attn.q_proj", "found", "3"] in lines
        assert lines[-1] == ["3", "of", "3", "targets", "found:", "it", "fits"]

    def test_the_standard_error_of_a_terminal_says_that_it_works(self, run, adapter, base, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        result = run(adapter, "--base", base, "--json")
        assert json.loads(result.stdout)["base"]["fits"]
        assert "Reading ..." in result.stderr


class TestJson:
    def test_all_there_is(self, run, adapter, base):
        found = json.loads(run(adapter, "--base", base, "--json").stdout)
        assert list(found) == [
            "checkpoint", "method", "changed", "settings", "tensors", "count", "bytes", "adapted", "metadata", "base",
        ]  # fmt: skip
        assert found["method"] == {
            "peft_type": "LORA",
            "id": "lora",
            "package": "tunerkit-lora",
            "version": found["method"]["version"],
            "problem": "",
        }
        assert found["changed"]["r"] == 2
        assert found["settings"]["lora_alpha"] == 8
        assert found["tensors"][0] == {
            "key": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "shape": [2, 8],
            "dtype": "F32",
            "bytes": 64,
        }
        assert (found["count"], found["bytes"]) == (96, 384)
        assert found["adapted"] == [
            {
                "module": "model.layers.*.self_attn.q_proj",
                "holds": ["lora_A", "lora_B"],
                "count": 3,
                "replaces": False,
            }
        ]
        assert found["metadata"]["tunerkit_plugin"] == "tunerkit-lora"
        assert found["base"]["targets"][0] == {
            "path": "model.layers.0.self_attn.q_proj",
            "status": "found",
            "note": "",
        }

    def test_no_tensor_is_read(self, run, adapter, base, monkeypatch):
        import safetensors

        from tunerkit.checkpoint import files
        from tunerkit.offline import tensor_file

        class HeaderOnly:
            def __init__(self, *args, **kwargs):
                self.file = safetensors.safe_open(*args, **kwargs)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def metadata(self):
                return self.file.metadata()

        monkeypatch.setattr(files, "safe_open", HeaderOnly)
        monkeypatch.setattr(tensor_file, "safe_open", HeaderOnly)
        result = run(adapter, "--base", base, "--json")
        assert json.loads(result.stdout)["base"]["fits"], result.output

    def test_what_the_whole_model_shares(self, run, tmp_path):
        with registered(shared):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            get_peft_model(model, shared.Config(target_modules=["0", "1"])).save_pretrained(tmp_path)
            found = json.loads(run(tmp_path, "--json").stdout)
        assert [(item["module"], item["count"]) for item in found["adapted"]] == [("*", 2), ("", 1)]
        with registered(shared):
            assert "(the whole model)" in run(tmp_path).stdout


class TestMethods:
    def test_not_installed(self, run, adapter, base):
        configure(adapter, peft_type="NO_SUCH", strange=3, empty=[])
        found = json.loads(run(adapter, "--json").stdout)
        assert found["method"]["package"] == "tunerkit-no-such"
        assert "by convention tunerkit-no-such" in found["method"]["problem"]
        assert found["changed"]["strange"] == 3
        assert "empty" not in found["changed"]
        assert found["adapted"][0]["holds"] == ["lora_A", "lora_B"]
        result = run(adapter, "--base", base)
        assert result.exit_code == 0
        assert "by convention tunerkit-no-such" in result.stdout
        assert "3 of 3 targets found" in result.stdout

    @pytest.mark.parametrize(("kind", "match"), [(None, "its peft_type is None"), ("???", "is not a method name")])
    def test_no_method(self, run, adapter, kind, match):
        configure(adapter, peft_type=kind)
        found = json.loads(run(adapter, "--json").stdout)
        assert match in found["method"]["problem"]
        assert found["method"]["id"] is None

    def test_broken(self, run, adapter, environment):
        configure(adapter, peft_type="NO_SUCH")
        environment.install("tunerkit-no-such", "1 / 0")
        found = json.loads(run(adapter, "--json").stdout)
        assert "ZeroDivisionError" in found["method"]["problem"]
        assert found["count"] == 96

    def test_a_config_that_cannot_be_used(self, run, adapter, base):
        configure(adapter, r=-1)
        found = json.loads(run(adapter, "--json").stdout)
        assert "LoraConfig.r" in found["method"]["problem"]
        assert "LoraConfig.r" in run(adapter, "--base", base).stdout

    def test_modules_trained_as_a_whole(self, run, adapter):
        path = adapter / "adapter_model.safetensors"
        save_file({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
        configure(adapter, modules_to_save=["lm_head"])
        whole = {"module": "lm_head", "holds": ["weight"], "count": 1, "replaces": True}
        assert json.loads(run(adapter, "--json").stdout)["adapted"] == [whole]
        assert ["lm_head", "weight", "(replaced)", "1"] in words(run(adapter).stdout)
        configure(adapter, peft_type="NO_SUCH")
        assert json.loads(run(adapter, "--json").stdout)["adapted"] == [whole]


class TestFit:
    def base_of(self, tmp_path, **changes):
        llama(**changes).save_pretrained(tmp_path / "other")
        return tmp_path / "other"

    def test_missing(self, run, adapter, tmp_path):
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "other")
        result = run(adapter, "--base", tmp_path / "other")
        assert result.exit_code == 1
        lines = words(result.stdout)
        assert ["model.layers.*.self_attn.q_proj", "missing", "3"] in lines
        assert lines[-1] == ["0", "of", "3", "targets", "found:", "it", "does", "not", "fit"]
        assert "  model.layers.0.self_attn.q_proj: Closest: 'transformer." in result.stdout

    def test_shapes(self, run, adapter, tmp_path):
        result = run(adapter, "--base", self.base_of(tmp_path, hidden_size=16), "--json")
        assert result.exit_code == 1
        [first, *_] = json.loads(result.stdout)["base"]["targets"]
        assert first["status"] == "shape mismatch"
        assert first["note"] == ("model.layers.0.self_attn.q_proj.lora_A.weight is (2, 8), the adapter's (2, 16).")

    def test_a_layer_that_cannot_be_adapted(self, run, adapter, base):
        path = adapter / "adapter_model.safetensors"
        save_file({"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 2)}, path)
        result = run(adapter, "--base", base)
        assert result.exit_code == 1
        assert "1 of 1 targets found: it does not fit" in result.stdout
        assert "LlamaRMSNorm" in result.stdout

    def test_a_method_that_makes_its_layers_itself(self, run, tmp_path, base):
        with registered(tuner_by_hand):
            peft = get_peft_model(llama(), tuner_by_hand.Config(target_modules=["q_proj"]))
            peft.save_pretrained(tmp_path / "adapter")
            result = run(tmp_path / "adapter", "--base", base)
        assert result.exit_code == 0, result.output

    def test_notes(self, run, adapter, tmp_path):
        path = adapter / "adapter_model.safetensors"
        tensors = {f"base_model.model.nowhere.{i}.lora_A.weight": torch.zeros(1) for i in range(6)}
        save_file(tensors, path)
        other = self.base_of(tmp_path)
        assert run(adapter, "--base", other).stdout.count("nothing like it") == 4
        assert run(adapter, "--base", other, "--all").stdout.count("nothing like it") == 6


class TestErrors:
    def test_no_checkpoint(self, run, tmp_path):
        result = run(tmp_path / "nowhere")
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: There is no folder '")

    def test_truncated(self, run, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        result = run(adapter)
        assert result.exit_code == 2
        assert "is not a whole safetensors file" in result.stderr

    def test_no_base(self, run, adapter, tmp_path):
        assert run(adapter, "--base", tmp_path / "nowhere").exit_code == 2
        result = run(adapter, "--base", adapter)
        assert result.exit_code == 2
        assert "so this is an adapter" in result.stderr

    def test_transformers_is_missing(self, run, adapter, base, monkeypatch):
        monkeypatch.setattr(skeleton, "find_spec", lambda _: None)
        assert run(adapter).exit_code == 0
        result = run(adapter, "--base", base)
        assert result.exit_code == 2
        assert result.stderr.endswith("pip install 'tunerkit[merge]'\n")


def test_help(run):
    output = run("--help").output
    assert "  1  it does not fit the model\n" in output
    assert "pip install 'tunerkit[merge]'" in " ".join(output.split())


class TestWholeModules:
    @pytest.fixture
    def whole(self, tmp_path):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
        get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def cut(self, folder, what):
        path = folder / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if what not in key}, path)

    def test_found(self, run, whole, base):
        result = run(whole, "--base", base, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert {"module": "lm_head", "holds": ["weight"], "count": 1, "replaces": True} in found["adapted"]
        assert {"path": "lm_head", "status": "found", "note": ""} in found["base"]["targets"]
        assert (found["base"]["lacking"], found["base"]["doubt"]) == ([], "")

    def test_lost(self, run, whole, base):
        self.cut(whole, "lm_head")
        result = run(whole, "--base", base)
        assert result.exit_code == 1
        assert ["lm_head", "incomplete", "1"] in words(result.stdout)
        assert "  lm_head: The checkpoint lacks 'lm_head.weight'." in result.stdout

    def test_another_size(self, run, whole, tmp_path):
        llama(vocab_size=32).save_pretrained(tmp_path / "other")
        result = run(whole, "--base", tmp_path / "other")
        assert result.exit_code == 1
        assert ["lm_head", "shape", "mismatch", "1"] in words(result.stdout)

    def test_a_module_that_the_config_means_and_the_file_lacks(self, run, whole, base):
        self.cut(whole, "1.self_attn.v_proj")
        result = run(whole, "--base", base)
        assert result.exit_code == 0
        assert "means 1 more modules of this model" in result.stdout
        assert "'model.layers.1.self_attn.v_proj'" in result.stdout
        found = json.loads(run(whole, "--base", base, "--json").stdout)
        assert found["base"]["lacking"] == ["model.layers.1.self_attn.v_proj"]


def test_a_start_that_needs_the_weight_needs_none_here(run, tmp_path, base):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    result = run(tmp_path / "adapter", "--base", base)
    assert result.exit_code == 0, result.output


class TestRepeatedLayers:
    @pytest.fixture
    def repeated(self, tmp_path):
        config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])
        get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_each_repetition_is_found(self, run, repeated, base):
        result = run(repeated, "--base", base, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["base"]
        assert found["targets"] == [
            {"path": f"model.layers.{number}.self_attn.q_proj", "status": "found", "note": ""} for number in range(4)
        ]
        assert (found["problem"], found["lacking"]) == ("", [])

    def test_what_the_checkpoint_lacks(self, run, repeated, base):
        path = repeated / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if "layers.3" not in key}, path)
        found = json.loads(run(repeated, "--base", base, "--json").stdout)["base"]
        assert found["lacking"] == ["model.layers.3.self_attn.q_proj"]

    def test_layers_that_the_base_does_not_have(self, run, repeated, base):
        configure(repeated, layer_replication=[[0, 2], [1, 4]])
        result = run(repeated, "--base", base)
        assert result.exit_code == 1
        assert "holds (1, 4), and the model has 3 layers" in " ".join(result.stdout.split())
