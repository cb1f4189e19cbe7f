"""Plugins from outside are checked before a run: a bad one is shown, named, and not ranked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import faithmap
from faithmap import registry, reliability
from faithmap.boards import rebuild
from faithmap.config import load_config
from faithmap.engine import Silent
from faithmap.folders import read_runs

EXPLAINER = '''
import torch
from faithmap import explainer

@explainer(version=1, source="a test", forwards=1, backwards=1)
def outside(model, batch):
    """Features times gradients."""
    {line}
    return (batch.activations() * batch.gradients()).sum(1)
'''
LEAK = "model.layer().register_forward_hook(lambda *_: None)"
METRIC = '''
from faithmap import metric

@metric(version=1, source="a test", scores={"brightness": "higher"})
def brightness(model, batch, maps):
    """The mean of the map."""
    return {"brightness": maps.mean((1, 2))}
'''


class Told(Silent):
    """Keeps what a run says of the plugins that it checks."""

    def __init__(self) -> None:
        self.checked_plugins: list[tuple[str, int]] = []

    def checked(self, plugin: str, failed: int, seconds: float) -> None:
        assert seconds >= 0
        self.checked_plugins.append((plugin, failed))


pytestmark = pytest.mark.usefixtures("own_plugins")


def load(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(text)
    registry.load_file(file)


def run(folder: Path, **lists: Any) -> tuple[faithmap.Run, Told]:
    told = Told()
    config = load_config({"run": {"limit": 6, "batch_size": 6, "own_nulls": []}}).with_lists(
        **{"models": ["shapes/resnet"], "metrics": ["perturbation"], **lists}
    )
    return faithmap.run(config, out=folder / "run", observer=told, figures=False), told


def statuses(done: faithmap.Run) -> dict[str, str]:
    return dict(done.leaderboard()[["explainer", "status"]].itertuples(index=False))


def test_a_bad_one_is_not_ranked_and_the_board_says_why(tmp_path: Path) -> None:
    load(tmp_path, "bad.py", EXPLAINER.format(line=LEAK))
    done, told = run(tmp_path, explainers=["outside", "gradcam"])
    assert statuses(done) == {"outside": "not ranked: unreliable", "gradcam": "ok", "random-grid": "null"}
    assert told.checked_plugins == [("outside", 2)]
    text = (done.path / "leaderboard.md").read_text(encoding="utf-8")
    assert "- `outside`: not ranked: unreliable" in text
    assert "## Unreliable plugins" in text
    assert "- explainer `outside`, `check_hooks` on `shapes/vit`: changed by the call" in text
    assert done.rows()["explainer"].eq("outside").any()

    again, told = run(tmp_path, explainers=["outside", "gradcam"])
    assert told.checked_plugins == []  # the manifest keeps the verdict
    assert statuses(again)["outside"] == "not ranked: unreliable"

    from rich.console import Console

    before = (done.path / "leaderboard.md").read_bytes()
    rebuild([done.path], None, Console(quiet=True))
    assert b"## Unreliable plugins" in (done.path / "leaderboard.md").read_bytes() and before


DATASET = """
import torch
from faithmap import Sample, dataset

@dataset(version=1, source="a test", license="{licence}", revision="1")
def squares():
    \"\"\"Noise.\"\"\"
    for i in range(8):
        image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i))
        yield Sample(id=f"square-{{i}}", image=image, label=i % 8)
"""


@pytest.mark.parametrize(("licence", "status"), [("CC0-1.0", "ok"), ("", "not ranked: unreliable dataset")])
def test_on_a_bad_dataset_nothing_is_ranked(licence: str, status: str, tmp_path: Path) -> None:
    load(tmp_path, "squares.py", DATASET.format(licence=licence))
    done, told = run(tmp_path, datasets=["squares"], explainers=["saliency", "gradcam"])
    assert told.checked_plugins == [("squares", int(not licence))]
    assert statuses(done) == {"saliency": status, "gradcam": status, "random-grid": "null"}


ELSEWHERE = """
from faithmap import explainer

def only_wide(model):
    return None if "convnext" in model.name else "not a ConvNeXt"

@explainer(version=1, source="a test", defined_for=only_wide, forwards={passes}, backwards=1)
def elsewhere(model, batch):
    \"\"\"Features times gradients.\"\"\"
    return (batch.activations() * batch.gradients()).sum(1)
