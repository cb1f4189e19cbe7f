"""A run beside the papers' tables: planted orders, missing variants, names, and the page."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fits import typed
from rich.console import Console

import faithmap
import slow_comparison
import slow_rows
from faithmap import comparing, stats
from faithmap.comparing import Comparison, Section, chosen_figures, compare
from faithmap.errors import RequestError
from faithmap.evidence import read_evidence
from faithmap.publications import publication
from faithmap.records import canonical_json
from faithmap.report.comparison import (
    comparison_table,
    figures_tables,
    incomparable,
    render_comparison,
    requested,
)

N = 40
TABLE = "scan-2026:table2"
PRINTED = ("scan", "layercam", "gradcam++", "xgradcam", "lime", "rise")
PERTURBATION = {"fill": "black", "span": 0.9, "steps": 9}
DROP = {"mute": "soft", "score": "probability", "space": "pixel"}
Values = Callable[[str, int], float | None]


def metric(name: str, params: Mapping[str, Any], *scores: str, variant: str = "") -> dict[str, Any]:
    """A metric's entry in a manifest."""
    return {"name": name, "version": 1, "params": dict(params), "spec": f"{name}{variant}/1",
            "variant": variant, "scores": dict.fromkeys(scores, "higher"), "fallback": {}}  # fmt: skip


