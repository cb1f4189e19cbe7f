"""Dogs vs. Cats: the photographs of Asirra, as Kaggle or as Microsoft hands them out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from faithmap import dataset
from faithmap.errors import RequestError
from faithmap.on_disk import Entry, Home, one_of, sample_list
from faithmap.pictures import Picture
from faithmap.records import Sample

NAME = "dogs-vs-cats"
CLASSES = ("cat", "dog")
SPLITS = ("all", "train", "test")
#: Share of the images that are held out.
TEST_SHARE = 0.2
ADVICE = (
    "fetch the competition 'dogs-vs-cats' from https://www.kaggle.com/c/dogs-vs-cats/data and unpack its "
    "train.zip to train/cat.0.jpg and so on, or the same photographs from "
    "https://www.microsoft.com/download/details.aspx?id=54765, which unpack to PetImages/Cat and "
    "PetImages/Dog, and give root = the folder of train/ or of PetImages/"
)
KAGGLE = Home(NAME, "train", (), ADVICE)
MICROSOFT = Home(NAME, "PetImages", ("Cat", "Dog"), ADVICE)
KAGGLE_NAME = re.compile(r"(cat|dog)\.(\d+)\.jpg")
MICROSOFT_NAME = re.compile(r"\d+\.jpg")


@dataset(
    version=1,
    source="Elson et al. 2007 (Asirra, ACM CCS), as given out by Kaggle (2013) and Microsoft",
    license=(
        "no open licence: Kaggle's rules of the competition, or Microsoft's terms for its download; the "
        "photographs are Petfinder's"
    ),
    citation=(
        "J. Elson, J. R. Douceur, J. Howell, J. Saul. Asirra: A CAPTCHA that Exploits Interest-Aligned "
        "Manual Image Categorization. ACM Conference on Computer and Communications Security, 2007."
    ),
    gives={"label"},
)
def dogs_vs_cats(*, root: str | Path | None = None, split: str = "all") -> Iterable[Sample]:
    """Photographs of 12,500 cats (label 0) and 12,500 dogs (label 1).

    Kaggle's layout (`train/cat.0.jpg`) and Microsoft's (`PetImages/Cat/0.jpg`) are told apart by
    what lies there. Ids are the paths below `train/` or `PetImages/`, so a board of the one is not
    continued with the other. The revision is a digest of the ids and of the files' sizes.

    Kaggle's own test images have no labels. `split` therefore holds out a fifth of the labelled ones
    by SHA-256 of their ids, the same on every machine.

    Some of Microsoft's files are broken, such as the empty `Cat/666.jpg` and `Dog/11702.jpg`. They
    are counted as unreadable, for all methods alike.

    No class of ImageNet means cat or dog: it has 118 breeds of dogs and five of cats. A network of
    ImageNet's classes therefore cannot be scored here without another head.

    Args:
        root: the folder that holds `train/` or `PetImages/`, or one of these.
        split: "all", "train" (four fifths) or "test" (the fifth held out).

    Raises:
        RequestError: the images are not there, or the split is unknown.
    """
    one_of(NAME, "split", split, SPLITS)
    entries = [entry for entry in _found(root) if split == "all" or _split_of(entry.id) == split]
    if not entries:
        raise RequestError(f"dataset '{NAME}': the split '{split}' holds none of the images found in {root}")
    return sample_list(entries[0].picture.path.parent, entries, CLASSES)


def _found(root: str | Path | None) -> list[Entry]:
    base = Path(root).expanduser() if root is not None else None
    if base is not None and any((folder / "Cat").is_dir() for folder in (base, base / "PetImages")):
        return _microsoft(MICROSOFT.find(base))
    folder = KAGGLE.find(base)
    entries = _kaggle(folder)
    if not entries:
        raise RequestError(f"dataset '{NAME}': {folder} holds no cat.N.jpg and no dog.N.jpg; {ADVICE}")
    return entries


def _kaggle(folder: Path) -> list[Entry]:
    found = [(match, path) for path in folder.iterdir() if (match := KAGGLE_NAME.fullmatch(path.name))]
    found.sort(key=lambda item: (item[0][1], int(item[0][2])))
    return [Entry(path.name, Picture(path), CLASSES.index(match[1]), match[1]) for match, path in found]


def _microsoft(folder: Path) -> list[Entry]:
    entries = []
    for label, name in enumerate(CLASSES):
        place = folder / name.title()
        files = [path for path in place.iterdir() if MICROSOFT_NAME.fullmatch(path.name)]
        if not files:
            raise RequestError(f"dataset '{NAME}': {place} holds no images such as 0.jpg; {ADVICE}")
        files.sort(key=lambda path: (int(path.stem), path.name))
        entries += [Entry(f"{place.name}/{path.name}", Picture(path), label, name) for path in files]
    return entries


def _split_of(image_id: str) -> str:
    """The split of an image, by hash of its id alone."""
    share = int.from_bytes(hashlib.sha256(f"{NAME}:{image_id}".encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"
