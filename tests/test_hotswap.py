"""Swapping adapters in place: the outputs of the other, the same tensors, one compiled graph, and all or nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from toys import bare, bottleneck, hooks_by_hand, registered, rotation, shared

import tunerkit
from tunerkit.errors import AdapterStateError, AdapterWarning, CheckpointError, ConfigError, UnknownAdapterError
from tunerkit.testing.bench import Snapshot, adapter_tensors, move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig
from tunerkit_lora.adapter import LoraAdapter

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
TOYS = [bare, bottleneck, rotation]


@pytest.fixture(autouse=True)
def toys():
    with registered(*TOYS, shared, hooks_by_hand):
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def base():
    torch.manual_seed(0)
    return Net().eval()


def adapted(toy, seed, targets=("first", "last"), name="default", **settings):
    model = tunerkit.get_peft_model(base(), toy.Config(target_modules=list(targets), **settings), name).eval()
    move(model, name, seed=seed)
    return model


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("toy", TOYS)
def test_the_output_is_that_of_the_other_adapter(toy, tmp_path):
    model, other = adapted(toy, 1), adapted(toy, 2)
    other.save_pretrained(tmp_path)
    before = adapter_tensors(model, "default")
    assert (run(model) - run(other)).abs().max() > 1e-3
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(run(model), run(other))
    after = adapter_tensors(model, "default")
    assert all(after[key] is tensor for key, tensor in before.items())
    assert all(tensor.requires_grad for tensor in after.values())


def test_the_adapter_keeps_its_name_and_may_have_come_from_another(tmp_path):
    model, other = adapted(bare, 1), adapted(bare, 2, name="else")
    other.save_pretrained(tmp_path)
    tunerkit.hotswap_adapter(model, tmp_path, "default", subfolder="else")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), run(other))


@pytest.mark.parametrize("inner", [False, True], ids=["wrapped", "injected"])
def test_keys_may_hold_the_adapters_name(inner):
    model, other = adapted(bare, 1), adapted(bare, 2)
    state = {
        key: tensor.clone() for key, tensor in (other.get_base_model() if inner else other).state_dict().items()
        if ".default." in key
    }  # fmt: skip
    target = model.get_base_model() if inner else model
    tunerkit.hotswap_adapter_from_state_dict(target, state, "default", other.peft_config["default"])
    assert torch.equal(run(model), run(other))


def test_a_layer_that_the_other_does_not_adapt_has_no_effect_afterwards(tmp_path):
    model, other = adapted(bare, 1), adapted(bare, 2, targets=["last"])
    other.save_pretrained(tmp_path)
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(run(model), run(other))
    assert model.peft_config["default"].target_modules == {"last"}


@pytest.mark.parametrize("toy", [bare, bottleneck])
def test_a_start_that_changes_the_output_is_refused_where_there_are_no_tensors(toy, tmp_path, monkeypatch):
    model, other = adapted(toy, 1), adapted(toy, 2, targets=["last"])
    other.save_pretrained(tmp_path)
    kind = toy.method.adapter if toy is bottleneck else bare.BareAdapter
    start = kind.__init__

    def random_start(self, site, config):
        start(self, site, config)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    monkeypatch.setattr(kind, "__init__", random_start)
    before, output = Snapshot.of(model), run(model)
    with pytest.raises(AdapterStateError) as error:
        tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert "has no tensors for 'first', where the adapter has to be without effect then" in str(error.value)
    assert before.differences(model) == []
    assert torch.equal(run(model), output)


@pytest.mark.parametrize("ones", [True, False], ids=["ones", "random"])
def test_ia3_where_there_are_no_tensors(ones, tmp_path):
    def make(seed, *targets):
        config = IA3Config(target_modules=list(targets), feedforward_modules=[], init_ia3_weights=ones)
        model = tunerkit.get_peft_model(base(), config).eval()
        move(model, "default", seed=seed)
        return model

    model, other = make(1, "first", "last"), make(2, "last")
    other.save_pretrained(tmp_path)
    if ones:
        tunerkit.hotswap_adapter(model, tmp_path, "default")
        assert torch.equal(run(model), run(other))
    else:
        with pytest.raises(AdapterStateError, match=r"has no tensors for 'first', where .* it changes the weight"):
            tunerkit.hotswap_adapter(model, tmp_path, "default")


class TestCopies:
    """Modules that are trained and saved as a whole are swapped with the rest."""

    def adapted(self, seed, name="default"):
        config = LoraConfig(target_modules=["first"], modules_to_save=["last"])
        model = tunerkit.get_peft_model(base(), config, name).eval()
        move(model, name, seed=seed)
        return model

    @pytest.mark.parametrize("named", [False, True], ids=["file", "with the name"])
    def test_are_swapped_in_place(self, named):
        model, other = self.adapted(1), self.adapted(2)
        state = other.state_dict() if named else tunerkit.get_peft_model_state_dict(other)
        if named:
            state = {key: value for key, value in state.items() if ".default." in key}
        before = adapter_tensors(model, "default")
        assert (run(model) - run(other)).abs().max() > 1e-3
        tunerkit.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
        assert torch.equal(run(model), run(other))
        assert all(tensor is before[key] for key, tensor in adapter_tensors(model, "default").items())
        with model.disable_adapter():
            assert torch.equal(run(model), run(base()))

    def test_that_the_checkpoint_lacks_are_missing(self):
        model = self.adapted(1)
        other = tunerkit.get_peft_model(base(), LoraConfig(target_modules=["first"]))
        before, output = Snapshot.of(model), run(model)
        with pytest.raises(CheckpointError, match=r"that it lacks: .*last\.bias.*last\.weight"):
            tunerkit.hotswap_adapter_from_state_dict(
                model, tunerkit.get_peft_model_state_dict(other), "default", other.peft_config["default"]
            )
        assert before.differences(model) == []
        assert torch.equal(run(model), output)

    def test_an_error_on_the_way_undoes_what_was_done(self, monkeypatch):
        model, other = self.adapted(1), self.adapted(2)
        output = run(model)

        def fail(self, adapter):
            raise KeyboardInterrupt("on purpose")

        monkeypatch.setattr(LoraAdapter, "take", fail)
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            tunerkit.hotswap_adapter_from_state_dict(
                model, tunerkit.get_peft_model_state_dict(other), "default", other.peft_config["default"]
            )
        assert torch.equal(run(model), output)


class IA3:
    Config = IA3Config


@pytest.mark.parametrize("method", [*TOYS, IA3])
def test_swapping_into_a_compiled_model_does_not_compile_again(method, tmp_path):
    settings = {"feedforward_modules": ["last"]} if method is IA3 else {}
    models = [adapted(method, seed, **settings) for seed in (1, 2, 3)]
    for number, other in enumerate(models):
        other.save_pretrained(tmp_path / str(number))
    tunerkit.prepare_model_for_compiled_hotswap(models[0])
    counter = CompileCounter()
    compiled = torch.compile(models[0], fullgraph=True, backend=counter)
    expected = [run(model) for model in models]
    for number in (0, 1, 2, 0):
        tunerkit.hotswap_adapter(compiled, tmp_path / str(number), "default")
        torch.testing.assert_close(run(compiled), expected[number])
    assert counter.frame_count == 1


def refusals(tmp_path):
    other = adapted(bare, 2)
    config, state = other.peft_config["default"], tunerkit.get_peft_model_state_dict(other)
    longer = {**state, "base_model.model.other.toy_up.weight": torch.ones(1)}
    part = dict(list(state.items())[1:])
    rank = adapted(bare, 2, rank=3)
    return {
        "unexpected": (longer, config, "default", CheckpointError, "tensors that have no place in the adapter"),
        "missing": (part, config, "default", CheckpointError, "tensors of the adapter that it lacks"),
        "none": ({}, config, "default", CheckpointError, "None of the tensors to swap in belongs to a layer"),
        "name": (state, config, "else", UnknownAdapterError, "no adapter 'else' to swap; it has 'default'."),
        "method": ({}, rotation.Config(), "default", CheckpointError, "is of the method 'toy-bare' and cannot be"),
        "shapes": (
            tunerkit.get_peft_model_state_dict(rank),
            rank.peft_config["default"],
            "default",
            AdapterStateError,
            "'toy_down.weight' is (3, 6) there and (2, 6) here, so it cannot be swapped in place.",
        ),
        "config": (state, rank.peft_config["default"], "default", CheckpointError, "Tensors whose shapes differ (4)"),
    }


@pytest.mark.parametrize("case", ["unexpected", "missing", "none", "name", "method", "shapes", "config"])
def test_what_does_not_fit_is_refused_and_nothing_changes(case, tmp_path):
    state, config, name, kind, message = refusals(tmp_path)[case]
    model = adapted(bare, 1)
    before, output = Snapshot.of(model), run(model)
    with pytest.raises(kind) as error:
        tunerkit.hotswap_adapter_from_state_dict(model, state, name, config)
    assert message in str(error.value)
    assert before.differences(model) == []
    assert torch.equal(run(model), output)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_undoes_what_was_done(kind, monkeypatch):
    model, other = adapted(bare, 1), adapted(bare, 2)
    take, calls = bare.BareAdapter.take, iter([None, kind("on purpose")])

    def failing(self, adapter):
        take(self, adapter)
        error = next(calls)
        if error is not None:
            raise error

    monkeypatch.setattr(bare.BareAdapter, "take", failing)
    before, config = Snapshot.of(model), model.peft_config["default"]
    with pytest.raises(kind, match="on purpose"):
        tunerkit.hotswap_adapter_from_state_dict(
            model, tunerkit.get_peft_model_state_dict(other), "default", other.peft_config["default"]
        )
    assert before.differences(model) == []
    assert model.peft_config["default"] is config


def test_a_merged_adapter_is_not_swapped():
    model, other = adapted(bare, 1), adapted(bare, 2)
    model.merge_adapter()
    with pytest.raises(AdapterStateError, match=r"is merged, so other numbers would have no effect"):
        tunerkit.hotswap_adapter_from_state_dict(
            model, tunerkit.get_peft_model_state_dict(other), "default", other.peft_config["default"]
        )


def test_tensors_that_layers_share_are_not_swapped():
    model = adapted(shared, 1)
    with pytest.raises(AdapterStateError, match=r"has tensors that all its layers share, which cannot be swapped"):
        tunerkit.hotswap_adapter_from_state_dict(model, {}, "default", model.peft_config["default"])


def test_an_adapter_whose_method_would_now_put_its_layers_in_by_itself_is_not_swapped(monkeypatch, tmp_path):
    model = adapted(bare, 1)
    model.save_pretrained(tmp_path)
    before = Snapshot.of(model)
    monkeypatch.setattr(type(model.base_model), "_create_and_replace", lambda *args, **kwargs: nn.Identity())
    with pytest.raises(AdapterStateError, match="'default' puts its layers in by itself, so it cannot be swapped"):
        tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert before.differences(model) == []


def test_layers_written_by_hand_are_not_swapped():
    model = adapted(hooks_by_hand, 1)
    with pytest.raises(AdapterStateError, match=r"The layer 'first' .* is a GatedLayer, which cannot be swapped"):
        tunerkit.hotswap_adapter_from_state_dict(model, {}, "default", model.peft_config["default"])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"check_compiled": "no"}, ConfigError, "check_compiled='no' is not known; possible are 'error',"),
        ({"target_rank": 0}, ConfigError, "target_rank must be a whole number above 0, or None"),
        ({"target_rank": True}, ConfigError, "it is True."),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_preparation(arguments, kind, message):
    with pytest.raises(kind) as error:
        tunerkit.prepare_model_for_compiled_hotswap(adapted(bare, 1), **arguments)
    assert message in str(error.value)


def test_a_model_without_adapters_is_not_prepared():
    with pytest.raises(UnknownAdapterError, match="no adapters to prepare"):
        tunerkit.prepare_model_for_compiled_hotswap(base())


def test_a_compiled_model_is_prepared_only_if_that_is_meant():
    model = adapted(bare, 1)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(AdapterStateError, match="compiled already"):
        tunerkit.prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(AdapterWarning, match="compiled already"):
        tunerkit.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tunerkit.prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    own = copy.deepcopy(model)
    own.compile(backend="eager")
    with pytest.raises(AdapterStateError, match="compiled already"):
        tunerkit.prepare_model_for_compiled_hotswap(own)