def planted(
    means: Mapping[str, float],
    *,
    score: str = "auc_d@label",
    spec: str = "perturbation/1",
    noise: float = 1.0,
    value: Values | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of one score whose means are those given, up to noise that is shared in part."""
    rows = slow_rows.Rows(seed)
    shared = rows.rng.normal(0, 5, N)
    for name, mean in means.items():
        for image in range(N):
            found = mean + shared[image] + rows.rng.normal(0, noise) if value is None else value(name, image)
            rows.add(name, f"img{image:03d}", score, found, spec, status="skipped" if found is None else "ok",
                     reason="no gain" if found is None else "")  # fmt: skip
    return rows.frame()


def manifest(
    methods: Sequence[str],
    metrics: Sequence[dict[str, Any]] = (),
    family: str = "cnn",
    dataset: str = "shapes",
) -> dict[str, Any]:
    """A manifest of these methods on one model."""
    made = slow_rows.manifest(methods, (), datasets=(dataset,), images=N)
    made["models"]["shapes/resnet"]["family"] = family
    made["metrics"] = list(metrics) or [metric("perturbation", PERTURBATION, "auc_d@label")]
    return made


def sections(rows: pd.DataFrame, made: Mapping[str, Any], *wanted: str) -> list[Section]:
    return compare(read_evidence(rows, made), chosen_figures(wanted or (TABLE,)), resamples=300)


def only(found: Sequence[Section]) -> Comparison:
    """The one comparison that there is."""
    (section,) = [section for section in found if section.comparisons]
    (comparison,) = section.comparisons
    return comparison


def falling(names: Sequence[str], step: float = 5.0) -> dict[str, float]:
    """Means that put the names in their order, the first the best."""
    return {name: 50 - step * place for place, name in enumerate(names)}


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
        better = stats.rank_intervals(np.round(table * 2**20) / 2**20, resamples=300, seed=0).better
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
        defaults = {"alpha": 4.0, "layer": None, "percentile": 95.0, "mask": "gradient", "blur": 1.0,
                    "squash": "sine", "width": 1.0, "fitted": "auto"}  # fmt: skip
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
            ("scan-2026:table4", "'scan-2026:table4' cannot be set beside a board: fewer than three methods"),
            ("scan-2026:section4.1.1", "cannot be set beside a board: the model is not stated"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, wanted: str, message: str) -> None:
        with pytest.raises(RequestError, match=re.escape(message)):
            chosen_figures([wanted])

    def test_a_source_named_twice_counts_once(self) -> None:
        once = chosen_figures(["score-cam-2020"])
        assert chosen_figures(["score-cam-2020:table3", "score-cam-2020"]) == [once[2], *once[:2]]
        assert len(chosen_figures()) > len(once) == len(publication("score-cam-2020").figures)


@pytest.fixture(scope="module")
def found() -> list[Section]:
    means = falling(PRINTED)
    means["layercam"], means["gradcam++"] = means["gradcam++"], means["layercam"]
    made = manifest(PRINTED[:-1])
    made["config"] = {"explainers": [{"name": "lime", "n_samples": 250}]}
    return sections(planted(means)[lambda rows: rows["explainer"] != "rise"], made, "scan-2026")


class TestPage:
    def test_it_is_the_same_for_the_same_rows(self) -> None:
        rows = planted(falling(PRINTED))
        shuffled = rows.sample(frac=1, random_state=1)
        made = manifest(PRINTED)
        assert render_comparison(sections(rows, made)) == render_comparison(sections(shuffled, made))

    def test_tables_are_regular(self, found: list[Section]) -> None:
        text = render_comparison(found)
        assert text.endswith("\n") and not text.endswith("\n\n")
        for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1

    def test_it_says_what_it_must(self, found: list[Section]) -> None:
        text = render_comparison(found)
        for said in (
            "A published value carries no interval",
            "| 1 | `scan-2026:table2`, ResNet50V2 on ImageNet | `auc_d` | `shapes/resnet` on `shapes` |",
            "Lee et al. 2026, *SCAN: Visual Explanations with Self-Confidence and Analysis Networks*, "
            "arXiv:2603.06523",
            "| Model | ResNet50V2 | `shapes/resnet`, 0.3 M parameters, weights `ab12cd34ef56ab78` |",
            "| Images | ImageNet, number not stated | `shapes`, 40 images, part eval; other images",
            "| Class explained | not stated | predicted |",
            "every map at the model's own grid (12 × 12)",
            "**Not comparable** as values, because the model is shapes/resnet, there ResNet50V2; the images "
            "are of shapes, there of ImageNet. The order is what is compared.",
            "- `lime`: run with n_samples = 250.",
            "The column is read as perturbation, label (certain).",
            "10 pairs: 9 agree, 1 disagree, 0 not told apart here. τ-b 0.80 [0.80, 0.80], 5 methods,",
            "- `layercam` less `gradcam++`: 0.85 there, −",
            "but not compared: `rise` (not in this run).",
            "- `neg_auc`: not measured (neg\\_auc@label, neg\\_auc).",
            "- not measured (ms\\_per\\_image): `scan-2026:table5`, ResNet50V2 on ImageNet.",
            "- fewer than three methods in the table: `scan-2026:table4`.",
            "- the model there is a vision transformer, here a CNN: `scan-2026:table1`, ViT-B/16 on ImageNet",
        ):
            assert said in text, said

    def test_the_same_architecture_is_said(self, found: list[Section]) -> None:
        section = next(section for section in found if section.figures.model.key == "resnet50v2")
        models = {"timm/resnetv2_50": section.cell.manifest["models"]["shapes/resnet"]}
        made = copy.deepcopy(dict(section.cell.manifest)) | {"models": models}
        cell = replace(section.cell, model="timm/resnetv2_50", manifest=made)
        assert "the same architecture, perhaps with other weights" in render_comparison(
            [replace(section, cell=cell)]
        )

    def test_nothing_to_compare(self) -> None:
        names = ("layercam", "gradcam++")
        text = render_comparison(sections(planted(falling(names)), manifest(names)))
        assert "No published table shares three methods and a score with this run." in text
        assert "fewer than three methods in both (gradcam++, layercam)" in text

    def test_the_terminal_has_a_line_for_each(self, found: list[Section]) -> None:
        table = comparison_table(found)
        assert table.row_count == sum(len(section.comparisons) for section in found) == 3
        assert [column.header.plain for column in table.columns][-3:] == ["Agree", "Disagree", "Not decided"]  # type: ignore[union-attr]


class TestValues:
    """Printed, measured, and whether the two may be compared at all."""

    def made(self, **facts: Any) -> list[Section]:
        section = sections(planted(falling(PRINTED)), manifest(PRINTED))[0]
        return [replace(section, cell=replace(section.cell, **facts))]

    def test_what_is_alike_may_be_compared(self) -> None:
        (section,) = self.made(model="timm/resnetv2_50.a1h_in1k", dataset="imagenet")
        assert incomparable(section) == []
        assert "Values may be compared as far as weights" in render_comparison([section])
        assert figures_tables([section])[0].caption is None

    def test_what_is_not_says_why(self) -> None:
        (section,) = self.made(dataset="imagenet")
        assert incomparable(section) == ["the model is shapes/resnet, there ResNet50V2"]
        (section,) = self.made(model="timm/resnetv2_50")
        assert incomparable(section) == ["the images are of shapes, there of ImageNet"]

    def test_a_terminal_shows_printed_measured_and_difference(self) -> None:
        console = Console(file=io.StringIO(), width=120)
        (drawn,) = figures_tables(self.made())
        console.print(drawn)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert re.search(r"scan +\S +37\.29 +\S +\S+ \[\S+, \S+\] \S +\S*\d+\.\d", said), said
        assert "not comparable: the model is shapes/resnet, there ResNet50V2;" in said

    def test_maps_that_were_reduced_alone_are_named(self) -> None:
        made = manifest(PRINTED)
        made["settings"]["map_grid"] = "native"
        made["explainers"]["lime"]["params"] = {"map_grid": 7}
        rows = planted(falling(PRINTED))
        rows.loc[rows["explainer"] == "lime", "params"] = canonical_json({"map_grid": 7})
        text = render_comparison(sections(rows, made))
        assert "each method's own; `lime` first at 7 cells a side |" in text


class TestInARun:
    """`published` in a request: the run ends beside the tables that it names."""

    def request(self, **changes: Any) -> dict[str, Any]:
        return {
            "run": {"limit": 8, "own_nulls": [], "null_draws": 1, "threads": 1},
            "models": [{"name": "shapes/resnet"}],
            "datasets": [{"name": "shapes"}],
            "explainers": [{"name": name} for name in ("gradcam++", "layercam", "xgradcam")],
            "metrics": [{"name": "perturbation"}],
            "published": [TABLE],
            **changes,
        }

    def test_the_page_stands_beside_the_board(self, tmp_path: Path) -> None:
        done = faithmap.run(self.request(), out=tmp_path / "run", figures=False)
        page = (tmp_path / "run" / "published.md").read_text()
        assert tmp_path / "run" / "published.md" in done.written
        assert "| 1 | `layercam` | 36.27 |" in page and "scan-2026:table3" not in page
        code, _ = typed("leaderboard", tmp_path / "run", "--out", tmp_path / "again")
        assert code == 0
        assert (tmp_path / "again" / "published.md").read_text() == page

    @pytest.mark.parametrize(
        ("published", "sentence"),
        [
            ("scan-2026", "published must list sources or tables"),
            ([1], "published must list sources or tables"),
            (["scan-2027"], "no figures of 'scan-2027' are kept here"),
            (["scan-2026:table4"], "cannot be set beside a board"),
        ],
    )
    def test_a_wrong_name_is_refused_before_anything_runs(
        self, tmp_path: Path, published: Any, sentence: str
    ) -> None:
        with pytest.raises(RequestError) as caught:
            faithmap.run(self.request(published=published), out=tmp_path / "run")
        assert sentence in str(caught.value)
        assert not (tmp_path / "run").exists()
