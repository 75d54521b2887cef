"""EVA: the principal components of what reaches the layers, and the ranks that follow from them, as PEFT finds them."""

import copy
import warnings

import pytest
import torch
from torch import distributed, nn

import tunerkit
from tunerkit.errors import AdapterStateError, AdapterWarning, ArgumentError, CheckpointError, ConfigError
from tunerkit.testing.parity import assert_close, run
from tunerkit_lora import EvaConfig, LoraConfig, get_eva_state_dict, initialize_lora_eva_weights
from tunerkit_lora.inits import pca
from tunerkit_lora.inits.activations import (
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from tunerkit_lora.inits.pca import IncrementalPCA

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 10)
        self.wide, self.narrow, self.head = nn.Linear(10, 12), nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.head(torch.tanh(self.narrow(torch.tanh(self.wide(self.words(input_ids))))))


TARGETS = ["wide", "narrow", "head"]


def batches(count=3, rows=6, length=12):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(40, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Text().eval()


@pytest.fixture
def x():
    return {"input_ids": torch.arange(40).reshape(4, 10)}


def eva(**settings):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva", **settings}
    return LoraConfig(**settings)


def pefts(base, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(config.to_dict())).eval()


def same_rows(ours, theirs):
    """Assert that two factors hold the same directions, up to their signs."""
    assert ours.shape == theirs.shape
    signs = (ours * theirs).sum(1, keepdim=True).sign()
    # Both search in twice as many directions from random ones.
    torch.testing.assert_close(signs * ours, theirs, atol=1e-2, rtol=1e-2)


def test_pca_of_batches_is_pefts():
    theirs = peft.utils.incremental_pca.IncrementalPCA(4, lowrank=True, lowrank_seed=42)
    ours = IncrementalPCA(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        batch = torch.randn(20, 8, generator=generator) * torch.arange(1, 9) + 2
        ours = ours.with_rows(batch)
        theirs.partial_fit(batch)
        torch.testing.assert_close(ours.components, theirs.components_.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.singular_values, theirs.singular_values_.float(), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(ours.explained.float(), theirs.explained_variance_ratio_.float())


def test_pca_of_one_batch_is_that_of_the_rows():
    batch = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + 3
    found = IncrementalPCA(6).with_rows(batch)
    s = torch.linalg.svdvals(batch - batch.mean(0))
    torch.testing.assert_close(found.singular_values, s)
    assert abs(float(found.explained.sum()) - 1) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eva_config": EvaConfig(rho=1.0)},
        {"eva_config": EvaConfig(rho=1.5, tau=0.9, use_label_mask=False)},
        {"eva_config": EvaConfig(whiten=True)},
        {"eva_config": EvaConfig(adjust_scaling_factors=False)},
        {"rank_pattern": {"wide": 4}, "alpha_pattern": {"head": 3}, "eva_config": EvaConfig(rho=1.2)},
    ],
)
def test_components_ranks_and_config_are_pefts(base, x, settings, tmp_path):
    ours = tunerkit.get_peft_model(copy.deepcopy(base), eva(**settings)).eval()
    theirs = pefts(base, eva(**settings))
    found = get_eva_state_dict(ours, batches(), show_progress_bar=False)
    wanted = peft.get_eva_state_dict(theirs, batches(), show_progress_bar=False)
    assert {name: len(factor) for name, factor in found.items()} == {name: len(f) for name, f in wanted.items()}
    for name, factor in found.items():
        same_rows(factor, wanted[name])
    initialize_lora_eva_weights(ours, eva_state_dict=found)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(found), show_progress_bar=False)
    state = tunerkit.get_peft_model_state_dict(ours)
    expected = peft.get_peft_model_state_dict(theirs)
    assert set(state) == set(expected)
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key])
    for name in ("rank_pattern", "alpha_pattern", "target_modules", "r", "lora_alpha"):
        mine, other = getattr(ours.peft_config["default"], name), getattr(theirs.peft_config["default"], name)
        assert mine == (set(other) if name == "target_modules" else other), name
    assert_close(run(ours, x), run(base, x))
    # Trained, saved and loaded on either side.
    moved = {key: tensor + 0.2 * torch.randn_like(tensor) for key, tensor in state.items()}
    tunerkit.set_peft_model_state_dict(ours, moved)
    peft.set_peft_model_state_dict(theirs, dict(moved))
    assert (run(ours, x) - run(base, x)).abs().max() > 1e-3
    assert_close(run(ours, x), run(theirs, x))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert_close(run(tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), folder), x), run(ours, x))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", low_cpu_mem_usage=True)
    assert_close(run(loaded, x), run(ours, x))


