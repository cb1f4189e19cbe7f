"""The figure of heat maps that a run ends with: its first images under every explainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from faithmap import heatmaps
from faithmap.data import read_shard
from faithmap.engine import PREVIEWED
from faithmap.report import file_stem
from faithmap.store import RunStore, write_bytes
from faithmap.units import Group


def draw_previews(groups: Sequence[Group], store: RunStore) -> list[Path]:
    """Draw `figures/heatmaps-<model>-<dataset>.png` from the maps that the run has kept."""
    files = []
    for group in groups:
        shown = [
            task for task in group.tasks if task.cell.null is None and not task.cell.draw and not task.skip
        ]
        kept = [store.preview(task.cell.key) for task in shown]
        read, _ = read_shard(group.shards[0], group.model)
        read = [(sample, prepared) for sample, prepared in read if any(sample.id in maps for maps in kept)]
        if not read:
            continue
        rows = []
        for sample, prepared in read[:PREVIEWED]:
            maps = [_tensor(cell, sample.id) for cell in kept]
            rows.append((_caption(sample.name or sample.id), prepared.image, maps))
        drawn = heatmaps.draw_grid(rows, [task.cell.label for task in shown])
        name = f"heatmaps-{file_stem(group.model.name, group.dataset)}.png"
        files.append(store.path / "figures" / name)
        write_bytes(files[-1], drawn)
    return files


def _tensor(maps: dict[str, object], image: str) -> torch.Tensor | None:
    return torch.as_tensor(maps[image]) if image in maps else None


def _caption(name: str) -> str:
    """A class name or id, short enough for a panel."""
    short = name.split(",")[0]
    return short if len(short) <= 22 else f"{short[:21]}…"
