"""Methods in order: wins, ranks, letters, pairs and the agreement of orders; slow rewrites, closed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

import slow_comparison
import slow_stats
from faithmap import ranking


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(20_240))


class TestWin:
    def test_slow_rewrite(self) -> None:
        drops = rng().integers(0, 5, (6, 40)).astype(float)
        found = ranking.paired_win(drops).mean(axis=1)
        assert found == pytest.approx([slow_stats.win(drops, method) for method in range(6)])

    def test_sums_to_half_the_methods(self) -> None:
        drops = rng().integers(0, 3, (7, 25)).astype(float)
        assert ranking.paired_win(drops).mean(axis=1).sum() == pytest.approx(3.5)

    def test_alone(self) -> None:
        assert np.isnan(ranking.paired_win([[1.0, 2.0]])).all()

    def test_smallest_share(self) -> None:
        found = ranking.smallest_share([[0.0, 1.0], [0.0, 2.0], [3.0, 9.0]])
        assert found.tolist() == [[0.5, 1.0], [0.5, 0.0], [0.0, 0.0]]


class TestRankIntervals:
    def test_slow_rewrite(self) -> None:
        source = rng()
        values = source.integers(0, 19, (5, 40)) * 5.0 + np.array([[0], [5], [9], [20], [20]])
        values[4, 2:] = values[3, 2:]  # differs on two images only: out of the family
        found = ranking.rank_intervals(values, resamples=400, seed=6)
        assert np.array_equal(found.better, slow_stats.better_pairs(values, 0.95, 400, 6))
        assert not found.decided[3, 4]

    def test_separated_methods_are_told_apart(self) -> None:
        values = rng().normal(size=(5, 100)) + np.array([[2.0], [0.0], [4.0], [1.0], [3.0]])
        found = ranking.rank_intervals(values)
        assert found.rank.tolist() == [3, 5, 1, 4, 2]
        assert found.low.tolist() == found.high.tolist() == found.rank.tolist()

    def test_lower_is_better(self) -> None:
        values = rng().normal(size=(3, 60)) + np.array([[2.0], [0.0], [4.0]])
        assert ranking.rank_intervals(values, higher_is_better=False).rank.tolist() == [2, 1, 3]

    @pytest.mark.parametrize("n", [40, 120])
    def test_family_wise_error(self, n: int) -> None:
        source, wrong = rng(), 0
        for trial in range(400):
            shared = source.normal(0, 2, n)
            values = shared + source.normal(0, 1, (6, n))
            wrong += ranking.rank_intervals(values, resamples=300, seed=trial).better.any()
        assert wrong / 400 <= 0.075  # 5%, and two standard errors of 400 trials

    def test_identical_methods_share_a_rank(self) -> None:
        values = np.tile(rng().normal(size=30), (3, 1))
        found = ranking.rank_intervals(values)
        assert found.rank.tolist() == [1, 1, 1]
        assert found.low.tolist() == [1, 1, 1]
        assert found.high.tolist() == [3, 3, 3]

    def test_near_copies_do_not_hide_the_rest(self) -> None:
        values = rng().normal(size=(3, 100))
        values[1] = values[0]
        values[1, 0] += 5
        values[2] += 5
        found = ranking.rank_intervals(values)
        assert found.better[2, 0] and found.better[2, 1]
        assert not found.decided[0, 1]

    def test_constant_difference(self) -> None:
        values = rng().integers(0, 9, 20).astype(float)
        assert ranking.rank_intervals([values, values + 5]).better[1, 0]
        assert not ranking.rank_intervals([values[:4], values[:4] + 5]).decided.any()

    @pytest.mark.parametrize("shape", [(1, 10), (3, 1), (3, 0)])
    def test_too_little_to_decide(self, shape: tuple[int, int]) -> None:
        found = ranking.rank_intervals(rng().normal(size=shape))
        assert found.low.tolist() == [1] * shape[0]
        assert found.high.tolist() == [shape[0]] * shape[0]

    def test_refuses_nan(self) -> None:
        with pytest.raises(ValueError, match="shared images"):
            ranking.rank_intervals([[1.0, math.nan], [1.0, 2.0]])

    @settings(max_examples=30, deadline=None)
    @given(hnp.arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(2, 25)),
                      elements=st.integers(0, 18).map(lambda k: 5.0 * k)))  # fmt: skip
    def test_ranks_lie_in_their_intervals(self, values: np.ndarray) -> None:
        found = ranking.rank_intervals(values, resamples=100)
        assert ((found.low <= found.rank) & (found.rank <= found.high)).all()
        assert not (found.better & found.better.T).any()


class TestLetterGroups:
    def test_chain_is_not_transitive(self) -> None:
        decided = np.zeros((3, 3), bool)
        decided[0, 2] = decided[2, 0] = True
        assert ranking.letter_groups(decided) == ["a", "ab", "b"]

    def test_all_differ(self) -> None:
        assert ranking.letter_groups(~np.eye(3, dtype=bool)) == ["a", "b", "c"]

    def test_none_differ(self) -> None:
        assert ranking.letter_groups(np.zeros((3, 3))) == ["a", "a", "a"]

    def test_more_than_the_alphabet(self) -> None:
        letters = ranking.letter_groups(~np.eye(30, dtype=bool))
        assert letters[25:28] == ["z", "a1", "b1"]

    def test_nobody(self) -> None:
        assert ranking.letter_groups(np.zeros((0, 0))) == []

    @settings(max_examples=100, deadline=None)
    @given(st.integers(2, 7).flatmap(lambda m: hnp.arrays(np.bool_, (m, m))))
    def test_a_letter_is_shared_exactly_where_undecided(self, drawn: np.ndarray) -> None:
        decided = np.triu(drawn, 1) | np.triu(drawn, 1).T
        letters = [set(word) for word in ranking.letter_groups(decided)]
        for i in range(len(decided)):
            for j in range(i + 1, len(decided)):
                assert bool(letters[i] & letters[j]) == (not decided[i, j])


class TestPairedDifferences:
    def test_intervals_are_those_of_a_slow_loop(self) -> None:
        rng = np.random.Generator(np.random.PCG64(3))
        values = rng.normal(size=(4, 30)) + np.array([0.0, 0.2, 0.6, 1.5])[:, None]
        found = ranking.paired_differences(values, resamples=200, seed=7)
        slow = slow_comparison.simultaneous_bounds(values, 0.95, 200, 7)
        for i, j, value, low, high, sign in zip(*found, strict=True):
            assert value == pytest.approx(values[i].mean() - values[j].mean())
            assert (low, high) == pytest.approx(slow[i, j])
            assert sign == (1 if low > 0 else -1 if high < 0 else 0)

    def test_an_interval_excludes_zero_where_ranks_decide(self) -> None:
        rng = np.random.Generator(np.random.PCG64(0))
        for seed in range(20):
            values = np.round(rng.normal(size=(5, 24)) + rng.normal(size=(5, 1)), 2)
            better = ranking.rank_intervals(values, resamples=300, seed=seed).better
            found = ranking.paired_differences(values, resamples=300, seed=seed)
            for i, j, _, low, high, sign in zip(*found, strict=True):
                assert (sign > 0, sign < 0) == (better[i, j], better[j, i]) == (low > 0, high < 0)

    def test_a_pair_that_too_few_images_tell_apart_has_no_interval(self) -> None:
        values = np.zeros((2, 20))
        values[0, :3] = 5
        found = ranking.paired_differences(values)
        assert found.value[0] == pytest.approx(0.75)
        assert np.isnan(found.low[0]) and np.isnan(found.high[0])
        assert found.sign[0] == 0

    def test_a_shift_without_spread_is_decided(self) -> None:
        found = ranking.paired_differences(np.stack([np.full(12, 3.0), np.full(12, 1.0)]))
        assert (found.value[0], found.low[0], found.high[0], found.sign[0]) == (2.0, 2.0, 2.0, 1)

    def test_nothing_to_compare(self) -> None:
        assert not ranking.paired_differences(np.ones((1, 5))).value.size
        empty = ranking.paired_differences(np.empty((3, 0)))
        assert np.isnan(empty.value).all() and not empty.sign.any()
        with pytest.raises(ValueError, match="not finite"):
            ranking.paired_differences([[1.0, np.nan], [1.0, 2.0]])


class TestOrderAgreement:
    def test_the_same_order_and_the_reverse(self) -> None:
        values = np.arange(5.0)[:, None] + np.zeros((5, 12))
        assert ranking.order_agreement(np.arange(5.0), values) == (1.0, 1.0, 1.0)
        assert ranking.order_agreement(-np.arange(5.0), values) == (-1.0, -1.0, -1.0)

    def test_known_ties(self) -> None:
        # Of three pairs one is tied by the reference and none by the values: 2 / sqrt(2 * 3).
        values = np.array([[1.0], [2.0], [3.0]]) + np.zeros((3, 4))
        assert ranking.order_agreement([1, 1, 2], values)[0] == pytest.approx(2 / np.sqrt(6))
        # Tied by the values within the tolerance only.
        near = values + np.array([[0.0], [-0.9995], [0.0]])
        assert ranking.order_agreement([1, 2, 3], near, tolerance=1e-3)[0] == pytest.approx(2 / np.sqrt(6))
        assert ranking.order_agreement([1, 2, 3], near)[0] == 1.0

    def test_all_tied_is_unknown(self) -> None:
        assert np.isnan(ranking.order_agreement([1, 1, 1], np.eye(3))).all()
        assert np.isnan(ranking.order_agreement([1, 2, 3], np.ones((3, 5)))).all()
        assert np.isnan(ranking.order_agreement([1], np.ones((1, 5)))).all()

    def test_one_image_has_no_bounds(self) -> None:
        tau, low, high = ranking.order_agreement([1, 2], [[3.0], [4.0]])
        assert tau == 1.0 and np.isnan(low) and np.isnan(high)

    def test_it_is_scipys_tau_and_a_slow_bootstrap(self) -> None:
        rng = np.random.Generator(np.random.PCG64(1))
        for seed in range(10):
            values = rng.integers(0, 4, (5, 9)).astype(float)
            reference = rng.integers(0, 3, 5).astype(float)
            tau, low, high = ranking.order_agreement(reference, values, resamples=100, seed=seed)
            means = values.sum(axis=1)
            expected = scipy_stats.kendalltau(reference, means).statistic
            assert tau == pytest.approx(expected, nan_ok=True)
            assert tau == pytest.approx(slow_comparison.tau_b(reference, means), nan_ok=True)
            if not np.isnan(tau):
                slow = slow_comparison.tau_bounds(reference, values, 0.95, 100, seed)
                assert (low, high) == pytest.approx(slow)
