"""Oxford-IIIT Pet: breeds of cats and dogs with a segmentation of each animal."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faithmap import dataset
from faithmap.errors import DataError, RequestError
from faithmap.imagenet_classes import imagenet_classes
from faithmap.on_disk import Entry, Home, lines, one_of, sample_list, text_of, whole
from faithmap.pictures import Box, Picture
from faithmap.records import Sample

if TYPE_CHECKING:
    import numpy as np

NAME = "oxford-iiit-pet"
HOME = Home(
    NAME,
    "oxford-iiit-pet",
    ("images", "annotations"),
    "fetch images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/, unpack "
    "both in a folder oxford-iiit-pet/ and give root = the folder that holds it",
    ", or give download = true to have it done (0.8 GB)",
)
SPLITS = ("test", "trainval")
LABELS = ("breed", "species", "imagenet")
#: Breeds that are a class of ImageNet, with its WordNet id. ImageNet's "Egyptian cat" is no Egyptian Mau.
WNIDS = {
    "American Pit Bull Terrier": "n02093428", "Basset Hound": "n02088238", "Beagle": "n02088364",
    "Boxer": "n02108089", "Chihuahua": "n02085620", "English Cocker Spaniel": "n02102318",
    "English Setter": "n02100735", "German Shorthaired": "n02100236", "Great Pyrenees": "n02111500",
    "Japanese Chin": "n02085782", "Keeshond": "n02112350", "Leonberger": "n02111129",
    "Miniature Pinscher": "n02107312", "Newfoundland": "n02111277", "Persian": "n02123394",
    "Pomeranian": "n02112018", "Pug": "n02110958", "Saint Bernard": "n02109525", "Samoyed": "n02111889",
    "Scottish Terrier": "n02097298", "Siamese": "n02123597", "Staffordshire Bull Terrier": "n02093256",
    "Wheaten Terrier": "n02098105", "Yorkshire Terrier": "n02094433",
}  # fmt: skip
TRUTHS = ("mask", "head")
SPECIES = ("Cat", "Dog")
#: Values of the trimaps.
PET, BACKGROUND, BORDER = 1, 2, 3
BORDERS = ("void", "pet", "background")


@dataset(
    version=2,
    source="Parkhi et al. 2012 (CVPR)",
    license="CC BY-SA 4.0; the copyright remains with the owners of the photographs",
    citation="O. M. Parkhi, A. Vedaldi, A. Zisserman, C. V. Jawahar. Cats and Dogs. CVPR, 2012.",
    gives={"label", "mask"},
)
def oxford_iiit_pet(
    *,
    root: str | Path | None = None,
    split: str = "test",
    labels: str = "breed",
    truth: str = "mask",
    border: str = "void",
    download: bool = False,
) -> Iterable[Sample]:
    """Photographs of 37 breeds of cats and dogs, with a mask of the animal.

    Labels and names are those of `torchvision.datasets.OxfordIIITPet`: breeds by their number in the
    lists less one, or cat 0 and dog 1. Ids are the names of the files in `images/`. The revision is a
    digest of ids, labels and boxes and of the files' sizes.

    A trimap holds 1 on the pet, 2 on the background and 3 along its outline, which the authors call
    "not classified"; it is about as wide as fur is blurred. `border` says where the outline goes.

    The boxes of the dataset are of the head, not of the animal, and only the images for training
    have them. They are therefore no truth about a breed, unless `truth = "head"` asks for them.

    torchvision downloads and checks the archives. The lists are read here, since its class hands out
    decoded images, not turned as EXIF asks, and does not say which line of a list is malformed.

    Args:
        root: the folder that holds `oxford-iiit-pet/`, or `oxford-iiit-pet/` itself.
        split: "test" (3,669 images) or "trainval" (3,680), as the lists in `annotations/` have it.
        labels: "breed", 0 to 36; "species"; or "imagenet", for models of ImageNet's 1000 classes: the 24
            breeds that are among these, under their labels, and no other images.
        truth: "mask" gives the trimaps as masks; "head" gives the heads' boxes and no masks.
        border: what the outline counts as: "void", neither, so that metrics of localisation pass over
            it; "pet", as in the common two-class reading of the dataset, such as that of the library
            segmentation_models.pytorch; or "background".
        download: fetch what is missing to `root`, with a check of the MD5 sums.

    Raises:
        RequestError: the data are not there, or a list is malformed; file and line are named.
    """
    one_of(NAME, "split", split, SPLITS)
    one_of(NAME, "labels", labels, LABELS)
    one_of(NAME, "truth", truth, TRUTHS)
    one_of(NAME, "border", border, BORDERS)
    if download:
        HOME.fetch(root, _download)
    base = HOME.find(root)
    entries, breeds = _listed(base, split, labels)
    if labels == "imagenet":
        entries, breeds = _among_imagenets(entries), imagenet_classes().names
    if truth == "head":
        entries = [_with_head(entry, base / "annotations" / "xmls") for entry in entries]
        if not any(entry.picture.boxes for entry in entries):
            raise RequestError(
                f"dataset '{NAME}': no image of the split '{split}' has its head's box in "
                f'{base / "annotations" / "xmls"}; those of "trainval" have'
            )
    else:
        folder = base / "annotations" / "trimaps"
        entries = [_with_mask(entry, folder, border) for entry in entries]
    return sample_list(base, entries, SPECIES if labels == "species" else breeds)


def _among_imagenets(entries: Sequence[Entry]) -> list[Entry]:
    """The images of breeds that are classes of ImageNet, with these for labels."""
    labels = {name: imagenet_classes().label(wnid, NAME) for name, wnid in WNIDS.items()}
    kept = [replace(entry, label=labels[entry.name]) for entry in entries if entry.name in labels]
    if not kept:
        raise RequestError(
            f"dataset '{NAME}': none of the images is of a breed that ImageNet has for a class"
        )
    return kept


def _download(root: Path) -> None:
    from torchvision.datasets import OxfordIIITPet

    OxfordIIITPet(root, split="test", download=True)


def _listed(base: Path, split: str, labels: str) -> tuple[list[Entry], Sequence[str]]:
    """The images of a split in the order of its list, and the breeds' names by label."""
    entries: dict[str, Entry] = {}
    breeds: dict[int, str] = {}
    file = base / "annotations" / f"{split}.txt"
    for line in lines(file, "image class_id species breed_id", comment="#"):
        stem = line.values[0]
        breed = whole(line, 1, "class id", least=1, most=37) - 1
        species = whole(line, 2, "species", least=1, most=2) - 1
        if stem in entries:
            raise RequestError(f"{line.where}: the image '{stem}' occurs twice; expected one line for each")
        name = " ".join(word.title() for word in stem.rpartition("_")[0].split("_"))
        if breeds.setdefault(breed, name) != name:
            raise RequestError(
                f"{line.where}: class {breed + 1} is '{name}' here and '{breeds[breed]}' further up"
            )
        by_species = labels == "species"
        entries[stem] = Entry(
            f"{stem}.jpg",
            Picture(base / "images" / f"{stem}.jpg"),
            species if by_species else breed,
            SPECIES[species] if by_species else name,
        )
    if not entries:
        raise RequestError(f"{file} lists no images; expected lines of 'image class_id species breed_id'")
    return list(entries.values()), [breeds.get(label, "") for label in range(max(breeds) + 1)]


