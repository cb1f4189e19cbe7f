"""Which reading of SCAN's equation 9 a decoder has come to follow: `python -m faithmap.equation_nine`.

The paper's words and the authors' two codes weigh the errors of confident pixels in opposite ways, and what
is learnt differs in two signs (see `faithmap.reconstruction.error_weights`). Under 9a ("amplified") it pays
to be confident where the error is small, and the area settles below its target; under 9b ("discounted") it
pays where the error is large, and the area settles above it. Both are measured here on images that the
decoder has not seen, with how much it reconstructs at all: a decoder that reconstructs nothing has no errors
to tell apart.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from faithmap.config import load_config
from faithmap.errors import DataError, FaithmapError, RequestError
from faithmap.explaining import guarded
from faithmap.reconstruction import blurred_target, over_cells, target_area
from faithmap.report._format import code, table
from faithmap.stats import Estimate, bca, rank_correlation
from faithmap.store import write_bytes

if TYPE_CHECKING:
    from faithmap.batch import Batch
    from faithmap.models import Model
    from faithmap.plan import ExplainerUse, Grid

#: Images in a batch.
BATCH = 16
#: What is kept of every image, after its cell.
SCORES = ("rho", "rho_pixels", "area_excess", "error", "blind_error", "spread")
CELL = ("model", "dataset", "explainer", "weighting", "percentile")
#: Scores whose means are told without an interval, and with how many digits.
PLAIN = (("error", 4), ("blind_error", 4), ("spread", 3))
#: A line for each image, and the table.
FILES = ("equation-9.csv", "equation-9.md")


def _rank_correlations(one: Tensor, other: Tensor) -> list[float]:
    """Spearman's correlation of maps (B, ...), image by image; 0 where one of the two does not vary."""
    found = [rank_correlation(left, right) for left, right in zip(one, other, strict=True)]
    return [0.0 if math.isnan(value) else value for value in found]


