"""`faithmap train`: the command, its data, and fits that go on after a kill."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import TOY, KillAt, KilledError, asked, typed
from rich.console import Console

from faithmap import commands, fitting, registry, training
from faithmap.config import parse_spec
from faithmap.errors import DataError, FaithmapError, RequestError
from faithmap.models import Model, load_model
from faithmap.records import Sample

pytestmark = pytest.mark.usefixtures("toy_fitted", "home")


@pytest.fixture
def model() -> Model:
    return load_model("shapes/resnet")


@pytest.mark.parametrize("at", [2, 3, 4, 7, 9])
def test_a_fit_goes_on_to_the_same_curve(model: Model, tmp_path: Path, at: int) -> None:
    whole = training.train(asked(model), out=tmp_path / "whole")
    with pytest.raises(KilledError):
        training.train(asked(model), KillAt(at), out=tmp_path / "killed", every=0.0)
    resumed = training.train(asked(model), out=tmp_path / "killed", every=0.0)
    assert resumed.digest == whole.digest
    assert whole.path is not None and resumed.path is not None
    assert resumed.path.with_suffix(".csv").read_text() == whole.path.with_suffix(".csv").read_text()
    assert not resumed.path.with_suffix(".checkpoint").exists()


def test_images_that_cannot_be_read_are_remembered_over_a_kill(model: Model, tmp_path: Path) -> None:
    def lost() -> Any:
        raise DataError("lost.png: no such file")

    request = asked(model)
    broken = replace(request.samples[0], image=lost)
    request = replace(request, samples=(broken, *request.samples[1:]))
    whole = training.train(request, out=tmp_path / "whole")
    assert whole.path is not None
    steps = len(whole.path.with_suffix(".csv").read_text().splitlines()) - 1
    with pytest.raises(KilledError):
        training.train(request, KillAt(steps), out=tmp_path / "killed", every=0.0)
    resumed = training.train(request, out=tmp_path / "killed", every=0.0)
    assert resumed.record["data"] == whole.record["data"]
    assert resumed.record["data"]["unreadable_ids"] == [broken.id]


def test_a_damaged_checkpoint_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        training.train(asked(model), KillAt(4), out=tmp_path, every=0.0)
    (checkpoint,) = tmp_path.glob("*.checkpoint")
    checkpoint.write_bytes(b"half a fi")
    with pytest.raises(FaithmapError, match=r"checkpoint .* is damaged .*--fresh"):
        training.train(asked(model), out=tmp_path)
    training.train(asked(model), out=tmp_path, fresh=True)


@pytest.mark.parametrize("explainer", ["scan", "infocam[statistics=fitted]"])
def test_a_checkpoint_that_does_not_fit_is_named(
    model: Model, tmp_path: Path, home: Path, explainer: str
) -> None:
    """Whichever method goes on from it: what it holds is of another network, or of an older version."""
    spec = parse_spec(explainer)
    plugin = registry.get("explainer", spec.name)
    params, options = plugin.check(spec.params), training.fit_options(plugin, {})
    request = replace(asked(model), plugin=plugin, params=params, options=options)
    checkpoint = (tmp_path / request.file_name).with_suffix(".checkpoint")
    torch.save({"curve": [], "seconds": 1.0, "state": {"step": 1, "done": 1}}, checkpoint)
    with pytest.raises(FaithmapError, match=r"checkpoint .* is damaged \(KeyError\); .* --fresh"):
        training.train(request, out=tmp_path)


SLOW_FIT = """
import sys, time
sys.path.insert(0, {folder!r})
import toy_fitted
from faithmap import training
inner = training.Session.report
def report(self, step, steps, values):
    inner(self, step, steps, values)
    time.sleep(0.05)
