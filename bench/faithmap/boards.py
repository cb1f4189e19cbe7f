"""`faithmap leaderboard` and `faithmap status`: from stored rows alone, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from faithmap.errors import RequestError
from faithmap.folders import publish, read_images, read_run, read_runs
from faithmap.records import VARIANTS
from faithmap.sources import timed_alike
from faithmap.store import LOCK, MANIFEST, RunStore, write_bytes

if TYPE_CHECKING:
    import pandas as pd

SHOWN_REASONS = 8


def rebuild(runs: Sequence[Path], out: Path | None, console: Console) -> int:
    """Write tables and figures again, into the run's folder or another one, and print the board in short."""
    from faithmap.evidence import read_evidence
    from faithmap.leaderboard import board_of, write_board
    from faithmap.report.terminal import summary_table
    from faithmap.report.variants import clear_variants, write_variants

    if len(runs) > 1 and out is None:
        raise RequestError("several runs make one board in a folder of its own; name it with --out")
    if len(runs) > 1 and out is not None and out.resolve() in {run.resolve() for run in runs}:
        raise RequestError(f"--out {out} is one of the runs; several make one board in a folder of its own")
    rows, manifest = _rows(runs)
    cells = read_evidence(rows, manifest)  # raises what is wrong with them before anything is replaced
    board = board_of(cells)
    target = out or runs[0]
    if out is not None and out.resolve() not in {run.resolve() for run in runs}:
        publish(rows, manifest, out)
        for run in reversed(runs):  # where two have drawn a cell, the one named first counts
            copy_heatmaps(run, out)
    if target.resolve() not in {run.resolve() for run in runs}:
        clear_variants(target)
        if len(runs) == 1:  # those of several runs are of other methods and images
            copy_variants(runs[0], target)
    written = [*write_board(cells, board, manifest, target), *write_variants(target)]
    for file in set((target / "figures").glob("cost-*.png")) - set(written):
        file.unlink()  # of an earlier board here
    console.print(summary_table(board if timed_alike(manifest) else board.assign(ms_per_image=float("nan"))))
    for file in written:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def compare(runs: Sequence[Path], wanted: Sequence[str], out: Path | None, console: Console) -> int:
    """Set a run's order of methods beside the published ones; write the page where one is named."""
    from faithmap.comparing import chosen_figures
    from faithmap.comparing import compare as set_beside
    from faithmap.evidence import read_evidence
    from faithmap.report.comparison import (
        comparison_table,
        figures_tables,
        reasons_by_section,
        render_comparison,
    )

    if out is not None and out.suffix != ".md":
        raise RequestError(f"--out {out}: the page is Markdown; give a file that ends in .md")
    figures = chosen_figures(wanted)
    sections = set_beside(read_evidence(*_rows(runs)), figures, named=bool(wanted))
    if any(section.comparisons for section in sections):
        for drawn in figures_tables(sections) if wanted else ():
            console.print(drawn)
        console.print(comparison_table(sections))
    else:
        console.print("nothing to compare: no published table shares three methods and a score with this run")
    left = reasons_by_section(sections)
    for line in left if wanted else []:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if left and not wanted:
        console.print(f"not compared: {len(left)} more; --with SOURCE:TABLE or the page (--out) says why")
    if out is not None:
        _write(out, render_comparison(sections), console)
    return 0