def measured(
    confidence: Tensor, reconstruction: Tensor, target: Tensor, grid: tuple[int, int], alpha: float
) -> list[dict[str, float]]:
    """What tells the two readings apart, image by image.

    Args:
        confidence: C, (B, H, W) in [0, 1].
        reconstruction: (B, 3, H, W), as the decoder gives it.
        target: (B, 3, H, W) in [-1, 1].
        grid: (h, w) cells of the features.
        alpha: of the decoder; the target area is 1 / (1 + alpha).

    Returns:
        `rho` (between C and the squared error, over cells), `rho_pixels` (over pixels, which also shows the
        pattern of the transposed convolutions), `area_excess` (mean C less its target), `error` (mean squared
        error) and `spread` (standard deviation of C over the cells).
    """
    squared = (target - reconstruction).square().mean(1)
    cells, errors = (over_cells(each, grid) for each in (confidence, squared))
    columns = {
        "rho": _rank_correlations(cells, errors),
        "rho_pixels": _rank_correlations(confidence, squared),
        "area_excess": (confidence.mean((1, 2)) - target_area(alpha)).tolist(),
        "error": squared.mean((1, 2)).tolist(),
        "spread": cells.flatten(1).std(1, correction=0).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def blind_errors(targets: Tensor) -> list[float]:
    """Mean squared distance of each target (N, 3, H, W) to the mean of all: what knowing no image leaves."""
    return (targets - targets.mean(0)).square().mean((1, 2, 3)).tolist()


def verdict(rho: Estimate, excess: Estimate) -> str:
    """The reading whose two signs are both there with their whole intervals: "9a", "9b", or "open"."""
    if rho.high[0] < 0 and excess.high[0] < 0:
        return "9a"
    return "9b" if rho.low[0] > 0 and excess.low[0] > 0 else "open"


def lines_of(grid: Grid) -> Iterator[dict[str, Any]]:
    """A line for each image, percentile and fitted SCAN of a request."""
    for model in grid.models:
        for use, percentile in _decoders(grid, model):
            for dataset, samples in grid.datasets:
                cell = (model.name, dataset.label, use.label, use.params["weighting"], percentile)
                for line in _images(use, model, samples, percentile, grid.config.run.target):
                    yield {**dict(zip(CELL, cell, strict=True)), **line}


def _decoders(grid: Grid, model: Model) -> list[tuple[ExplainerUse, float]]:
    """The request's SCANs that are fitted to a model, each decoder at a percentile once.

    The percentiles are the middle of those of the training, and that of the explanation.
    """
    found: dict[tuple[str, float], ExplainerUse] = {}
    for use in grid.explainers:
        if use.plugin.name != "scan" or use.params["output"] != "confidence":
            continue
        if model.name in use.unfitted:
            raise RequestError(f"{use.label} on {model.name}: {use.unfitted[model.name]}")
        if model.name in use.fits:
            for percentile in ((use.params["lowest_percentile"] + 100) / 2, use.params["percentile"]):
                found.setdefault((use.fits[model.name].digest, float(percentile)), use)
    return [(use, percentile) for (_, percentile), use in found.items()]


def _images(
    use: ExplainerUse, model: Model, samples: Sequence[Any], percentile: float, target: str
) -> Iterator[dict[str, Any]]:
    from faithmap.data import make_batch, read_shard, shards

    method: Any = use.plugin.make({**use.params, "percentile": percentile})
    method.load(model, use.fits[model.name].tensors())
    lines: list[dict[str, Any]] = []
    targets = []
    for shard in shards(samples, BATCH):
        read, _ = read_shard(shard, model)
        if not read:
            continue
        batch = make_batch(read, model, target, model.grid, 0)
        found, blurred = _of_batch(method, model, batch)
        lines += [{"image_id": name, **line} for name, line in zip(batch.ids, found, strict=True)]
        targets.append(blurred)
    if not lines:
        raise DataError(f"none of the {len(samples)} images could be read; look at them with `faithmap show`")
    for line, blind in zip(lines, blind_errors(torch.cat(targets)), strict=True):
        yield {**line, "blind_error": blind}


def _of_batch(method: Any, model: Model, batch: Batch) -> tuple[list[dict[str, float]], Tensor]:
    with guarded(model):
        decoded, masked = method.decode(model, batch)
    batch.context.release()
    grid = masked.layout.grid
    target = blurred_target(batch.images.float(), grid, method.blur)
    found = measured(method.confidence(decoded).cpu(), decoded[:, 1:].cpu(), target.cpu(), grid, method.alpha)
    return found, target.cpu()


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of `lines_of`, or of the file that holds them, as a Markdown table with 95% intervals."""
    cells: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        cells.setdefault(_cell(line), []).append(line)
    heads = (
        "Model", "Explainer", "Eq. 9", "Signs of", "P", "Images", "rho, cells", "rho, pixels", "C - A",
        "Error", "Blind error", "Spread of C",
    )  # fmt: skip
    rows = []
    for (model, _, explainer, weighting, percentile), here in cells.items():
        found = {name: bca([[float(line[name]) for line in here]]) for name in SCORES}
        rows.append((
            code(model), code(explainer), "9a" if weighting == "amplified" else "9b",
            verdict(found["rho"], found["area_excess"]), f"{float(percentile):g}", str(len(here)),
            _told(found["rho"], 2), _told(found["rho_pixels"], 2), _told(found["area_excess"], 3),
            *(f"{found[name].value[0]:.{digits}f}" for name, digits in PLAIN),
        ))  # fmt: skip
    return table(heads, rows, left=4) + "\n"


def _told(found: Estimate, digits: int) -> str:
    value, low, high = (float(each[0]) for each in found)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


LEGEND = """# Which reading of equation 9

*Eq. 9* is the weighting that the decoder was trained with: 9a alpha C ("amplified"), 9b C / alpha
("discounted"). *rho* is the rank correlation of confidence and squared error within an image, over the cells
of the features and over pixels. *C - A* is the mean confidence less its target area. *Error* is the mean
squared error of the reconstruction in [-1, 1], *Blind error* what the mean of all targets leaves: where the
two are the same, the decoder has learnt nothing of single images. *Spread of C* is its standard deviation
over the cells of an image. *Signs of*: the reading whose signs, both below zero (9a) or both above it (9b),
are there with their whole 95% intervals. *P* is the percentile of the mask: the middle of those of the
training, and that of the explanation.
"""


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table with what its columns mean."""
    return f"{LEGEND}\n{summary(lines)}"


def read_lines(file: Path) -> list[dict[str, str]]:
    """The lines of a file that was written here.

    Raises:
        DataError: it is another file, or damaged.
    """
    names = [*CELL, "image_id", *SCORES]
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
        whole = all(list(line) == names and None not in line.values() for line in lines)
        if not whole or not all(math.isfinite(float(line[name])) for line in lines for name in SCORES):
            raise ValueError(f"not every line has finite {', '.join(SCORES)} behind {', '.join(CELL)}")
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file} is damaged ({error}); delete it and measure all models again") from error
    return lines


def write_lines(file: Path, held: Sequence[Mapping[str, str]], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines to a file, behind those that it held of other models, data or decoders."""
    made = {_cell(line) for line in lines}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [*CELL, "image_id", *SCORES]
    writer.writerow(names)
    writer.writerows([line[name] for name in names] for line in held if _cell(line) not in made)
    for line in lines:
        values = [f"{line[name]:.6g}" for name in SCORES]
        writer.writerow([*(line[name] for name in CELL), line["image_id"], *values])
    write_bytes(file, text.getvalue().encode())


def _cell(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(line[name]) for name in CELL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the lines and the table."""
    from faithmap.engine import Silent
    from faithmap.plan import make_grid
    from faithmap.runner import apply_settings, fit_wanted, resolve_settings

    parser = argparse.ArgumentParser(prog="python -m faithmap.equation_nine", description=__doc__)
    parser.add_argument("request", help="a request whose explainers name one SCAN or more")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder for both files; lines of other models are kept"
    )
    options = parser.parse_args(arguments)
    grid = make_grid(load_config(options.request))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {options.out}: no folder can be made there ({error})") from error
    file = options.out / FILES[0]
    held = read_lines(file) if file.is_file() else []  # raises before anything is measured
    grid, _ = fit_wanted(grid, Silent())  # one that fails is told with its reason
    apply_settings(grid, resolve_settings(grid, None))
    lines = list(lines_of(grid))
    if not lines:
        raise RequestError(f"{options.request} names no explainer 'scan' with output 'confidence'")
    write_lines(file, held, lines)
    written = read_lines(file)
    (options.out / FILES[1]).write_text(page(written), encoding="utf-8")
    sys.stdout.write(summary(written))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FaithmapError as error:
        sys.exit(f"faithmap: {error}")
