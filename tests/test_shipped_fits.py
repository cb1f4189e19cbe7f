"""The fits that come with the package: decoders of SCAN and statistics of InfoCAM for the embedded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faithmap import fitting, zoo
from faithmap.data import Shard, choose, load_dataset, make_batch, read_shard
from faithmap.explaining import bind
from faithmap.models import load_model
from faithmap.records import Spec
from faithmap.registry import get

SHIPPED = [
    ("scan", {}),
    ("scan", {"weighting": "discounted"}),
    ("infocam", {"statistics": "fitted"}),
]
CASES = [(name, params, model) for name, params in SHIPPED for model in zoo.NAMES]


@pytest.fixture(autouse=True)
def _nothing_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fitting.HOME_VARIABLE, str(tmp_path))


def found(name: str, params: dict[str, Any], model: str) -> fitting.Fit:
    plugin = get("explainer", name)
    fit = fitting.find(plugin, plugin.check(params), load_model(f"shapes/{model}"))
    assert fit is not None, "no fit ships for this model"
    return fit


@pytest.mark.parametrize(("name", "params", "model"), CASES)
def test_a_record_says_how_it_was_made(name: str, params: dict[str, Any], model: str) -> None:
    record = found(name, params, model).record
    assert record["data"]["plugin"] == "shapes" and record["data"]["params"]["split"] == "train"
    assert record["data"]["images"] == 4096 and not record["data"]["unreadable"]
    assert record["commit"] and record["dirty"] is False and record["half"] is True
    spec = fitting.spec_text(get("explainer", name), {**get("explainer", name).parameters, **params})
    command = record["command"]
    assert command.startswith("faithmap train ") and spec in command and f"--model shapes/{model} " in command
    text = json.dumps(record)
    assert not [word for word in ("/work", "/home", "/root", "/tmp") if word in text]
    if name == "scan":
        assert record["options"]["steps"] == 5000 and record["options"]["batch_size"] == 16
        assert "epochs" not in record["options"] and record["data"]["passes"] == 80_000
        assert record["counts"] == {"unmasked": 0}


@pytest.mark.parametrize(("name", "params", "model"), CASES)
def test_it_explains_without_any_fit_of_the_user(name: str, params: dict[str, Any], model: str) -> None:
    network, plugin = load_model(f"shapes/{model}"), get("explainer", name)
    samples = choose(load_dataset(Spec("shapes")).samples, "dev", 4)
    batch = make_batch(read_shard(Shard(samples, True), network)[0], network, "predicted", network.grid, 0)
    checked = plugin.check(params)
    maps = bind(plugin, checked, {}, found(name, params, model))(network, batch)
    values = maps.flatten(1).numpy()
    assert np.isfinite(values).all()
    assert (np.ptp(values, axis=1) > 0.05 * np.abs(values).max()).all()


def test_no_file_ships_that_serves_nothing() -> None:
    files = {file.name for file in (Path(zoo.__file__).parent / "fitted").rglob("*") if file.is_file()}
    served = {fit.path.name for fit in (found(*case) for case in CASES) if fit.path is not None}
    assert files == served