def compare_lines(
    runs: Sequence[Path], label: str | None, score: str, out: Path | None, console: Console
) -> int:
    """Set every line of a run against one of them; write the page or the table where one is named.

    Without a label, the lines of each method are set against the first of them.
    """
    from faithmap import pairs
    from faithmap.evidence import read_evidence
    from faithmap.leaderboard import board_csv
    from faithmap.report.pairs import pairs_table, render_pairs

    if out is not None and out.suffix not in (".md", ".csv"):
        raise RequestError(f"--out {out}: give a file that ends in .md, for a page, or in .csv")
    cells = read_evidence(*_rows(runs))
    if label is None:
        lines, left_out = pairs.within(cells, score), pairs.unmeasured(cells, score)
    else:
        lines, left_out = pairs.differences(cells, label, score), pairs.without_baseline(cells, label, score)
    console.print(pairs_table(lines))
    for said in left_out:
        console.print(f"not compared: {said}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        _write(out, board_csv(lines) if out.suffix == ".csv" else render_pairs(lines, left_out), console)
    return 0


def _rows(runs: Sequence[Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What runs hold, which must be something."""
    rows, manifest = read_runs(runs)
    if rows.empty:
        raise RequestError(f"{runs[0]} holds no rows yet; run it first")
    return rows, manifest


def _write(file: Path, text: str, console: Console) -> None:
    try:
        write_bytes(file, text.encode())
    except OSError as error:
        raise RequestError(f"cannot write {file} ({error.strerror or error}); name another file") from error
    console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def copy_heatmaps(run: Path, out: Path) -> None:
    """Take along the figures that a board cannot draw, having neither images nor maps."""
    for file in sorted((run / "figures").glob("heatmaps-*.png")):
        write_bytes(out / "figures" / file.name, file.read_bytes())


def copy_variants(run: Path, out: Path) -> None:
    """Take along the rows of a run's variants."""
    files = [run / VARIANTS / MANIFEST, *sorted((run / VARIANTS / "rows").rglob("*.parquet"))]
    for file in files if files[0].is_file() else []:
        write_bytes(out / file.relative_to(run), file.read_bytes())


def print_variants(path: Path, console: Console) -> None:
    """Print how the order of methods moves under the variants of a run."""
    from faithmap.orders import read_orders
    from faithmap.report.variants import PAGE, variants_table

    for each in read_orders(path):
        if each.comparable:
            console.print(variants_table(each))
        else:
            said = f"{each.model} on {each.dataset}: variants not compared, see {PAGE}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def print_summary(path: Path, console: Console) -> None:
    """Print the board of a run in short."""
    from faithmap.leaderboard import build_board
    from faithmap.report.terminal import summary_table

    rows, manifest = read_run(path)
    console.print(summary_table(build_board(rows, manifest)))
    for verdict in manifest.get("verdicts", {}).values():
        for fault in verdict["failed"]:
            where = f"{fault['check']} on {fault['model']}" if fault["model"] else fault["check"]
            console.print(
                f"unreliable {verdict['kind']} {verdict['name']}, {where}: {fault['message']}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip


def unfitted(path: Path) -> list[str]:
    """What is not fitted yet, with the command that does it: a line for each method and model."""
    rows, _ = read_run(path)
    wanting = rows[(rows["status"] == "skipped") & rows["reason"].str.startswith("not fitted", na=False)]
    found = wanting.drop_duplicates(["model", "explainer", "reason"])
    return [f"{line.explainer} on {line.model}: {line.reason}" for line in found.itertuples()]


def print_failures(path: Path, console: Console) -> int:
    """List what failed with its reasons; 1 where anything did."""
    rows, _ = read_run(path)
    failed = rows[rows["status"] == "failed"]
    if failed.empty:
        return 0
    images = failed.drop_duplicates(["model", "dataset", "explainer", "image_id"])
    console.print(f"{len(images)} failures:", highlight=False)
    grouped = images.groupby(["model", "dataset", "explainer", "reason"], sort=True)["image_id"]
    for shown, ((model, dataset, explainer, reason), names) in enumerate(grouped):
        if shown == SHOWN_REASONS:
            console.print(f"  ... and {len(grouped) - shown} more reasons", highlight=False)
            break
        what = explainer or "reading images"
        count = f"{len(names)} images" if len(names) > 1 else f"image {names.iloc[0]}"
        console.print(
            f"  {model}, {dataset}, {what}, {count}: {reason}", markup=False, highlight=False, soft_wrap=True
        )
    return 1


def status(path: Path, console: Console) -> int:
    """Say how far a run has come: images scored of those asked for, by explainer."""
    from rich.table import Table

    rows, manifest = read_run(path)
    state = "running" if _is_running(path) else "not running"
    begun = manifest["command"] or "Python"
    console.print(f"{path}: {state}; begun by: {begun}", markup=False, highlight=False, soft_wrap=True)
    if "plan" not in manifest:
        console.print(f"a published board: {len(rows)} rows", highlight=False)
        return print_failures(path, console)
    table = Table(
        "model", "dataset", "explainer", "scored", "failed", "empty", "skipped", box=None, pad_edge=False
    )
    shares = completeness(path, manifest, rows)
    for (model, dataset, label), (held, asked) in shares.items():
        name = manifest["explainers"][label]["name"]
        here = (rows["model"] == model) & (rows["dataset"] == dataset) & (rows["explainer"] == name)
        counts = rows[here].drop_duplicates(["image_id", "status"])["status"].value_counts()
        share = f"{100 * held / asked:.0f}%" if asked else "nothing to score"
        table.add_row(
            model, dataset, label, share, *(str(counts.get(k, 0)) for k in ("failed", "empty", "skipped"))
        )
    console.print(table)
    left = "" if all(held >= asked for held, asked in shares.values()) else "unfinished"
    if not left and not _variants_complete(path, manifest):
        left = "variants unfinished"
    console.print(f"{left}; run the same command again to go on" if left else "complete", highlight=False)
    return print_failures(path, console)


def _variants_complete(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the variants that the latest request asks for are there for its images, if it asks for any."""
    wanted = manifest.get("config", {}).get("variants")
    if not wanted:
        return True
    held = RunStore(path / VARIANTS).manifest()
    images = {dataset: set(ids) for dataset, ids in (held or {}).get("images", {}).items()}
    return held is not None and held["config"]["variants"] == wanted and images == read_images(path)


def completeness(
    path: Path, manifest: Mapping[str, Any], rows: pd.DataFrame
) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Image and metric pairs (stored, asked for), by model, dataset and explainer label."""
    images = read_images(path) or {}
    unreadable = rows[rows["explainer"] == ""].groupby("dataset")["image_id"].agg(set).to_dict()
    done = RunStore(path).done(manifest["plan"])
    shares: dict[tuple[str, str, str], tuple[int, int]] = {}
    for key, entry in manifest["plan"].items():
        wanted = images.get(entry["dataset"], set()) - unreadable.get(entry["dataset"], set())
        held = sum(image in wanted and spec in entry["specs"] for image, spec in done[key])
        place = (entry["model"], entry["dataset"], entry["explainer"])
        before = shares.get(place, (0, 0))
        shares[place] = (before[0] + held, before[1] + len(wanted) * len(entry["specs"]))
    return shares


def _is_running(path: Path) -> bool:
    if not (path / LOCK).exists():  # looking must not leave a lock behind
        return False
    try:
        with RunStore(path).locked():
            return False
    except RequestError:
        return True