def _with_mask(entry: Entry, folder: Path, border: str) -> Entry:
    picture = replace(
        entry.picture,
        mask_path=folder / Path(entry.id).with_suffix(".png"),
        on_object=partial(_among, wanted=(PET, BORDER) if border == "pet" else (PET,)),
        is_void=partial(_among, wanted=(BORDER,)) if border == "void" else None,
    )
    return replace(entry, picture=picture)


def _among(values: np.ndarray, *, wanted: tuple[int, ...]) -> np.ndarray:
    """The pixels of a trimap with one of some values."""
    import numpy as np

    if values.ndim != 2 or not ((values >= PET) & (values <= BORDER)).all():
        found = sorted({int(value) for value in values.ravel()[:100_000]})[:5]
        raise DataError(f"the trimap holds {found}, expected 1 (pet), 2 (background) and 3 (border)")
    return np.isin(values, wanted)


def _with_head(entry: Entry, folder: Path) -> Entry:
    """The entry with the boxes of the heads in its XML file, if it has one."""
    file = folder / Path(entry.id).with_suffix(".xml")
    if not file.is_file():
        return entry
    try:
        tree = ElementTree.fromstring(text_of(file))
    except ElementTree.ParseError as error:
        raise RequestError(f"{file} is not XML: {error}; fetch the annotations anew") from error
    boxes = tuple(_head(found, file) for found in tree.iter("bndbox"))
    return replace(entry, picture=replace(entry.picture, boxes=boxes))


def _head(element: ElementTree.Element, file: Path) -> Box:
    """A box of PASCAL VOC's kind: it counts pixels from 1, and its last pixel belongs to it."""
    try:
        x0, y0, x1, y1 = (float(element.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise RequestError(f"{file}: expected numbers as xmin, ymin, xmax, ymax of each bndbox") from None
    return x0 - 1, y0 - 1, x1, y1
