"""The toy methods pass the checks that every method has to pass."""

import pytest
from toys import (
    bare,
    bias,
    bottleneck,
    hooks_by_hand,
    parameters,
    registered,
    rotation,
    rows,
    shared,
    sound,
    tuner_by_hand,
)

from tunerkit.testing import MethodConformance

NOT_ROUTED = "its layers are written by hand and run what is active on them"
BY_HAND = {
    "test_use_adapter": NOT_ROUTED,
    "test_use_adapter_is_of_this_thread": NOT_ROUTED,
    "test_threads": NOT_ROUTED,
    "test_mixes_with_another_method": "the other method would have to stand on a layer of a kind that it does not know",
    "test_use_adapter_holds_in_the_backward": NOT_ROUTED,
    "test_rows": NOT_ROUTED,
    "test_gradients_of_rows": NOT_ROUTED,
}

COUNTS = {"test_compiles": "its part counts the calls in a plain number, which a graph takes for a constant"}


class Toy(MethodConformance):
    toy = None
    kinds = ("linear",)

    @pytest.fixture(autouse=True)
    def known(self):
        with registered(self.toy):
            yield

    def config(self):
        return self.toy.Config()


class TestRotation(Toy):
    toy = rotation


class TestShared(Toy):
    toy = shared
    absent = COUNTS


class TestSharedAndTrained(Toy):
    toy = shared
    absent = COUNTS

    def config(self):
        return shared.Config(train_shared=True)


class TestBare(Toy):
    toy = bare


class TestRows(Toy):
    toy = rows
    kinds = ("embedding",)


class TestBottleneck(Toy):
    toy = bottleneck


class TestBias(Toy):
    toy = bias


class TestSound(Toy):
    toy = sound


class TestParameters(Toy):
    toy = parameters
    kinds = ("parameter",)


class TestHooksByHand(Toy):
    toy = hooks_by_hand
    absent = BY_HAND


class TestTunerByHand(Toy):
    toy = tuner_by_hand
    absent = BY_HAND