training.Session.report = report
training.EVERY = 0.0
from faithmap import cli
real = training.train
training.train = lambda *a, **k: real(*a, **k, every=0.0)
sys.exit(cli.main(sys.argv[1:]))
"""


def curve(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_a_fit_survives_kill_9(tmp_path: Path, home: Path) -> None:
    words = ["train", "toy-fitted", "--model", "shapes/resnet", "--dataset", "shapes[split=train,n=12]",
             "--set", "epochs=20", "--threads", "1"]  # fmt: skip
    script = SLOW_FIT.format(folder=str(TOY.parent))
    command = [sys.executable, "-c", script, *words]
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL) as process:
        folder = home / "fitted" / "toy-fitted"
        deadline = time.monotonic() + 120
        while not list(folder.glob("*.checkpoint")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not list(folder.glob("*.safetensors"))
    again = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "of them done before" in again.stderr
    (resumed,) = folder.glob("*.csv")
    code, said = typed(*words, "--out", tmp_path / "whole")
    assert code == 0, said
    (whole,) = (tmp_path / "whole").glob("*.csv")
    assert resumed.name == whole.name
    for one, two in zip(curve(resumed), curve(whole), strict=True):
        assert one["step"] == two["step"]
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-6)


#: A minute between checkpoints is longer than this fit.
OFTEN = """
import sys
from faithmap import cli, training
real = training.train
training.train = lambda *a, **k: real(*a, **k, every=0.0)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_decoder_survives_kill_9(tmp_path: Path, home: Path) -> None:
    """A real method on a real model, as typed, killed with its optimiser and its schedule on their way."""
    words = ["train", "scan[width=0.125]", "--model", "shapes/vit", "--dataset", "shapes[split=train,n=12]",
             "--set", "steps=8", "--set", "batch_size=4", "--threads", "1"]  # fmt: skip
    command = [sys.executable, "-c", OFTEN, *words]
    folder = home / "fitted" / "scan"
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not list(folder.glob("*.checkpoint")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not list(folder.glob("*.safetensors"))
    again = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "of them done before" in again.stderr, again.stderr
    code, said = typed(*words, "--out", tmp_path / "whole")
    assert code == 0, said
    (resumed,), (whole,) = folder.glob("*.csv"), (tmp_path / "whole").glob("*.csv")
    for one, two in zip(curve(resumed), curve(whole), strict=True):
        assert one.keys() == two.keys() and {"step", "loss", "rate"} <= one.keys()
        for name, value in two.items():
            assert float(one[name]) == pytest.approx(float(value), abs=1e-6), (name, two["step"])
    data = [fitting.read(file.with_suffix(".safetensors")).record["data"] for file in (resumed, whole)]
    assert data[0] == data[1] and data[0]["seen"] == 12


def test_the_command_says_what_was_made(tmp_path: Path, home: Path) -> None:
    code, said = typed("train", "toy-fitted", "--model", "shapes/resnet",
                       "--dataset", "shapes[split=train,n=8]", "--set", "epochs=2")  # fmt: skip
    assert code == 0
    assert "toy-fitted fitted to shapes/resnet on 8 images of shapes: 3 parameters" in said
    (file,) = (home / "fitted" / "toy-fitted").glob("*.safetensors")
    assert f"wrote {file}" in said
    code, said = typed("train", "toy-fitted", "--model", "shapes/resnet",
                       "--dataset", "shapes[split=train,n=8]", "--set", "epochs=2")  # fmt: skip
    assert code == 0
    assert f"{file} was there already" in said and "wrote" not in said


def test_the_command_reads_models_and_datasets_of_a_request(tmp_path: Path) -> None:
    request = tmp_path / "learn.toml"
    request.write_text(
        '[[models]]\nname = "shapes/resnet"\nlabel = "mine"\n'
        '[[datasets]]\nname = "shapes"\nlabel = "few"\nsplit = "train"\nn = 8\n'
    )
    code, said = typed("train", "toy-fitted", "--model", "mine", "--dataset", "few", "--request", request)
    assert code == 0
    assert "toy-fitted fitted to mine on 8 images of few" in said
    code, said = typed("train", "toy-fitted", "--model", "min", "--dataset", "few", "--request", request)
    assert code == 2 and "names no model 'min'; did you mean 'mine'?" in said


def test_a_fit_takes_every_image_unless_a_limit_is_given() -> None:
    """The default run's own limit, which is for scoring, is far below the images of this data set."""
    words = ("toy-fitted", "shapes/resnet", "shapes[split=train,n=1000]", None, [])
    assert len(commands.training(*words, commands.Learning()).samples) == 1000
    assert len(commands.training(*words, commands.Learning(limit=300)).samples) == 300


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gradcam"], "explainer 'gradcam' is not fitted: it explains any model as it is"),
        (["toy-fitted", "--set", "epoch=3"], "has no option 'epoch'; did you mean 'epochs'?"),
        (["toy-fitted", "--set", "epochs=many"], "option 'epochs': got 'many', expected int"),
        (["toy-fitted", "--set", "epochs"], "'epochs' is no option; write key=value"),
        (["toy-fitted", "--part", "some"], "expected one of"),
        (["toy-fitted[learn=false]"], "needs no fit with these parameters"),
        (["infocam"], "needs no fit with these parameters; infocam[statistics=fitted] needs one"),
        (["toy-fitted[colour=1]"], "has no parameter 'colour'"),
        (["toy-fitted", "--workers", "-1"], "expected 0 or more"),
        (["toy-fitted", "--limit", "0"], "expected a number of images of at least 1"),
    ],
)
def test_bad_requests_are_a_sentence(words: list[str], sentence: str) -> None:
    code, said = typed("train", *words, "--model", "shapes/resnet", "--dataset", "shapes[split=train,n=8]")
    assert code == 2
    assert sentence in said


def test_two_processes_do_not_make_one_fit(model: Model, tmp_path: Path) -> None:
    from filelock import FileLock

    request = asked(model)
    lock = tmp_path / fitting.file_name(request.served, request.key)
    with (
        FileLock(lock.with_suffix(".lock")),
        pytest.raises(RequestError, match="another process is making"),
    ):
        training.train(request, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RequestError, match=r"cannot write to .*FAITHMAP_HOME"):
        training.train(asked(model), out=file / "below")


