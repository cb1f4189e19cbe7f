"""Food-101: dishes, photographed by those who were about to eat them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from faithmap import dataset
from faithmap.errors import RequestError
from faithmap.on_disk import Entry, Home, one_of, sample_list, text_of
from faithmap.pictures import Picture
from faithmap.records import Sample

NAME = "food-101"
HOME = Home(
    NAME,
    "food-101",
    ("meta", "images"),
    "fetch food-101.tar.gz from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/, unpack it and "
    "give root = the folder that then holds food-101/",
    ", or give download = true to have it done (5 GB)",
)
SPLITS = ("test", "train")


@dataset(
    version=1,
    source="Bossard et al. 2014 (ECCV)",
    license=(
        "scientific fair use only; the photographs come from Foodspotting, are not ETH Zurich's, and any "
        "other use must be negotiated with their owners under Foodspotting's terms"
    ),
    citation=(
        "L. Bossard, M. Guillaumin, L. Van Gool. Food-101: Mining Discriminative Components with Random "
        "Forests. European Conference on Computer Vision, 2014."
    ),
    gives={"label"},
)
def food_101(
    *, root: str | Path | None = None, split: str = "test", download: bool = False
) -> Iterable[Sample]:
    """Photographs of 101 dishes: 250 checked ones each for testing, 750 unchecked ones for training.

    Labels are the places of the sorted class names, as in `torchvision.datasets.Food101`; ids are
    the paths below `images/`. The training images are noisy on purpose: some labels are wrong. The
    revision is a digest of the ids and of the files' sizes.

    torchvision downloads and checks the archive. The lists are read here, since its class hands out
    decoded images, not turned as EXIF asks, and stops at the first broken one.

    Args:
        root: the folder that holds `food-101/`, or `food-101/` itself.
        split: "test" or "train", as listed in `meta/` (`.json`, or `.txt` where there is no `.json`).
        download: fetch what is missing to `root`, with a check of the MD5 sum.

    Raises:
        RequestError: the data are not there, or a list is malformed; file and place are named.
    """
    one_of(NAME, "split", split, SPLITS)
    if download:
        HOME.fetch(root, _download)
    base = HOME.find(root)
    listed = _listed(base / "meta", split)
    classes = sorted(listed)
    entries = [
        Entry(f"{path}.jpg", Picture(base / "images" / f"{path}.jpg"), label, name.replace("_", " "))
        for label, name in enumerate(classes)
        for path in listed[name]
    ]
    return sample_list(base, entries, [name.replace("_", " ") for name in classes])


def _download(root: Path) -> None:
    from torchvision.datasets import Food101

    Food101(root, split="test", download=True)


def _listed(meta: Path, split: str) -> dict[str, list[str]]:
    """Paths by class, without their endings, in the order of the list."""
    file = meta / f"{split}.json"
    if not file.is_file() and (meta / f"{split}.txt").is_file():
        return _from_text(meta / f"{split}.txt")
    try:
        content = json.loads(text_of(file))
    except json.JSONDecodeError as error:
        raise RequestError(f"{file} is not JSON: {error}; fetch the dataset anew") from error
    form = 'expected {"class": ["class/image", ...], ...}'
    if not isinstance(content, dict) or not content:
        raise RequestError(f"{file} lists no classes; {form}")
    for name, paths in content.items():
        sound = isinstance(paths, list) and all(
            isinstance(path, str) and path.startswith(f"{name}/") for path in paths
        )
        if not sound:
            raise RequestError(f"{file}: the class '{name}' has {str(paths)[:80]}; {form}")
        if len(set(paths)) < len(paths):
            double = next(path for path in paths if paths.count(path) > 1)
            raise RequestError(f"{file}: the image '{double}' occurs twice; fetch the dataset anew")
    return content


def _from_text(file: Path) -> dict[str, list[str]]:
    """The same from a list of `class/image`, one a line."""
    listed: dict[str, list[str]] = {}
    seen: set[str] = set()
    for number, text in enumerate(text_of(file).splitlines(), 1):
        path = text.strip()
        if not path:
            continue
        name, slash, image = path.partition("/")
        if not (name and slash and image):
            raise RequestError(f"{file}, line {number}: expected 'class/image', got '{path}'")
        if path in seen:
            raise RequestError(f"{file}, line {number}: the image '{path}' occurs twice")
        seen.add(path)
        listed.setdefault(name, []).append(path)
    if not listed:
        raise RequestError(f"{file} lists no images; expected lines of 'class/image'")
    return listed
