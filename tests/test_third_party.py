"""A package of somebody else's, really installed: its explainer is found, checked, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "third_party"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into, from a copy of its source, without a network."""
    folder = tmp_path_factory.mktemp("third-party")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def call(*words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder, with the package on its path."""
    paths = [str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=place, env=variables
    )


def test_it_is_found_through_its_entry_point(place: Path) -> None:
    done = call("-m", "faithmap.cli", "list", "explainers", "--json", place=place)
    assert done.returncode == 0, done.stderr
    (entry,) = [entry for entry in json.loads(done.stdout) if entry["name"] == "blurred-gradient"]
    assert entry["origin"] == "blurmap"
    assert entry["params"] == {"width": 5}


def test_it_runs_the_kit_in_its_own_tests(place: Path) -> None:
    file = str(place / "source" / "conformance_of_blurmap.py")
    done = call("-m", "pytest", "-q", "-p", "no:cacheprovider", file, place=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 passed" in done.stdout


def test_it_stands_on_a_board_and_is_ranked(place: Path) -> None:
    words = ["run", "--explainers", "blurred-gradient,centre", "--models", "shapes/resnet", "--limit", "4"]
    done = call("-m", "faithmap.cli", *words, "--metrics", "perturbation", "--out", "run", place=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked blurred-gradient, which is not built in: all passed" in done.stderr
    manifest = json.loads((place / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["explainers"]["blurred-gradient"]["reliable"] is True
    assert [verdict["failed"] for verdict in manifest["verdicts"].values()] == [[]]
