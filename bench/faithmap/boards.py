"""`faithmap leaderboard` and `faithmap status`: from stored rows alone, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from faithmap.errors import RequestError
from faithmap.folders import publish, read_run, read_runs
from faithmap.store import RunStore, write_bytes

SHOWN_REASONS = 8


def rebuild(runs: Sequence[Path], out: Path | None, console: Console) -> int:
    """Write tables and figures again, into the run's folder or another one."""
    from faithmap.leaderboard import write_boards

    if len(runs) > 1 and out is None:
        raise RequestError("several runs make one board in a folder of its own; name it with --out")
    rows, manifest = read_runs(runs)
    if rows.empty:
        raise RequestError(f"{runs[0]} holds no rows yet; run it first")
    target = out or runs[0]
    if out is not None and out.resolve() not in {run.resolve() for run in runs}:
        publish(rows, manifest, out)
        for run in runs:
            copy_heatmaps(run, out)
    for file in write_boards(rows, manifest, target):
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def copy_heatmaps(run: Path, out: Path) -> None:
    """Take along the figures that a board cannot draw, having neither images nor maps."""
    for file in sorted((run / "figures").glob("heatmaps-*.png")):
        write_bytes(out / "figures" / file.name, file.read_bytes())


def print_summary(path: Path, console: Console) -> None:
    """Print the board of a run in short."""
    from faithmap.leaderboard import build_board
    from faithmap.report.terminal import summary_table

    console.print(summary_table(build_board(*read_run(path))))


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
    running = _is_running(path)
    request = manifest["request"]
    console.print(
        f"{path}: {'running' if running else 'not running'}; begun by: {manifest['command'] or 'Python'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(
        "model",
        "dataset",
        "explainer",
        "images",
        "of",
        "failed",
        "empty",
        "skipped",
        box=None,
        pad_edge=False,
    )
    unfinished = 0
    for model in request["models"]:
        for dataset in request["datasets"]:
            here = rows[(rows["model"] == model) & (rows["dataset"] == dataset)]
            asked = manifest["datasets"][dataset]["images"]
            unreadable = here[here["explainer"] == ""]["image_id"].nunique()
            for label in request["explainers"]:
                entry = manifest["explainers"][label]
                own = here[
                    (here["explainer"] == entry["name"]) & _same_params(here["params"], entry["params"])
                ]
                seen = own["image_id"].nunique()
                unfinished += max(asked - unreadable - seen, 0)
                counts = own.drop_duplicates(["image_id", "status"])["status"].value_counts()
                table.add_row(
                    model, dataset, label, str(seen), str(asked - unreadable),
                    *(str(counts.get(kind, 0)) for kind in ("failed", "empty", "skipped")),
                )  # fmt: skip
    console.print(table)
    console.print(
        "complete" if not unfinished else "unfinished; run the same command again to go on", highlight=False
    )
    return print_failures(path, console)


def _same_params(column: object, params: dict[str, object]) -> object:
    """Rows whose parameters are these, a null's draw and a moved map's null aside."""
    import json

    def same(text: str) -> bool:
        held = {key: value for key, value in json.loads(text).items() if key not in ("draw", "null")}
        return bool(held == json.loads(json.dumps(params)))

    return column.map(same)  # type: ignore[attr-defined]


def _is_running(path: Path) -> bool:
    try:
        with RunStore(path).locked():
            return False
    except RequestError:
        return True
