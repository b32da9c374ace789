"""The allocation is the best there is: beside every other one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_qguard.precision.allocate import allocate
from optimum_qguard.precision.errors import PrecisionError
from optimum_qguard.precision.sensitivity import GroupSensitivity, Sensitivity


def sensitivity(groups: list[tuple[int, dict[int, float]]]) -> Sensitivity:
    return Sensitivity(
        fingerprint="",
        group_size=32,
        mapping="symmetric",
        tokens=1,
        groups=tuple(
            GroupSensitivity(name=f"g{index}", modules=(f"a.g{index}", f"b.g{index}"), weights=weights, kl=kl)
            for index, (weights, kl) in enumerate(groups)
        ),
    )


KL = st.dictionaries(st.integers(2, 8), st.floats(1e-9, 10), min_size=1)
GROUPS = st.lists(st.tuples(st.integers(1, 1000), KL), min_size=1, max_size=4).map(sensitivity)


@settings(max_examples=60)
@given(GROUPS, st.floats(2, 8))
def test_no_other_widths_predict_less(measured: Sensitivity, budget: float) -> None:
    found = allocate(measured, budget)
    assert found.average_bits <= budget + 1e-9
    names = [group.name for group in measured.groups]
    best = math.inf
    for widths in itertools.product(range(2, 9), repeat=len(names)):
        candidate = dict(zip(names, widths, strict=True))
        if measured.average_bits(candidate) <= budget:
            best = min(best, measured.predict(candidate))
    assert found.predicted == pytest.approx(measured.predict(found.widths))
    assert found.predicted <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 10**6), KL), min_size=1, max_size=30).map(sensitivity), st.data())
def test_more_bits_never_predict_more(measured: Sensitivity, data: st.DataObject) -> None:
    low = data.draw(st.floats(2, 8))
    high = data.draw(st.floats(low, 8))
    few, many = allocate(measured, low), allocate(measured, high)
    assert many.predicted <= few.predicted * (1 + 1e-6) + 1e-9


def test_the_bit_map_has_every_layer() -> None:
    found = allocate(sensitivity([(100, {2: 1.0, 8: 0.99999}), (100, {2: 1.0, 4: 1e-3})]), 4)
    assert found.widths["g0"] < found.widths["g1"]
    assert found.bitmap.to_dict() == {
        "a.g0": found.widths["g0"],
        "b.g0": found.widths["g0"],
        "a.g1": found.widths["g1"],
        "b.g1": found.widths["g1"],
    }


def test_the_ends_of_the_range() -> None:
    measured = sensitivity([(3, {4: 0.1}), (7, {4: 0.2})])
    assert set(allocate(measured, 2).widths.values()) == {2}
    assert set(allocate(measured, 8).widths.values()) == {8}
    for budget in (1.99, 8.01, math.nan):
        with pytest.raises(PrecisionError, match="an average width is between 2 and 8"):
            allocate(measured, budget)
    with pytest.raises(PrecisionError, match="no groups"):
        allocate(sensitivity([]), 4)
