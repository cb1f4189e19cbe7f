"""What a reader sees: the Markdown, the figures and the table of the terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

import slow_rows
from faithmap import leaderboard
from faithmap.report import _format, terminal
from faithmap.report.figures import cell_figures

N = 24


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return slow_rows.run(images=N)


@pytest.fixture(scope="module")
def board(rows: pd.DataFrame) -> pd.DataFrame:
    return leaderboard.build_board(rows, slow_rows.manifest(images=N))


def written(rows: pd.DataFrame, manifest: dict[str, Any], folder: Path, figures: bool = False) -> str:
    leaderboard.write_boards(rows, manifest, folder, figures=figures)
    return (folder / "leaderboard.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(rows, slow_rows.manifest(images=N), tmp_path_factory.mktemp("board"), figures=True)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as rows of fields."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[[f.strip() for f in re.split(r"(?<!\\)\|", row)[1:-1]] for row in t.splitlines()] for t in found]


class TestMarkdown:
    def test_every_table_is_regular(self, text: str) -> None:
        for table in tables(text):
            assert len({len(row) for row in table}) == 1

    def test_ranked_first_and_in_order(self, text: str) -> None:
        main = tables(text)[0]
        assert main[0][:2] == ["Rank", "Explainer"]
        assert main[2][:2] == ["1&nbsp;(1\N{EN DASH}1)", "`scan`"]
        assert [row[1] for row in main[2:]][-1] == "`saliency`"

    def test_arrows_follow_the_directions(self, text: str) -> None:
        header = " ".join(tables(text)[0][0]).replace("&nbsp;", " ")
        for title in ("AUC-D ↑", "Neg AUC ↑", "Pos AUC ↓", "Drop ↓", "Increase ↑", "Win ↑", "Energy ↑"):
            assert title in header
        assert "Area ↑" not in header
        assert "Area ↓" not in header

    def test_means_carry_intervals(self, text: str, board: pd.DataFrame) -> None:
        scan = board.iloc[0]
        expected = f"**{scan.auc_d:.1f}**<br><sub>[{scan.auc_d_low:.1f},&nbsp;{scan.auc_d_high:.1f}]</sub>"
        assert expected in text

    def test_controls_stand_apart(self, text: str) -> None:
        controls = tables(text)[1]
        assert [row[0] for row in controls[2:]] == ["`centre`", "`random-grid`", "`random`"]
        assert "**" not in str(controls)

    def test_best_by_printed_value_is_bold_ties_too(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        same = rows.copy()
        where = (same.metric == "auc_d") & (same.params == "{}")
        best = same[where & (same.explainer == "scan")]["value"].to_numpy()
        same.loc[where & (same.explainer == "gradcam"), "value"] = best + 1e-3
        main = tables(written(same, slow_rows.manifest(images=N), tmp_path))[0]
        column = main[0].index("AUC-D&nbsp;↑")
        assert [row[1] for row in main[2:] if "**" in row[column]] == ["`gradcam`", "`scan`"]

    def test_conditions(self, text: str) -> None:
        for said in ("24 images.", "87.5% classified as labelled", "starts at 100%", "filled with black",
                     "Energy is scored on 21 images", "at 80% power",
                     "*Win* compares `scan`, `gradcam`"):  # fmt: skip
            assert said in text

    def test_provenance(self, text: str) -> None:
        for said in ("commit `0123456789abcdef", "weights `ab12cd34ef56ab78`", "revision 1", "seed 0",
                     "map grid model", "target predicted", "part eval", "precision fp32", "device cpu",
                     "threads 2", "batch size 16", "faithmap run quickstart", "torch 2.13.0",
                     "2026-01-02T03:04:05+00:00"):  # fmt: skip
            assert said in text
        assert "uncommitted" not in text

    def test_dirty_and_missing_commits(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        manifest = slow_rows.manifest(images=N) | {"dirty": True}
        assert "with uncommitted changes" in written(rows, manifest, tmp_path)
        assert "not from a checkout" in written(rows, manifest | {"commit": None}, tmp_path)

    def test_reasons_are_given_and_harmless(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        skipped = rows.copy()
        where = skipped.explainer == "layercam"
        skipped.loc[where, ["status", "reason"]] = ["skipped", "no <grid>\nof | tokens"]
        skipped.loc[where, "value"] = np.nan
        text = written(skipped, slow_rows.manifest(images=N), tmp_path)
        assert "### Not ranked" in text
        assert "- `layercam`: skipped: no \\<grid\\> of \\| tokens" in text

    def test_failures_are_counted(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        void = rows.copy()
        where = (void.explainer == "scan") & (void.params == "{}") & (void.image_id == "img00002")
        void.loc[where, "status"] = "empty"
        void.loc[where, "value"] = np.nan
        text = written(void, slow_rows.manifest(images=N), tmp_path)
        assert "scored as the reference null: `scan` 1 empty, 0 failed." in text

    def test_reversals_are_listed(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        turned = rows.copy()
        where = (turned.metric == "auc_d@blur") & (turned.explainer == "scan") & (turned.params == "{}")
        turned.loc[where, "value"] = -turned.loc[where, "value"]
        text = written(turned, slow_rows.manifest(images=N), tmp_path)
        assert re.search(
            r"- `scan` leads `saliency` by \d+\.\d under black \(significant\), trails it by", text
        )

    def test_variants_and_cost(self, text: str) -> None:
        variants, cost = tables(text)[2:4]
        assert "AUC-D,&nbsp;label&nbsp;↑" in variants[0]
        assert "rank" not in variants[0]
        assert not [title for title in variants[0] if title.startswith(("Pos", "object"))]
        assert cost[0][1:] == [
            "ms&nbsp;/&nbsp;image&nbsp;↓",
            "Forwards&nbsp;↓",
            "Backwards&nbsp;↓",
            "Peak&nbsp;MB&nbsp;↓",
        ]

    def test_figures_are_shown(self, text: str) -> None:
        assert "](figures/curves-shapes-resnet-shapes.png)" in text
        assert "](figures/cost-shapes-resnet-shapes.png)" in text

    def test_several_cells_get_a_summary(self, tmp_path: Path) -> None:
        cells = (("shapes/resnet", "shapes"), ("shapes/vit", "shapes"))
        several = slow_rows.run(images=8, cells=cells, moved=False, variants=())
        manifest = slow_rows.manifest(models=[model for model, _ in cells], images=8)
        text = written(several, manifest, tmp_path)
        assert "## Ranks across cells" in text
        assert "## `shapes/vit` on `shapes`" in text

    def test_no_local_paths_and_one_final_newline(self, text: str, tmp_path: Path) -> None:
        assert str(tmp_path.parent) not in text
        assert text.endswith("```\n")
        assert not text.endswith("\n\n")


class TestFigures:
    def test_pictures(self, rows: pd.DataFrame, tmp_path: Path) -> None:
        paths = leaderboard.write_boards(rows, slow_rows.manifest(images=N), tmp_path)
        for path in (path for path in paths if path.suffix == ".png"):
            with Image.open(path) as picture:
                assert min(picture.size) > 400
                assert "Software" not in picture.info
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 20

    def test_each_line_has_a_look_of_its_own(self) -> None:
        """As many methods as any board here has, with its nulls and controls."""
        from faithmap.report import figures

        lines: list[dict[str, Any]] = [{"explainer": f"m{i}", "status": "ok"} for i in range(36)]
        lines += [{"explainer": f"c{i}", "status": "control"} for i in range(6)]
        looks = figures._looks(lines)
        assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == len(lines)

    def test_a_score_that_rounds_to_nothing_has_no_sign(self) -> None:
        from faithmap.report import figures

        line = {"explainer": "random", "rank": None, "auc_d": -0.026}
        assert figures._legend_text(line) == "random  0.0"

    def test_style_of_the_user_is_ignored(self, board: pd.DataFrame) -> None:
        import matplotlib as mpl

        from faithmap._curves import Curves

        (draw,) = cell_figures(board, Curves(), "shapes/resnet", "shapes").values()
        plain = draw()
        with mpl.rc_context({"lines.linewidth": 9, "font.size": 30}):
            assert draw() == plain

    def test_what_is_not_defined_here_is_not_in_the_legend(
        self, board: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from faithmap.report import figures

        drawn: list[str] = []
        monkeypatch.setattr(
            figures, "_draw_curves", lambda lines, *_: drawn.extend(line["explainer"] for line in lines)
        )
        first, second = board["explainer"][:2]
        curves = figures.Curves({first: {"pos_auc": np.ones(9)}, second: {"pos_auc": np.full(9, np.nan)}})
        figures.curves_figure(_format.records(board), curves, "here")
        assert drawn == [first]

    @pytest.mark.parametrize("curve", [np.ones(0), np.full(9, np.nan)])
    def test_without_curves_no_figure_shows_them(self, board: pd.DataFrame, curve: np.ndarray) -> None:
        from faithmap.report.figures import Curves

        board = board.assign(model="net", dataset="images")
        for drawn, there in ((curve, False), (np.ones(9), True)):
            made = cell_figures(board, Curves({board["explainer"][0]: {"pos_auc": drawn}}), "net", "images")
            assert ("curves-net-images.png" in made) is there

    def test_names_of_files(self) -> None:
        assert _format.file_stem("hf/a b", "cub-200") == "hf-a-b-cub-200"

    def test_import_draws_in_nothing_heavy(self) -> None:
        code = (
            "import sys, faithmap.leaderboard, faithmap.report.terminal; "
            "assert not {'torch', 'matplotlib', 'rich'} & set(sys.modules)"
        )
        path = os.pathsep.join(sys.path)
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


class TestTerminal:
    def test_table(self, board: pd.DataFrame) -> None:
        console = Console(file=io.StringIO(), width=120)
        console.print(terminal.summary_table(board))
        shown = console.file.getvalue()
        assert "shapes/resnet on shapes" in shown
        assert f"{board.auc_d[0]:.1f} [{board.auc_d_low[0]:.1f}, {board.auc_d_high[0]:.1f}]" in shown
        assert shown.index("scan") < shown.index("saliency") < shown.index("random-grid")

    def test_several_cells_and_a_reason(self, board: pd.DataFrame) -> None:
        other = board.assign(model="shapes/vit")
        other.loc[0, ["auc_d", "auc_d_low", "auc_d_high", "status"]] = [
            np.nan,
            np.nan,
            np.nan,
            "skipped: no grid",
        ]
        console = Console(file=io.StringIO(), width=120)
        console.print(terminal.summary_table(pd.concat([board, other])))
        shown = console.file.getvalue()
        assert "shapes/vit / shapes" in shown
        assert "skipped: no grid" in shown


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [("auc_d", -0.04, "0.0"), ("auc_d", 41.25, "41.2"), ("auc_d_z", 1.234, "1.23"),
     ("ms_per_image", 3.14159, "3.14"), ("ms_per_image", 11812.5, "11812"),
     ("forwards", 1.0, "1"), ("win", np.nan, ""), ("rank", pd.NA, "")],
)  # fmt: skip
def test_numbers(column: str, value: Any, expected: str) -> None:
    assert _format.number(column, value) == expected
