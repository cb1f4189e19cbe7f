"""What a fit's record says of the images that were really learnt from."""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fits import KillAt, KilledError, asked, typed
from rich.console import Console

import faithmap
from faithmap import commands, fitting, registry, training
from faithmap.learning_record import counted, told_counts
from faithmap.models import Model, load_model

pytestmark = pytest.mark.usefixtures("toy_fitted", "home")


@pytest.fixture
def model() -> Model:
    return load_model("shapes/resnet")


def learn(data: training.TrainingData, session: training.Session, steps: int, epochs: int = 1) -> None:
    """Steps of four images, as a fit takes them that stops when it has fetched one batch too many."""
    session.seen = data.seen
    done = 0
    for epoch in range(epochs):
        for _ in data.batches(4, epoch):
            if done == steps:
                return
            done += 1
            session.report(done, steps, {"loss": 0.0})


class TestSeen:
    @pytest.mark.parametrize(
        ("steps", "epochs", "seen", "passes"), [(2, 1, 8, 8), (9, 1, 12, 12), (6, 2, 12, 24)]
    )
    def test_a_batch_that_is_only_fetched_does_not_count(
        self, model: Model, steps: int, epochs: int, seen: int, passes: int
    ) -> None:
        data = training.TrainingData(asked(model).samples, model, 0)
        learn(data, training.Session(), steps, epochs)
        assert data.seen.entry() == {"seen": seen, "passes": passes}

    def test_a_fit_that_reports_nothing_counts_too(self, model: Model) -> None:
        data = training.TrainingData(asked(model).samples, model, 0, workers=1)
        assert [len(labels) for _, labels in data.batches(5, 0)] == [5, 5, 2]
        assert data.seen.entry() == {"seen": 12, "passes": 12}

    def test_images_that_cannot_be_read_are_not_seen(self, model: Model) -> None:
        samples = asked(model).samples
        broken = replace(samples[3], image=Path("/nowhere/a.png"))
        data = training.TrainingData([*samples[:3], broken], model, 0)
        learn(data, training.Session(), 9, 2)
        assert data.seen.entry() == {"seen": 3, "passes": 6}


@pytest.mark.parametrize("at", [2, 4, 8])
def test_a_fit_that_goes_on_counts_all_its_parts(model: Model, at: int) -> None:
    with pytest.raises(KilledError):
        training.train(asked(model), KillAt(at), every=0.0)
    data = training.train(asked(model)).record["data"]
    assert (data["images"], data["seen"], data["passes"]) == (12, 12, 36)


def test_a_fit_that_goes_on_elsewhere_names_both_devices(
    model: Model, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, at in (("Card 1, CUDA 13.0", 2), ("cpu", 4), ("cpu", None)):
        monkeypatch.setattr(training, "device_name", lambda _, device=device: device)
        with nullcontext() if at is None else pytest.raises(KilledError):
            made = training.train(asked(model), *([] if at is None else [KillAt(at)]), every=0.0)
    assert made.record["devices"] == ["Card 1, CUDA 13.0", "cpu"]
    request = {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1},
        "models": [{"name": "shapes/resnet"}], "datasets": [{"name": "shapes"}],
        "explainers": [{"name": "toy-fitted"}], "metrics": [{"name": "drop"}],
    }  # fmt: skip
    done = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert " s on Card 1, CUDA 13.0 and cpu\n" in (done.path / "leaderboard.md").read_text()


def test_a_checkpoint_without_a_count_leaves_it_unknown(model: Model, home: Path) -> None:
    with pytest.raises(KilledError):
        training.train(asked(model), KillAt(4), every=0.0)
    (file,) = home.rglob("*.checkpoint")
    held = torch.load(file, weights_only=True)
    del held["seen"]
    torch.save(held, file)
    data = training.train(asked(model)).record["data"]
    assert data["images"] == 12 and not {"seen", "passes"} & set(data)


