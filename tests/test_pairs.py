"""One line against all others: differences by hand, planted shifts, errors of the family, and pages."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import slow_rows
from faithmap import pairs
from faithmap.errors import RequestError
from faithmap.evidence import Evidence, read_evidence
from faithmap.report.pairs import pairs_table, render_pairs

SHIFTS = {"gradcam": 0.0, "scan": 3.0, "layercam": -3.0, "saliency": 0.0}


def cells_of(rows: pd.DataFrame, **given: Any) -> list[Evidence]:
    return read_evidence(rows, slow_rows.manifest(**given))


def shifted(metric: str = "auc_d", noise: float = 0.0, images: int = 24) -> list[Evidence]:
    """Scores of `gradcam`, and of the others the same plus a number and noise of their own."""
    rows = slow_rows.Rows()
    base = rows.rng.normal(0, 20, images)
    for name, shift in SHIFTS.items():
        own = 0.0 if name == "gradcam" else rows.rng.normal(0, noise, images)
        for image, value in enumerate(base + shift + own):
            rows.add(name, f"img{image:05d}", metric, float(value))
    return cells_of(rows.frame(), methods=tuple(SHIFTS), controls=(), images=images)


def as_lines_of(methods: dict[str, str], cells: list[Evidence]) -> list[Evidence]:
    """The same evidence, with some labels as lines of one method."""
    manifest = dict(cells[0].manifest)
    entries = manifest["explainers"]
    named = {label: {**entries[label], "name": method} for label, method in methods.items()}
    manifest["explainers"] = {**entries, **named}
    return [dataclasses.replace(cell, manifest=manifest) for cell in cells]


def by_label(lines: pd.DataFrame) -> dict[str, Any]:
    return {line["explainer"]: line for line in lines.to_dict("records")}


class TestDifferences:
    def test_they_are_the_means_over_the_images_that_both_have(self) -> None:
        rows = slow_rows.run()
        lost = rows["explainer"].eq("layercam") & rows["metric"].eq("energy_pg")
        rows.loc[lost & rows["image_id"].isin(["img00003", "img00004"]), ["value", "status"]] = [
            np.nan,
            "skipped",
        ]
        found = by_label(pairs.differences(cells_of(rows), "gradcam", "energy_pg"))
        assert set(found) == {"scan", "layercam", "saliency", "centre", "random-grid", "random"}
        ours = rows[rows["metric"].eq("energy_pg") & ~rows["params"].str.contains("null")]
        for label, line in found.items():
            apart = []
            for image in sorted(set(ours["image_id"])):
                here = ours[ours["image_id"] == image]
                one, other = (here.loc[here["explainer"] == name, "value"] for name in (label, "gradcam"))
                if one.notna().all() and other.notna().all():
                    apart.append(one.mean() - other.mean())
            assert line["n"] == len(apart) == (19 if label == "layercam" else 21)
            assert line["difference"] == pytest.approx(np.mean(apart), abs=1e-5)
            assert line["difference_low"] < line["difference"] < line["difference_high"]

    def test_the_highest_comes_first_and_a_shift_has_no_width(self) -> None:
        lines = pairs.differences(shifted(), "gradcam")
        assert list(lines["explainer"]) == ["scan", "saliency", "layercam"]
        assert list(lines["difference"]) == list(lines["difference_low"]) == list(lines["difference_high"])
        assert list(lines["difference"]) == pytest.approx([3, 0, -3], abs=1e-5)
        assert list(lines["verdict"]) == ["better", "", "worse"]
        assert lines["p"][1] == lines["p_holm"][1] == 1

    @pytest.mark.parametrize(
        ("score", "above", "below"), [("average_drop", "worse", "better"), ("area", "higher", "lower")]
    )
    def test_the_verdict_knows_which_way_is_better(self, score: str, above: str, below: str) -> None:
        assert list(pairs.differences(shifted(score), "gradcam", score)["verdict"]) == [above, "", below]

    def test_its_p_value_is_that_of_all_sign_flips(self) -> None:
        (cell,) = shifted(noise=4.0, images=9)
        found = by_label(pairs.differences([cell], "gradcam"))
        for label, line in found.items():
            apart = cell.score(label, "auc_d") - cell.score("gradcam", "auc_d")
            means = [abs(np.mean(apart * flips)) for flips in itertools.product((-1, 1), repeat=apart.size)]
            exact = np.mean(np.array(means) >= abs(apart.mean()) - 1e-9)
            assert line["p"] == pytest.approx(exact, abs=0.02)

    def test_a_column_of_the_board_names_a_score_too(self) -> None:
        cells = cells_of(slow_rows.run())
        by_row, by_column = (
            pairs.differences(cells, "scan", name) for name in ("auc_d@label", "auc_d_label")
        )
        pd.testing.assert_frame_equal(by_row, by_column)
        assert set(by_row["score"]) == {"auc_d@label"}

    def test_a_control_may_be_the_baseline(self) -> None:
        found = by_label(pairs.differences(cells_of(slow_rows.run()), "centre"))
        assert found["scan"]["verdict"] == "better" and found["random-grid"]["verdict"] == "worse"
        assert found["random-grid"]["status"] == "null"

    def test_where_the_baseline_is_missing_it_is_said(self) -> None:
        where = (("shapes/resnet", "shapes"), ("shapes/vit", "shapes"))
        rows = slow_rows.run(cells=where)
        rows = rows[~(rows["model"].eq("shapes/vit") & rows["explainer"].eq("scan"))]
        cells = cells_of(rows, models=("shapes/resnet", "shapes/vit"))
        assert set(pairs.differences(cells, "scan")["model"]) == {"shapes/resnet"}
        (said,) = pairs.without_baseline(cells, "scan")
        assert said == "shapes/vit on shapes: 'scan' has no auc_d, not ranked: no rows"
        left = pairs.differences(cells, "gradcam")
        (line,) = left[left["model"].eq("shapes/vit") & left["explainer"].eq("scan")].to_dict("records")
        assert line["n"] == 0 and math.isnan(line["difference"]) and math.isnan(line["p_holm"])
        assert line["verdict"] == "" and left["explainer"].iloc[-1] == "scan"

    @pytest.mark.parametrize(
        ("label", "score", "message"),
        [
            ("gradcan", "auc_d", "no explainer 'gradcan' to set the others against; did you mean 'gradcam'"),
            ("scan", "aucd", "no score 'aucd' of single images; did you mean 'auc_d'"),
            ("scan", "ms_per_image", "'ms_per_image' is a cost"),
            ("scan", "fit_seconds", "'fit_seconds' is a cost"),
            ("scan", "win", "no score 'win' of single images; known are: area, auc_d"),
        ],
    )
    def test_wrong_requests(self, label: str, score: str, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            pairs.differences(cells_of(slow_rows.run()), label, score)

    def test_a_run_of_one_line(self) -> None:
        rows = slow_rows.run(plan={"scan": (0.9, 12.0)})
        cells = cells_of(rows[rows["explainer"] == "scan"], methods=("scan",), controls=())
        with pytest.raises(
            RequestError, match="no line beside 'scan' to set against it; run another explainer"
        ):
            pairs.differences(cells, "scan")

    def test_a_baseline_without_any_value(self) -> None:
        rows = slow_rows.run()
        cells = cells_of(rows[rows["explainer"] != "scan"])
        with pytest.raises(RequestError, match="'scan' has no auc_d on any model and dataset"):
            pairs.differences(cells, "scan")


#: Labels that TestWithin takes as lines of another method.
LINES = {"layercam": "gradcam", "saliency": "scan", "centre": "scan"}


class TestWithin:
    def test_each_line_is_set_against_the_first_of_its_method(self) -> None:
        cells = as_lines_of(LINES, cells_of(slow_rows.run()))
        found = by_label(pairs.within(cells, "average_drop"))
        asked = {label: line["against"] for label, line in found.items()}
        assert asked == {"layercam": "gradcam", "saliency": "scan", "centre": "scan"}
        for label, first in asked.items():
            alone = by_label(pairs.differences(cells, first, "average_drop"))[label]
            same = ("difference", "difference_low", "difference_high", "p", "n", "status", "score")
            assert [found[label][key] for key in same] == [alone[key] for key in same]

    def test_the_lines_of_all_methods_are_one_family(self) -> None:
        lines = pairs.within(as_lines_of(LINES, cells_of(slow_rows.run())))
        by_p = sorted(lines.to_dict("records"), key=lambda line: line["p"])
        highest = 0.0
        for place, line in enumerate(by_p):
            highest = max(highest, min(1.0, line["p"] * (len(by_p) - place)))
            assert line["p_holm"] == pytest.approx(highest)

    def test_where_the_first_was_not_measured_the_next_takes_its_place(self) -> None:
        rows = slow_rows.run()
        cells = as_lines_of({"layercam": "gradcam", "saliency": "gradcam"},
                            cells_of(rows[rows["explainer"] != "gradcam"]))  # fmt: skip
        (line,) = pairs.within(cells).to_dict("records")
        assert (line["explainer"], line["against"]) == ("saliency", "layercam")
        assert pairs.unmeasured(cells) == ["shapes/resnet on shapes: gradcam (not ranked: no rows)"]

    def test_what_is_missing_for_one_reason_is_told_in_one_sentence(self) -> None:
        rows = slow_rows.run()
        gone = rows["explainer"].isin(["gradcam", "layercam", "saliency"])
        cells = as_lines_of(LINES, cells_of(rows[~gone]))
        (line,) = pairs.within(cells).to_dict("records")
        assert (line["explainer"], line["against"]) == ("centre", "scan")
        (said,) = pairs.unmeasured(cells)
        assert said == "shapes/resnet on shapes: gradcam, layercam, saliency (not ranked: no rows)"

    def test_a_run_without_second_lines(self) -> None:
        with pytest.raises(RequestError, match="no method of the run has two lines with auc_d; give one"):
            pairs.within(cells_of(slow_rows.run()))

    def test_each_line_of_the_pages_names_its_baseline(self) -> None:
        cells = as_lines_of(LINES, cells_of(slow_rows.run()))
        page = render_pairs(pairs.within(cells), pairs.unmeasured(cells))
        console = Console(width=120, file=io.StringIO())
        console.print(pairs_table(pairs.within(cells)))
        for text in (page, console.file.getvalue()):
            assert "AUC-D: differences from the first line of each method" in text and "From" in text
        assert "| `layercam` | `gradcam` |" in page and "| *`centre`* | `scan` |" in page

    def test_a_narrow_terminal_cuts_no_number(self) -> None:
        console = Console(width=80, file=io.StringIO())
        lines = pairs.within(as_lines_of(LINES, cells_of(slow_rows.run())))
        lines["explainer"] += " (with a long label)"
        console.print(pairs_table(lines))
        shown = console.file.getvalue()
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown and "Verdict" in shown
        for line in lines.to_dict("records"):
            assert f"{line['difference']:.1f} [{line['difference_low']:.1f}, " in shown

    def test_lines_of_one_method_alone_read_like_those_against_a_label(self) -> None:
        cells = as_lines_of({"layercam": "gradcam"}, cells_of(slow_rows.run()))
        page = render_pairs(pairs.within(cells), [])
        assert page.startswith("# AUC-D: differences from `gradcam`\n") and "From" not in page


class TestPages:
    def test_both_have_every_line_of_every_cell(self) -> None:
        where = (("shapes/resnet", "shapes"), ("shapes/vit", "shapes"))
        rows = slow_rows.run(cells=where)
        rows = rows[~(rows["model"].eq("shapes/vit") & rows["explainer"].eq("saliency"))]
        cells = cells_of(rows, models=[model for model, _ in where])
        lines = pairs.differences(cells, "gradcam")
        page = render_pairs(lines, ["shapes/b|d on shapes: 'gradcam' has no auc_d"])
        console = Console(width=100, file=io.StringIO())
        console.print(pairs_table(lines))
        for text in (page, console.file.getvalue()):
            assert "AUC-D: differences from" in text and text.count("24 images") == 2
            assert text.count("layercam") == 2 and text.count("saliency") == 2
            assert "better" in text and "worse" in text and "<0.001" in text
        assert "| *`random`* |" in page and "| *`saliency`* |  |  |  | not ranked |" in page
        assert page.endswith("Not compared: shapes/b\\|d on shapes: 'gradcam' has no auc\\_d.\n")
