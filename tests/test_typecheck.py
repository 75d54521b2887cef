from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunerkit._typecheck import describe, fits


@dataclass
class Options:
    size: int = 1


FITS = [
    (Any, object()),
    (None, None),
    (type(None), None),
    (int, 3),
    (float, 0.5),
    (float, 3),
    (float, 2**63 - 1),
    (str, ""),
    (bool, True),
    (dict, {1: 2}),
    (Options, Options()),
    (int | None, None),
    (Optional[int], 3),  # noqa: UP045 - the older spelling has another type
    (Union[int, str], "a"),  # noqa: UP007 - the same
    (bool | Literal["gaussian"], "gaussian"),
    (Literal["a", 1], 1),
    (dict[str, int], {}),
    (dict[str, list[int]], {"a": [1, 2]}),
    (list[str], ["a"]),
    (list[str], ("a", "b")),
    (list[str] | set[str] | str | None, {"a"}),
    (set[str], ["a"]),
    (frozenset[str], {"a"}),
    (tuple[int, str], (1, "a")),
    (tuple[int, str], [1, "a"]),
    (tuple[int, ...], [1, 2, 3]),
    (list[tuple[int, int]], [[0, 2], (1, 3)]),
    (Sequence[str], ["a"]),
]
DOES_NOT_FIT = [
    (None, 0),
    (int, True),
    (int, 1.0),
    (int, "1"),
    (int, None),
    (float, True),
    (float, "0.5"),
    (float, math.nan),
    (float, math.inf),
    (str, 1),
    (str, b"a"),
    (bool, 1),
    (bool, "yes"),
    (Options, {"size": 1}),
    (int | None, "a"),
    (bool | Literal["gaussian"], "Gaussian"),
    (Literal["a", 1], True),
    (Literal[1], 1.0),
    (dict[str, int], {"a": "b"}),
    (dict[str, int], {1: 1}),
    (dict[str, int], [("a", 1)]),
    (list[str], "abc"),
    (list[str], [1]),
    (list[str], {"a": 1}),
    (list[int], [True]),
    (tuple[int, str], (1,)),
    (tuple[int, str], ("a", 1)),
    (tuple[int, str], "1a"),
    (tuple[int, ...], ["a"]),
    (Sequence[str], 3),
]


@pytest.mark.parametrize(("annotation", "value"), FITS)
def test_fits(annotation, value):
    assert fits(value, annotation)


@pytest.mark.parametrize(("annotation", "value"), DOES_NOT_FIT)
def test_does_not_fit(annotation, value):
    assert not fits(value, annotation)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Any, "anything"),
        (None, "None"),
        (type(None), "None"),
        (int, "a whole number"),
        (float, "a finite number"),
        (str, "text"),
        (bool, "True or False"),
        (dict, "a dict"),
        (bytes, "bytes"),
        (Options, "a Options"),
        (int | None, "a whole number or None"),
        (Union[int, str], "a whole number or text"),  # noqa: UP007 - the older spelling has another type
        (Literal["none", "all"], "'none' or 'all'"),
        (dict[str, list[int]], "a dict of text to a list of a whole number"),
        (list[str] | set[str] | str | None, "a list of text or text or None"),
        (tuple[int, ...], "a list of a whole number"),
        (list[tuple[int, int]], "a list of a sequence of a whole number, a whole number"),
        (Sequence[str], "Sequence"),
    ],
)
def test_describe(annotation, words):
    assert describe(annotation) == words


LEAVES = [
    (int, st.integers(-(2**63) + 1, 2**63 - 1)),
    (float, st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63) + 1, 2**63 - 1)),
    (str, st.text(max_size=3)),
    (bool, st.booleans()),
    (None, st.none()),
]


def annotated(depth: int):
    """Annotations, each with a strategy for values that are meant by it."""
    leaves = st.sampled_from(LEAVES)
    if not depth:
        return leaves
    below = annotated(depth - 1)
    return st.one_of(
        leaves,
        below.map(lambda pair: (list[pair[0]], st.lists(pair[1], max_size=3))),
        below.map(lambda pair: (dict[str, pair[0]], st.dictionaries(st.text(max_size=3), pair[1], max_size=3))),
        st.tuples(below, below).map(
            lambda pairs: (tuple[pairs[0][0], pairs[1][0]], st.tuples(pairs[0][1], pairs[1][1]))
        ),
        st.tuples(below, below).map(
            lambda pairs: (Union[pairs[0][0], pairs[1][0]], pairs[0][1] | pairs[1][1])  # noqa: UP007 - built at run time
        ),
    )


@given(annotated(2), st.data())
def test_what_an_annotation_means_fits_it(pair, data):
    annotation, values = pair
    assert fits(data.draw(values), annotation)


@given(annotated(2))
def test_no_annotation_means_a_foreign_object(pair):
    assert not fits(threading.Lock(), pair[0])
    assert describe(pair[0])
