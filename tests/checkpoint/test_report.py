from __future__ import annotations

import warnings

import pytest

from tunerkit.checkpoint.report import LoadReport
from tunerkit.errors import CheckpointError, LoadWarning


def report(**keys):
    return LoadReport(loaded_keys=["a.lora_A.weight"], **keys)


@pytest.mark.parametrize("strict", [True, False])
def test_complete(strict):
    found = report()
    assert found.complete
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.settle("The file", strict=strict)


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_incomplete(kind):
    assert not report(**{kind: ["x"]}).complete


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_are_refused_in_any_case(strict):
    notes = [f"{letter} is (2, 3), the adapter's (4, 3)" for letter in "bcdefg"]
    with pytest.raises(CheckpointError) as caught:
        report(mismatched_keys=notes, missing_keys=["z"]).settle("The file", strict=strict)
    message = str(caught.value)
    assert message.startswith(
        "The file does not fit the adapter. Tensors whose shapes differ (6): b is (2, 3), the adapter's"
    )
    assert "e is (2, 3)" in message
    assert "f is" not in message
    assert message.endswith("Use the config (ranks, targets) and the base model that it was made with.")
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, ValueError)


def test_missing_and_unexpected_are_refused():
    found = report(missing_keys=["b.lora_A.weight", "b.lora_B.weight"], unexpected_keys=["b.lora_A.weigh"])
    with pytest.raises(CheckpointError) as caught:
        found.settle("The file", strict=True)
    assert str(caught.value) == (
        "The file does not fit the adapter (1 of its tensors do): tensors of the adapter that it lacks: "
        "'b.lora_A.weight', 'b.lora_B.weight'; tensors that have no place in the adapter: 'b.lora_A.weigh'. Load it "
        "into the base model it was made for, or pass strict=False to load what fits."
    )


def test_nothing_fits():
    with pytest.raises(CheckpointError) as caught:
        LoadReport(missing_keys=["x.lora_A.weight"], unexpected_keys=["y.lora_A.weight"]).settle(
            "The file", strict=True
        )
    assert str(caught.value) == (
        "The file does not fit the adapter (none of its tensors does): tensors of the adapter that it lacks: "
        "'x.lora_A.weight'; tensors that have no place in the adapter: 'y.lora_A.weight'. Load it into the base model "
        "it was made for."
    )


PREFIX = "base_model.model."
NAMES = ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight", "layers.1.q.lora_A.weight"]


@pytest.mark.parametrize("added", ["model.", "lm.model.", "layers."])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("start", [PREFIX, ""])
def test_names_that_differ_by_a_part_at_the_front(added, names, start):
    short, long = [start + name for name in names], [start + added + name for name in names]
    for missing, unexpected, sentence in (
        (short, long, f"All the checkpoint's names hold {added!r} where the adapter's do not"),
        (long, short, f"All the adapter's names hold {added!r} where the checkpoint's do not"),
    ):
        with pytest.raises(CheckpointError) as caught:
            LoadReport(missing_keys=missing, unexpected_keys=unexpected).settle("The file", strict=True)
        assert f"'. {sentence}: `key_mapping` renames them. Load it" in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "unexpected"),
    [(["a.x"], ["b.x"]), (["a.x", "a.y"], ["m.a.x"]), (["a.x"], []), ([], ["a.x"]), (["ax"], ["bax"])],
)
def test_names_that_differ_in_another_way(missing, unexpected):
    with pytest.raises(CheckpointError) as caught:
        LoadReport(missing_keys=missing, unexpected_keys=unexpected).settle("The file", strict=True)
    assert "hold" not in str(caught.value)


def test_not_strict_warns():
    with pytest.warns(LoadWarning) as caught:
        report(unexpected_keys=["zzz"]).settle("The file", strict=False)
    assert str(caught[0].message) == (
        "The file does not fit the adapter (1 of its tensors do): tensors that have no place in the adapter: 'zzz'. "
        "Those without a place were left out."
    )
    with pytest.warns(
        LoadWarning, match="tensors of the adapter that it lacks: 'a', 'b', 'c', 'd' and 1 more"
    ) as caught:
        report(missing_keys=list("abcde")).settle("The file", strict=False)
    assert str(caught[0].message).endswith("and 1 more. The missing ones keep the values they had.")
    with pytest.warns(LoadWarning) as caught:
        report(missing_keys=["a"], unexpected_keys=["zzz"]).settle("The file", strict=False)
    assert str(caught[0].message).endswith(
        "The missing ones keep the values they had. Those without a place were left out."
    )
