"""Figures of heat maps over images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.resize import upsample

SUFFIXES = (".png", ".pdf", ".svg")


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


def draw(
    image: Tensor, maps: Sequence[tuple[str, Tensor]], heading: str, out: Path, columns: int = 5
) -> None:
    """Draw the image and one overlay for each map into a file.

    Args:
        image: (3, H, W) in [0, 1].
        maps: titles with maps (h, w) at any resolution.
        heading: the figure's title.
        out: a .png, .pdf or .svg file.
        columns: panels in a row.
    """
    from matplotlib.figure import Figure

    panels = len(maps) + 1
    width = min(columns, panels)
    height = -(-panels // width)
    figure = Figure(figsize=(2.2 * width, 2.4 * height + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).ravel()
    figure.suptitle(heading, fontsize=10)
    picture = image.permute(1, 2, 0).cpu().numpy()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture)
    axes[0].set_title("image", fontsize=9)
    for axis, (name, heat) in zip(axes[1:], maps, strict=False):
        full, opacity, span = overlay(image, heat)
        signed = bool((full < 0).any())
        axis.imshow(picture)
        axis.imshow(
            full.numpy(),
            cmap="RdBu_r" if signed else "inferno",
            vmin=-span if signed else 0.0,
            vmax=span,
            alpha=(0.85 * opacity.sqrt()).numpy(),
        )
        axis.set_title(name, fontsize=9)
    figure.savefig(out, metadata={"Software": None} if out.suffix == ".png" else None)
