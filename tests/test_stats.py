"""The statistics against slow rewrites, closed forms, other libraries and their own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

import slow_stats
from faithmap import stats
from faithmap._resample import count_chunks

RNG_SEED = 20_240


def rng(seed: int = RNG_SEED) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


class TestRankCorrelation:
    def test_is_the_correlation_of_ranks_whatever_the_shape(self) -> None:
        one, other = np.random.default_rng(0).normal(size=(2, 4, 5)).round(1)
        ranks = [
            [np.mean([float(b < a) + 0.5 * float(b == a) for b in x.flat]) for a in x.flat]
            for x in (one, other)
        ]
        assert stats.rank_correlation(one, other) == pytest.approx(np.corrcoef(ranks)[0, 1])
        assert stats.rank_correlation(one, np.exp(one)) == pytest.approx(1)
        assert stats.rank_correlation(one, -one) == pytest.approx(-1)

    def test_what_does_not_vary_has_none(self) -> None:
        assert math.isnan(stats.rank_correlation(np.ones(4), np.arange(4)))
        assert math.isnan(stats.rank_correlation(np.arange(4), np.ones(4)))


class TestWilson:
    @pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (40, 128), (12.5, 64)])
    def test_solves_its_definition(self, hits: float, n: int) -> None:
        low, high = stats.wilson(hits, n)
        assert (float(low), float(high)) == pytest.approx(slow_stats.wilson(hits, n, 0.95), abs=1e-12)

    def test_known_value(self) -> None:
        low, high = stats.wilson(0, 10)
        assert float(low) == 0.0
        assert float(high) == pytest.approx(0.27753, abs=1e-5)

    def test_no_images(self) -> None:
        assert np.isnan(stats.wilson(0, 0)).all()

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
    def test_coverage(self, share: float) -> None:
        low, high = stats.wilson(rng().binomial(100, share, 20_000), 100)
        assert ((low <= share) & (share <= high)).mean() == pytest.approx(0.95, abs=0.02)

    @given(st.integers(1, 500), st.floats(0, 1))
    def test_holds_the_share(self, n: int, share: float) -> None:
        low, high = stats.wilson(share * n, n)
        assert 0 <= low <= share + 1e-12
        assert share - 1e-12 <= high <= 1


class TestBca:
    @pytest.mark.parametrize("draw", ["normal", "skewed", "discrete"])
    def test_equals_scipy(self, draw: str) -> None:
        source = rng()
        series = {
            "normal": source.normal(size=(3, 40)),
            "skewed": source.exponential(size=(3, 40)) ** 2,
            "discrete": source.integers(-9, 10, (3, 40)) * 5.0,
        }[draw]
        found = stats.bca(series, resamples=500, seed=3)
        for row, values in enumerate(series):
            expected = slow_stats.bca_interval(list(values), 0.95, 500, 3)
            assert (found.low[row], found.high[row]) == pytest.approx(expected, rel=1e-9)
            assert found.value[row] == pytest.approx(values.mean())

    @pytest.mark.parametrize("skewed", [False, True])
    def test_coverage(self, skewed: bool) -> None:
        source = rng()
        draws = source.exponential(1.0, (3000, 100)) if skewed else source.normal(1.0, 1.0, (3000, 100))
        found = stats.bca(draws, resamples=1000, seed=1)
        assert ((found.low <= 1) & (1 <= found.high)).mean() == pytest.approx(0.95, abs=0.02)

    def test_constant_series_is_a_point(self) -> None:
        found = stats.bca(np.full((2, 9), 7.5))
        assert found.low.tolist() == found.high.tolist() == [7.5, 7.5]

    def test_one_image_has_no_bounds(self) -> None:
        found = stats.bca([[4.0]])
        assert found.value[0] == 4.0
        assert np.isnan([found.low[0], found.high[0]]).all()

    def test_nan_stays_in_its_series(self) -> None:
        found = stats.bca([[1.0, np.nan, 2.0], [1.0, 2.0, 4.0]])
        assert np.isnan(found.value[0]) and np.isnan(found.low[0])
        assert found.low[1] < found.value[1] < found.high[1]

    def test_no_images(self) -> None:
        assert np.isnan(stats.bca(np.empty((2, 0))).value).all()

    def test_other_series_change_nothing(self) -> None:
        series = rng().integers(0, 99, (5, 30)).astype(float)
        assert stats.bca(series[2:3]).low[0] == stats.bca(series).low[2]

    def test_resamples_do_not_depend_on_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = np.concatenate(list(count_chunks(7, 50, 0)))
        monkeypatch.setattr("faithmap._resample._CHUNK", 30)
        parts = list(count_chunks(7, 50, 0))
        assert len(parts) > 5
        assert np.array_equal(np.concatenate(parts), whole)

    @settings(max_examples=40, deadline=None)
    @given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.integers(-50, 50).map(float)))
    def test_bounds_are_ordered_and_within_the_data(self, values: np.ndarray) -> None:
        found = stats.bca(values[None], resamples=200)
        assert values.min() <= found.low[0] <= found.high[0] <= values.max()

    @settings(max_examples=20, deadline=None)
    @given(hnp.arrays(np.float64, 20, elements=st.integers(-50, 50).map(float)), st.integers(-9, 9))
    def test_moves_with_the_data(self, values: np.ndarray, shift: int) -> None:
        here, there = stats.bca(values[None], resamples=200), stats.bca(values[None] + shift, resamples=200)
        assert there.low[0] == pytest.approx(here.low[0] + shift)


class TestMedianInterval:
    def test_coverage(self) -> None:
        covered = 0
        for values in rng().exponential(1.0, (2000, 31)):
            _, low, high = stats.median_interval(values)
            covered += low <= math.log(2) <= high
        assert 0.94 <= covered / 2000 <= 0.985

    def test_small_samples_have_no_bounds(self) -> None:
        median, low, high = stats.median_interval([3, 1, 2, np.nan])
        assert median == 2
        assert math.isnan(low) and math.isnan(high)

    def test_six_values_span_their_range(self) -> None:
        assert stats.median_interval([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)

    def test_nothing(self) -> None:
        assert all(math.isnan(part) for part in stats.median_interval([]))


class TestRatioOfSums:
    def test_equals_scipy(self) -> None:
        source = rng()
        top, bottom = source.exponential(size=40), source.uniform(0.5, 1.0, 40)
        found = stats.ratio_of_sums(top, bottom, resamples=400, seed=5)
        expected = scipy_stats.bootstrap(
            (top, bottom),
            lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
            paired=True,
            n_resamples=400,
            method="BCa",
            rng=rng(5),
        ).confidence_interval
        assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high), rel=1e-9)

    def test_one_image(self) -> None:
        found = stats.ratio_of_sums([1.0], [4.0])
        assert found.value[0] == 0.25
        assert math.isnan(found.low[0])

    def test_constant_ratio(self) -> None:
        found = stats.ratio_of_sums([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        assert (found.value[0], found.low[0], found.high[0]) == pytest.approx((0.5, 0.5, 0.5))


class TestCalibration:
    def test_definition(self) -> None:
        scores, null = rng(1).normal(3, 1, (2, 50)), rng(2).normal(0, 1, 50)
        found = stats.calibration(scores, null)
        difference = scores - null
        assert found.value == pytest.approx(difference.mean(axis=1) / difference.std(axis=1, ddof=1))
        assert (found.low < found.value).all() and (found.value < found.high).all()

    def test_orientation(self) -> None:
        scores, null = rng(1).normal(3, 1, 50), np.zeros(50)
        assert stats.calibration(scores, null, False).value == -stats.calibration(scores, null).value

    def test_equals_scipy(self) -> None:
        difference = rng(4).exponential(size=40)
        found = stats.calibration(difference, np.zeros(40), resamples=400, seed=2)
        expected = scipy_stats.bootstrap(
            (difference,),
            lambda d, axis=-1: d.mean(axis=axis) / d.std(axis=axis, ddof=1),
            n_resamples=400,
            method="BCa",
            rng=rng(2),
        ).confidence_interval
        assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high), rel=1e-8)

    def test_does_not_grow_with_n(self) -> None:
        source = rng()
        small = stats.calibration(source.normal(1, 1, 200), np.zeros(200)).value[0]
        large = stats.calibration(source.normal(1, 1, 20_000), np.zeros(20_000), resamples=50).value[0]
        assert small == pytest.approx(large, abs=0.25)

    @pytest.mark.parametrize("values", [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0]])
    def test_undefined_without_variation(self, values: list[float]) -> None:
        assert np.isnan(np.concatenate(stats.calibration(values, np.zeros(len(values))))).all()

    def test_coverage(self) -> None:
        found = stats.calibration(rng().normal(0.5, 1.0, (2000, 100)), np.zeros(100), resamples=600)
        assert ((found.low <= 0.5) & (0.5 <= found.high)).mean() == pytest.approx(0.95, abs=0.02)


class TestSignFlip:
    def test_equals_all_flips(self) -> None:
        differences = [3.0, -1.0, 4.0, 1.5, -0.5, 9.0, 2.0, 6.0]
        found = stats.sign_flip_test(differences, resamples=40_000)
        assert found == pytest.approx(slow_stats.sign_flip_p(differences), abs=0.005)

    def test_agrees_with_scipy(self) -> None:
        differences = rng(8).normal(0.3, 1.0, 60)
        expected = scipy_stats.permutation_test(
            (differences,),
            lambda d, axis=-1: d.mean(axis=axis),
            permutation_type="samples",
            n_resamples=20_000,
            rng=rng(1),
        ).pvalue
        assert stats.sign_flip_test(differences, 20_000) == pytest.approx(expected, abs=0.01)

    def test_same_method_twice_gives_uniform_p(self) -> None:
        source = rng()
        p = [stats.sign_flip_test(source.exponential(size=40) - source.exponential(size=40), 499, seed)
             for seed in range(500)]  # fmt: skip
        assert scipy_stats.kstest(p, "uniform").pvalue > 0.01

    def test_nothing_differs(self) -> None:
        assert stats.sign_flip_test(np.zeros(20), 99) == 1.0

    def test_no_images(self) -> None:
        assert math.isnan(stats.sign_flip_test([math.nan]))

    def test_never_zero(self) -> None:
        assert stats.sign_flip_test(np.ones(60), 99) == pytest.approx(0.01)

    def test_sign_does_not_matter(self) -> None:
        differences = rng().normal(0.2, 1, 50)
        assert stats.sign_flip_test(differences) == stats.sign_flip_test(-differences)


class TestDetectableDifference:
    @pytest.mark.parametrize("n", [2, 3, 10, 128, 5000])
    def test_power_of_a_t_test(self, n: int) -> None:
        shift = stats.detectable_difference(1.0, n) * math.sqrt(n)
        power = scipy_stats.nct.sf(scipy_stats.t.ppf(0.975, n - 1), n - 1, shift)
        assert power == pytest.approx(0.8, abs=1e-6)

    def test_textbook_limit(self) -> None:
        assert stats.detectable_difference(1.0, 10_000) == pytest.approx(2.8016 / 100, rel=1e-3)

    def test_by_simulation(self) -> None:
        shift = stats.detectable_difference(4.0, 50)
        draws = rng().normal(shift, 4.0, (4000, 50))
        assert (scipy_stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(
            0.8, abs=0.02
        )

    def test_from_differences(self) -> None:
        differences = rng().normal(size=30)
        expected = stats.detectable_difference(float(differences.std(ddof=1)), 30)
        assert stats.detectable_difference(differences) == pytest.approx(expected)

    def test_one_image(self) -> None:
        assert math.isnan(stats.detectable_difference([1.0]))

    def test_no_spread(self) -> None:
        assert stats.detectable_difference(np.full(9, 2.0)) == 0.0


class TestHolm:
    def test_step_by_step(self) -> None:
        """By the rule: the k-th smallest of m is rejected at level / (m - k + 1), if all before it are."""
        rng = np.random.default_rng(0)
        for _ in range(50):
            values = [float(p) for p in rng.uniform(0, 0.1, 6)]
            adjusted = stats.holm(values)
            for level in (0.01, 0.05, 0.2):
                rejected = set()
                for before, place in enumerate(sorted(range(6), key=values.__getitem__)):
                    if values[place] > level / (6 - before):
                        break
                    rejected.add(place)
                assert rejected == {place for place, p in enumerate(adjusted) if p <= level}

    def test_any_error_among_many_true_nulls_is_as_rare_as_promised(self) -> None:
        rng = np.random.default_rng(1)
        wrong = np.mean([min(stats.holm(list(rng.uniform(size=12)))) <= 0.05 for _ in range(4000)])
        assert 0.04 < wrong < 0.06

    def test_tests_that_were_not_made_count_for_nothing(self) -> None:
        assert stats.holm([math.nan, 0.03, math.nan, 0.01])[1::2] == pytest.approx([0.03, 0.02])
        assert all(math.isnan(p) for p in stats.holm([math.nan, math.nan])) and stats.holm([]) == []
