"""`merge_adapter(keep_base=...)`: where the original parameters are while adapters are merged."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

from tunerkit import BaseTunerLayer, folding, get_base_model_state_dict, get_peft_model, merge
from tunerkit.absent import Absent
from tunerkit.errors import ArgumentError, MergeError, MergeWarning
from tunerkit.folding import Merged
from tunerkit.sites import LinearSite
from tunerkit.testing.bench import MOVED, Snapshot, difference, move, same_bits
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig, LoraModel

X = torch.linspace(-1, 1, 15).reshape(5, 3)
LOST = (
    "'one' is merged into '0' and the original parameters were not kept (keep_base='none'), so the bare layer is not "
    "to be had. Load the base model again, or go on without it: more can be merged, and merge_and_unload() gives the "
    "merged model."
)


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def adapted(config, base=None):
    model = get_peft_model(make_base() if base is None else base, config, "one")
    move(model, "one")
    return model.eval()


def lora(**settings):
    return LoraConfig(r=2, **{"target_modules": ["0", "2"], **settings})


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.fixture
def model():
    model = adapted(lora())
    model.add_adapter("two", lora())
    move(model, "two", seed=1)
    return model


def layers(model):
    return list(model.base_model.layers())


class TestNone:
    def test_computes_the_same_and_holds_no_original(self, model):
        output = run(model)
        with model.disable_adapter():
            assert difference(run(model), output) > MOVED
        originals = [weakref.ref(layer.base_layer.weight) for layer in layers(model)]
        biases = [layer.base_layer.bias for layer in layers(model)]
        model.merge_adapter(keep_base="none")
        gc.collect()
        assert [original() for original in originals] == [None, None]
        assert all(layer.base_layer.bias is bias for layer, bias in zip(layers(model), biases, strict=True))
        assert difference(run(model), output) < 1e-5
        assert [layer.merged_adapters for layer in layers(model)] == [["one"], ["one"]]
        assert [layer.keeps_base for layer in layers(model)] == [False, False]
        assert [layer.originals for layer in layers(model)] == [{}, {}]

    @pytest.mark.parametrize(
        ("call", "layer"),
        [
            (lambda model: model.unmerge_adapter(), "2"),
            (lambda model: model.unload(), "2"),
            (lambda model: model.base_model.disable_adapter_layers(), "2"),
            (lambda model: model.get_base_model()[0].get_delta_weight("dora"), "0"),
        ],
    )
    def test_what_needs_the_base_is_refused_and_changes_nothing(self, call, layer):
        model = adapted(lora())
        model.add_adapter("dora", lora(use_dora=True))
        model.merge_adapter(keep_base="none")
        output, before = run(model), Snapshot.of(model)
        with pytest.raises(MergeError) as caught:
            call(model)
        assert str(caught.value) == LOST.replace("'0'", repr(layer))
        assert before.differences(model) == []
        assert same_bits(run(model), output)

    @pytest.mark.filterwarnings("ignore:Adapters were merged")
    def test_switching_to_another_is_refused(self, model):
        model.merge_adapter(keep_base="none")
        before = Snapshot.of(model)
        with pytest.raises(MergeError, match="the original parameters were not kept"):
            model.set_adapter("two")
        assert before.differences(model) == []

    def test_what_does_not_need_it_goes_on(self, model, tmp_path):
        plain = make_base()[0].weight
        model.save_pretrained(tmp_path / "before")
        model.merge_adapter(keep_base="none")
        model.save_pretrained(tmp_path / "after")
        files = [tmp_path / name / "one" / "adapter_model.safetensors" for name in ("before", "after")]
        assert [len(file.read_bytes()) for file in files] == [len(files[0].read_bytes())] * 2
        state = get_base_model_state_dict(model)
        assert same_bits(state["0.weight"], model.get_base_model()[0].base_layer.weight)
        assert difference(state["0.weight"].detach(), plain.detach()) > MOVED
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"]

    @pytest.mark.parametrize("keep", ["none", "device"])
    def test_more_is_merged_on_top(self, model, keep):
        model.set_adapter(["one", "two"])
        output = run(model)
        model.merge_adapter(["one"], keep_base="none")
        assert difference(run(model), output) < 1e-5
        model.merge_adapter(["two"], keep_base=keep)
        assert difference(run(model), output) < 1e-5
        assert {tuple(layer.merged_adapters) for layer in layers(model)} == {("one", "two")}
        assert not any(layer.originals for layer in layers(model))
        with pytest.raises(MergeError, match="'one', 'two' is merged into '2' and the original parameters"):
            model.unmerge_adapter()
        with pytest.warns(MergeWarning, match="merged already"):
            assert difference(run(model.merge_and_unload()), output) < 1e-5

    def test_gives_up_what_was_kept_before(self, model):
        model.set_adapter(["one", "two"])
        model.merge_adapter(["one"])
        model.merge_adapter(["two"], keep_base="none")
        assert not any(layer.keeps_base or layer.originals for layer in layers(model))

    @pytest.mark.parametrize("call", [lambda model: model.merge_adapter(["dora"], keep_base="none"), None])
    def test_a_method_that_reads_the_base_is_refused_before_anything_is_done(self, call):
        model = adapted(lora(target_modules=["2"]))
        model.add_adapter("dora", lora(use_dora=True))
        move(model, "dora", seed=1)
        model.merge_adapter(keep_base="none")
        model.base_model.active_adapter = ["dora"]
        for layer in layers(model):
            layer._activate(["dora"])
        before = Snapshot.of(model)
        with pytest.raises(MergeError, match="'one' is merged into '2' and the original parameters were not kept"):
            model.merge_and_unload() if call is None else call(model)
        assert before.differences(model) == []
        with pytest.raises(MergeError, match="'one' is merged into '2' and the original parameters were not kept"):
            run(model)

    def test_other_adapters_run_on_top(self, model):
        model.set_adapter(["one", "two"])
        output = run(model)
        model.merge_adapter(["one"], keep_base="none")
        model.add_adapter("three", lora())
        assert difference(run(model), output) < 1e-5
        before = Snapshot.of(model)
        with pytest.raises(MergeError, match="the original parameters were not kept"):
            model.add_adapter("four", lora(use_dora=True))
        assert before.differences(model) == []
        # One that asks for the layer's form alone starts without its numbers.
        model.add_adapter("five", IA3Config(target_modules=["0"], feedforward_modules=[]))
        move(model, "five", seed=2)
        assert difference(run(model), output) < 1e-5

    @pytest.mark.parametrize("what", ["unfoldable", "nan"])
    def test_what_can_be_refused_is_refused_before_anything_is_done(self, model, what):
        last = layers(model)[-1]
        if what == "nan":
            with torch.no_grad():
                last.adapters["one"].lora_A.weight[0, 0] = torch.nan
        else:
            last.adapters["one"].unfoldable = "for a test"
        before = Snapshot.of(model)
        with pytest.raises(MergeError):
            model.merge_adapter(safe_merge=True, keep_base="none")
        assert before.differences(model) == []

    def test_interrupted_the_model_computes_what_it_did_and_a_second_call_does_the_rest(self, model, monkeypatch):
        output, last = run(model), layers(model)[-1]

        def interrupted(self, *args, **kwargs):
            if self is last:
                raise KeyboardInterrupt
            return merged(self, *args, **kwargs)

        merged = type(last).merge
        monkeypatch.setattr(type(last), "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter(keep_base="none")
        assert [layer.merged_adapters for layer in layers(model)] == [["one"], []]
        assert difference(run(model), output) < 1e-5
        monkeypatch.undo()
        with pytest.warns(match="is merged already"):
            model.merge_adapter(keep_base="none")
        assert [layer.merged_adapters for layer in layers(model)] == [["one"], ["one"]]
        assert difference(run(model), output) < 1e-5

    def test_what_trained_before_trains_again(self):
        base = make_base()
        frozen = base[2].weight
        frozen.requires_grad = False
        model = adapted(lora(), base)
        model.merge_adapter(keep_base="none")
        with pytest.warns(MergeWarning, match="merged already"):
            merged = model.merge_and_unload()
        flags = {name: parameter.requires_grad for name, parameter in merged.named_parameters()}
        assert flags == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": True}
        assert merged[2].weight is not frozen

    def test_trained_biases(self):
        model = adapted(lora(bias="all"))
        before = Snapshot.of(model)
        with pytest.raises(MergeError) as caught:
            model.merge_adapter(keep_base="none")
        assert str(caught.value) == (
            "'one' trains the base model's biases (bias='all'), and without the originals (keep_base='none') they "
            "could not be told from merged ones. Use keep_base='device' or merge_and_unload()."
        )
        assert before.differences(model) == []

    def test_the_bare_layer_is_not_to_be_had(self):
        site = LinearSite(nn.Linear(3, 4), "0")
        lost = Merged(("one",), {}, kept=False).bare(site)
        assert isinstance(lost, LinearSite)
        assert lost.base is lost
        assert (lost.kind, lost.name, lost.in_features, lost.dtype) == ("linear", "0", 3, torch.float32)
        assert lost.empty(2).device == site.device
        for ask in (lambda: lost(X), lambda: lost.module(X), lambda: lost.weight + 1, lambda: lost.bias + 1):
            with pytest.raises(MergeError) as caught:
                ask()
            assert str(caught.value) == LOST
        # That needs nothing of its own.
        assert torch.equal(lost.run(X, site.weight, None), X @ site.weight.T)

    def test_a_layer_into_which_nothing_is_merged(self):
        assert layers(adapted(lora()))[0].forget_base() == []


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.head = nn.Embedding(6, 3), nn.Linear(3, 4)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None

    def forward(self, tokens):
        return self.head(self.embed_tokens(tokens))


def test_saving_the_embeddings_that_were_given_up_is_refused(tmp_path):
    torch.manual_seed(0)
    model = adapted(LoraConfig(r=2, target_modules=["embed_tokens"]), Embedded())
    model.merge_adapter(keep_base="none")
    with pytest.raises(MergeError, match="'one' is merged into 'embed_tokens' and the original parameters were not"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    model.save_pretrained(tmp_path, save_embedding_layers=False)


class Reluctant(nn.Module, BaseTunerLayer):
    """A layer written by hand that cannot merge."""

    adapter_layer_names = ("reluctant",)

    def __init__(self, base, name):
        super().__init__()
        self.base_layer, self.reluctant = base, nn.ParameterDict({name: nn.Parameter(torch.ones(2))})
        self._active_adapter = name


class WithReluctant(LoraModel):
    def _create_and_replace(self, config, name, target, target_name, parent, current_key, parameter_name=None):
        if current_key != "2":
            return super()._create_and_replace(config, name, target, target_name, parent, current_key, parameter_name)
        parent._modules[target_name] = Reluctant(target, name)
        return parent._modules[target_name]


@pytest.mark.parametrize("keep_base", ["device", "cpu", "none"])
def test_what_a_layer_by_hand_refuses_changes_nothing(keep_base):
    tuner = WithReluctant(make_base(), lora(), "one")
    before = Snapshot.of(tuner)
    with pytest.raises(NotImplementedError, match="Reluctant does not define merge"):
        tuner.merge_adapter(keep_base=keep_base)
    assert before.differences(tuner) == []
    assert not any(layer.merged for layer in tuner.layers())


def test_unknown_words(model):
    with pytest.raises(ArgumentError) as caught:
        model.merge_adapter(keep_base="disk")
    assert str(caught.value) == "keep_base is 'disk'; it can be 'device', 'cpu', 'none'."


class TestCpu:
    """On the CPU it is what the default is; moving is shown with a stand-in for the other device."""

    def test_there_and_back(self, model):
        before = Snapshot.of(model)
        model.merge_adapter(keep_base="cpu")
        assert all(layer.originals["weight"].device.type == "cpu" for layer in layers(model))
        model.unmerge_adapter()
        assert before.differences(model) == []

    def test_each_is_moved_once_but_those_that_are_shared(self, monkeypatch):
        base = make_base()
        base.append(nn.Linear(4, 3))
        base[3].weight = base[2].weight
        model, moved = adapted(lora(), base.eval()), []
        monkeypatch.setattr(merge, "move", lambda parameter, device: moved.append((parameter, device)))
        original = base[0].base_layer.weight
        model.merge_adapter(keep_base="cpu")
        assert len(moved) == 1
        assert moved[0][0] is original
        assert moved[0][1] == torch.device("cpu")

    def test_failing_moves_back_what_was_moved(self, model, monkeypatch):
        moved, last = [], layers(model)[-1]
        monkeypatch.setattr(merge, "move", lambda parameter, device: moved.append((id(parameter), device)))
        last.adapters["one"].lora_A.weight.data[0, 0] = torch.nan
        before, original = Snapshot.of(model), layers(model)[0].base_layer.weight
        with pytest.raises(MergeError, match="NaN"):
            model.merge_adapter(safe_merge=True, keep_base="cpu")
        assert moved == [(id(original), torch.device("cpu"))] * 2  # there, and back to where it was
        assert before.differences(model) == []

    def test_originals_come_back_to_where_the_layer_is(self, monkeypatch):
        layer, meta, moved = nn.Linear(3, 4), torch.device("meta"), []
        monkeypatch.setattr(folding, "move", lambda parameter, device: moved.append((parameter, device)))
        original = layer.weight
        kept = Merged((), {}).put(LinearSite(layer), {"weight": torch.ones(4, 3, device=meta), "bias": None}, ["one"])
        assert kept.bare(LinearSite(layer)).weight.device == meta
        assert (kept.bare(LinearSite(layer)).weight + 1).device == meta
        assert original.device.type == "cpu"
        kept.take_out(LinearSite(layer))
        assert layer.weight is original
        [(parameter, device)] = moved  # nothing stood in the bias's place that says where it should be
        assert parameter is original
        assert device == meta

    def test_originals_are_moved_only_where_they_are_read(self, model, monkeypatch):
        model.add_adapter("dora", lora(use_dora=True))
        model.merge_adapter(["one"], keep_base="cpu")
        moved = []
        monkeypatch.setattr(folding, "_brought", lambda tensor, device: Absent(tensor, device, lambda: here(tensor)))

        def here(tensor):
            moved.append(tuple(tensor.shape))
            return tensor

        for name, expected in (("two", []), ("dora", [(4, 3), (3, 4)])):
            with torch.no_grad():
                for layer in layers(model):
                    layer._activate(["one", name])
                output = run(model)
            assert moved == expected
            model.unmerge_adapter()
            assert difference(run(model), output) < 1e-5
            model.merge_adapter(["one"], keep_base="cpu")

    def test_a_graph_moves_what_it_uses(self, monkeypatch):
        layer, meta = nn.Linear(3, 4), torch.device("meta")
        kept = Merged((), {}).put(LinearSite(layer), {"weight": torch.ones(4, 3, device=meta)}, ["one"])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert type(kept.bare(LinearSite(layer)).weight) is Tensor

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
    def test_on_a_gpu(self, model):
        model.cuda()
        before = Snapshot.of(model)
        model.merge_adapter(keep_base="cpu")
        assert all(layer.originals["weight"].device.type == "cpu" for layer in layers(model))
        assert all(parameter.is_cuda for parameter in model.parameters())
        model.unmerge_adapter()
        assert before.differences(model) == []

    def test_moving_keeps_the_object(self):
        parameter = nn.Parameter(torch.ones(3))
        data = parameter.data_ptr()
        folding.move(parameter, torch.device("cpu"))
        assert parameter.data_ptr() == data
        half = types.SimpleNamespace(device="elsewhere", data=torch.ones(3))
        folding.move(half, torch.device("cpu"))
        assert same_bits(half.data, torch.ones(3))
