"""Repeating layers here and in PEFT, and what PEFT does not do: merging them right and putting the model back."""

import copy
import pickle
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit import PeftModel, get_peft_model, inject_adapter_in_model
from tunerkit.errors import AdapterStateError, TargetError
from tunerkit.testing.bench import Snapshot
from tunerkit.testing.parity import Pair, assert_close, assert_same_tensors, quiet, run
from tunerkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
RANGES = [(0, 2), (1, 3)]


def lora(*targets, ranges=RANGES, **others):
    return LoraConfig(target_modules=list(targets or ("lin",)), layer_replication=ranges, **others)


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.lin, self.layer_idx = nn.Linear(4, 4), number
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return x + torch.tanh(self.lin(x)) * self.scale


class Plain(nn.Module):
    def __init__(self, name="layers", count=3):
        super().__init__()
        setattr(self, name, nn.ModuleList(Block(number) for number in range(count)))
        self.config = types.SimpleNamespace(num_hidden_layers=count, layer_types=["a", "b", "c"])
        self.name = name

    def forward(self, x):
        for layer in getattr(self, self.name):
            x = layer(x)
        return x


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Plain().eval()


@pytest.fixture
def inputs():
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))}


def moved(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}


class TestParity:
    @pytest.mark.parametrize("kind", ["Llama", "BertFor", "Bert"])
    def test_models(self, kind, tmp_path):
        transformers = pytest.importorskip("transformers", reason="the models are those of transformers")
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
        torch.manual_seed(0)
        if kind == "Llama":
            base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
            config = lora("q_proj", "up_proj")
        else:
            cls = transformers.BertModel if kind == "Bert" else transformers.BertForMaskedLM
            base, config = cls(transformers.BertConfig(**TINY)), lora("query")
        pair = Pair(base, config, {"input_ids": torch.arange(6)[None]})
        assert pair.ours.config.num_hidden_layers == pair.theirs.config.num_hidden_layers == 4
        indices = [
            [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] for model in (pair.ours, pair.theirs)
        ]
        assert indices[0] == indices[1]
        pair.check_parameters()
        pair.check_tensors()
        pair.check_outputs()
        pair.ours.save_pretrained(tmp_path / "ours")
        pair.theirs.save_pretrained(tmp_path / "theirs")
        name = "adapter_model.safetensors"
        assert_same_tensors(load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name))
        expected = run(pair.theirs, pair.inputs)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        assert_close(run(again, pair.inputs), expected)
        with quiet():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert_close(run(theirs, pair.inputs), expected)
        pair.check_gradients()
        if kind == "Llama":  # in the others the gradients are too small for two steps to show
            pair.check_steps()

    def test_merging(self):
        """What PEFT gets wrong: it adds each repetition's update to the one weight that they share."""
        transformers = pytest.importorskip("transformers", reason="the model is of transformers")
        pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
        pair = Pair(base, lora("q_proj", "up_proj"), {"input_ids": torch.arange(6)[None]})
        before = run(pair.ours, pair.inputs)
        ours, theirs = pair.ours.merge_and_unload(), pair.theirs.merge_and_unload()
        assert_close(run(ours, pair.inputs), before)
        assert (run(theirs, pair.inputs) - before).abs().max() > 1e-3
        assert ours.config.num_hidden_layers == len(ours.model.layers) == 4


class TestPuttingBack:
    @pytest.mark.parametrize("way", ["unload", "delete"])
    def test_gives_the_model_its_own_layers(self, base, inputs, way):
        before, output, config = Snapshot.of(base), run(base, inputs), copy.deepcopy(vars(base.config))
        model = moved(get_peft_model(base, lora()))
        assert base.config.num_hidden_layers == len(base.layers) == 4
        assert base.config.layer_types == ["a", "b", "b", "c"]
        assert [layer.layer_idx for layer in base.layers] == [0, 1, 2, 3]
        assert (run(model, inputs) - output).abs().max() > 1e-3
        if way == "unload":
            model.unload()
            assert before.differences(base) == []
        else:
            model.delete_adapter("default")
            assert [text for text in before.differences(base) if "train" not in text and "grad" not in text] == []
        assert vars(base.config) == config
        assert torch.equal(run(base, inputs), output)

    def test_follows_what_was_converted(self, base, inputs):
        model = get_peft_model(base, lora())
        model.double().train()
        model.unload()
        assert {tensor.dtype for tensor in (*base.parameters(), *base.buffers())} == {torch.float64}
        assert all(module.training for module in base.layers.modules())

    def test_a_failure_leaves_all_as_it_was(self, base, monkeypatch):
        before, config = Snapshot.of(base), copy.deepcopy(vars(base.config))
        with pytest.raises(TargetError):
            get_peft_model(base, lora("none"))
        assert before.differences(base) == []
        assert vars(base.config) == config
        model = get_peft_model(base, lora())
        before = Snapshot.of(model)
        monkeypatch.setattr(tunerkit.replication.Replication, "_configure", lambda *_: 1 / 0)
        for call in (model.unload, lambda: model.delete_adapter("default")):
            with pytest.raises(ZeroDivisionError):
                call()
            assert before.differences(model) == []

    def test_disabled_repeats_the_base(self, base, inputs):
        plain = copy.deepcopy(base)
        plain.layers = nn.ModuleList(plain.layers[number] for number in (0, 1, 1, 2))
        model = moved(get_peft_model(base, lora()))
        with model.disable_adapter():
            assert torch.equal(run(model, inputs), run(plain, inputs))