def test_layers_that_are_given_one_input_find_its_components_once(monkeypatch):
    class Attention(Text):
        def forward(self, input_ids, attention_mask=None, labels=None):
            x = self.words(input_ids)
            return self.head(torch.tanh(self.wide(x).sum(-1, keepdim=True) * self.narrow(x)))

    torch.manual_seed(0)
    base, calls, search = Attention().eval(), [], pca.lowrank_svd
    base.narrow = nn.Linear(10, 10)
    monkeypatch.setattr(pca, "lowrank_svd", lambda *args: calls.append(args[0]) or search(*args))

    def found(**settings):
        calls.clear()
        state = get_eva_state_dict(base, batches(), eva(**settings), show_progress_bar=False)
        return state, len(calls)

    alone = {}
    for name in TARGETS:
        state, count = found(target_modules=[name])
        alone[name] = state[name], count
    state, count = found()
    assert count < sum(several for _, several in alone.values())
    components = min(len(state["wide"]), len(alone["wide"][0]))
    torch.testing.assert_close(state["wide"][:components], alone["wide"][0][:components], atol=1e-2, rtol=1e-2)
    # Two of one input have the same components, the head's are of another.
    assert torch.equal(*(state[name][:1] for name in ("wide", "narrow")))
    assert not torch.allclose(state["wide"][:1], state["head"][:1], atol=1e-2)
    # With other numbers of components each finds its own.
    assert found(rank_pattern={"narrow": 2})[1] > count


def test_of_a_plain_model(base):
    model = tunerkit.get_peft_model(copy.deepcopy(base), eva())
    mine = get_eva_state_dict(model, batches(), show_progress_bar=False)
    plain = get_eva_state_dict(base, batches(), eva(), show_progress_bar=False)
    assert {f"base_model.model.{name}" for name in plain} == set(mine)
    for name, factor in plain.items():
        assert torch.equal(factor, mine[f"base_model.model.{name}"])
    initialize_lora_eva_weights(model, eva_state_dict=plain)  # PEFT would not find these names
    assert model.get_base_model().wide.r["default"] == len(plain["wide"])


