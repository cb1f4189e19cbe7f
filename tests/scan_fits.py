"""A decoder of SCAN that is fitted in a test: its images, its session, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faithmap import registry
from faithmap.models import Model


@dataclass
class Data:
    """Images and labels in memory; the order is a function of the seed and the epoch."""

    images: Tensor
    labels: Tensor
    seed: int = 0
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int, *, drop_last: bool = False) -> int:
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self, batch_size: int, epoch: int, *, drop_last: bool = True, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append(epoch)
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self), generator=generator)
        for part in order.split(batch_size)[start:]:
            if len(part) == batch_size or not drop_last:
                yield self.images[part], self.labels[part]


class KilledError(Exception):
    pass


@dataclass
class Session:
    """Keeps the state after each step, and may be killed after one."""

    seed: int = 0
    precision: str = "fp32"
    kept: dict[str, Any] | None = None
    dies_after: int | None = None
    curve: dict[int, dict[str, float]] = field(default_factory=dict)

    def resume(self) -> dict[str, Any] | None:
        return self.kept

    def restoring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def checkpoint(self, make_state: Callable[[], dict[str, Any]]) -> None:
        self.kept = make_state()
        if self.dies_after is not None and len(self.curve) >= self.dies_after:
            raise KilledError

    def report(self, step: int, steps: int, values: dict[str, float]) -> None:
        assert 1 <= step <= steps
        self.curve[step] = values


def make_data(model: Model, count: int = 10, seed: int = 2) -> Data:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *model.input_size, generator=generator)
    return Data(images, torch.randint(0, model.num_classes, (count,), generator=generator))


def make_scan(**params: Any) -> Any:
    plugin = registry.get("explainer", "scan")
    return plugin.make(plugin.check({"width": 0.125, **params}))


def fitted(model: Model, **params: Any) -> Any:
    scan = make_scan(**params)
    scan.load(model, scan.fit(model, make_data(model), Session(), epochs=1, batch_size=4))
    return scan


def curve_of(session: Session) -> np.ndarray:
    return np.array([list(session.curve[step].values()) for step in sorted(session.curve)])
