"""The thousand classes of ImageNet in the order of models' outputs: sorted by WordNet id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from faithmap.errors import RequestError
from faithmap.pictures import SUFFIXES


@dataclass(frozen=True)
class ImageNetClasses:
    """WordNet ids and words of the classes, by label, and labels by id."""

    wnids: tuple[str, ...]
    names: tuple[str, ...]
    labels: Mapping[str, int]

    def label(self, wnid: str, where: str) -> int:
        """The label of a WordNet id; `where` says in errors what names it.

        Raises:
            RequestError: it is none of the thousand.
        """
        label = self.labels.get(wnid)
        if label is None:
            raise RequestError(
                f"{where}: '{wnid}' is none of the WordNet ids of ImageNet's 1000 classes, "
                f"{self.wnids[0]} to {self.wnids[-1]}"
            )
        return label

    def images_in(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """The images in folders of WordNet ids, sorted, each with its label.

        Files that begin with a dot came along from macOS.

        Raises:
            RequestError: a folder is named otherwise.
        """
        for place in sorted(path for path in folder.iterdir() if path.is_dir()):
            label = self.label(place.name, str(folder))
            for file in sorted(place.iterdir()):
                if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                    yield file, label


@cache
def imagenet_classes() -> ImageNetClasses:
    """The classes as timm lists them, offline, with the words that the devkit of ILSVRC2012 has for them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    wnids = tuple(info.label_names())
    names = tuple(info.label_name_to_description(wnid) for wnid in wnids)
    return ImageNetClasses(wnids, names, {wnid: label for label, wnid in enumerate(wnids)})