def test_the_model_is_afterwards_as_it_was(base):
    model = tunerkit.get_peft_model(base, eva()).train()
    model.get_base_model().wide.eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        model.get_base_model().wide.lora_B["default"].weight.fill_(1)  # adapters are disabled while looking
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        model.get_base_model().wide.lora_B["default"].weight.fill_(2)
    again = get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_all_or_nothing(base, x, error):
    model = tunerkit.get_peft_model(base, eva()).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = {name: id(module) for name, module in model.named_modules()}
    found = get_eva_state_dict(model, batches(), show_progress_bar=False)

    class Breaks(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function.__name__ == "copy_":
                raise error
            return super().__torch_function__(function, types, args, kwargs)

    broken = {**found, "base_model.model.head": found["base_model.model.head"].as_subclass(Breaks)}
    with pytest.raises(error):
        initialize_lora_eva_weights(model, eva_state_dict=broken)
    assert {name: id(module) for name, module in model.named_modules()} == layers
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].rank_pattern == {}
    assert model.active_adapters == ["default"]

    def fails(model, batch):
        raise error

    model.train()
    with pytest.raises(error):
        initialize_lora_eva_weights(model, batches(), forward_fn=fails, show_progress_bar=False)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_beside_another_adapter(base, x):
    model = tunerkit.get_peft_model(base, eva(init_lora_weights=False), adapter_name="a")
    model.add_adapter("b", eva())
    model.set_adapter("b")
    initialize_lora_eva_weights(model, batches(), adapter_name="b", show_progress_bar=False)
    assert model.active_adapters == ["b"]
    assert {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.set_adapter("a")
    initialize_lora_eva_weights(model, batches(), adapter_name="b", show_progress_bar=False)
    assert model.active_adapters == ["a"]


def test_a_layer_of_rank_zero_is_no_longer_adapted(base, x):
    model = tunerkit.get_peft_model(base, eva())
    found = get_eva_state_dict(model, batches(), show_progress_bar=False)
    found["base_model.model.head"] = found["base_model.model.head"][:0]
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert type(model.get_base_model().head) is nn.Linear
    assert model.peft_config["default"].target_modules == {"wide", "narrow"}


def test_names_that_end_in_one_another(x):
    torch.manual_seed(0)
    base = nn.ModuleDict({"0": nn.Linear(4, 4), "inner": nn.ModuleDict({"0": nn.Linear(4, 4)})})
    base.forward = lambda x: base["0"](x) + base["inner"]["0"](x)
    model = tunerkit.get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva"))
    initialize_lora_eva_weights(model, eva_state_dict={"0": torch.ones(1, 4), "inner.0": torch.ones(0, 4)})
    assert type(base["inner"]["0"]) is nn.Linear
    assert model.peft_config["default"].target_modules == "0"


def test_layers_that_were_left_out_start_as_ever(base):
    model = tunerkit.get_peft_model(base, eva(target_modules=[*TARGETS, "words"]))
    with pytest.warns(AdapterWarning, match="The eva_state_dict lacks 'words', which start as with init_lora_weights="):
        initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    assert model.get_base_model().words.r["default"] == 3


def test_from_the_meta_device_and_in_half_precision(base, x):
    model = tunerkit.get_peft_model(copy.deepcopy(base), eva(), low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    half = tunerkit.get_peft_model(copy.deepcopy(base).bfloat16(), eva(), autocast_adapter_dtype=False)
    initialize_lora_eva_weights(half, batches(), show_progress_bar=False)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_other_inputs(base, x):
    rows = [torch.randn(30, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4))
    model = tunerkit.get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva"))
    found = get_eva_state_dict(
        model,
        rows,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    counted = []

    def first_only(layer_input, model_input, layer_name):
        counted.append((layer_name, model_input))
        return layer_input[0]

    again = get_eva_state_dict(
        model,
        rows,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=lambda batch, config: "given",
        prepare_layer_inputs_fn={"base_model.model.0": first_only},
        show_progress_bar=False,
    )
    assert set(counted) == {("base_model.model.0", "given")}
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_the_bar_is_shown_when_asked_for(base, capsys):
    get_eva_state_dict(base, batches(), eva(), show_progress_bar=True)
    assert "layers whose inputs are known" in capsys.readouterr().err


def test_inputs_of_all_processes(base, tmp_path):
    expected = get_eva_state_dict(base, batches(), eva(), show_progress_bar=False)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = get_eva_state_dict(base, batches(), eva(), show_progress_bar=False)
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_places_that_count():
    [batch] = batches(1, rows=2, length=6)
    places = prepare_model_inputs_fn_language_modeling(batch, eva())
    assert places.tolist() == [[0, 2], [1, 2]]
    del batch["labels"]
    assert len(prepare_model_inputs_fn_language_modeling(batch, eva())) == 6
    del batch["attention_mask"]
    assert len(prepare_model_inputs_fn_language_modeling(batch, eva())) == 12
    states = torch.arange(12.0).reshape(2, 6, 1)
    assert prepare_layer_inputs_fn_language_modeling((states,), places, "x").flatten().tolist() == [2, 8]


# --- Bad input.


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"EvaConfig.rho must be at least 1; it is 0.5\."):
        EvaConfig(rho=0.5)
    with pytest.raises(ConfigError, match=r"EvaConfig.tau must be from 0 to 1; it is 2\."):
        EvaConfig(tau=2)
    with pytest.raises(ConfigError, match=r"LoraConfig.eva_config is not what EvaConfig takes: .*'roh'"):
        eva(eva_config={"roh": 1})
    assert vars(EvaConfig()) == vars(peft.EvaConfig())
    assert eva(eva_config={"rho": 3.0}).eva_config == EvaConfig(rho=3.0)


def test_a_model_without_a_config(base):
    with pytest.raises(ConfigError, match=r"no PeftModel, so the settings are not known\. Pass peft_config=LoraConfig"):
        get_eva_state_dict(base, batches())


def test_a_config_of_another_start(base):
    with pytest.raises(ConfigError, match="The config has no eva_config"):
        get_eva_state_dict(base, batches(), LoraConfig(target_modules=TARGETS))
    model = tunerkit.get_peft_model(base, LoraConfig(target_modules=TARGETS))
    with pytest.raises(AdapterStateError) as error:
        initialize_lora_eva_weights(model, batches())
    assert str(error.value) == "The adapter 'default' has init_lora_weights=True; EVA starts one that has \"eva\"."


def test_a_model_that_is_none(base):
    with pytest.raises(ConfigError, match="initialize_lora_eva_weights needs a PeftModel; it was given a Text"):
        initialize_lora_eva_weights(base, batches())


def test_several_active_adapters(base):
    model = tunerkit.get_peft_model(base, eva())
    model.add_adapter("b", eva())
    model.set_adapter(["default", "b"])
    with pytest.raises(AdapterStateError, match=r"active together.* Call set_adapter\('default'\) first"):
        initialize_lora_eva_weights(model, batches())


def test_no_data(base):
    model = tunerkit.get_peft_model(base, eva())
    with pytest.raises(ConfigError, match="EVA needs data to look at: pass a dataloader, or the eva_state_dict"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="The dataloader is empty, or can be gone through only once"):
        initialize_lora_eva_weights(model, [], show_progress_bar=False)


def test_too_few_rows(base):
    with pytest.raises(
        ConfigError, match=r"No batch has as many rows .* to find for 'wide' \(6\)\. Use larger batches"
    ):
        get_eva_state_dict(base, batches(rows=1, length=6), eva(), show_progress_bar=False)


def test_too_few_rows_with_which_peft_goes_on_for_ever(base):
    calls = []

    def give_up(*_):
        calls.append(1)
        if len(calls) > 50:
            raise TimeoutError

    base.register_forward_pre_hook(give_up)
    given, rank = batches(rows=1, length=6), {"r": 3, "target_modules": TARGETS, "init_lora_weights": "eva"}
    theirs = peft.LoraConfig(**rank, eva_config=peft.EvaConfig())
    with pytest.raises(TimeoutError):
        peft.get_eva_state_dict(base, given, theirs, show_progress_bar=False)
    calls.clear()
    with pytest.raises(ConfigError, match="No batch has as many rows"):
        get_eva_state_dict(base, given, LoraConfig(**rank), show_progress_bar=False)
    assert len(calls) <= len(given)


def test_functions_for_layers_that_are_not_looked_at(base):
    with pytest.raises(ConfigError, match="prepare_layer_inputs_fn has 'nowhere', which are not looked at; 'wide'"):
        get_eva_state_dict(base, batches(), eva(), prepare_layer_inputs_fn={"nowhere": None}, show_progress_bar=False)


def test_batches_that_are_no_dicts(base):
    with pytest.raises(ArgumentError, match="The batch is a list, and prepare_model_inputs_fn_language_modeling needs"):
        get_eva_state_dict(base, [[torch.ones(2, 3)]], eva(), show_progress_bar=False)
    with pytest.raises(ArgumentError, match="The layer 'x' is called with a str first, not with a tensor"):
        prepare_layer_inputs_fn_language_modeling("text", torch.zeros(1, 2), "x")


def test_batches_without_text(base):
    batch = {"pixels": torch.ones(2, 3), "labels": torch.ones(2)}
    message = (
        r"The batch has 'pixels', 'labels', and prepare_model_inputs_fn_language_modeling needs input_ids or "
        r"attention_mask\. Pass another prepare_model_inputs_fn, or None\."
    )
    with pytest.raises(ArgumentError, match=message):
        get_eva_state_dict(base, [batch], eva(), show_progress_bar=False)


def test_state_dicts_that_do_not_fit(base):
    model = tunerkit.get_peft_model(base, eva())
    with pytest.raises(CheckpointError, match="The eva_state_dict has 'nowhere', where the adapter has no layer; it"):
        initialize_lora_eva_weights(model, eva_state_dict={"nowhere": torch.ones(1, 4)})
    with pytest.raises(CheckpointError, match=r"In the eva_state_dict 'wide' is \(1, 4\); the layer needs rank x 10"):
        initialize_lora_eva_weights(model, eva_state_dict={"wide": torch.ones(1, 4)})


def test_below_a_layer_of_another_adapter(x):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.base_layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.base_layer(x) @ self.scale

    base = nn.ModuleDict({"0": Parent(), "base_layer": Parent()})
    config = LoraConfig(r=2, target_modules=r".*\.base_layer", init_lora_weights="eva")
    model = tunerkit.get_peft_model(base, config)
    model.add_adapter("beside", LoraConfig(r=2, target_modules=[], target_parameters=["0.scale"]))
    given = {"0.base_layer": torch.ones(1, 4), "base_layer.base_layer": torch.zeros(0, 4)}
    initialize_lora_eva_weights(model, eva_state_dict=given)
    layer = base["0"].base_layer.base_layer
    assert torch.equal(layer.lora_A["default"].weight, given["0.base_layer"])
    assert type(base["base_layer"].base_layer) is nn.Linear
    assert model.peft_config["default"].target_modules == {"0.base_layer"}
