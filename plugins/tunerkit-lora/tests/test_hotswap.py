"""LoRA adapters swapped in place: other ranks and scales, one compiled graph, and what is saved afterwards."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import tunerkit
from tunerkit.errors import AdapterStateError
from tunerkit.testing.parity import assert_close, peft_config, run
from tunerkit_lora import LoraConfig
from tunerkit_lora.ranks import resize_first, resize_second


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.mix = nn.Conv2d(6, 8, 3, padding=1, groups=groups)
        self.last = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.words(tokens).permute(0, 3, 1, 2)
        return self.last(torch.tanh(self.mix(x)).mean(dim=(2, 3)))


TOKENS = {"tokens": torch.arange(36).reshape(2, 3, 6) % 12}
TARGETS = ["words", "mix", "last"]


def base(groups=1):
    torch.manual_seed(0)
    return Net(groups).eval()


def adapted(seed, r, alpha, *, groups=1, **values):
    settings = {"target_modules": TARGETS, **values}
    model = tunerkit.get_peft_model(base(groups), LoraConfig(r=r, lora_alpha=alpha, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def saved(folder, *models):
    for number, model in enumerate(models):
        model.save_pretrained(folder / str(number), save_embedding_layers=False)
    return [folder / str(number) for number in range(len(models))]


@pytest.mark.parametrize("groups", [1, 2])
def test_other_ranks_and_scales_without_compiling_again(groups, tmp_path):
    models = [
        adapted(1, 4, 6, groups=groups),
        adapted(2, 2, 3, groups=groups, use_rslora=True),
        adapted(3, 8, 2, groups=groups, alpha_pattern={"last": 5}),
        adapted(4, 4, 4, groups=groups, rank_pattern={"words": 3}),
    ]
    folders, expected = saved(tmp_path, *models), [run(model, TOKENS) for model in models]
    model = adapted(1, 4, 6, groups=groups)
    tunerkit.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_close(run(model, TOKENS), expected[0])
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number in (0, 1, 2, 3, 1, 0):
        tunerkit.hotswap_adapter(compiled, folders[number], "default")
        assert_close(run(compiled, TOKENS), expected[number])
    assert counter.frame_count == 1


def test_what_was_swapped_in_is_saved_without_the_zeros(tmp_path):
    other = adapted(2, 2, 3, groups=2)
    [folder] = saved(tmp_path / "other", other)
    model = adapted(1, 4, 6, groups=2)
    tunerkit.prepare_model_for_compiled_hotswap(model, target_rank=8)
    tunerkit.hotswap_adapter(model, folder, "default")
    [again] = saved(tmp_path / "again", model)
    before, after = (tunerkit.load_peft_weights(place) for place in (folder, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = tunerkit.PeftModel.from_pretrained(base(2), again)
    assert_close(run(loaded, TOKENS), run(other, TOKENS))
    # What was saved goes back in, zeros and all.
    tunerkit.set_peft_model_state_dict(model, after)
    assert_close(run(model, TOKENS), run(other, TOKENS))


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_ranks_need_no_preparation_without_a_compiler(first, second, tmp_path):
    model, other = adapted(1, first, 6), adapted(2, second, 3)
    tunerkit.hotswap_adapter(model, saved(tmp_path, other)[0], "default")
    assert_close(run(model, TOKENS), run(other, TOKENS))
    assert model.get_base_model().last.r["default"] == second
    assert model.peft_config["default"].r == second
    model.merge_adapter()
    assert_close(run(model, TOKENS), run(other, TOKENS))


def test_the_outcome_is_that_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    from peft.utils.hotswap import hotswap_adapter

    targets = {"target_modules": ["mix", "last"]}
    model, other = adapted(1, 4, 6, **targets), adapted(2, 4, 3, **targets)
    [folder] = saved(tmp_path, other)
    theirs = peft.get_peft_model(copy.deepcopy(base()), peft_config(model.peft_config["default"])).eval()
    hotswap_adapter(theirs, folder, "default")
    tunerkit.hotswap_adapter(model, folder, "default")
    assert_close(run(model, TOKENS), run(theirs, TOKENS))


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.high(torch.tanh(self.low(x)))


X = {"x": torch.linspace(-1, 1, 30).reshape(5, 6)}


def two_linears(seed, *targets, **settings):
    torch.manual_seed(0)
    model = tunerkit.get_peft_model(TwoLinears(), LoraConfig(r=4, target_modules=list(targets), **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    before = run(model, X)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    assert (run(model, X) - before).abs().max() > 1e-3
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"init_lora_weights": False},
        {"init_lora_weights": False, "use_dora": True},
    ],
    ids=str,
)
def test_a_layer_without_tensors_has_no_effect_or_the_swap_is_refused(settings, tmp_path):
    model, other = two_linears(1, "low", "high", **settings), two_linears(2, "high", **settings)
    folder, before = saved(tmp_path, other)[0], run(model, X)
    if settings.get("init_lora_weights", True) is False:
        with pytest.raises(AdapterStateError, match=r"has no tensors for 'low', where the adapter has to be without"):
            tunerkit.hotswap_adapter(model, folder, "default")
        assert torch.equal(run(model, X), before)
    else:
        tunerkit.hotswap_adapter(model, folder, "default")
        assert_close(run(model, X), run(other, X))


@pytest.mark.parametrize("start", [True, False])
def test_a_convolution_with_groups_that_has_no_tensors(start, tmp_path):
    model = adapted(1, 4, 6, groups=2, init_lora_weights=start)
    other = adapted(2, 4, 3, groups=2, init_lora_weights=start, target_modules=["words", "last"])
    folder = saved(tmp_path, other)[0]
    if start:
        tunerkit.hotswap_adapter(model, folder, "default")
        assert_close(run(model, TOKENS), run(other, TOKENS))
    else:
        with pytest.raises(AdapterStateError, match="has no tensors for 'mix'"):
            tunerkit.hotswap_adapter(model, folder, "default")


def test_embeddings_that_a_checkpoint_holds_are_loaded_as_load_adapter_does(tmp_path):
    model, other = adapted(1, 4, 6), adapted(2, 4, 3)
    for net in (model.get_base_model(), other.get_base_model()):
        net.get_input_embeddings = lambda net=net: net.words
    with torch.no_grad():
        other.get_base_model().words.base_layer.weight.normal_()
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert_close(run(model, TOKENS), run(other, TOKENS))


def test_training_goes_on_with_the_same_tensors(tmp_path):
    model, other = adapted(1, 4, 6), adapted(2, 4, 3)
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tunerkit.hotswap_adapter(model, saved(tmp_path, other)[0], "default")
    assert all(
        one is two for one, two in zip(tensors, filter(lambda p: p.requires_grad, model.parameters()), strict=True)
    )
    model(**TOKENS).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


@pytest.mark.parametrize(
    ("groups", "rank", "message"),
    [
        (1, 2, "An adapter cannot be brought to rank 2: it has rank 4. Choose another target_rank."),
        (2, 5, "An adapter cannot be brought to rank 5: its layer has 2 groups, which divide it."),
    ],
)
def test_room_that_cannot_be_made(groups, rank, message):
    model = adapted(1, 4, 6, groups=groups)
    output = run(model, TOKENS)
    with pytest.raises(AdapterStateError) as error:
        tunerkit.prepare_model_for_compiled_hotswap(model, target_rank=rank)
    assert message in str(error.value)
    assert torch.equal(run(model, TOKENS), output)
    assert {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name} == {4}
    assert isinstance(model.get_base_model().last.scaling["default"], float)


def test_groups_keep_their_rows():
    factor = torch.arange(8.0).reshape(4, 2)
    wider = resize_first(factor, 6, groups=2)
    assert wider.tolist() == [[0, 1], [2, 3], [0, 0], [4, 5], [6, 7], [0, 0]]
    assert torch.equal(resize_first(wider, 4, groups=2), factor)
    assert resize_second(factor, 6, groups=2).tolist() == [[0, 1, 0], [2, 3, 0], [4, 5, 0], [6, 7, 0]]


def test_embeddings_that_are_saved_beside_it(tmp_path):
    """They are read with it, as `load_adapter` does."""

    class Words(Net):
        def get_input_embeddings(self):
            return self.words

    def make(seed):
        torch.manual_seed(0)
        model = tunerkit.get_peft_model(Words().eval(), LoraConfig(r=2, target_modules=TARGETS)).eval()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        return model

    model, other = make(1), make(2)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(run(model, TOKENS), run(other, TOKENS))
    model = make(1)
    model.get_base_model().words.base_layer.weight.data.add_(1)
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(run(model, TOKENS), run(other, TOKENS))


def test_on_a_base_of_half_precision_the_numbers_are_those_of_the_file(tmp_path):
    other = adapted(2, 2, 4)
    [folder] = saved(tmp_path, other)
    half = tunerkit.PeftModel.from_pretrained(base().bfloat16(), folder, is_trainable=True)
    for parameter in half.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    tunerkit.hotswap_adapter(half, folder, "default")
    tensors, expected = map(tunerkit.get_peft_model_state_dict, (half, other))
    assert all(tensors[key].dtype == torch.float32 for key in expected)
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
