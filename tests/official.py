"""Small copies of datasets, written in the formats in which these are handed out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from faithmap.imagenet_classes import imagenet_classes
from faithmap.records import Sample, SampleList
from faithmap.registry import get

if TYPE_CHECKING:
    import pandas as pd

#: xmin, ymin, xmax, ymax as a file states them.
Corners = tuple[float, float, float, float]


def build(name: str, **params: Any) -> SampleList:
    """The samples of a dataset, as the core calls it."""
    plugin = get("dataset", name)
    samples = plugin.make(plugin.check(params))()
    assert isinstance(samples, SampleList)
    return samples


def photograph(
    file: Path, size: tuple[int, int], bright: Iterable[Corners] = (), first: int = 0, **options: Any
) -> None:
    """A JPEG, white on the pixels from (xmin, ymin) to (xmax, ymax), counted from `first`; else black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for x0, y0, x1, y1 in bright:
        pixels[int(y0) - first : int(y1) - first + 1, int(x0) - first : int(x1) - first + 1] = 255
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=100, subsampling=0, **options)


def annotation(
    file: Path, size: tuple[int, int], things: Sequence[tuple[str, Corners] | tuple[str, Corners, int]]
) -> None:
    """An XML file as ILSVRC2012 and VOC have them, corners in VOC's order of later years."""
    objects = ""
    for name, (x0, y0, x1, y1), *difficult in things:
        objects += (
            f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
            f"\t\t<difficult>{(difficult or [0])[0]}</difficult>\n\t\t<bndbox>\n\t\t\t<xmax>{x1}</xmax>\n"
            f"\t\t\t<xmin>{x0}</xmin>\n\t\t\t<ymax>{y1}</ymax>\n\t\t\t<ymin>{y0}</ymin>\n\t\t</bndbox>\n"
            "\t\t<part>\n\t\t\t<name>head</name>\n\t\t\t<bndbox>\n\t\t\t\t<xmin>1</xmin>\n\t\t\t\t<ymin>1</ymin>\n"
            "\t\t\t\t<xmax>2</xmax>\n\t\t\t\t<ymax>2</ymax>\n\t\t\t</bndbox>\n\t\t</part>\n\t</object>\n"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<annotation>\n\t<folder>val</folder>\n\t<filename>{file.stem}</filename>\n\t<source>\n"
        "\t\t<database>ILSVRC_2012</database>\n\t</source>\n\t<size>\n"
        f"\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{objects}</annotation>\n",
        encoding="utf-8",
    )


def devkit(folder: Path, truths: dict[int, str]) -> None:
    """The devkit of ILSVRC2012: WordNet ids by the images' numbers, in numbers of the devkit's own."""
    import scipy.io

    fields = (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
        "num_train_images",
    )  # fmt: skip
    classes = imagenet_classes()
    # The real devkit does not number the classes by sorted WordNet id either.
    order = list(reversed(classes.wnids))
    synsets = np.empty((len(order) + 1, 1), dtype=[(field, "O") for field in fields])
    for place, wnid in enumerate(order):
        words = classes.names[classes.labels[wnid]]
        synsets[place, 0] = (place + 1, wnid, words, "a gloss", 0, np.zeros((1, 0)), 0, 1300)
    synsets[-1, 0] = (len(order) + 1, "n00001740", "entity", "a gloss", 2, np.array([[1, 2]]), 19, 0)
    data = folder / "data"
    data.mkdir(parents=True)
    scipy.io.savemat(data / "meta.mat", {"synsets": synsets})
    lines = [
        order.index(truths[number]) + 1 if number in truths else 1 for number in range(1, max(truths) + 1)
    ]
    text = "".join(f"{line}\n" for line in lines)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text, encoding="utf-8")


def drawn(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Where the image is white, and where its boxes lie: bool (H, W) each."""
    from faithmap.batch import box_mask

    assert callable(sample.image)
    assert callable(sample.boxes)
    white = np.asarray(sample.image())[..., 0] > 127
    return white, box_mask(sample.boxes(), (white.shape[0], white.shape[1])).numpy()


def oracle_energy(dataset: dict[str, Any], data: Path, out: Path) -> pd.Series[float]:
    """Percent of the oracle's energy on the object, of the images of a dataset that are scored.

    By the small transformer, at the resolution of its input.

    Args:
        dataset: a line of `[[datasets]]`, with labels of ImageNet's.
        data: the folder that `FAITHMAP_DATA` names.
        out: the folder of the run.
    """
    import faithmap

    weights = data / "weights" / "vit_tiny_patch16_224.safetensors"
    config = {
        "run": {"map_grid": "native", "part": "all", "limit": 2000, "null_draws": 1, "own_nulls": []},
        "models": [{"name": "timm/vit_tiny_patch16_224", "mean": 0.5, "std": 0.5, "crop_pct": 0.9,
                    "weights": str(weights)}],
        "datasets": [dataset],
        "explainers": [{"name": "oracle"}],
        "metrics": [{"name": "energy-pointing-game"}],
    }  # fmt: skip
    rows = faithmap.run(config, out=out, figures=False).rows()
    rows = rows[(rows["explainer"] == "oracle") & (rows["metric"] == "energy_pg")]
    return rows["value"].dropna()
