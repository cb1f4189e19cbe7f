"""What is kept beside something that was learnt: from which images, under what circumstances, its curve."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import faithmap
from faithmap.config import PLACE_KEYS
from faithmap.data import LoadedDataset, traces
from faithmap.models import Model
from faithmap.records import Sample

if TYPE_CHECKING:
    from faithmap.training import Session


#: Images that could not be read are named in a record up to this many.
NAMED = 100


def data_entry(
    dataset: LoadedDataset,
    samples: Sequence[Sample],
    unreadable: Mapping[str, str],
    *,
    part: str,
    limit: int | None,
) -> dict[str, Any]:
    """What was learnt from, as a record keeps it; its `ids` are digests, so that overlaps can be found."""
    return {
        "dataset": dataset.label,
        "key": dataset.key,
        "revision": dataset.revision,
        "part": part,
        "limit": limit,
        "images": len(samples) - len(unreadable),
        "unreadable": len(unreadable),
        "unreadable_ids": sorted(unreadable)[:NAMED],
        "plugin": dataset.plugin.name,
        "params": {k: v for k, v in dataset.params.items() if k not in PLACE_KEYS},
        "ids": traces(dataset, samples),
    }


def circumstances(session: Session, model: Model) -> dict[str, Any]:
    """Where, when, for how long and with what it was learnt, as a record keeps it."""
    from faithmap.provenance import checkout, command_line, git_state, gpu, library_versions

    return {
        "seed": session.seed,
        "precision": session.precision,
        "device": str(model.device),
        **gpu(model.device),
        "devices": session.devices,
        "threads": torch.get_num_threads(),
        "steps": len(session.curve),
        "last": session.curve[-1] if session.curve else {},
        "seconds": round(session.elapsed(), 3),
        "faithmap": faithmap.__version__,
        **git_state(checkout()),
        "torch": library_versions()["torch"],
        "command": command_line(),
        "created": datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
    }


def device_name(model: Model) -> str:
    """What a model's device is called: the card behind CUDA, else "cpu" or "mps"."""
    from faithmap.provenance import gpu

    return gpu(model.device).get("gpu", str(model.device))


def counted(curve: Sequence[Mapping[str, float]], columns: Iterable[str]) -> dict[str, int]:
    """The sums of the columns that count images of a step."""
    return {name: round(sum(line[name] for line in curve)) for name in columns if curve and name in curve[0]}


def told_counts(record: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """A line for each sum of a record that is above zero: what is true of how many image passes."""
    passes = record["data"].get("passes")
    of = "" if passes is None else f" of {passes}"
    counts = record.get("counts", {})
    return [f"{what}: {counts[name]}{of} image passes" for name, what in columns.items() if counts.get(name)]


def curve_csv(curve: Sequence[Mapping[str, float]]) -> str:
    """What was reported, a step a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(curve[0]) if curve else ["step"]
    writer.writerow(names)
    for line in curve:
        writer.writerow([int(line["step"]), *(repr(line[name]) for name in names[1:])])
    return text.getvalue()
