"""Datasets as a run sees them: what was asked for, in an order that any limit is a prefix of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faithmap.batch import Batch
from faithmap.config import PLACE_KEYS, located
from faithmap.context import Context
from faithmap.errors import DataError, RequestError
from faithmap.models import Model
from faithmap.pictures import Picture, file_size
from faithmap.plugin import Plugin
from faithmap.records import Sample, Spec, digest
from faithmap.registry import get
from faithmap.transforms import Prepared, prepare

DEV_SHARE = 0.25


@dataclass(frozen=True)
class LoadedDataset:
    """The samples of a dataset with its identity."""

    label: str
    plugin: Plugin
    params: dict[str, Any]
    samples: tuple[Sample, ...]
    #: What the samples really come with.
    gives: frozenset[str]
    revision: str
    class_names: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Content key: plugin, version, revision and parameters; not where the data lie or came from."""
        params = {key: value for key, value in self.params.items() if key not in PLACE_KEYS}
        return digest(self.plugin.name, self.plugin.facts.version, self.revision, params)


def load_dataset(spec: Spec) -> LoadedDataset:
    """Call a dataset plugin and check what it gives.

    Raises:
        RequestError: the plugin refuses its parameters, gives no images, or repeats an id.
    """
    plugin = get("dataset", spec.name)
    params = plugin.check(located(spec)[1])
    given = plugin.make(params)()
    samples = tuple(given)
    if not samples:
        raise RequestError(
            f"dataset '{spec.title}' gives no images; check its parameters: {dict(spec.params)}"
        )
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise RequestError(f"dataset '{spec.title}' gives the id '{double}' twice; ids must be unique")
    gives = {"label"} if any(sample.label is not None for sample in samples) else set()
    gives |= {"box"} if any(sample.boxes is not None for sample in samples) else set()
    gives |= {"mask"} if any(sample.mask is not None for sample in samples) else set()
    names = getattr(given, "class_names", None)
    return LoadedDataset(
        label=spec.title,
        plugin=plugin,
        params=params,
        samples=samples,
        gives=frozenset(gives),
        revision=str(getattr(given, "revision", "") or plugin.facts.revision),
        class_names=tuple(names) if names else None,
    )


def part_of(image_id: str) -> str:
    """ "dev" (a quarter, for choosing defaults) or "eval" (what is published), by hash of the id."""
    return "dev" if _share(image_id, "part") < DEV_SHARE else "eval"


def choose(samples: Sequence[Sample], part: str, limit: int | None) -> tuple[Sample, ...]:
    """The samples of a part in the run's order, of which a limit takes the first.

    The order goes round the classes, one image of each a round, by hash of the ids: every limit
    is as balanced as the data allow, and a larger limit only adds images.

    Raises:
        RequestError: the part holds no image.
    """
    wanted = [sample for sample in samples if part == "all" or part_of(sample.id) == part]
    if not wanted:
        raise RequestError(f"part '{part}' holds none of the {len(samples)} images; use part = \"all\"")
    wanted.sort(key=lambda sample: (_share(sample.id, "order"), sample.id))
    rounds: dict[int | None, int] = {}
    keyed = []
    for place, sample in enumerate(wanted):
        turn = rounds.get(sample.label, 0)
        rounds[sample.label] = turn + 1
        keyed.append((turn, place, sample))
    ordered = [sample for _, _, sample in sorted(keyed, key=lambda item: item[:2])]
    return tuple(ordered[:limit])


def held_out(samples: Sequence[Sample], share: float) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples to learn from, and a share of them to test on, by hash of the ids.

    Samples of one file, as of the classes in a photograph, stay together.
    """
    first: dict[Path, str] = {}
    for sample in samples:
        if (file := file_of(sample)) is not None:
            first[file] = min(sample.id, first.get(file, sample.id))

    def held(sample: Sample) -> bool:
        file = file_of(sample)
        return _share(sample.id if file is None else first[file], "held-out") < share

    return tuple(s for s in samples if not held(s)), tuple(s for s in samples if held(s))


def file_of(sample: Sample) -> Path | None:
    """The file that a sample's image is read from; None where that is not known."""
    if isinstance(sample.image, Path):
        return sample.image
    owner = getattr(sample.image, "__self__", None)
    return owner.path if isinstance(owner, Picture) else None


