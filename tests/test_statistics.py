"""Paired statistics against values worked out by hand, and properties that any such statistic has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_patch.evals.statistics import cluster_bootstrap, mcnemar, paired


@pytest.mark.parametrize(
    "lost, won, p",
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (10, 2, 2 * (1 + 12 + 66) / 4096), (3, 3, 1.0)],
)
def test_mcnemar_is_the_exact_binomial(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)
    assert mcnemar(won, lost) == pytest.approx(p)


def test_equal_runs_differ_by_exactly_nothing():
    found = paired([1, 0, 1, 1], [1, 0, 1, 1], ["a", "a", "b", "c"])
    assert (found.difference, found.low, found.high, found.lost, found.won, found.p_value) == (0, 0, 0, 0, 0, 1)
    assert found.groups == 3


def test_flips_and_difference():
    found = paired([1, 1, 1, 0], [0, 0, 1, 1], list("abcd"))
    assert (found.lost, found.won, found.difference) == (2, 1, -0.25)
    assert found.low <= found.difference <= found.high


def test_weights_count_items_several_times():
    one = paired([1, 1, 0], [0, 1, 1], list("abc"), weights=[3, 1, 1])
    rows = paired([1, 1, 1, 1, 0], [0, 0, 0, 1, 1], list("aaabc"))
    assert one.difference == rows.difference == pytest.approx(-0.4)
    assert (one.low, one.high) == pytest.approx((rows.low, rows.high))
    assert (one.lost, rows.lost) == (1, 3)


def test_clusters_widen_the_interval():
    """Twenty copies of the same ten answers are ten answers."""
    values = np.array([1.0, 0, 0, 1, -1, 0, 0, 0, 1, 0])
    few = cluster_bootstrap(values, [str(i) for i in range(10)])
    copies = np.repeat(values, 20)
    clustered = cluster_bootstrap(copies, [str(i) for i in np.repeat(range(10), 20)])
    independent = cluster_bootstrap(copies, [str(i) for i in range(200)])
    assert clustered == pytest.approx(few, abs=0.05)
    assert independent[1] - independent[0] < 0.5 * (clustered[1] - clustered[0])


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        values = rng.choice([-1.0, 0.0, 1.0], size=100, p=[0.15, 0.75, 0.1])
        low, high = cluster_bootstrap(values, [str(j) for j in range(100)], seed=i, resamples=1000)
        hits += low <= -0.05 <= high
    assert 0.89 <= hits / 200 <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcde")), min_size=1, max_size=40))
def test_swapping_the_runs_mirrors_everything(rows):
    before, after, groups = ([row[i] for row in rows] for i in range(3))
    one, two = paired(before, after, groups, resamples=200), paired(after, before, groups, resamples=200)
    assert (one.lost, one.won, one.p_value) == (two.won, two.lost, two.p_value)
    assert one.difference == -two.difference
    assert one.low == pytest.approx(-two.high) and one.high == pytest.approx(-two.low)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="equal, non-zero lengths"):
        paired([1, 0], [1], ["a", "b"])
