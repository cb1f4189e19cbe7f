"""What goes into a network's head, computed once for all images and kept while the head learns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from faithmap.heads import Head, Taps
from faithmap.models import Model
from faithmap.records import Sample
from faithmap.store import write_bytes
from faithmap.training import Session, TrainingData
from faithmap.training_images import epoch_order

#: Images in a file: what is lost when a process is killed.
SHARD = 512
#: Images that pass through a network together, without gradients.
FORWARD = 64


class Kept:
    """Inputs of a head with their labels, in batches whose order the seed and the epoch alone decide."""

    def __init__(
        self, inputs: Sequence[Tensor], labels: Tensor, device: torch.device, seed: int, total: int
    ) -> None:
        self.inputs, self.labels = list(inputs), labels
        self._device, self._seed, self._total = device, seed, total
        #: Ids of the images that could not be read, with the reason.
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return self._total

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch."""
        return max(1, -(-len(self.labels) // batch_size))

    def batches(
        self, batch_size: int, epoch: int, *, start: int = 0
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Inputs, a tensor for each layer of the head, and labels (B,), of one epoch from a batch on."""
        order = torch.tensor(epoch_order(len(self.labels), self._seed, epoch), dtype=torch.long)
        for place in range(start, self.steps(batch_size)):
            chosen = order[place * batch_size : (place + 1) * batch_size]
            inputs = [tensor[chosen].to(self._device) for tensor in self.inputs]
            yield inputs, self.labels[chosen].to(self._device)


def keep(
    model: Model, head: Head, samples: Sequence[Sample], session: Session, shelf: Path, workers: int = 0
) -> Kept:
    """Compute what goes into a head for every image; files on a shelf make it go on after a kill.

    Args:
        model: the network.
        head: the layers whose inputs are wanted.
        samples: the images, with labels.
        session: whose seed orders the batches, and whose watcher is told.
        shelf: a folder of this very request's own.
        workers: processes that read images.

    Raises:
        KeyboardInterrupt: the user has asked to stop.
    """
    shards = [samples[start : start + SHARD] for start in range(0, len(samples), SHARD)]
    parts: list[dict[str, Tensor]] = []
    unreadable: dict[str, str] = {}
    begun = False
    steps = [-(-len(shard) // FORWARD) for shard in shards]
    for place, shard in enumerate(shards):
        file = shelf / f"{place:05d}.safetensors"
        if (held := _from(file)) is not None:
            parts.append(held[0])
            unreadable |= held[1]
            continue
        if not begun:
            session.watcher.begin(f"features · {session.title}", sum(steps), sum(steps[:place]))
            begun = True
        part, faults = _shard(model, head, shard, session, workers, sum(steps[:place]))
        write_bytes(file, save(part, metadata={"unreadable": json.dumps(faults)}))
        parts.append(part)
        unreadable |= faults
    if begun:
        session.watcher.end()
    filled = [part for part in parts if len(part["labels"])]
    inputs = [torch.cat([part[str(i)] for part in filled]) for i in range(len(head.layers))] if filled else []
    labels = torch.cat([part["labels"] for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
    kept = Kept(inputs, labels, model.device, session.seed, len(samples))
    kept.unreadable = unreadable
    return kept


def _from(file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What a file on the shelf holds; None where there is none, or it is broken and is written anew."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            part = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return part, json.loads(opened.metadata()["unreadable"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _shard(
    model: Model, head: Head, samples: Sequence[Sample], session: Session, workers: int, before: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = TrainingData(samples, model, session.seed, workers)
    read: list[list[Tensor]] = []
    labels: list[Tensor] = []
    with torch.no_grad(), Taps(model.module, head.layers) as taps:
        for step, (images, known) in enumerate(data.batches(FORWARD, 0, shuffle=False), before + 1):
            if session.stopping:
                raise KeyboardInterrupt
            if len(known):
                model(images)
                read.append([given.float().cpu() for given in taps.inputs])
                labels.append(known.cpu())
            session.watcher.step(step, {"images": float(len(known))})
    part = {str(i): torch.cat([given[i] for given in read]) for i in range(len(head.layers)) if read}
    part["labels"] = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)
    return part, data.unreadable
