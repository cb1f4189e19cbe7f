"""What is shown of a run beside the papers' tables: the page, the terminal, the end of a run."""

from __future__ import annotations

import copy
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparisons import (
    PRINTED,
    TABLE,
    falling,
    manifest,
    planted,
    sections,
)
from fits import typed
from rich.console import Console

import faithmap
from faithmap.comparing import Section
from faithmap.errors import RequestError
from faithmap.records import canonical_json
from faithmap.report.comparison import (
    comparison_table,
    figures_tables,
    incomparable,
    render_comparison,
)


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

    def test_a_fine_tuned_model_is_known_by_what_was_tuned(self) -> None:
        tuned = {"tuned": {"record": {"model": {"name": "timm/resnetv2_50"}}}}
        (section,) = self.made(
            model="tuned/mine", dataset="imagenet", manifest={"models": {"tuned/mine": tuned}}
        )
        assert incomparable(section) == []
        (section,) = self.made(model="tuned/mine", dataset="imagenet")
        assert incomparable(section) == ["the model is tuned/mine, there ResNet50V2"]

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
            (["scan-2026:table11"], "'scan-2026' has no table 'table11'"),
        ],
    )
    def test_a_wrong_name_is_refused_before_anything_runs(
        self, tmp_path: Path, published: Any, sentence: str
    ) -> None:
        with pytest.raises(RequestError) as caught:
            faithmap.run(self.request(published=published), out=tmp_path / "run")
        assert sentence in str(caught.value)
        assert not (tmp_path / "run").exists()