def traces(dataset: LoadedDataset, samples: Sequence[Sample]) -> list[str]:
    """What each image is known by, so that images that two datasets have in common are found.

    A file by its name and size, under whatever list or split it comes; what is not a file by its dataset's
    revision and its id.
    """
    found = []
    for sample in samples:
        file = file_of(sample)
        known = (
            [dataset.plugin.name, dataset.revision, sample.id]
            if file is None
            else [file.name, file_size(file)]
        )
        found.append(digest(*known, length=10))
    return found


def _share(image_id: str, purpose: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{image_id}".encode()).digest()[:8], "big") / 2**64


def check_labels(dataset: LoadedDataset, samples: Sequence[Sample], model: Model) -> None:
    """Refuse labels that the model has no logit for.

    Raises:
        RequestError: names the image, its label and the number of classes.
    """
    for sample in samples:
        if sample.label is not None and not 0 <= sample.label < model.num_classes:
            raise RequestError(
                f"dataset '{dataset.label}': image '{sample.id}' has label {sample.label}, out of range for "
                f"model '{model.name}', which has {model.num_classes} classes (0 to "
                f"{model.num_classes - 1}); give a class map, or a model of these classes"
            )


def check_target(target: str, dataset: LoadedDataset, samples: Sequence[Sample]) -> None:
    """Refuse to explain labels where an image has none.

    Raises:
        RequestError: names the image.
    """
    for sample in samples:
        if target == "label" and sample.label is None:
            raise RequestError(
                f"dataset '{dataset.label}': image '{sample.id}' has no label, and target = \"label\" "
                'explains it; use target = "predicted", or leave such images out'
            )


@dataclass(frozen=True)
class Shard:
    """Images that run through explainers and metrics together."""

    samples: tuple[Sample, ...]
    first: bool

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' ids."""
        return tuple(sample.id for sample in self.samples)


def shards(samples: Sequence[Sample], size: int) -> list[Shard]:
    """Cut the run's order into shards of a fixed size."""
    return [Shard(tuple(samples[start : start + size]), start == 0) for start in range(0, len(samples), size)]


def read_shard(shard: Shard, model: Model) -> tuple[list[tuple[Sample, Prepared]], dict[str, str]]:
    """Load the images of a shard for a model; those that cannot be read are returned with the reason."""
    read, unreadable = [], {}
    for sample in shard.samples:
        try:
            read.append((sample, prepare(sample, model.transform)))
        except DataError as error:
            unreadable[sample.id] = str(error)
    return read, unreadable


def make_batch(
    read: Sequence[tuple[Sample, Prepared]],
    model: Model,
    target: str,
    grid: tuple[int, int] | None,
    seed: int,
    gives: frozenset[str] = frozenset(),
) -> Batch:
    """Put loaded images on the model's device as one batch, and decide which classes are explained.

    Truths that the dataset gives (`gives`) are there in every batch, blank for images without them, so
    that no metric depends on which images come together.
    """
    device = model.device
    images = torch.stack([prepared.image for _, prepared in read]).to(device)
    context = Context(model, images)
    labels = None
    if "label" in gives or any(sample.label is not None for sample, _ in read):
        labels = torch.tensor([-1 if s.label is None else s.label for s, _ in read], device=device)
    blank = torch.zeros(images.shape[2:], dtype=torch.bool)
    masks, masked = None, None
    if "mask" in gives or any(prepared.mask is not None for _, prepared in read):
        masked = torch.tensor([p.mask is not None for _, p in read], device=device)
        masks = torch.stack([blank if p.mask is None else p.mask for _, p in read]).to(device)
    void = None
    if any(prepared.void is not None for _, prepared in read):
        void = torch.stack([blank if p.void is None else p.void for _, p in read]).to(device)
    boxes = None
    if "box" in gives or any(prepared.boxes is not None for _, prepared in read):
        boxes = [torch.zeros(0, 4) if p.boxes is None else p.boxes for _, p in read]
    return Batch(
        images=images,
        targets=pick_targets(target, context.logits, labels),
        ids=tuple(sample.id for sample, _ in read),
        context=context,
        labels=labels,
        masks=masks,
        masked=masked,
        void=void,
        boxes=boxes,
        grid=grid,
        seed=seed,
    )


def pick_targets(policy: str, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The classes (B,) explained: the prediction, the label, or the second most likely class."""
    if policy == "label":
        if labels is None or bool((labels < 0).any()):
            raise RequestError('target = "label" needs a label for every image; use target = "predicted"')
        return labels
    order = logits.topk(min(2, logits.shape[1]), dim=1).indices
    return order[:, -1 if policy == "second" else 0]