def test_a_fit_of_a_few_steps_says_how_many_images_it_saw(tmp_path: Path, home: Path) -> None:
    words = ("train", "scan[width=0.125]", "--model", "shapes/resnet", "--dataset",
             "shapes[split=train,n=40]", "--set", "steps=2", "--set", "batch_size=4")  # fmt: skip
    code, said = typed(*words)
    assert code == 0, said
    assert "scan fitted to shapes/resnet on 8 of 40 images of shapes: " in said
    (file,) = home.rglob("*.safetensors")
    assert (
        fitting.read(file).record["data"] | {"images": 40, "seen": 8, "passes": 8}
        == fitting.read(file).record["data"]
    )
    request = {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1},
        "models": [{"name": "shapes/resnet"}], "datasets": [{"name": "shapes"}],
        "explainers": [{"name": "scan", "width": 0.125, "label": "scan"}, {"name": "gradcam"}],
        "metrics": [{"name": "drop"}],
    }  # fmt: skip
    done = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert "8 of 40 images of `shapes`" in (done.path / "leaderboard.md").read_text()
    assert done.leaderboard().set_index("explainer").loc["scan", "fit_images"] == 40


def test_a_fit_says_how_many_passes_were_not_masked(model: Model, home: Path) -> None:
    """Logits that fall with every feature have no positive gradient anywhere."""
    head = model.module.get_submodule("fc")
    head.weight.data = -head.weight.data.abs()
    plugin = registry.get("explainer", "scan")
    options = training.fit_options(plugin, {"steps": 3, "batch_size": 4})
    request = replace(
        asked(model), plugin=plugin, params=plugin.check({"width": 0.125, "training_class": "predicted"}),
        options=options,
    )  # fmt: skip
    said = io.StringIO()
    shown, errors = Console(file=said, width=200), Console(file=io.StringIO())
    assert commands.train(request, shown, errors, out=None, half=False, fresh=False) == 0
    assert "\nnot masked, as no gradient was positive: 12 of 12 image passes\n" in said.getvalue()
    (file,) = home.rglob("*.safetensors")
    assert fitting.read(file).record["counts"] == {"unmasked": 12}


def test_sums_are_told_where_they_are_above_zero() -> None:
    curve = [{"step": 1.0, "loss": 2.0, "unmasked": 3.0}, {"step": 2.0, "loss": 1.0, "unmasked": 0.0}]
    columns = fitting.counts(registry.get("explainer", "scan"))
    assert counted(curve, columns) == {"unmasked": 3}
    assert counted([{"step": 1.0, "loss": 2.0}], columns) == counted([], columns) == {}
    told = "not masked, as no gradient was positive: 3"
    passes, record = {"passes": 8}, {"counts": {"unmasked": 3}}
    assert told_counts({"data": passes, **record}, columns) == [f"{told} of 8 image passes"]
    assert told_counts({"data": {}, **record}, columns) == [f"{told} image passes"]
    assert told_counts({"data": passes, "counts": {"unmasked": 0}}, columns) == []
    assert told_counts({"data": {"images": 8}}, columns) == []
    assert told_counts({"data": passes, **record}, fitting.counts(registry.get("explainer", "infocam"))) == []


def test_records_without_a_count_are_told_as_before(model: Model, tmp_path: Path) -> None:
    made = training.train(asked(model))
    assert made.path is not None
    record = {
        **made.record,
        "data": {k: v for k, v in made.record["data"].items() if k not in ("seen", "passes")},
    }
    fitting.write(made.path, made.tensors(), record)
    request = {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1},
        "models": [{"name": "shapes/resnet"}], "datasets": [{"name": "shapes"}],
        "explainers": [{"name": "toy-fitted"}, {"name": "gradcam"}], "metrics": [{"name": "drop"}],
    }  # fmt: skip
    done = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert "), 12 images of `shapes`" in (done.path / "leaderboard.md").read_text()