def unreadable(name: str) -> Sample:
    return Sample(id=name, image=Path("/nowhere") / name, label=0)


def test_unreadable_images_are_left_out_and_counted(model: Model) -> None:
    data = training.TrainingData(
        [*asked(model, 5).samples, unreadable("a.png"), unreadable("b.png")], model, seed=0
    )
    sizes = [len(labels) for _, labels in data.batches(1, epoch=0)]
    assert len(sizes) == 7 and sum(sizes) == 5
    assert set(data.unreadable) == {"a.png", "b.png"}


def test_unreadable_images_are_named(model: Model, home: Path) -> None:
    from dataclasses import replace

    request = asked(model, 5)
    broken = tuple(unreadable(f"{i:02d}.png") for i in range(10))
    said = io.StringIO()
    shown, errors = Console(file=said, width=200), Console(file=io.StringIO())
    asked_for = replace(request, samples=(*request.samples, *broken))
    assert commands.train(asked_for, shown, errors, out=None, half=False, fresh=False) == 0
    names = ", ".join(f"{i:02d}.png" for i in range(8))
    assert f"10 images could not be read and were left out: {names}, ...\n" in said.getvalue()
    (file,) = home.rglob("*.safetensors")
    data = fitting.read(file).record["data"]
    assert (data["images"], data["unreadable"]) == (5, 10)
    assert data["unreadable_ids"] == [f"{i:02d}.png" for i in range(10)]


def test_a_fit_on_nothing_readable_is_refused(model: Model) -> None:
    from dataclasses import replace

    request = replace(asked(model), samples=(unreadable("a.png"), unreadable("b.png")))
    with pytest.raises(RequestError, match="none of the 2 images could be read"):
        training.train(request)


def test_the_order_follows_seed_and_epoch_alone(model: Model) -> None:
    def order(seed: int, epoch: int, start: int = 0, workers: int = 0) -> list[torch.Tensor]:
        data = training.TrainingData(asked(model).samples, model, seed, workers)
        return [images for images, _ in data.batches(5, epoch, start=start)]

    base = order(0, 0)
    assert [len(part) for part in base] == [5, 5, 2]
    assert all(torch.equal(a, b) for a, b in zip(base, order(0, 0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base[1:], order(0, 0, start=1), strict=True))
    assert not torch.equal(base[0], order(0, 1)[0])
    assert not torch.equal(base[0], order(1, 0)[0])
    assert all(torch.equal(a, b) for a, b in zip(base, order(0, 0, workers=1), strict=True))


def test_steps_of_an_epoch(model: Model) -> None:
    data = training.TrainingData(asked(model).samples, model, 0)
    assert [data.steps(size) for size in (1, 5, 12, 50)] == [12, 3, 1, 1]
    assert [data.steps(size, drop_last=True) for size in (5, 12, 50)] == [2, 1, 1]
    assert [len(labels) for _, labels in data.batches(5, 0, drop_last=True)] == [5, 5]


def test_a_fit_that_diverges_is_not_kept(model: Model, home: Path) -> None:
    with pytest.raises(FaithmapError, match="ended with NaN or infinity in 'colour'; nothing was kept"):
        training.train(asked(model, params={"start": float("inf")}))
    assert not [file for file in home.rglob("*") if file.is_file()]  # no fit, and no lock either


def test_ctrl_c_stops_with_a_checkpoint(tmp_path: Path, home: Path) -> None:
    words = ["train", "toy-fitted", "--model", "shapes/resnet", "--dataset", "shapes[split=train,n=12]",
             "--set", "epochs=40", "--threads", "1"]  # fmt: skip
    script = SLOW_FIT.format(folder=str(TOY.parent)).replace("every=0.0", "every=1e9")
    command = [sys.executable, "-u", "-c", script, *words]
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = [next(process.stderr), next(process.stderr)]  # the title, and the first step
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, (seen, rest)
    assert "interrupted; run the same command again to go on from here" in rest
    assert list((home / "fitted" / "toy-fitted").glob("*.checkpoint"))
    again = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "of them done before" in again.stderr, again.stderr


def test_a_fit_goes_on_past_images_that_cannot_be_read(model: Model, tmp_path: Path) -> None:
    from dataclasses import replace

    samples = (*asked(model, 3).samples, unreadable("a.png"), *asked(model, 6).samples[3:])
    request = replace(asked(model, options={"batch_size": 1, "epochs": 2}), samples=samples)
    whole = training.train(request, out=tmp_path / "whole")
    with pytest.raises(KilledError):
        training.train(request, KillAt(11), out=tmp_path / "killed", every=0.0)
    assert training.train(request, out=tmp_path / "killed").digest == whole.digest
    assert whole.record["data"]["images"] == 6 and whole.record["data"]["unreadable"] == 1


def test_what_goes_wrong_in_a_fit_is_a_sentence(model: Model) -> None:
    with pytest.raises(FaithmapError, match="the fit of 'toy-fitted' failed: ZeroDivisionError"):
        training.train(asked(model, options={"batch_size": 0}))
