"""`faithmap show`: samples of a dataset as a model sees them, with their boxes and masks drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from faithmap.errors import DataError, RequestError
from faithmap.heatmaps import check_target
from faithmap.models import Transform
from faithmap.records import Sample, Spec
from faithmap.transforms import Prepared, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from faithmap.data import LoadedDataset

#: Of most models trained on ImageNet; what is shown where no model is named.
TRANSFORM = Transform((224, 224), 0.875)
BOX, MASK, VOID = "#00e5ff", "#ff2fd0", "#ffe14d"
COLUMNS = 4
#: Samples that a figure can hold.
MOST = 400


@dataclass(frozen=True)
class Panel:
    """One sample after the transform."""

    sample: Sample
    prepared: Prepared
    title: str


def show(
    spec: Spec,
    options: Mapping[str, Any],
    model: Spec | None,
    *,
    part: str,
    limit: int,
    out: Path | None,
    console: Console,
    errors: Console,
) -> int:
    """Draw the first samples of a dataset into a figure; 1 where some cannot be read.

    Args:
        spec: the dataset.
        options: parameters over those of `spec`.
        model: whose transform is used; by default the shorter side becomes 256 and the centre is cut to 224.
        part: "eval", "dev" or "all".
        limit: how many samples, balanced over the classes as in a run.
        out: a .png, .pdf or .svg file; by default named after the dataset, in the working directory.
        console: where the summary goes.
        errors: where the images that cannot be read are listed.

    Raises:
        RequestError: the dataset or the model is refused, or the figure cannot be written.
    """
    from faithmap.data import check_labels, choose, load_dataset
    from faithmap.plan import load_named
    from faithmap.report import file_stem

    if limit > MOST:
        raise RequestError(f"--limit {limit}: a figure holds up to {MOST} samples")
    file = out if out is not None else Path(f"{file_stem(spec.title)}.png")
    check_target(file)
    transform = TRANSFORM
    data = load_dataset(replace(spec, params={**spec.params, **options}))
    samples = choose(data.samples, part, limit)
    if model is not None:
        network = load_named(model)
        check_labels(data, samples, network)
        transform = network.transform
    panels, unread = [], []
    for sample in samples:
        try:
            panels.append(Panel(sample, prepare(sample, transform), title(sample, data)))
        except DataError as error:
            unread.append(str(error))
    for reason in unread:
        errors.print(f"not shown: {reason}", markup=False, highlight=False, soft_wrap=True)
    if not panels:
        errors.print("no figure: none of the samples can be read", highlight=False)
    else:
        figure = draw(panels, heading(data, len(panels)))
        figure.savefig(file, metadata={"Software": None} if file.suffix.lower() == ".png" else None)
        console.print(f"{summary(data, panels)}; wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return 1 if unread else 0


def title(sample: Sample, data: LoadedDataset) -> str:
    """The label in words where there are words, with its number."""
    if sample.label is None:
        return sample.name or "no label"
    names = data.class_names or ()
    name = sample.name or (names[sample.label] if sample.label < len(names) else "")
    short = name.split(",")[0]
    short = short if len(short) <= 22 else f"{short[:21]}…"
    return f"{short} ({sample.label})" if short else f"class {sample.label}"


def heading(data: LoadedDataset, shown: int) -> str:
    """The figure's title: the dataset and how much of it is shown."""
    return f"{data.label}: {shown} of {len(data.samples):,} samples, revision {data.revision}"


def summary(data: LoadedDataset, panels: Sequence[Panel]) -> str:
    """What was drawn, in one line: how many images came with a box and with a mask in sight."""
    boxes = [panel.prepared.boxes for panel in panels]
    masks = [panel.prepared.mask for panel in panels]
    with_box = sum(given is not None and len(given) > 0 for given in boxes)
    with_mask = sum(given is not None and bool(given.any()) for given in masks)
    count = len(data.samples)
    return (
        f"{data.label}: {count:,} sample{'' if count == 1 else 's'}, {len(panels)} shown, "
        f"{with_box} with boxes, {with_mask} with masks"
    )


def draw(panels: Sequence[Panel], text: str) -> Figure:
    """A figure with a panel for each sample, four in a row."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows + 0.4), dpi=110, layout="constrained")
    figure.suptitle(text, fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        lay(axis, panel)
    return figure


def lay(axis: Axes, panel: Panel) -> None:
    """One sample: the image, its boxes, its mask's outline, void pixels in yellow; label and id above."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    prepared = panel.prepared
    height, width = prepared.image.shape[1:]
    # Pixel edges are whole numbers, as in the boxes; matplotlib would put the pixels' centres there.
    axis.imshow(prepared.image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    for x0, y0, x1, y1 in prepared.boxes.tolist() if prepared.boxes is not None else ():
        for colour, thickness in (("black", 2.6), (BOX, 1.4)):
            axis.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=thickness)
            )
    if prepared.void is not None and bool(prepared.void.any()):
        axis.imshow(
            prepared.void.numpy(), cmap=ListedColormap(["#00000000", f"{VOID}b0"]), vmin=0, vmax=1,
            extent=(0, width, height, 0), interpolation="nearest",
        )  # fmt: skip
    if prepared.mask is not None and bool(prepared.mask.any()):
        outline(axis, prepared)
    axis.set_title(f"{panel.title}\n{shortened(panel.sample.id)}", fontsize=7, pad=3)


def outline(axis: Axes, prepared: Prepared) -> None:
    """The outline of a mask; a rim of zeros lets it close where the object meets the image's edge."""
    import torch

    if prepared.mask is None:
        return
    rimmed = torch.nn.functional.pad(prepared.mask.float(), (1, 1, 1, 1)).numpy()
    rows, columns = torch.arange(rimmed.shape[0]) - 0.5, torch.arange(rimmed.shape[1]) - 0.5
    for colour, thickness in (("black", 2.2), (MASK, 1.0)):
        axis.contour(
            columns.numpy(), rows.numpy(), rimmed, levels=[0.5], colors=[colour], linewidths=[thickness]
        )
    axis.set_xlim(0, prepared.mask.shape[1])
    axis.set_ylim(prepared.mask.shape[0], 0)


def shortened(name: str) -> str:
    """An id, or its end where it is long."""
    return name if len(name) <= 34 else f"…{name[-33:]}"
