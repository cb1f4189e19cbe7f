"""Maps kept on disk for as long as one request scores them in several ways.

A map depends on the model, the explainer, the image and the class explained, and not on how it is
scored. `<key>/<hash of images and classes>.npz` holds the maps of one batch.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch

from faithmap.batch import Batch
from faithmap.explaining import MapSet
from faithmap.records import Status, digest
from faithmap.store import write_bytes


class MapLibrary:
    """A folder of maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, batch: Batch, make: Callable[[], MapSet]) -> MapSet:
        """The maps of a batch, made and kept where they are not here yet.

        Args:
            key: what they depend on beside the images and the classes explained.
            batch: the images.
            make: makes the maps.
        """
        file = self.folder / key / f"{digest(batch.ids, batch.targets.tolist())}.npz"
        held = _read(file, batch)
        if held is not None:
            return held
        made = make()
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, maps=made.maps.cpu().numpy(), status=np.array(made.status), reasons=np.array(made.reasons)
        )
        write_bytes(file, buffer.getvalue())
        return made

    def drop(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path, batch: Batch) -> MapSet | None:
    """The maps of a file; None where there is none, or a damaged one, which is made again."""
    try:
        with np.load(file) as held:
            maps = torch.from_numpy(held["maps"]).to(batch.images.device)
            status = [cast(Status, str(word)) for word in held["status"]]
            return MapSet(maps, status, [str(reason) for reason in held["reasons"]])
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError):
        return None
