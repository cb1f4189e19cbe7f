"""Figures of heat maps over images."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.resize import upsample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")
#: Characters in a line of a panel's title: of a small one on a board, and of one that `draw` makes.
SMALL_TITLE, TITLE = 18, 28


def check_target(out: Path) -> None:
    """Refuse a figure file that cannot be written.

    Raises:
        RequestError: the suffix is no figure's, or the folder does not exist.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{out} has no suffix of a figure; expected one of {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise RequestError(f"the folder {out.parent} does not exist; make it first")


def logits(model: Model, image: Tensor) -> Tensor:
    """Logits (classes,) of one image (1, 3, H, W)."""
    model.eval()
    with torch.no_grad():
        values: Tensor = model(image)[0].cpu()
    return values


def title(model: Model, values: Tensor, target: int) -> str:
    """Model, class explained and its probability, in words where the model knows them."""
    probability = float(values.softmax(0)[target])
    names = model.class_names
    name = f"{names[target]} ({target})" if names and target < len(names) else f"class {target}"
    return f"{model.name}: {name}, probability {probability:.3f}"


def overlay(image: Tensor, heat: Tensor) -> tuple[Tensor, Tensor, float]:
    """What is drawn of a map: the map at image size, its opacity, and the colour scale's half-range.

    A map without negative values is drawn from 0 to its maximum; a signed one on a scale that is
    symmetric about 0, so that white (transparent) is always "no relevance".
    """
    full = upsample(heat.unsqueeze(0).float().cpu(), (int(image.shape[1]), int(image.shape[2])))[0]
    # A few extreme pixels of a gradient map must not hide all others.
    span = float(full.abs().flatten().quantile(0.995)) or float(full.abs().max()) or 1.0
    return full, (full.abs() / span).clamp(0, 1), span


def lay(axis: Axes, image: Tensor, heat: Tensor | None) -> None:
    """Draw an image, and a map over it, into one panel."""
    axis.set_axis_off()
    axis.imshow(image.permute(1, 2, 0).cpu().numpy())
    if heat is None:
        return
    full, opacity, span = overlay(image, heat)
    signed = bool((full < 0).any())
    axis.imshow(
        full.numpy(),
        cmap="RdBu_r" if signed else "inferno",
        vmin=-span if signed else 0.0,
        vmax=span,
        alpha=(0.8 * opacity).numpy(),
    )


def draw_grid(rows: Sequence[tuple[str, Tensor, Sequence[Tensor | None]]], titles: Sequence[str]) -> bytes:
    """A PNG with a row for each image: the image, then one overlay for each explainer.

    Args:
        rows: caption, image (3, H, W) in [0, 1], and a map (h, w) or None for each title.
        titles: the explainers.
    """
    from matplotlib.figure import Figure

    width, height = len(titles) + 1, len(rows)
    headings = [textwrap.fill(name, SMALL_TITLE) for name in titles]
    top = 0.2 + 0.125 * max([2, *(heading.count("\n") + 1 for heading in headings)])
    inches = 1.25 * height + top + 0.05
    figure = Figure(figsize=(1.25 * width, inches), dpi=90)
    axes = figure.subplots(height, width, squeeze=False)
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.005, top=1 - top / inches, wspace=0.04, hspace=0.14
    )
    for line, (caption, image, maps) in zip(axes, rows, strict=True):
        for axis, heat in zip(line, [None, *maps], strict=True):
            lay(axis, image, heat)
        line[0].set_title(caption, fontsize=6, pad=2)
    for axis, heading in zip(axes[0][1:], headings, strict=True):
        axis.set_title(heading, fontsize=7, pad=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw(
    image: Tensor, shown: Sequence[tuple[str, Tensor]], heading: str, out: Path, columns: int = 5
) -> None:
    """Draw the image, and one panel for each map or picture, into a file.

    Args:
        image: (3, H, W) in [0, 1].
        shown: titles with maps (h, w) at any resolution, which are laid over the image, or with pictures
            (3, h, w) in [0, 1], which stand by themselves.
        heading: the figure's title.
        out: a .png, .pdf or .svg file.
        columns: panels in a row.
    """
    from matplotlib.figure import Figure

    panels = len(shown) + 1
    width = min(columns, panels)
    height = -(-panels // width)
    figure = Figure(figsize=(2.2 * width, 2.4 * height + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).ravel()
    figure.suptitle(heading, fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    lay(axes[0], image, None)
    axes[0].set_title("image", fontsize=9)
    for axis, (name, drawn) in zip(axes[1:], shown, strict=False):
        if drawn.ndim == 3:
            lay(axis, drawn, None)
        else:
            lay(axis, image, drawn)
        axis.set_title(textwrap.fill(name, TITLE), fontsize=9)
    figure.savefig(out, metadata={"Software": None} if out.suffix == ".png" else None)
