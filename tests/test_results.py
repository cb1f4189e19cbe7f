"""The published boards: rebuilt byte for byte from their rows, and what they must show."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from faithmap import boards, equation_nine, registry
from faithmap.folders import read_run
from faithmap.leaderboard import write_boards
from faithmap.records import REFERENCE_NULL
from faithmap.report.variants import write_variants

RESULTS = Path(__file__).parents[1] / "results"
BOARDS = sorted(folder.parent.name for folder in RESULTS.glob("*/manifest.json"))
MEASURED = sorted(page.parent.name for page in RESULTS.glob(f"*/{equation_nine.FILES[1]}"))
AGAINST = sorted(RESULTS.glob("*/against-*.md"))
WITHIN = sorted(RESULTS.glob("*/within.md"))
COMPARED = sorted(page.parent.name for page in RESULTS.glob("*/published.md"))


@cache
def published(name: str) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]:
    """Rows, manifest and board of a folder; that the board is that of the rows has a test of its own."""
    rows, manifest = read_run(RESULTS / name)
    return rows, manifest, pd.read_csv(RESULTS / name / "leaderboard.csv")


def test_the_quickstart_is_published() -> None:
    assert "quickstart" in BOARDS


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_rebuilt_from_its_rows_byte_for_byte(name: str, tmp_path: Path) -> None:
    held = RESULTS / name
    (tmp_path / "figures").mkdir()
    for figure in (held / "figures").glob("heatmaps-*.png"):
        (tmp_path / "figures" / figure.name).write_bytes(figure.read_bytes())
    write_boards(*read_run(held), tmp_path)
    for file in ("leaderboard.csv", "leaderboard.md"):
        assert (tmp_path / file).read_bytes() == (held / file).read_bytes(), file


@pytest.mark.long
def test_the_order_under_other_variants_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    held, new = RESULTS / "quickstart-variants", tmp_path / "new"
    shutil.copytree(held, new)
    pages = ("variants.csv", "variants.md")
    for page in pages:
        (new / page).unlink()
    write_variants(new)
    for page in pages:
        assert (new / page).read_bytes() == (held / page).read_bytes(), page


@pytest.mark.parametrize("name", COMPARED)
def test_a_page_beside_the_papers_tables_is_rebuilt_byte_for_byte(name: str, tmp_path: Path) -> None:
    page = tmp_path / "published.md"
    _, manifest = read_run(RESULTS / name)
    wanted = manifest.get("config", {}).get(
        "published", []
    )  # of a table's preset; else all are set beside it
    assert boards.compare([RESULTS / name], wanted, page, Console(quiet=True)) == 0
    assert page.read_bytes() == (RESULTS / name / "published.md").read_bytes()


@pytest.mark.parametrize("name", MEASURED)
def test_a_page_on_equation_nine_is_rebuilt_from_its_lines_byte_for_byte(name: str) -> None:
    lines, page = (RESULTS / name / file for file in equation_nine.FILES)
    assert page.read_text(encoding="utf-8") == equation_nine.page(equation_nine.read_lines(lines))


@pytest.mark.parametrize("page", [*AGAINST, *WITHIN], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_a_page_of_paired_differences_is_rebuilt_byte_for_byte(page: Path, tmp_path: Path) -> None:
    new = tmp_path / "page.md"
    label = None if page in WITHIN else page.stem.removeprefix("against-")
    assert boards.compare_lines([page.parent], label, "auc_d", new, Console(quiet=True)) == 0
    assert page.read_bytes() == new.read_bytes()


def test_the_reading_of_equation_nine_that_is_the_default_is_the_one_that_the_dev_part_supports() -> None:
    """On both convolutional networks 9a leads 9b with the whole interval; on the transformer neither does."""
    assert registry.get("explainer", "scan").parameters["weighting"] == "amplified"
    _, manifest, board = published("scan-readings")
    assert manifest["settings"]["part"] == "dev"
    for model, cell in board.groupby("model"):
        line = cell.set_index("explainer")
        apart = line.loc["scan", "auc_d_low"] > line.loc["scan (9b)", "auc_d_high"]
        assert apart == (model != "shapes/vit"), model


def verdicts(page: Path) -> dict[str, Counter[str]]:
    """Of each line of a page of differences, how many models it is better and worse on."""
    found: dict[str, Counter[str]] = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        fields = [field.strip(" *`") for field in line.strip("|").split("|")]
        if line.startswith("| ") and fields[0] not in ("Explainer", ":--"):
            found.setdefault(fields[0], Counter())[fields[-1]] += 1
    return found


def favoured(page: Path) -> set[str]:
    """The lines that a default gives way to: better on two models at least, and worse on none."""
    return {label for label, seen in verdicts(page).items() if seen["better"] >= 2 and not seen["worse"]}


#: What ScoreCAM++ is by its paper and code, its gate and its sum, and not for us to choose.
STATED = {f"scorecam++ ({label})" for label in ("relu", "min-max", "raw sum")}


def test_defaults_of_baselines_are_those_that_the_dev_part_supports() -> None:
    held = RESULTS / "baseline-open-points"
    chosen = {"eigencam (centred)", "saliency (absolute)", "smoothgrad (squared)", "lime (mean)"}
    assert favoured(held / "within.md") == chosen | STATED
    _, manifest = read_run(held)
    assert manifest["settings"]["part"] == "dev"
    entries = manifest["explainers"]
    assert chosen <= entries.keys()
    first = {entries[label]["name"]: entries[label] for label in reversed(manifest["request"]["explainers"])}
    for label, entry in entries.items():
        before = first[entry["name"]]["params"]
        changed = {key: value for key, value in entry["params"].items() if value != before[key]}
        defaults = registry.get("explainer", entry["name"]).parameters
        if label in chosen:
            assert changed and changed == {key: defaults[key] for key in changed}, label
        elif changed:
            assert any(defaults[key] != value for key, value in changed.items()), label


def test_infocams_defaults_stay_by_the_same_rule() -> None:
    held = RESULTS / "infocam-open-points"
    others = favoured(held / "against-infocam.md")
    assert not {label for label in others if label.startswith("infocam (")}


def test_scans_defaults_stay_by_the_same_rule() -> None:
    """Whatever the ResNet would say, which was not measured: no choice is better on either of the others."""
    held = RESULTS / "scan-open-points"
    _, manifest = read_run(held)
    assert manifest["settings"]["part"] == "dev"
    entries, defaults = manifest["explainers"], registry.get("explainer", "scan").parameters
    assert {key: entries["scan"]["params"][key] for key in defaults} == defaults
    seen = {
        label: found for label, found in verdicts(held / "within.md").items() if label.startswith("scan (")
    }
    alone = {label for label, found in seen.items() if sum(found.values()) == 2}
    assert len(seen) == 9 and seen.keys() - alone == {"scan (C / alpha)"}  # and see scan-readings
    assert not {label for label, found in seen.items() if found["better"] and not found["worse"]}


def test_a_board_of_published_methods_stands_beside_the_papers() -> None:
    assert "imagenet-val-sample" in COMPARED


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_names_what_it_was_made_of(name: str) -> None:
    rows, manifest, _ = published(name)
    assert manifest["command"].startswith("faithmap run")
    assert manifest["commit"] and manifest["dirty"] is False
    assert set(manifest["identity"]["weights"]) == set(rows["model"])
    files = ("manifest.json", "leaderboard.md", *(["published.md"] if name in COMPARED else []))
    text = "".join((RESULTS / name / file).read_text(encoding="utf-8") for file in files)
    for word in ("/work", "/home", "/root", "/tmp"):
        assert word not in text, f"{name} names a path of the machine it was made on"


@pytest.fixture(scope="module")
def quickstart() -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame]:
    return published("quickstart")


def test_the_quickstart_covers_what_it_promises(quickstart: Any) -> None:
    _, manifest, board = quickstart
    assert {entry["family"] for entry in manifest["models"].values()} == {"cnn", "vit"}
    for _, cell in board.groupby(["model", "dataset"]):
        assert len(cell) >= 12
        assert set(cell["n"]) == {96}
        assert set(cell["failed"]) == {0}
        for score in (
            "auc_d",
            "average_drop",
            "increase",
            "energy_pg",
            "pointing",
            "ms_per_image",
            "forwards",
        ):
            assert cell[score].notna().all(), score


@pytest.mark.parametrize("null", ["random", REFERENCE_NULL])
def test_maps_that_know_nothing_score_nothing(quickstart: Any, null: str) -> None:
    rows = quickstart[0]
    found = rows[(rows["explainer"] == null) & (rows["metric"] == "auc_d")]
    for _, cell in found.groupby(["model", "dataset"]):
        by_image = cell.groupby("image_id")["value"].mean()
        error = by_image.std(ddof=1) / np.sqrt(len(by_image))
        assert abs(by_image.mean()) < 4 * error


def test_the_oracle_finds_the_object(quickstart: Any) -> None:
    for _, cell in quickstart[2].groupby(["model", "dataset"]):
        energy = cell.set_index("explainer")["energy_pg"]
        assert energy["oracle"] > energy[["random", REFERENCE_NULL, "centre"]].max()


def test_nulls_and_controls_are_never_ranked(quickstart: Any) -> None:
    board = quickstart[2]
    aside = board[
        board["explainer"].isin(["random", REFERENCE_NULL, "centre", "edges", "oracle", "fake-cam"])
    ]
    assert aside["rank"].isna().all()
    assert board[~board.index.isin(aside.index)]["rank"].notna().all()


#: The three methods that faithmap is built around, and what belongs to them.
OWN = {"scan", "scan-untrained", "masked-features", "scorecam++", "infocam"}
#: Scored at their published budgets on fewer photographs.
EXPENSIVE = {"rise", "lime"}


@pytest.mark.parametrize(
    ("name", "images", "models", "left"),
    [("shapes-methods", 256, 3, set()), ("imagenet-baselines", 100, 2, EXPENSIVE)],
)
def test_the_baselines_are_all_there(name: str, images: int, models: int, left: set[str]) -> None:
    _, manifest, board = published(name)
    wanted = {plugin.name for plugin in registry.plugins("explainer")} - OWN - left
    entries = manifest["explainers"]
    assert {entry["name"] for entry in entries.values()} - OWN == wanted
    board = board[[entries[label]["name"] in wanted for label in board["explainer"]]]
    assert len(board) == models * len(wanted) and board["model"].nunique() == models
    skipped = board["status"].str.startswith("skipped")
    assert set(board["n"][~skipped]) == {images}
    assert set(board["explainer"][~skipped]) == wanted


def test_the_methods_stand_beside_all_baselines() -> None:
    _, manifest, board = published("shapes-methods")
    assert {entry["name"] for entry in manifest["explainers"].values()} >= OWN
    given = {label: entry["params"] for label, entry in manifest["explainers"].items()}
    assert given["rise"]["n_masks"] == 8000 and given["lime"]["n_samples"] == 1000
    assert set(board[board["explainer"].isin(["rise", "lime", "scan", "scorecam++", "infocam"])]["n"]) == {
        256
    }


def test_the_expensive_ones_are_scored_at_their_published_budgets() -> None:
    _, manifest, board = published("imagenet-rise-lime")
    given = {entry["name"]: entry["params"] for entry in manifest["explainers"].values()}
    assert given["rise"]["n_masks"] == 8000 and given["lime"]["n_samples"] == 1000
    lines = board[board["explainer"].isin(sorted(EXPENSIVE))]
    assert len(lines) == 4 and (lines["n"] >= 30).all() and (lines["status"] == "ok").all()