"""


@pytest.mark.parametrize(("passes", "status"), [(1, "ok"), (7, "not ranked: unreliable")])
def test_one_for_other_models_is_tried_on_those_of_the_run(passes: int, status: str, tmp_path: Path) -> None:
    load(tmp_path, "elsewhere.py", ELSEWHERE.format(passes=passes))
    lists = {"explainers": ["elsewhere", "gradcam"], "models": ["shapes/convnext"]}
    done, _ = run(tmp_path, **lists)
    (verdict,) = done.manifest["verdicts"].values()
    assert {fault["model"] for fault in verdict["failed"]} == (set() if passes == 1 else {"shapes/convnext"})
    assert statuses(done)["elsewhere"] == status
    again, told = run(tmp_path, **lists)
    assert told.checked_plugins == [] and statuses(again)["elsewhere"] == status


def test_one_that_cannot_say_where_it_is_defined_costs_the_others_nothing(tmp_path: Path) -> None:
    text = ELSEWHERE.format(passes=1).replace("model.name", "model.module.no_such_part")
    load(tmp_path, "elsewhere.py", text)
    done, _ = run(tmp_path, explainers=["elsewhere", "gradcam"])
    found = statuses(done)
    assert found["gradcam"] == "ok"
    assert found["elsewhere"].startswith("skipped: its defined_for raises AttributeError")


def test_a_good_one_is_ranked_and_another_file_is_checked_anew(tmp_path: Path) -> None:
    load(tmp_path, "good.py", EXPLAINER.format(line=""))
    done, told = run(tmp_path, explainers=["outside", "gradcam"])
    assert statuses(done)["outside"] == "ok"
    assert told.checked_plugins == [("outside", 0)]
    assert "Unreliable" not in (done.path / "leaderboard.md").read_text(encoding="utf-8")
    (verdict,) = done.manifest["verdicts"].values()
    assert verdict == {"name": "outside", "kind": "explainer", "failed": []}
    plugin = registry.get("explainer", "outside")
    key = reliability.key_of(plugin, {})
    (tmp_path / "good.py").write_text(EXPLAINER.format(line="# changed"))
    assert reliability.key_of(plugin, {}) != key


def test_metrics_are_judged_too_and_what_is_built_in_is_not(tmp_path: Path) -> None:
    load(tmp_path, "metric.py", METRIC)
    done, told = run(tmp_path, explainers=["gradcam"], metrics=["perturbation", "brightness"])
    assert told.checked_plugins == [("brightness", 1)]
    entries = {entry["name"]: entry["reliable"] for entry in done.manifest["metrics"]}
    assert entries == {"perturbation": True, "brightness": False}
    text = (done.path / "leaderboard.md").read_text(encoding="utf-8")
    assert "- metric `brightness`, `check_direction`" in text
    assert json.loads((done.path / "manifest.json").read_text())["datasets"]["shapes"]["reliable"] is True


def test_what_is_decorated_outside_the_rooms_is_not_built_in() -> None:
    @registry.explainer(version=1, source="a test")
    def here(model: object, batch: object) -> None:
        """Decorated in a test."""

    assert registry.get("explainer", "here").origin == str(Path(__file__).resolve())
    assert not registry.get("explainer", "here").built_in
    assert registry.get("explainer", "gradcam").built_in


def test_a_terminal_and_a_log_are_told() -> None:
    from rich.console import Console

    from faithmap.progress import Bar, Lines

    log, terminal = io.StringIO(), io.StringIO()
    Lines(log).checked("outside", 0, 1.04)
    assert log.getvalue() == "checked outside, which is not built in: all passed (1.0 s)\n"
    Bar(Console(file=terminal, width=200)).checked("outside", 2, 1.0)
    assert terminal.getvalue() == (
        "checked outside, which is not built in: 2 failed, so it is marked unreliable (1.0 s)\n"
    )


def test_several_runs_on_one_board_keep_their_verdicts(tmp_path: Path) -> None:
    load(tmp_path, "bad.py", EXPLAINER.format(line=LEAK))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, _ = run(tmp_path / "one", explainers=["centre"])
    two, _ = run(tmp_path / "two", explainers=["outside"])
    _, manifest = read_runs([one.path, two.path])
    assert [verdict["name"] for verdict in manifest["verdicts"].values()] == ["outside"]
    assert manifest["explainers"]["outside"]["reliable"] is False