def test_weights_are_shared_and_adapters_are_not(base):
    model = get_peft_model(base, lora())
    layers = base.layers
    assert layers[1].lin.weight is layers[2].lin.weight
    assert layers[1].lin.lora_A["default"].weight is not layers[2].lin.lora_A["default"].weight
    assert layers[1].scale is layers[2].scale
    assert model.targeted_module_names == [f"layers.{number}.lin" for number in range(4)]


def test_plan_changes_nothing(base):
    before = Snapshot.of(base)
    found = tunerkit.plan(base, lora())
    assert found.adapted == [f"layers.{number}.lin" for number in range(4)]
    assert before.differences(base) == []
    assert base.config.num_hidden_layers == 3
    assert tunerkit.plan(get_peft_model(base, lora()), lora()).adapted == found.adapted


def test_merging_and_taking_out_again(base, inputs):
    model = moved(get_peft_model(base, lora()))
    output = run(model, inputs)
    model.merge_adapter()
    assert_close(run(model, inputs), output)
    model.unmerge_adapter()
    assert base.layers[1].lin.weight is base.layers[2].lin.weight
    assert torch.equal(run(model, inputs), output)
    merged = model.merge_and_unload()
    assert_close(run(merged, inputs), output)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_second_adapter(base, inputs, tmp_path):
    model = moved(get_peft_model(base, lora()))
    model.save_pretrained(tmp_path / "first")
    model.add_adapter("b", LoraConfig(target_modules=["lin"]))
    model.load_adapter(tmp_path / "first", "c")
    model.load_adapter(tmp_path / "first", "c")  # the configs agree, though a file has lists for pairs
    assert len(base.layers) == 4
    output = run(model, inputs)
    model.set_adapter("c")
    assert torch.equal(run(model, inputs), output)
    model.delete_adapter("default")
    assert len(base.layers) == 4
    model.delete_adapter("b")
    assert torch.equal(run(model, inputs), output)
    model.unload()
    assert len(base.layers) == base.config.num_hidden_layers == 3


def test_copies(base, inputs):
    model = moved(get_peft_model(base, lora()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - what was just written
        assert torch.equal(run(other, inputs), run(model, inputs))
        plain = other.unload()
        assert len(plain.layers) == 3
        assert len(base.layers) == 4


@pytest.mark.parametrize("name", ["layers", "h"])
def test_where_layers_are_found(name, inputs):
    base = Plain(name)
    del base.config
    inject_adapter_in_model(lora(), base)
    assert len(getattr(base, name)) == 4


def test_injected(base, inputs):
    before, plain = Snapshot.of(base), run(base, inputs)
    for _ in range(2):
        inject_adapter_in_model(lora(), base, "one")
        inject_adapter_in_model(lora(), base, "two")
        assert len(base.layers) == 4
        other = copy.deepcopy(base)
        for model in (base, other):
            tunerkit.delete_adapter(model, "one")
            assert len(model.layers) == 4
            tunerkit.delete_adapter(model, "two")
            assert torch.equal(run(model, inputs), plain)
        assert [line for line in before.differences(base) if "requires_grad" not in line] == []


class TestRefusals:
    @pytest.mark.parametrize("ranges", [[(0, 4)], [(-1, 2)], [(2, 2)], [(0, 1), (3, 1)]])
    def test_ranges_beyond_the_layers(self, base, ranges):
        before = Snapshot.of(base)
        for call in (tunerkit.plan, get_peft_model):
            with pytest.raises(TargetError) as caught:
                call(base, lora(ranges=ranges))
            assert str(caught.value) == (
                f"layer_replication={ranges} holds {ranges[-1]}, and the model has 3 layers: a range starts at 0 or "
                "later, and ends after its start and at 3 at most."
            )
        assert before.differences(base) == []

    def test_a_model_without_layers(self):
        with pytest.raises(TargetError) as caught:
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), lora("0"))
        assert str(caught.value) == (
            "layer_replication needs the list of the model's layers, and Sequential has none under 'layers', "
            "'encoder.layer' or 'h'. Leave it out for this model."
        )

    def test_after_other_adapters(self, base):
        model = get_peft_model(base, LoraConfig(target_modules=["lin"]))
        with pytest.raises(AdapterStateError) as caught:
            model.add_adapter("b", lora())
        assert str(caught.value) == (
            "layer_replication=[(0, 2), (1, 3)] repeats layers, and the model has the adapters 'default' on its layers "
            "as they are. Attach the adapter that repeats layers first, and the others with the same layer_replication "
            "or none."
        )
        model.unload()
        model = get_peft_model(base, lora())
        with pytest.raises(
            AdapterStateError, match=r"'default' on the layers \[\(0, 2\), \(1, 3\)\] repeated\. Attach"
        ):
            model.add_adapter("b", lora(ranges=[(0, 3), (0, 3)]))
        assert len(base.layers) == 4

    def test_swapping_in_what_is_for_other_layers(self, base, tmp_path):
        get_peft_model(base, LoraConfig(target_modules=["lin"])).save_pretrained(tmp_path)
        model = get_peft_model(Plain().eval(), lora())
        before = Snapshot.of(model)
        with pytest.raises(AdapterStateError) as caught:
            tunerkit.hotswap_adapter(model, tmp_path, "default")
        assert str(caught.value) == (
            "The adapter to swap in has layer_replication=[], and the adapter 'default' has "
            "layer_replication=[(0, 2), (1, 3)]: they are for different layers. Delete the adapter and load the other "
            "one."
        )
        assert before.differences(model) == []
