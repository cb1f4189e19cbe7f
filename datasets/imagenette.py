"""Imagenette: ten classes of ImageNet that are easy to tell apart, free to download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from faithmap import dataset
from faithmap.errors import RequestError
from faithmap.imagenet_classes import imagenet_classes
from faithmap.on_disk import Entry, Home, one_of, sample_list
from faithmap.pictures import Picture
from faithmap.records import Sample

NAME = "imagenette"
FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
SPLITS = ("val", "train")
LABELS = ("imagenet", "own")


@dataset(
    version=1,
    source="Howard 2019, Imagenette (fast.ai)",
    license="Apache 2.0 for the collection; the photographs are under ImageNet's terms",
    citation="J. Howard. Imagenette: A smaller subset of 10 easily classified classes from ImageNet, 2019.",
    gives={"label"},
)
def imagenette(
    *,
    root: str | Path | None = None,
    split: str = "val",
    size: str = "320px",
    labels: str = "imagenet",
    download: bool = False,
) -> Iterable[Sample]:
    """Photographs of ten of ImageNet's classes, from tench to parachute; no boxes, no masks.

    The labels are ImageNet's by default, so that models of its 1000 classes can be scored. Beware that
    `val` holds images of ImageNet's training set: the collection was cut anew (70 to 30) from all of
    ImageNet's images of these classes, so such a model may have learnt from them.

    torchvision downloads and checks the archive. The folders are read here, as its class hands out
    decoded images, not turned as EXIF asks.

    Args:
        root: the folder that holds `imagenette2-320/` (or `imagenette2/`, `imagenette2-160/`), or that
            folder itself; by default where `download` puts it.
        split: "val" (3,925 images) or "train" (9,469).
        size: "320px" or "160px" along the shorter side, or "full".
        labels: "imagenet", 0 to 999, or "own", 0 to 9 in the order of the WordNet ids.
        download: fetch the archive into `root` if it is not there (326 MB at "320px"); by default into the
            user's folder of faithmap.

    Raises:
        RequestError: the images are not there, a folder is no class of ImageNet, or a parameter is unknown.
    """
    for parameter, given, known in (
        ("split", split, SPLITS),
        ("size", size, (*FOLDERS,)),
        ("labels", labels, LABELS),
    ):
        one_of(NAME, parameter, given, known)
    home = Home(
        NAME, FOLDERS[size], (split,),
        f"fetch {FOLDERS[size]}.tgz from https://github.com/fastai/imagenette, unpack it and give root = the "
        "folder that holds it",
        ", or give download = true to have it done",
    )  # fmt: skip
    if download:
        home.fetch(root, lambda base: _download(base, size))
    base = home.find(root)
    classes = imagenet_classes()
    found = list(classes.images_in(base / split))
    present = sorted({label for _, label in found})  # in the order of the WordNet ids, as labels are
    entries = [
        Entry(f"{split}/{file.parent.name}/{file.name}", Picture(file),
              label if labels == "imagenet" else present.index(label), classes.names[label])
        for file, label in found
    ]  # fmt: skip
    if not entries:
        raise RequestError(f"dataset '{NAME}': {base / split} holds no images; unpack the archive anew")
    own = tuple(classes.names[label] for label in present)
    return sample_list(base, entries, classes.names if labels == "imagenet" else own)


def _download(base: Path, size: str) -> None:
    from torchvision.datasets import Imagenette

    Imagenette(base, split="val", size=size, download=True)
