"""Simultaneous intervals of pairs, and the agreement of two orders: slow rewrites and closed cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

import slow_comparison
from faithmap import stats


class TestPairedDifferences:
    def test_intervals_are_those_of_a_slow_loop(self) -> None:
        rng = np.random.Generator(np.random.PCG64(3))
        values = rng.normal(size=(4, 30)) + np.array([0.0, 0.2, 0.6, 1.5])[:, None]
        found = stats.paired_differences(values, resamples=200, seed=7)
        slow = slow_comparison.simultaneous_bounds(values, 0.95, 200, 7)
        for i, j, value, low, high, sign in zip(*found, strict=True):
            assert value == pytest.approx(values[i].mean() - values[j].mean())
            assert (low, high) == pytest.approx(slow[i, j])
            assert sign == (1 if low > 0 else -1 if high < 0 else 0)

    def test_an_interval_excludes_zero_where_ranks_decide(self) -> None:
        rng = np.random.Generator(np.random.PCG64(0))
        for seed in range(20):
            values = np.round(rng.normal(size=(5, 24)) + rng.normal(size=(5, 1)), 2)
            better = stats.rank_intervals(values, resamples=300, seed=seed).better
            found = stats.paired_differences(values, resamples=300, seed=seed)
            for i, j, _, low, high, sign in zip(*found, strict=True):
                assert (sign > 0, sign < 0) == (better[i, j], better[j, i]) == (low > 0, high < 0)

    def test_a_pair_that_too_few_images_tell_apart_has_no_interval(self) -> None:
        values = np.zeros((2, 20))
        values[0, :3] = 5
        found = stats.paired_differences(values)
        assert found.value[0] == pytest.approx(0.75)
        assert np.isnan(found.low[0]) and np.isnan(found.high[0])
        assert found.sign[0] == 0

    def test_a_shift_without_spread_is_decided(self) -> None:
        found = stats.paired_differences(np.stack([np.full(12, 3.0), np.full(12, 1.0)]))
        assert (found.value[0], found.low[0], found.high[0], found.sign[0]) == (2.0, 2.0, 2.0, 1)

    def test_nothing_to_compare(self) -> None:
        assert not stats.paired_differences(np.ones((1, 5))).value.size
        empty = stats.paired_differences(np.empty((3, 0)))
        assert np.isnan(empty.value).all() and not empty.sign.any()
        with pytest.raises(ValueError, match="not finite"):
            stats.paired_differences([[1.0, np.nan], [1.0, 2.0]])


class TestOrderAgreement:
    def test_the_same_order_and_the_reverse(self) -> None:
        values = np.arange(5.0)[:, None] + np.zeros((5, 12))
        assert stats.order_agreement(np.arange(5.0), values) == (1.0, 1.0, 1.0)
        assert stats.order_agreement(-np.arange(5.0), values) == (-1.0, -1.0, -1.0)

    def test_known_ties(self) -> None:
        # Of three pairs one is tied by the reference and none by the values: 2 / sqrt(2 * 3).
        values = np.array([[1.0], [2.0], [3.0]]) + np.zeros((3, 4))
        assert stats.order_agreement([1, 1, 2], values)[0] == pytest.approx(2 / np.sqrt(6))
        # Tied by the values within the tolerance only.
        near = values + np.array([[0.0], [-0.9995], [0.0]])
        assert stats.order_agreement([1, 2, 3], near, tolerance=1e-3)[0] == pytest.approx(2 / np.sqrt(6))
        assert stats.order_agreement([1, 2, 3], near)[0] == 1.0

    def test_all_tied_is_unknown(self) -> None:
        assert np.isnan(stats.order_agreement([1, 1, 1], np.eye(3))).all()
        assert np.isnan(stats.order_agreement([1, 2, 3], np.ones((3, 5)))).all()
        assert np.isnan(stats.order_agreement([1], np.ones((1, 5)))).all()

    def test_one_image_has_no_bounds(self) -> None:
        tau, low, high = stats.order_agreement([1, 2], [[3.0], [4.0]])
        assert tau == 1.0 and np.isnan(low) and np.isnan(high)

    def test_it_is_scipys_tau_and_a_slow_bootstrap(self) -> None:
        rng = np.random.Generator(np.random.PCG64(1))
        for seed in range(10):
            values = rng.integers(0, 4, (5, 9)).astype(float)
            reference = rng.integers(0, 3, 5).astype(float)
            tau, low, high = stats.order_agreement(reference, values, resamples=100, seed=seed)
            means = values.sum(axis=1)
            expected = scipy_stats.kendalltau(reference, means).statistic
            assert tau == pytest.approx(expected, nan_ok=True)
            assert tau == pytest.approx(slow_comparison.tau_b(reference, means), nan_ok=True)
            if not np.isnan(tau):
                slow = slow_comparison.tau_bounds(reference, values, 0.95, 100, seed)
                assert (low, high) == pytest.approx(slow)
