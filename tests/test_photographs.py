"""`faithmap run photographs` from local stand-ins of all that it would fetch, in the hub's own layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from copies import inside, paint, save_grey
from safetensors.torch import save_file

from faithmap.config import load_config
from faithmap.models import load_model

BOX = (20, 12, 60, 44)
#: Any commit, for those who name none; the hub's cache has a folder for it.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BREEDS = ("Siamese 34 1 12", "pug 27 2 18", "beagle 5 2 4")


def put_on_hub(cache: Path, name: str, commit: str = COMMIT) -> None:
    """Weights of a model, as `huggingface_hub` keeps what it has fetched for timm."""
    repository = cache / f"models--timm--{name}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # weights that no constructor makes
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 1000}))


def put_pets(folder: Path, each: int) -> None:
    base = folder / "oxford-iiit-pet"
    rows = []
    for breed in BREEDS:
        word, *numbers = breed.split()
        for i in range(each):
            rows.append(" ".join((f"{word}_{i}", *numbers)))
            paint(base / "images" / f"{word}_{i}.jpg", BOX)
            trimap = np.where(inside(BOX), 1, 2)
            save_grey(base / "annotations" / "trimaps" / f"{word}_{i}.png", trimap)
    (base / "annotations" / "test.txt").write_text("\n".join(rows))


def put_imagenette(folder: Path, each: int) -> None:
    for wnid in ("n01440764", "n03888257"):
        for split in ("val", "train"):
            for i in range(each):
                paint(folder / "imagenette2-320" / split / wnid / f"{wnid}_{i}.JPEG", BOX)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for spec in load_config("photographs").models:
        put_on_hub(tmp_path / "hub", spec.name.partition("/")[2], spec.params["revision"])
    put_pets(tmp_path / "home" / "data", 3)
    put_imagenette(tmp_path / "home" / "data", 4)
    return tmp_path


def call(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, its hub's cache and its user's folder in a place of the test's own, without a network."""
    environment = {
        **os.environ, "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1",
        "FAITHMAP_HOME": str(place / "home"), "COLUMNS": "120",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "faithmap", "run", "photographs", *words],
        cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_it_ends_in_a_leaderboard(place: Path) -> None:
    done = call(
        place, "--limit", "2", "--explainers", "gradcam,rollout,random-grid", "--metrics",
        "perturbation,energy-pointing-game", "--out", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    board = pd.read_csv(place / "run" / "leaderboard.csv")
    assert set(board["dataset"]) == {"oxford-iiit-pet", "imagenette"} and board["model"].nunique() == 2
    assert (board["n"] == 2).all()
    assert list((place / "run" / "figures").glob("heatmaps-*.png"))
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert len({entry["digest"] for entry in manifest["models"].values()}) == 2
    rows = pd.read_parquet(place / "run" / "rows")
    share = rows[(rows["metric"] == "object_share") & (rows["dataset"] == "oxford-iiit-pet")]
    assert share["status"].isin(["ok", "skipped"]).all() and len(share)


def test_weights_are_taken_at_the_commit_that_is_named(tmp_path: Path) -> None:
    """In the hub's cache the branch leads elsewhere by now."""
    name = "mobilenetv2_100.ra_in1k"
    put_on_hub(tmp_path / "hub", name)
    (tmp_path / "hub" / f"models--timm--{name}" / "refs" / "main").write_text("f" * 40)
    code = f"""
from faithmap.errors import RequestError
from faithmap.models import load_model
print(load_model("timm/mobilenetv2_100", revision="{COMMIT}").weights_digest())
for wrong in ({{"revision": "f" * 40}}, {{}}, {{"revision": "{COMMIT}", "pretrained": False}}):
    try:
        load_model("timm/{name}", **wrong)
    except RequestError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    digest, *refused = done.stdout.splitlines()
    weights = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / COMMIT / "model.safetensors"
    expected = load_model("timm/mobilenetv2_100", weights=str(weights)).weights_digest()
    assert digest == expected
    assert ["cannot be had" in line for line in refused] == [True, True, False]
    assert "takes no revision" in refused[2]


def test_without_a_network_it_says_what_is_missing(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.returncode == 2
    assert "dataset 'oxford-iiit-pet' is not in" in done.stderr
    assert "the network may not be asked" in done.stderr and "Traceback" not in done.stderr
    assert "give root = " in done.stderr and "give download = true" not in done.stderr  # which it has
    put_pets(tmp_path / "home" / "data", 3)
    put_imagenette(tmp_path / "home" / "data", 4)
    done = call(tmp_path)
    assert done.returncode == 2
    assert "resnet18" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
