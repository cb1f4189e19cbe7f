"""A run beside the papers' tables: planted orders, missing variants, names and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from comparisons import (
    DROP,
    PERTURBATION,
    PRINTED,
    SCAN,
    N,
    falling,
    manifest,
    metric,
    only,
    planted,
    sections,
)

import slow_comparison
import slow_rows
from faithmap import comparing, ranking
from faithmap.comparing import chosen_figures
from faithmap.errors import RequestError
from faithmap.publications import publication
from faithmap.records import canonical_json
from faithmap.report.comparison import (
    render_comparison,
    requested,
)


class TestOrders:
    def test_the_printed_order_agrees_in_full(self) -> None:
        found = only(sections(planted(falling(PRINTED)), manifest(PRINTED)))
        assert [beside.method for beside in found.methods] == list(PRINTED)
        assert [beside.measured_place for beside in found.methods] == [1, 2, 3, 4, 5, 6]
        assert found.tau == (1.0, 1.0, 1.0)
        assert (found.count("agree"), found.count("disagree"), found.count("undecided")) == (15, 0, 0)
        assert found.images == N

    def test_the_reverse_disagrees_in_full(self) -> None:
        found = only(sections(planted(falling(PRINTED[::-1])), manifest(PRINTED)))
        assert found.tau == (-1.0, -1.0, -1.0)
        assert (found.count("agree"), found.count("disagree"), found.count("undecided")) == (0, 15, 0)
        pair = found.pairs[0]
        assert (pair.first, pair.second) == ("scan", "layercam")
        assert pair.published == pytest.approx(37.29 - 36.27)
        assert pair.low < pair.measured < pair.high < 0

    def test_lower_may_be_better(self) -> None:
        made = manifest(PRINTED, [metric("perturbation", PERTURBATION, "pos_auc@label")])
        rising = {name: 10 + 5.0 * place for place, name in enumerate(PRINTED)}
        found = only(sections(planted(rising, score="pos_auc@label"), made))
        assert found.column.name == "pos_auc"
        assert found.methods[0].published == min(beside.published for beside in found.methods)
        assert found.methods[0].measured_place == 1

    def test_one_swap_is_named(self) -> None:
        means = falling(PRINTED)
        means["layercam"], means["gradcam++"] = means["gradcam++"], means["layercam"]
        found = only(sections(planted(means), manifest(PRINTED)))
        assert [(p.first, p.second) for p in found.pairs if p.verdict == "disagree"] == [
            ("layercam", "gradcam++")
        ]
        assert found.tau[0] == pytest.approx(1 - 2 / 15)

    def test_equal_methods_are_not_decided(self) -> None:
        found = only(sections(planted(dict.fromkeys(PRINTED, 30.0), noise=3.0), manifest(PRINTED)))
        assert found.count("undecided") >= 14

    def test_rounding_decides_nothing(self) -> None:
        rows = planted(falling(PRINTED), value=lambda name, image: image + 1e-4 * PRINTED.index(name))
        found = only(sections(rows, manifest(PRINTED)))
        assert found.count("undecided") == 15
        assert {beside.measured_place for beside in found.methods} == {1}
        assert math.isnan(found.tau[0])

    def test_equal_printed_values_are_not_decided(self) -> None:
        names = ("gradcam", "gradcam++", "xgradcam", "layercam")
        made = manifest(names, [metric("drop", DROP, "increase")])
        rows = planted(falling(names), score="increase", spec="drop/1")
        found = sections(rows, made, "scorecampp-2024")
        (resnet,) = [s for s in found if s.figures.model.key == "resnet18"]
        (comparison,) = resnet.comparisons
        assert all(pair.tied and pair.verdict == "undecided" for pair in comparison.pairs)
        assert [beside.published_place for beside in comparison.methods] == [1, 1, 1, 1]

    def test_counts_are_those_of_a_slow_loop(self) -> None:
        rows = planted(dict(zip(PRINTED, (30, 32, 31, 29, 35, 31), strict=True)), noise=4.0, seed=5)
        found = only(sections(rows, manifest(PRINTED)))
        names = [beside.method for beside in found.methods]
        table = rows.pivot_table(index="explainer", columns="image_id", values="value").loc[names].to_numpy()
        better = ranking.rank_intervals(np.round(table * 2**20) / 2**20, resamples=300, seed=0).better
        printed = [beside.published for beside in found.methods]
        counts = slow_comparison.verdicts(printed, better.astype(int) - better.T.astype(int))
        assert counts == {name: found.count(name) for name in counts}  # type: ignore[arg-type]
        assert 0 < counts["undecided"] < 15
        assert found.tau[0] == pytest.approx(slow_comparison.tau_b(printed, table.mean(axis=1).tolist()))


class TestShares:
    def test_scores_on_all_images_are_left_alone(self) -> None:
        values = np.array([[1.0, 2.0, np.nan], [3.0, 5.0, np.nan]])
        assert (comparing.complete(values) == values[:, :2]).all()

    def test_a_gain_keeps_its_own_mean_and_the_spread_of_a_ratio(self) -> None:
        rng = np.random.Generator(np.random.PCG64(2))
        values = rng.normal(20, 6, (2, 400))
        values[0, rng.random(400) < 0.5] = np.nan
        values[1, rng.random(400) < 0.3] = np.nan
        values[:, 0] = 20.0
        full = comparing.complete(list(values))
        held = values[:, np.isfinite(values).any(axis=0)]
        assert full.shape == held.shape
        assert full.mean(axis=1) == pytest.approx(np.nanmean(values, axis=1), abs=1e-5)
        means = []
        for index in rng.integers(0, held.shape[1], (2000, held.shape[1])):
            first, second = np.nanmean(held[:, index], axis=1)
            means.append(first - second)
        error = (full[0] - full[1]).std(ddof=1) / math.sqrt(full.shape[1])
        assert error == pytest.approx(np.std(means), rel=0.1)

    def test_too_few_gains_are_left_out(self) -> None:
        def gain(name: str, image: int) -> float | None:
            return None if name == "rise" and image >= 5 else float(image)

        printed = ("rollout", "lime", "rise", "gradcam")
        made = manifest(printed, [metric("drop", DROP, "scan_inc", "area")], family="vit")
        rows = planted(falling(printed), score="scan_inc", spec="drop/1", value=gain)
        area = planted(falling(printed), score="area", spec="drop/1")
        found = sections(pd.concat([rows, area]), made, "scan-2026:table1")
        for section in found:
            (comparison,) = [c for c in section.comparisons if c.column.name == "increase"]
            assert comparison.score == "scan_inc"
            assert comparison.absent["rise"] == "has the score on 5 images; 8 are needed"
            assert comparison.absent["scan"] == "not in this run"


class TestNames:
    def test_gradient_is_saliency(self) -> None:
        names = ("saliency", "smoothgrad", "integrated-gradients", "gradcam")
        made = manifest(
            names, [metric("energy-pointing-game", {"most_share": 0.5, "only_correct": True}, "energy_pg")]
        )
        rows = planted(falling(names), score="energy_pg", spec="energy-pointing-game/1")
        found = only(sections(rows, made, "score-cam-2020:table3"))
        assert {beside.method: beside.label for beside in found.methods}["gradient"] == "saliency"
        assert found.absent["scorecam"] == "not in this run"

    def test_a_line_of_several_is_the_first_and_said(self) -> None:
        labels = [*PRINTED[1:], "rise[n_masks=500]"]
        made = manifest(labels)
        made["explainers"]["rise[n_masks=500]"] |= {"name": "rise", "params": {"n_masks": 500}}
        rows = planted(falling(PRINTED[1:]))
        other = rows[rows["explainer"] == "rise"].assign(params='{"n_masks":500}')
        found = sections(pd.concat([rows, other]), made)
        assert "rise" in [beside.label for beside in only(found).methods]
        assert "`rise`: the first of several lines of this explainer." in render_comparison(found)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"role": "control"}, "control, not a ranked method"),
            ({"reliable": False}, "unreliable: it fails checks of the kit"),
        ],
    )
    def test_what_is_not_ranked_is_not_compared(self, change: dict[str, Any], reason: str) -> None:
        made = manifest(PRINTED)
        made["explainers"]["lime"] |= change
        found = only(sections(planted(falling(PRINTED)), made))
        assert found.absent == {"lime": reason}

    def test_failed_skipped_and_unfinished_lines(self) -> None:
        rows = planted(falling(PRINTED))
        at = rows["explainer"]
        rows.loc[(at == "lime") & (rows["image_id"] < "img010"), ["value", "status"]] = [np.nan, "failed"]
        rows.loc[at == "rise", ["value", "status", "reason"]] = [np.nan, "skipped", "no layer"]
        rows = rows[(at != "scan") | (rows["image_id"] < "img020")]
        found = only(sections(rows, manifest(PRINTED)))
        assert found.absent == {
            "lime": "25.0% of its maps failed",
            "rise": "no layer",
            "scan": "has rows of 20 images, others of 40",
        }

    def test_parameters_of_the_request(self) -> None:
        made = {
            "config": {"explainers": [{"name": "rise", "label": "short", "n_masks": 9}]},
            "explainers": {"lime": {"params": {"n_samples": 7, "layer": None}}},
        }
        assert requested(made, "short") == {"n_masks": 9}
        assert requested(made, "lime") == {"n_samples": 7}
        assert requested(made, "scan") == {}


class TestReadings:
    def test_the_published_reading_is_preferred(self) -> None:
        made = manifest(PRINTED, [metric("perturbation", PERTURBATION, "auc_d", "auc_d@label")])
        rows = pd.concat([planted(falling(PRINTED[::-1]), score="auc_d"), planted(falling(PRINTED))])
        found = only(sections(rows, made))
        assert found.score == "auc_d@label" and not found.reading.another
        assert found.tau[0] == 1.0

    def test_a_kin_is_marked(self) -> None:
        made = manifest(PRINTED, [metric("perturbation", PERTURBATION, "auc_d")])
        found = sections(planted(falling(PRINTED), score="auc_d"), made)
        assert only(found).reading.another.startswith("agreement with the model's own prediction")
        text = render_comparison(found)
        assert "**Another reading: agreement with the model's own prediction, not with the label.**" in text
        assert "| `auc_d` (another reading) |" in text

    def test_a_variant_by_its_parameters(self) -> None:
        names = ("gradcam", "gradcam++", "scorecam", "rise")
        half = metric("drop", DROP | {"mute": "half"}, "average_drop@mine", variant="mine")
        made = manifest(names, [metric("drop", DROP, "average_drop"), half])
        rows = pd.concat([
            planted(falling(names), score="average_drop", spec="drop/1"),
            planted(falling(names[::-1]), score="average_drop@mine", spec="dropmine/1"),
        ])  # fmt: skip
        found = only(sections(rows, made, "score-cam-2020:table1"))
        assert found.score == "average_drop@mine" and not found.reading.another

    def test_another_fill_does_not_answer(self) -> None:
        made = manifest(PRINTED, [metric("perturbation", PERTURBATION | {"fill": "mean"}, "auc_d@label")])
        (section,) = sections(planted(falling(PRINTED)), made)
        assert section.comparisons == ()
        assert section.missing["auc_d"] == "not measured (auc_d@label, auc_d)"


ALPHAS = {  # label -> what differs from scan's defaults
    "scan[alpha=2]": {"alpha": 2.0},
    "scan": {},
    "mine": {"alpha": 8.0, "width": 0.25},
    "scan[alpha=16]": {"alpha": 16.0},
    "scan[alpha=8,blur=0]": {"alpha": 8.0, "blur": 0.0},
}


class TestSettings:
    """An ablation: lines of one explainer, each a printed setting by its parameters."""

    def run(self, lines: Mapping[str, Mapping[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Rows and manifest of lines of `scan`, in falling order."""
        defaults = {"alpha": 4.0, "layer": None, "percentile": 95.0, "blur": 1.0, "squash": "sine",
                    "width": 1.0, "fitted": "auto", **SCAN}  # fmt: skip
        rows, made = planted(falling(list(lines))), manifest(list(lines))
        for label, params in lines.items():
            made["explainers"][label] |= {"name": "scan", "params": {**defaults, **params}}
        written = {label: canonical_json(made["explainers"][label]["params"]) for label in lines}
        return rows.assign(params=rows["explainer"].map(written), explainer="scan"), made

    def test_lines_are_found_by_what_defines_the_setting(self) -> None:
        found = only(sections(*self.run(ALPHAS), "scan-2026:table6"))
        assert {beside.method: beside.label for beside in found.methods} == {
            "scan (alpha=4)": "scan", "scan (alpha=8)": "mine", "scan (alpha=2)": "scan[alpha=2]",
            "scan (alpha=16)": "scan[alpha=16]",
        }  # fmt: skip
        assert [beside.published for beside in found.methods] == [37.29, 35.82, 35.26, 31.20]
        assert not found.absent

    def test_settings_without_a_line_are_named(self) -> None:
        found = only(sections(*self.run({**ALPHAS, "mine": {"alpha": 8.0, "blur": 0.5}}), "scan-2026:table6"))
        assert found.absent == {"scan (alpha=8)": "not in this run"}

    def test_the_page_names_settings_and_doubts(self) -> None:
        lines = {"scan": {}, "none": {"percentile": 0.0}, "flat": {"blur": 0.0}, "two": {"percentile": 40.0}}
        text = render_comparison(sections(*self.run(lines), "scan-2026:table8", "scan-2026:table9"))
        assert "`scan (percentile=column2-of-8)`: here `two`; " in text
        assert "the head of the column could not be had" in text
        assert "`scan (without-gradient-mask)`: here `none`; " in text
        assert "several lines of this explainer" not in text

    def test_a_control_of_the_method_is_not_the_method(self) -> None:
        """A map of the reconstruction's error, or from features without a mask, is not what was printed."""
        for control in ({"output": "error"}, {"mask": "none"}):
            found = only(
                sections(*self.run({**ALPHAS, "mine": {"alpha": 8.0, **control}}), "scan-2026:table6")
            )
            assert found.absent == {"scan (alpha=8)": "not in this run"}
            made = manifest(PRINTED)
            made["explainers"]["scan"]["params"] = {**SCAN, **control}
            found = only(sections(planted(falling(PRINTED)), made))
            assert found.absent == {"scan": "not in this run"}


