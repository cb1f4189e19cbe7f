"""Boards from planted rows: columns, substitutions, ranks, derived scores, and the files' bytes."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import slow_rows
import slow_stats
from faithmap import leaderboard
from faithmap.columns import column_of, direction, fills, ordered_scores
from faithmap.errors import FaithmapError, RequestError

N = 24


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return slow_rows.run(images=N)


@pytest.fixture(scope="module")
def board(rows: pd.DataFrame) -> pd.DataFrame:
    return leaderboard.build_board(rows, slow_rows.manifest(images=N))


def line(board: pd.DataFrame, explainer: str) -> dict[str, Any]:
    return board[board["explainer"] == explainer].iloc[0].to_dict()


def values(rows: pd.DataFrame, explainer: str, metric: str, params: str = "{}") -> pd.Series:
    chosen = (rows.explainer == explainer) & (rows.metric == metric) & (rows.params == params)
    return rows[chosen].set_index("image_id")["value"].sort_index()


def changed(rows: pd.DataFrame, where: pd.Series, **fields: Any) -> pd.DataFrame:
    copy = rows.copy()
    for name, value in fields.items():
        copy.loc[where, name] = value
    return copy


class TestColumns:
    def test_exact_order(self, board: pd.DataFrame) -> None:
        head = ["model", "dataset", "explainer", "n", "failed", "empty", "auc_d", "neg_auc", "pos_auc",
                "average_drop", "increase", "win", "area", "energy_pg", "ms_per_image", "forwards",
                "backwards", "peak_mb"]  # fmt: skip
        others = ["pos_auc_blur", "pos_auc_noisy_linear", "neg_auc_blur", "neg_auc_noisy_linear",
                  "auc_d_blur", "auc_d_noisy_linear", "pos_auc_label", "neg_auc_label", "auc_d_label",
                  "pos_auc_prob", "neg_auc_prob", "auc_d_prob", "win_share", "energy_pg_corrected",
                  "object_share", "beats_swapped", "beats_rolled"]  # fmt: skip
        expected = [*head, *others]
        for score in [*head[6:], *others]:
            expected += [f"{score}_low", f"{score}_high"]
            if score in ("auc_d", "neg_auc", "pos_auc", "average_drop", "increase", "energy_pg"):
                expected.append(f"{score}_z")
            if score == "auc_d":
                expected += ["auc_d_z_low", "auc_d_z_high"]
        assert list(board.columns) == [*expected, "rank", "rank_low", "rank_high", "tied_with", "status"]

    @pytest.mark.parametrize(
        ("score", "column"),
        [("auc_d@label", "auc_d_label"), ("auc_d@probability", "auc_d_prob"),
         ("pos_auc@blur", "pos_auc_blur"), ("auc_d@label-blur", "auc_d_label_blur"), ("auc_d", "auc_d"),
         ("average_drop@half-muted", "average_drop_half_muted")],
    )  # fmt: skip
    def test_names(self, score: str, column: str) -> None:
        assert column_of(score) == column

    def test_direction(self) -> None:
        manifest = slow_rows.manifest()
        ways = {"auc_d@label": "higher", "pos_auc_blur": "lower", "pos_auc@blur": "lower", "area": "none",
                "ms_batch": "lower", "energy_pg_corrected": "higher", "else": "none"}  # fmt: skip
        assert {name: direction(name, manifest) for name in ways} == ways

    def test_registry_order_then_the_rest(self) -> None:
        manifest = {"metrics": [{"scores": {"b": "higher", "a@x": "none", "a": "none"}}]}
        assert ordered_scores(["z", "a@y", "a", "a@x", "b"], manifest) == ["b", "a@x", "a", "a@y", "z"]

    def test_only_fills_of_perturbation_count(self) -> None:
        entries = [{"fill": "grey", "scores": {"insertion": "higher"}},
                   {"fill": "mean", "scores": {"auc_d": "higher"}},
                   {"fill": "black", "scores": {"auc_d@black": "higher"}}]  # fmt: skip
        main, known = fills({"metrics": entries})
        assert main == "mean"
        assert "grey" not in known

    def test_one_line_per_explainer_in_order_of_the_request(self, board: pd.DataFrame) -> None:
        assert list(board["explainer"]) == [*slow_rows.METHODS, *slow_rows.CONTROLS]


class TestCells:
    def test_a_cell_is_the_mean_of_its_rows(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        for metric in ("auc_d", "pos_auc@label", "average_drop", "increase", "energy_pg", "forwards"):
            expected = values(rows, "gradcam", metric).mean()
            assert line(board, "gradcam")[column_of(metric)] == pytest.approx(expected, abs=1e-5)

    def test_draws_of_a_null_are_averaged_per_image(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        draws = [values(rows, "random-grid", "auc_d", slow_rows.canonical({"draw": k})) for k in range(2)]
        means = (draws[0] + draws[1]) / 2
        found = line(board, "random-grid")
        assert found["auc_d"] == pytest.approx(means.mean())
        low, high = slow_stats.bca_interval(list(means), 0.95, 2000, 0)
        assert (found["auc_d_low"], found["auc_d_high"]) == pytest.approx((low, high), abs=1e-6)

    def test_hits_have_wilson_intervals(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        hits = values(rows, "scan", "increase").sum() / 100
        low, high = slow_stats.wilson(hits, N, 0.95)
        found = line(board, "scan")
        assert (found["increase_low"], found["increase_high"]) == pytest.approx((100 * low, 100 * high))

    def test_times_are_medians_with_quartiles(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        times = values(rows, "scan", "ms_per_image")
        found = line(board, "scan")
        expected = times.quantile([0.5, 0.25, 0.75]).tolist()
        measured = [found["ms_per_image"], found["ms_per_image_low"], found["ms_per_image_high"]]
        assert measured == pytest.approx(expected, abs=1e-5)

    def test_times_with_all_repetitions_show_their_quartiles(self, rows: pd.DataFrame) -> None:
        where = (rows.explainer == "scan") & (rows.metric == "ms_per_image")
        readings = [[float(value), 2.0 * float(value), 4.0 * float(value)] for value in rows[where]["value"]]
        kept = rows.assign(curve=rows["curve"].astype(object) if "curve" in rows else None)
        kept.loc[where, "curve"] = pd.Series(readings, index=kept.index[where])
        found = line(leaderboard.build_board(kept, slow_rows.manifest(images=N)), "scan")
        expected = np.quantile(np.ravel(readings), [0.5, 0.25, 0.75])
        measured = [found["ms_per_image"], found["ms_per_image_low"], found["ms_per_image_high"]]
        assert measured == pytest.approx(expected.tolist(), abs=1e-5)

    def test_peak_memory_is_the_largest(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        assert line(board, "scan")["peak_mb"] == values(rows, "scan", "peak_mb").max()

    def test_not_measured_is_blank(self, board: pd.DataFrame) -> None:
        assert math.isnan(line(board, "random")["ms_per_image"])

    def test_skipped_rows_are_left_out(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        energy = values(rows, "scan", "energy_pg")
        assert energy.isna().any()
        assert line(board, "scan")["energy_pg"] == pytest.approx(energy.mean(), abs=1e-5)

    def test_corrected_energy_is_a_ratio_of_sums(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        energy, share = values(rows, "scan", "energy_pg") / 100, values(rows, "scan", "object_share") / 100
        known = energy.notna()
        expected = 100 * (energy - share)[known].sum() / (1 - share)[known].sum()
        found = line(board, "scan")
        assert found["energy_pg_corrected"] == pytest.approx(expected, abs=1e-4)
        assert found["energy_pg_corrected_low"] < expected < found["energy_pg_corrected_high"]

    def test_effects(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        for metric, sign in (("auc_d", 1), ("pos_auc", -1), ("average_drop", -1), ("increase", 1)):
            null = (
                sum(values(rows, "random-grid", metric, slow_rows.canonical({"draw": k})) for k in (0, 1)) / 2
            )
            gap = sign * (values(rows, "scan", metric) - null)
            assert line(board, "scan")[f"{metric}_z"] == pytest.approx(gap.mean() / gap.std(), rel=1e-4)
        found = line(board, "scan")
        assert found["auc_d_z_low"] < found["auc_d_z"] < found["auc_d_z_high"]
        assert math.isnan(line(board, "random-grid")["auc_d_z"])

    def test_beats_its_own_moved_maps(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        own = values(rows, "gradcam", "auc_d")
        moved = sum(
            values(rows, "gradcam", "auc_d", slow_rows.canonical({"null": "swapped", "draw": k}))
            for k in (0, 1)
        )
        expected = 100 * ((own > moved / 2) + 0.5 * (own == moved / 2)).mean()
        found = line(board, "gradcam")
        assert found["beats_swapped"] == pytest.approx(expected)
        assert found["beats_swapped_low"] < expected < found["beats_swapped_high"]
        assert math.isnan(line(board, "centre")["beats_rolled"])

    def test_no_columns_without_moved_maps(self) -> None:
        board = leaderboard.build_board(slow_rows.run(images=6, moved=False), slow_rows.manifest(images=6))
        assert "beats_swapped" not in board.columns


class TestWin:
    def test_slow_rewrite(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        drops = np.array([values(rows, name, "average_drop") for name in slow_rows.METHODS])
        for place, name in enumerate(slow_rows.METHODS):
            assert line(board, name)["win"] == pytest.approx(100 * slow_stats.win(drops, place), abs=1e-4)
        assert board["win_share"].sum() == pytest.approx(100)

    def test_controls_do_not_take_part(self, board: pd.DataFrame) -> None:
        assert board[board.explainer.isin(slow_rows.CONTROLS)][["win", "win_share"]].isna().all(axis=None)

    def test_field_is_named(self, rows: pd.DataFrame) -> None:
        (facts,) = leaderboard.cell_facts(rows, slow_rows.manifest(images=N))
        assert facts.win_field == slow_rows.METHODS


class TestStatus:
    def test_empty_and_failed_score_as_the_null(self, rows: pd.DataFrame) -> None:
        own = (rows.explainer == "gradcam") & (rows.params == "{}") & ~rows.metric.isin(
            [*slow_rows.COSTS, "object_share"]
        )  # fmt: skip
        void = changed(rows, own & (rows.image_id == "img00003"), value=np.nan, status="empty", curve=None)
        void = changed(void, own & (rows.image_id == "img00004"), value=np.nan, status="failed", curve=None)
        found = line(leaderboard.build_board(void, slow_rows.manifest(images=N)), "gradcam")
        assert (found["empty"], found["failed"]) == (1, 1)
        for metric in ("auc_d", "auc_d@label", "average_drop"):
            expected = values(rows, "gradcam", metric)
            for image in ("img00003", "img00004"):
                draws = [
                    values(rows, "random-grid", metric, slow_rows.canonical({"draw": k})) for k in (0, 1)
                ]
                expected[image] = (draws[0][image] + draws[1][image]) / 2
            assert found[column_of(metric)] == pytest.approx(expected.mean(), abs=1e-5)
        energy = values(rows, "gradcam", "energy_pg")
        for image in ("img00003", "img00004"):
            energy[image] = values(rows, "gradcam", "object_share")[image]
        assert found["energy_pg"] == pytest.approx(energy.mean(), abs=1e-5)

    def test_many_failures_are_listed_not_ranked(self, rows: pd.DataFrame) -> None:
        where = (rows.explainer == "scan") & (rows.params == "{}") & (rows.image_id == "img00001")
        broken = changed(rows, where, value=np.nan, status="failed", reason="it broke")
        board = leaderboard.build_board(broken, slow_rows.manifest(images=N))
        found = line(board, "scan")
        assert found["status"] == f"not ranked: {100 / N:.1f}% failed"
        assert pd.isna(found["rank"])
        assert found["auc_d"] > 0
        assert sorted(board["rank"].dropna()) == [1, 2, 3]

    def test_another_metric_that_fails_costs_no_rank(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        where = rows.metric == "energy_pg"
        broken = changed(rows, where, value=np.nan, status="failed", reason="it broke")
        found = leaderboard.build_board(broken, slow_rows.manifest(images=N))
        assert line(found, "scan")["failed"] == N
        for name in ("rank", "rank_low", "rank_high"):
            pd.testing.assert_series_equal(found[name], board[name])

    def test_a_nan_that_claims_to_be_ok_is_a_failure(self, rows: pd.DataFrame) -> None:
        where = (rows.explainer == "scan") & (rows.metric == "auc_d") & (rows.image_id == "img00001")
        board = leaderboard.build_board(changed(rows, where, value=np.nan), slow_rows.manifest(images=N))
        assert line(board, "scan")["failed"] == 1

    def test_not_defined_for_the_model(self, rows: pd.DataFrame) -> None:
        where = rows.explainer == "scan"
        skipped = changed(rows, where, value=np.nan, status="skipped", reason="needs attention", curve=None)
        found = line(leaderboard.build_board(skipped, slow_rows.manifest(images=N)), "scan")
        assert found["status"] == "skipped: needs attention"
        assert math.isnan(found["auc_d"])
        assert pd.isna(found["failed"])
        assert found["n"] == N

    def test_one_row_for_a_whole_skipped_method(self, rows: pd.DataFrame) -> None:
        first = rows[rows.explainer == "scan"].iloc[:1].assign(
            metric="", image_id="", status="skipped", reason="no", value=np.nan
        )  # fmt: skip
        told = pd.concat([rows[rows.explainer != "scan"], first])
        found = line(leaderboard.build_board(told, slow_rows.manifest(images=N)), "scan")
        assert found["status"] == "skipped: no"

    def test_no_rows(self, rows: pd.DataFrame) -> None:
        board = leaderboard.build_board(rows[rows.explainer != "scan"], slow_rows.manifest(images=N))
        assert line(board, "scan")["status"] == "not ranked: no rows"

    def test_unreliable(self, rows: pd.DataFrame) -> None:
        manifest = slow_rows.manifest(images=N)
        manifest["explainers"]["scan"]["reliable"] = False
        assert line(leaderboard.build_board(rows, manifest), "scan")["status"] == "not ranked: unreliable"

    def test_unfinished(self, rows: pd.DataFrame) -> None:
        half = rows[(rows.explainer != "scan") | (rows.image_id < "img00012")]
        found = line(leaderboard.build_board(half, slow_rows.manifest(images=N)), "scan")
        assert found["status"] == "not ranked: auc_d missing on 12 of 24 images"

    def test_unreadable_images_count_for_nobody(self, rows: pd.DataFrame) -> None:
        manifest = slow_rows.manifest(images=N + 2)
        manifest["datasets"]["shapes"]["unreadable"] = 2
        unread = rows.iloc[:2].assign(
            explainer="", metric="", image_id=["x", "y"], status="failed", value=np.nan, params=""
        )
        board = leaderboard.build_board(pd.concat([rows, unread]), manifest)
        assert set(board["n"]) == {N}
        assert line(board, "scan")["status"] == "ok"

    def test_controls_and_nulls(self, board: pd.DataFrame) -> None:
        assert [line(board, name)["status"] for name in slow_rows.CONTROLS] == ["control", "null", "null"]
        assert board[board.status != "ok"]["rank"].isna().all()

    def test_missing_null(self, rows: pd.DataFrame) -> None:
        where = (rows.explainer == "scan") & (rows.params == "{}") & (rows.image_id == "img00001")
        void = changed(rows, where & (rows.metric == "average_drop"), value=np.nan, status="empty")
        alone = void[~void.explainer.isin(["random-grid", "random"])]
        found = line(
            leaderboard.build_board(alone, slow_rows.manifest(controls=["centre"], images=N)), "scan"
        )
        expected = values(rows, "scan", "average_drop").drop("img00001").mean()
        assert found["average_drop"] == pytest.approx(expected, abs=1e-5)
        assert math.isnan(found["auc_d_z"])

    def test_null_outside_the_request_still_calibrates(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        unseen = leaderboard.build_board(rows, slow_rows.manifest(controls=["centre"], images=N))
        assert line(unseen, "scan")["auc_d_z"] == line(board, "scan")["auc_d_z"]
        assert "random-grid" not in set(unseen["explainer"])


class TestRanks:
    def test_planted_order(self, board: pd.DataFrame) -> None:
        ranks = {name: line(board, name)["rank"] for name in slow_rows.METHODS}
        assert ranks["scan"] == 1
        assert ranks["saliency"] == 4

    def test_near_equals_share_a_letter(self, board: pd.DataFrame) -> None:
        letters = {name: set(line(board, name)["tied_with"]) for name in slow_rows.METHODS}
        assert letters["gradcam"] & letters["layercam"]
        assert not letters["scan"] & letters["saliency"]

    def test_order_of_rows_changes_nothing(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        shuffled = leaderboard.build_board(rows.sample(frac=1, random_state=1), slow_rows.manifest(images=N))
        assert leaderboard.board_csv(shuffled) == leaderboard.board_csv(board)

    def test_another_method_leaves_the_intervals_alone(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        fewer = leaderboard.build_board(rows, slow_rows.manifest(methods=("scan", "gradcam"), images=N))
        for column in ("auc_d", "auc_d_low", "auc_d_high", "auc_d_z_low", "energy_pg_corrected_low"):
            assert line(fewer, "scan")[column] == line(board, "scan")[column]

    def test_labels_tell_parameters_apart(self, rows: pd.DataFrame) -> None:
        other = rows[rows.explainer == "gradcam"].copy()
        other["explainer"] = "scan"
        other["params"] = [text.replace("{", '{"alpha":0.5,').replace(",}", "}") for text in other["params"]]
        manifest = slow_rows.manifest(methods=("scan", "scan[alpha=0.5]", "gradcam"), images=N)
        manifest["explainers"]["scan[alpha=0.5]"] |= {"name": "scan", "params": {"alpha": 0.5}}
        board = leaderboard.build_board(pd.concat([rows, other]), manifest)
        assert line(board, "scan[alpha=0.5]")["auc_d"] == line(board, "gradcam")["auc_d"]
        assert line(board, "scan")["auc_d"] != line(board, "gradcam")["auc_d"]
        assert line(board, "scan[alpha=0.5]")["rank"] == line(board, "gradcam")["rank"]


class TestSmallRuns:
    def test_one_image(self, tmp_path: Path) -> None:
        rows, manifest = slow_rows.run(images=1, moved=False), slow_rows.manifest(images=1)
        board = leaderboard.build_board(rows, manifest)
        assert math.isnan(line(board, "scan")["auc_d_low"])
        assert set(board["rank_high"].dropna()) == {4}
        assert leaderboard.write_boards(rows, manifest, tmp_path, figures=False)

    def test_one_method(self) -> None:
        manifest = slow_rows.manifest(methods=["gradcam"], controls=[], images=6)
        board = leaderboard.build_board(slow_rows.run({"gradcam": (0.5, 3)}, images=6), manifest)
        assert (board["rank"].item(), board["rank_high"].item(), board["tied_with"].item()) == (1, 1, "a")
        assert math.isnan(board["win"].item())

    def test_no_objects(self) -> None:
        rows = slow_rows.run(images=6, energy=False)
        board = leaderboard.build_board(rows[rows.metric != "object_share"], slow_rows.manifest(images=6))
        assert board["energy_pg"].isna().all()
        assert "energy_pg_corrected" not in board.columns

    def test_no_rows_at_all(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        manifest = slow_rows.manifest(images=N)
        board = leaderboard.build_board(rows.iloc[:0], manifest)
        assert len(board) == 7
        assert board["auc_d"].isna().all()
        leaderboard.write_boards(rows.iloc[:0], manifest, tmp_path)

    def test_rows_without_curves(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        written = leaderboard.write_boards(rows.drop(columns="curve"), slow_rows.manifest(images=N), tmp_path)
        assert not [path for path in written if path.name.startswith("curves")]


class TestRequests:
    def test_missing_columns(self, rows: pd.DataFrame) -> None:
        with pytest.raises(RequestError, match="status"):
            leaderboard.build_board(rows.drop(columns="status"), slow_rows.manifest())

    def test_contradicting_rows(self, rows: pd.DataFrame) -> None:
        with pytest.raises(FaithmapError, match="two rows give the same score"):
            leaderboard.build_board(pd.concat([rows, rows.iloc[:1]]), slow_rows.manifest(images=N))

    def test_rows_of_an_older_metric_are_passed_over(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        old = rows[rows.metric == "auc_d"].assign(spec="perturbation-0", value=1.0)
        mixed = leaderboard.build_board(pd.concat([old, rows]), slow_rows.manifest(images=N))
        assert leaderboard.board_csv(mixed) == leaderboard.board_csv(board)


class TestFillReversals:
    @pytest.fixture
    def reversed_rows(self, rows: pd.DataFrame) -> pd.DataFrame:
        def swap(name: str, like: str, frame: pd.DataFrame) -> None:
            where = (frame.explainer == name) & (frame.metric == "auc_d@blur") & (frame.params == "{}")
            frame.loc[where, "value"] = values(rows, like, "auc_d@blur").to_numpy()

        frame = rows.copy()
        swap("scan", "saliency", frame)
        swap("saliency", "scan", frame)
        return frame

    def test_found(self, reversed_rows: pd.DataFrame) -> None:
        found = leaderboard.fill_reversals(reversed_rows, slow_rows.manifest(images=N))
        pair = (found["first"] == "scan") & (found["second"] == "saliency") & (found["fill"] == "blur")
        (first,) = found[pair].to_dict("records")
        assert first["significant"]
        assert first["significant_there"]
        assert first["difference"] > 0 > first["difference_there"]

    def test_label_variants_are_no_fills(self, rows: pd.DataFrame) -> None:
        found = leaderboard.fill_reversals(rows, slow_rows.manifest(images=N))
        assert set(found["fill"]) <= {"blur", "noisy-linear"}


class TestAcrossCells:
    def test_ranks_and_agreement(self) -> None:
        cells = (("shapes/resnet", "shapes"), ("shapes/vit", "shapes"))
        rows = slow_rows.run(images=N, cells=cells, moved=False, variants=())
        manifest = slow_rows.manifest(models=[model for model, _ in cells], images=N)
        table = leaderboard.across_cells(leaderboard.build_board(rows, manifest))
        assert list(table.columns) == [
            "explainer", "shapes/resnet / shapes", "shapes/vit / shapes", "consistent", "above_null",
        ]  # fmt: skip
        best = table.iloc[0]
        assert best["explainer"] == "scan"
        assert best["consistent"] == 100
        assert best["above_null"] == "2/2"
        assert best["shapes/vit / shapes"].startswith("1 (1")


class TestFiles:
    def test_equal_rows_give_equal_bytes(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        manifest = slow_rows.manifest(images=N)
        first = leaderboard.write_boards(rows, manifest, tmp_path / "a")
        second = leaderboard.write_boards(rows.iloc[::-1], manifest, tmp_path / "b")
        assert [path.name for path in first] == [path.name for path in second]
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()

    def test_what_is_written(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        written = leaderboard.write_boards(rows, slow_rows.manifest(images=N), tmp_path)
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert found == {path.relative_to(tmp_path).as_posix() for path in written}
        assert found == {"leaderboard.csv", "leaderboard.md", "figures/curves-shapes-resnet-shapes.png",
                         "figures/cost-shapes-resnet-shapes.png"}  # fmt: skip

    def test_without_figures(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        leaderboard.write_boards(rows, slow_rows.manifest(images=N), tmp_path, figures=False)
        assert not (tmp_path / "figures").exists()
        assert "![" not in (tmp_path / "leaderboard.md").read_text()

    def test_csv_fields(self, rows: pd.DataFrame, board: pd.DataFrame) -> None:
        text = leaderboard.board_csv(board)
        assert "\r" not in text
        table = list(csv.DictReader(io.StringIO(text)))
        scan, random = table[0], table[-1]
        assert scan["auc_d"] == f"{values(rows, 'scan', 'auc_d').mean():.4f}"
        assert (scan["n"], scan["rank"], scan["status"]) == (str(N), "1", "ok")
        assert (random["rank"], random["ms_per_image"], random["tied_with"]) == ("", "", "")
        assert "nan" not in text.lower()

    def test_no_negative_zero(self) -> None:
        assert leaderboard.board_csv(pd.DataFrame({"x": [-1e-9, -0.5]})) == "x\n0.0000\n-0.5000\n"

    def test_nothing_is_left_behind_by_a_failed_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            leaderboard._write_atomic(tmp_path / "x.csv", b"x")
        assert list(tmp_path.iterdir()) == []


def test_a_large_board_is_built_in_seconds() -> None:
    names = [f"m{k:02d}" for k in range(12)]
    plan = {name: (k / 12, 3.0) for k, name in enumerate(names)}
    cells = (("shapes/resnet", "shapes"), ("shapes/vit", "shapes"))
    rows = slow_rows.run(plan, images=64, cells=cells, moved=False, variants=slow_rows.VARIANTS)
    manifest = slow_rows.manifest(methods=names, controls=["random-grid", "random"], images=64,
                                  models=[model for model, _ in cells])  # fmt: skip
    started = time.process_time()
    board = leaderboard.build_board(rows, manifest)
    assert time.process_time() - started < 6
    assert len(board) == 28
