"""Boxes around named objects as PASCAL VOC writes them in XML, a form that ImageNet shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from faithmap.errors import DataError
from faithmap.pictures import Box

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class Thing:
    """One annotated object."""

    name: str
    #: `xmin, ymin, xmax, ymax` as the file has them; see `pixel_edges`.
    corners: Box
    #: Marked as hard to recognise.
    difficult: bool = False


@dataclass(frozen=True, slots=True)
class Annotation:
    """What an XML file says of one image."""

    #: (width, height) of the image that was annotated; None where the file does not say.
    size: tuple[int, int] | None
    things: tuple[Thing, ...]


def read_annotation(file: Path) -> Annotation:
    """The objects of an XML file, without their parts (heads, hands and feet of persons).

    Raises:
        DataError: the file is missing or malformed; it is named.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} cannot be read as XML: {error}") from error
    if root.tag != "annotation":
        raise DataError(f"{file} holds <{root.tag}>; expected <annotation> with an <object> for each object")
    return Annotation(_size(root), tuple(_thing(node, file) for node in root.findall("object")))


def pixel_edges(corners: Box, first: int) -> Box:
    """Corners that name pixels, both ends included, as edges: `x0, y0, x1, y1` around these pixels.

    Args:
        corners: column and row of the first pixel, then of the last.
        first: the number of the uppermost row and the leftmost column, 0 or 1.

    >>> pixel_edges((0, 0, 63, 63), 0), pixel_edges((1, 1, 1, 2), 1)
    ((0, 0, 64, 64), (0, 0, 1, 2))
    """
    x0, y0, x1, y1 = corners
    return x0 - first, y0 - first, x1 - first + 1, y1 - first + 1


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _thing(node: ElementTree.Element, file: Path) -> Thing:
    name = node.findtext("name", "").strip()
    if not name:
        raise DataError(f"{file} holds an <object> without a <name>")
    given = [node.findtext(f"bndbox/{corner}", "").strip() for corner in CORNERS]
    try:
        corners = [float(text) for text in given]
    except ValueError:
        corners = [math.nan] * 4
    x0, y0, x1, y1 = corners
    if not (all(map(math.isfinite, corners)) and x0 <= x1 and y0 <= y1):
        shown = ", ".join(
            f"{corner} {text or 'missing'}" for corner, text in zip(CORNERS, given, strict=True)
        )
        raise DataError(
            f"{file}: malformed box of '{name}': {shown}; expected numbers, xmin <= xmax and ymin <= ymax"
        )
    return Thing(name, (x0, y0, x1, y1), node.findtext("difficult", "").strip() == "1")