class TestScope:
    def test_families_stand_apart(self) -> None:
        (section,) = sections(planted(falling(PRINTED)), manifest(PRINTED, family="vit"))
        assert section.missing == {"": "the model there is a CNN, here a vision transformer"}
        (section,) = sections(planted(falling(PRINTED)), manifest(PRINTED, family=""))
        assert "a model of unknown family" in section.missing[""]

    def test_the_nearest_images_of_a_table(self) -> None:
        names = ("rollout", "lime", "rise", "gradcam")
        rows = planted(falling(names))
        elsewhere = sections(rows, manifest(names, family="vit"), "scan-2026:table1")
        assert [bool(section.comparisons) for section in elsewhere] == [True, True, True]
        rows["dataset"] = "food-101-sample"
        made = manifest(names, family="vit", dataset="food-101-sample")
        nearest = sections(rows, made, "scan-2026:table1")
        assert [s.figures.images.key for s in nearest if s.comparisons] == ["food-101"]
        assert nearest[0].missing == {"": "other images; the table also has figures for Food-101"}

    def test_what_no_run_has_measured_is_no_section(self) -> None:
        made = manifest(PRINTED)
        made["request"]["datasets"] = ["elsewhere", "shapes"]
        assert [s.cell.dataset for s in sections(planted(falling(PRINTED)), made)] == ["shapes"]

    def test_two_methods_are_no_order(self) -> None:
        names = ("layercam", "gradcam++")
        (section,) = sections(planted(falling(names)), manifest(names))
        assert section.missing["auc_d"] == "fewer than three methods in both (gradcam++, layercam)"

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("scan-2062", "no figures of 'scan-2062' are kept here; did you mean 'scan-2026'"),
            ("scan-2026:table11", "'scan-2026' has no table 'table11'; did you mean 'table1'"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, wanted: str, message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)):
            chosen_figures([wanted])

    def test_too_few_images_are_the_reason_where_they_are(self) -> None:
        names = ("layercam", "gradcam++", "xgradcam")

        def few(name: str, image: int) -> float | None:
            return float(image) if image < 3 else None

        (section,) = sections(planted(falling(names), value=few), manifest(names))
        assert section.missing["auc_d"] == (
            "fewer than three methods in both (none); xgradcam, gradcam++, layercam: has the score on 3 "
            "images; 8 are needed"
        )

    def test_a_table_that_is_asked_for_shows_values_without_an_order(self) -> None:
        """Table 4 has two methods; what stands beside a setting is the score that answers it there."""
        names = ("layercam", "scan")
        metrics = [
            metric("perturbation", PERTURBATION, "auc_d@label", "neg_auc@label", "pos_auc@label"),
            metric("sanity", {}, "sanity_self", "sanity_class_gap"),
        ]
        rows = [
            planted(falling(names), score=score, spec=spec, seed=seed)
            for seed, (score, spec) in enumerate((
                ("auc_d@label", "perturbation/1"), ("neg_auc@label", "perturbation/1"),
                ("pos_auc@label", "perturbation/1"), ("sanity_self", "sanity/1"),
            ))
        ]  # fmt: skip
        table = (pd.concat(rows), manifest(names, metrics), "scan-2026:table4")
        assert not any(section.comparisons for section in sections(*table))
        found = {section.figures.setting: section for section in sections(*table, named=True)}
        shown = {
            setting: {comparison.column.name: comparison.score for comparison in section.comparisons}
            for setting, section in found.items()
        }
        assert shown == {
            "trained": {name: f"{name}@label" for name in ("auc_d", "neg_auc", "pos_auc")},
            "random-weights": {"auc_d": "sanity_self"},
            "random-label": {},
        }
        trained, *_ = found["trained"].comparisons
        assert [(beside.method, beside.published) for beside in trained.methods] == [
            ("scan", 37.29), ("layercam", 36.27),
        ]  # fmt: skip
        mean = rows[0].groupby("explainer")["value"].mean()
        assert [beside.measured[0] for beside in trained.methods] == pytest.approx(
            [mean["scan"], mean["layercam"]], abs=1e-5
        )
        assert all(math.isnan(end) for end in trained.tau) and len(trained.pairs) == 1
        page = render_comparison(list(found.values()))
        assert "1 pair: 0 agree, 1 disagree" in page and "No order of so few: 2 methods, 40 images." in page
        assert "ResNet50V2 on ImageNet" in page and ", random-weights, beside" in page
        assert "what the map of another class loses" in page and "none, too few methods" in page

    def test_what_nulls_score_stands_beside_what_nulls_score(self) -> None:
        """Section 4.1.1 of SCAN: random maps, of a model that is not stated."""
        made = slow_rows.manifest(("gradcam",), ("random",), images=N)
        made["explainers"]["random"]["role"] = "null"
        made["models"]["shapes/resnet"]["family"] = "vit"
        made["metrics"] = [metric("perturbation", PERTURBATION, "neg_auc@label")]
        rows = planted({"gradcam": 30.0, "random": 14.0}, score="neg_auc@label")
        assert not any(section.comparisons for section in sections(rows, made, "scan-2026:section4.1.1"))
        (section,) = sections(rows, made, "scan-2026:section4.1.1", named=True)
        (comparison,) = section.comparisons
        (beside,) = comparison.methods
        assert (comparison.column.name, beside.method, beside.published) == ("neg_auc", "random", 14.16)
        assert beside.measured[0] == pytest.approx(
            rows[rows["explainer"] == "random"]["value"].mean(), abs=1e-5
        )
        page = render_comparison([section])
        assert "Not comparable" in page and "there a model that is not stated" in page
        assert "No order of so few: 1 method, 40 images." in page

    def test_a_source_named_twice_counts_once(self) -> None:
        once = chosen_figures(["score-cam-2020"])
        assert chosen_figures(["score-cam-2020:table3", "score-cam-2020"]) == [once[2], *once[:2]]
        assert len(chosen_figures()) > len(once) == len(publication("score-cam-2020").figures)
