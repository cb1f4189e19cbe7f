"""The guides: a first method, run as it is written on few images, and the examples of the reference."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from faithmap import conformance, registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
GUIDE, PLUGINS = DOCS / "first-method.md", DOCS / "plugins.md"

pytestmark = pytest.mark.skipif(not GUIDE.is_file(), reason="the guides are in the checkout")


def blocks(language: str, page: Path = GUIDE) -> list[str]:
    """The code of a language on a page, block by block."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M
    )
    return found


def call(command: str, folder: Path) -> str:
    """Run a command of the guide with eight images, and return what it prints."""
    words = shlex.split(re.sub(r"--limit \d+", "--limit 8", command))
    assert words[0] == "faithmap"
    done = subprocess.run(
        [sys.executable, "-m", "faithmap.cli", *words[1:]],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_guide_leads_to_a_ranked_method(tmp_path: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    (code,) = blocks("python")
    assert [command.split()[1] for command in commands] == ["new", "check", "run", "leaderboard", "compare"]
    new, check, run, leaderboard, compare = commands

    assert "wrote smooth_gradient_image.py" in call(new, tmp_path)
    (tmp_path / "smooth_gradient_image.py").write_text(code, encoding="utf-8")
    assert "failed" not in call(check, tmp_path)
    printed = call(run, tmp_path)
    assert "checked smooth-gradient-image, which is not built in: all passed" in printed
    assert printed.count("checked ") == 1  # once, though it is asked for at two widths
    board = pd.read_csv(tmp_path / "runs" / "first" / "leaderboard.csv", keep_default_na=False)
    ranked = board[board["status"] == "ok"]
    assert set(ranked["explainer"]) == {
        "smooth-gradient-image",
        "smooth-gradient-image[width=3]",
        "saliency",
        "gradcam",
    }
    assert set(board["explainer"]) - set(ranked["explainer"]) == {"random-grid", "centre"}
    assert list((tmp_path / "runs" / "first" / "figures").glob("heatmaps-*.png"))
    assert "leaderboard.md" in call(leaderboard, tmp_path)
    against = call(compare, tmp_path)
    assert "AUC-D: differences from saliency" in against
    assert all(f"\u2502{label} " in against for label in set(board["explainer"]) - {"saliency"}), against


def test_the_method_of_the_guide_forgets_clone_as_it_says(tmp_path: Path) -> None:
    (code,) = blocks("python")
    careless = code.replace("batch.images.clone().requires_grad_()", "batch.images.requires_grad_()")
    assert careless != code
    (tmp_path / "careless.py").write_text(careless, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "faithmap.cli",
        "check",
        "careless.py",
        "--quick",
        "--models",
        "shapes/resnet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "check_inputs on shapes/resnet: batch.images" in done.stdout


@pytest.mark.usefixtures("own_plugins")
class TestPlugins:
    """The examples of the reference keep the promises that it lists."""

    def load(self, folder: Path, function: str, page: Path = PLUGINS) -> registry.Plugin:
        """Load the example that defines a function."""
        (code,) = [block for block in blocks("python", page) if f"def {function}(" in block]
        file = folder / f"{function}.py"
        file.write_text(code, encoding="utf-8")
        (plugin,) = registry.load_file(file)
        return plugin

    def test_the_explainer(self, tmp_path: Path) -> None:
        results = conformance.check_explainer(self.load(tmp_path, "gradient_norm"), slow=False)
        assert {result.status for result in results} == {"passed"}, conformance.failures(results)

    def test_the_explainer_of_the_readme(self, tmp_path: Path) -> None:
        results = conformance.check_explainer(self.load(tmp_path, "my_method", README), slow=False)
        # It is kept to ten lines and declares no costs.
        assert {r.check for r in results if r.status != "passed"} == {"check_cost"}, results
        assert not conformance.failures(results)

    def test_the_metric(self, tmp_path: Path) -> None:
        results = conformance.check_metric(self.load(tmp_path, "inside_max"))
        assert {result.status for result in results} == {"passed"}, conformance.failures(results)

    def test_the_metric_that_explains_again(self, tmp_path: Path) -> None:
        plugin = self.load(tmp_path, "mirror_gap")
        results = conformance.check_metric(plugin)
        assert not conformance.failures(results)
        assert plugin not in registry.default_metrics()

    def test_the_dataset(self, tmp_path: Path) -> None:
        for kind in ("hawk", "tiger"):
            (tmp_path / "test" / kind).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "test" / kind / f"{i}.jpg")
        results = conformance.check_dataset(self.load(tmp_path, "moths"), params={"root": str(tmp_path)})
        assert {r.check for r in results if r.status != "passed"} == {"check_truths"}, results

    def test_every_check_is_listed(self) -> None:
        text = PLUGINS.read_text(encoding="utf-8")
        for kind in registry.KINDS:
            for name in conformance.check_names(kind):
                assert f"`{name}`" in text, name
