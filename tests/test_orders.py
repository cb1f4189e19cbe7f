"""How the order of methods moves between variants: shorter spans, shares reversed, and their bounds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from faithmap.orders import Orders, at_span


def planted(*means: tuple[float, ...], n: int = 40, noise: float = 1.0, seed: int = 0) -> Orders:
    """Variants of planted mean scores, a line of means for each."""
    from faithmap.orders import Variant

    rng = np.random.Generator(np.random.PCG64(seed))
    values = np.array(means)[:, :, None] + noise * rng.normal(size=(len(means), len(means[0]), n))
    variants = tuple(
        Variant("predicted", "model", fill, 0.9, "agreement")
        for fill in ("black", "mean", "blur", "noisy-linear")[: len(means)]
    )
    names = tuple("abcdef"[: len(means[0])])
    return Orders("m", "d", names, variants, values, {}, n, resamples=400)


class TestOrders:
    def test_a_planted_reversal(self) -> None:
        orders = planted((30, 20, 10), (30, 10, 20), (10, 20, 30))
        found = orders.disagreement(0, 1)
        assert (found.reversed, found.low, found.high) == pytest.approx((100 / 3,) * 3)
        assert found.tau == pytest.approx(1 / 3)
        everything = orders.disagreement(0, 2)
        assert (everything.reversed, everything.low, everything.tau) == pytest.approx((100, 100, -1))
        assert orders.reversed_somewhere == 3
        assert orders.any_two() == pytest.approx((200 / 3, 100, 200 / 3))
        assert orders.ranks.tolist() == [[1, 2, 3], [1, 3, 2], [3, 2, 1]]
        assert [c.values for c in orders.contrasts()] == [
            ("black", "mean"), ("black", "blur"), ("mean", "blur"),
        ]  # fmt: skip

    def test_what_noise_hides_is_neither_claimed_nor_excluded(self) -> None:
        orders = planted((0, 0, 0), (0, 0, 0), seed=3)
        found = orders.disagreement(0, 1)
        assert (found.low, found.high) == (0, 100)
        assert orders.reversed_somewhere == 0

    def test_the_same_order_is_known_to_be_the_same(self) -> None:
        orders = planted((30, 20, 10), (60, 40, 20))
        found = orders.disagreement(0, 1)
        assert (found.reversed, found.low, found.high, found.tau) == (0, 0, 0, 1)

    @pytest.mark.slow
    def test_two_variants_hold_no_wrong_order_at_95(self) -> None:
        """Where all methods are equal, any decided pair is wrong: of 400 experiments 5% may have one.

        Three standard errors are allowed for; were each variant decided at 90%, a fifth would.
        """
        nothing = (0.0,) * 4
        wrong = sum(bool(planted(nothing, nothing, n=60, seed=trial).decided.any()) for trial in range(400))
        assert wrong <= 400 * 0.05 + 3 * np.sqrt(400 * 0.05 * 0.95)

    @pytest.mark.slow
    def test_all_variants_hold_no_wrong_reversal_at_95(self) -> None:
        """A reversal takes two wrong orders, of which the one family of all variants has none at 95%."""
        nothing = (0.0,) * 4
        wrong = sum(planted(*[nothing] * 4, n=60, seed=trial).reversed_somewhere > 0 for trial in range(200))
        assert wrong <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)

    def test_many_pairs_make_no_negative_share(self) -> None:
        means = tuple(float(10 * m) for m in range(6))
        orders = planted(means, means)
        found = orders.disagreement(0, 1)
        assert str(found.high) == "0.0" and str(found.low) == "0.0"
        assert np.isnan(planted((1.0, 1.0), (2.0, 2.0), noise=0.0).disagreement(0, 1).tau)


def test_areas_up_to_a_share_are_those_of_a_loop() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    rows = []
    for image in ("a", "b"):
        for reading in ("", "@label-black"):
            curves = {name: rng.random(11) for name in ("pos_auc", "neg_auc")}
            whole = {name: 100 * np.trapezoid(curve, dx=0.1) for name, curve in curves.items()}
            for name, curve in curves.items():
                rows.append((image, name + reading, whole[name], list(curve)))
            rows.append((image, "auc_d" + reading, whole["neg_auc"] - whole["pos_auc"], None))
        rows.append((image, "ties", 5.0, None))
    table = pd.DataFrame(rows, columns=["image_id", "metric", "value", "curve"])
    table = table.assign(model="m", dataset="d", explainer="e", params="{}", spec="s")
    found = at_span(table, 0.9)
    assert list(found.columns) == list(table.columns) and len(found) == len(table)
    assert np.allclose(at_span(table, 1.0)["value"], table["value"])
    for line in found.itertuples():
        kind, _, reading = line.metric.partition("@")
        areas = {}
        for name in ("pos_auc", "neg_auc"):
            title = f"{name}@{reading}" if reading else name
            here = table[(table["image_id"] == line.image_id) & (table["metric"] == title)]
            curve = here["curve"].iloc[0]
            areas[name] = sum(5 * (curve[i] + curve[i + 1]) for i in range(9))
        areas["auc_d"] = areas["neg_auc"] - areas["pos_auc"]
        assert line.value == pytest.approx(areas.get(kind, 5.0))
