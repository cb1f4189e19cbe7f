"""A folder with a dataset, a network and a request, and runs of it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.console import Console

from faithmap import cli, runner
from faithmap.store import KEY_COLUMNS

TIMED = r"ms_|peak_mb"

DATASET = '''
"""Coloured squares: an image's class is the colour of its square."""
import torch
from faithmap import Sample, dataset

@dataset(version=1, source="a test", license="CC0", revision="1", gives={"label", "mask", "box"})
def squares(*, n: int = 24, broken: int = -1):
    """Squares of one of five colours on grey noise."""
    return [make(i, broken) for i in range(n)]

def make(i, broken):
    generator = torch.Generator().manual_seed(i)
    image = 0.2 * torch.rand(3, 32, 32, generator=generator)
    y, x = (int(v) for v in torch.randint(0, 16, (2,), generator=generator))
    colour = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])[i % 5]
    image[:, y:y + 12, x:x + 12] = colour.view(3, 1, 1).float()
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[y:y + 12, x:x + 12] = True
    def load():
        if i == broken:
            raise OSError("the file is cut off")
        return image
    return Sample(f"square-{i:03d}", load, i % 5, torch.tensor([[x, y, x + 12, y + 12]]), mask)
'''

NETWORK = """
import sys
from pathlib import Path
import torch
from faithmap import Model
from torch import nn

def build(seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    for parameter in net.parameters():
        parameter.data.mul_(3)
    return Model(net, mean=0.5, std=0.5, input_size=32)

def wrong():
    return nn.Linear(3, 3)
"""

CONFIG = """
[run]
limit = {limit}
part = "all"
batch_size = 4

[[models]]
name = "net.py:build"

[[datasets]]
name = "squares"

[[explainers]]
name = "gradcam"

[[explainers]]
name = "saliency"

[[explainers]]
name = "random"
"""


def lay_out(folder: Path) -> None:
    """Write the files."""
    (folder / "squares.py").write_text(DATASET)
    (folder / "net.py").write_text(NETWORK)
    (folder / "small.toml").write_text(CONFIG.format(limit=12))


@contextlib.contextmanager
def printing_to(out: Console, err: Console) -> Iterator[None]:
    """Commands in this process print there."""
    kept = cli.OUT, cli.ERR
    cli.OUT, cli.ERR = out, err
    try:
        yield
    finally:
        cli.OUT, cli.ERR = kept


def command(*words: str, place: Path) -> list[str]:
    return [sys.executable, "-m", "faithmap.cli", "run", *words, "--plugin", str(place / "squares.py")]


def call(*words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The same command in this process: a new one would import for seconds what is here already."""
    _, _, _, *typed = command(*words, place=place)
    streams = io.StringIO(), io.StringIO()
    with printing_to(*(Console(file=stream, width=80) for stream in streams)), contextlib.chdir(place):
        code = cli.main(typed)
    return subprocess.CompletedProcess(typed, code, *(stream.getvalue() for stream in streams))


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without what a clock measured, in one order."""
    kept = rows[~rows["metric"].str.contains(TIMED)]
    return kept.sort_values(KEY_COLUMNS, ignore_index=True)


def rows_of(folder: Path) -> pd.DataFrame:
    return comparable(runner.read_run(folder)[0])
