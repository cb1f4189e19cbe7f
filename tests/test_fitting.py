"""Explainers that are fitted: the fit is kept by content, found by a run, resumed after a kill."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cnn, make_vit
from rich.console import Console

import faithmap
from faithmap import cli, conformance, fitting, registry, training
from faithmap.data import choose, load_dataset
from faithmap.errors import FaithmapError, RequestError
from faithmap.models import Model, load_model
from faithmap.records import Sample, Spec

TOY = Path(__file__).parent / "plugins" / "toy_fitted.py"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The toy is registered while these tests run."""
    for kind in registry.KINDS:
        registry.plugins(kind)
    before = dict(registry._plugins)
    registry.load_file(TOY)
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fits of the test's own."""
    monkeypatch.setenv(fitting.HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model() -> Model:
    return load_model("shapes/resnet")


def toy() -> registry.Plugin:
    return registry.get("explainer", "toy-fitted")


def asked(model: Model, n: int = 12, **changes: Any) -> training.Training:
    """A request to fit the toy to some shapes."""
    params = toy().check(changes.pop("params", {}))
    options = training.fit_options(toy(), changes.pop("options", {}))
    dataset = load_dataset(Spec("shapes", {"split": "train", "n": n}))
    samples = choose(dataset.samples, "all", None)
    return training.Training(toy(), params, model, dataset, samples, options, **changes)


def typed(*words: object) -> tuple[int, str]:
    """Type a command: its exit code and all that it printed."""
    stream = io.StringIO()
    console, kept = Console(file=stream, width=240), (cli.OUT, cli.ERR)
    cli.OUT = cli.ERR = console
    try:
        return cli.main([str(word) for word in words]), stream.getvalue()
    finally:
        cli.OUT, cli.ERR = kept


def test_a_fit_is_kept_and_found_again(model: Model, home: Path) -> None:
    made = training.train(asked(model))
    found = fitting.find(toy(), toy().check({}), model)
    assert found == made
    assert found is not None and found.path is not None and home in found.path.parents
    expected = torch.stack([s.image() for s in asked(model).samples]).mean((0, 2, 3))
    assert torch.allclose(found.tensors()["colour"], expected, atol=0.2)
    record = found.record
    assert record["data"]["images"] == 12 and record["params_added"] == 3 and record["steps"] == 9
    assert record["params"] == {"start": 0.0}
    assert record["options"] == {"epochs": 3, "batch_size": 4, "rate": 0.1}
    assert record["seconds"] > 0


def test_a_fit_that_is_there_is_not_made_again(model: Model) -> None:
    made = training.train(asked(model))
    assert made.path is not None
    before = made.path.stat().st_mtime_ns
    assert training.train(asked(model)).path == made.path
    assert made.path.stat().st_mtime_ns == before
    training.train(asked(model), fresh=True)
    assert made.path.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"n": 13}, {"options": {"rate": 0.2}}, {"precision": "bf16"}],
)
def test_another_cause_is_another_fit(model: Model, change: dict[str, Any]) -> None:
    one, two = asked(model), asked(model, **change)
    assert one.served == two.served
    assert one.key != two.key


def test_what_is_served_depends_on_the_weights_and_the_fit_parameters(model: Model) -> None:
    base = asked(model).served
    assert asked(model, params={"power": 3.0}).served == base  # no part of the fit
    assert asked(model, params={"start": 0.5}).served != base
    assert asked(load_model("shapes/convnext")).served != base
    assert asked(load_model("shapes/resnet", layer="layer3")).served != base
    other = load_model("shapes/resnet")
    with torch.no_grad():
        next(other.module.parameters()).add_(1e-3)
    assert asked(other).served != base


def test_whole_numbers_are_floats_where_floats_are_meant(model: Model) -> None:
    assert asked(model, params={"start": 1}).served == asked(model, params={"start": 1.0}).served
    assert asked(model, options={"rate": 1}).key == asked(model, options={"rate": 1.0}).key


def test_the_images_that_are_seen_are_part_of_the_cause(model: Model) -> None:
    cropped = load_model("shapes/resnet", crop_pct=0.5)
    assert asked(cropped).served == asked(model).served
    assert asked(cropped).key != asked(model).key
    assert asked(model).key[0].isalpha()  # on the command line it is no number


def test_of_two_fits_one_must_be_named(model: Model) -> None:
    first, second = training.train(asked(model)), training.train(asked(model, seed=1))
    with pytest.raises(RequestError, match=rf"2 fits for model 'shapes/resnet'.*{first.key}|{second.key}"):
        fitting.find(toy(), toy().check({}), model)
    named = fitting.find(toy(), toy().check({"fitted": second.key[:6]}), model)
    assert named == second
    by_path = fitting.find(toy(), toy().check({"fitted": str(first.path)}), model)
    assert by_path == first
    with pytest.raises(RequestError, match="key that begins with 'zzz'; there are"):
        fitting.find(toy(), toy().check({"fitted": "zzz"}), model)


def test_a_fit_of_another_model_is_refused(model: Model) -> None:
    made = training.train(asked(model))
    with pytest.raises(RequestError, match="not for 'toy-fitted' on 'tiny-cnn'"):
        fitting.find(toy(), toy().check({"fitted": str(made.path)}), make_cnn())
    with pytest.raises(RequestError, match="there is no file"):
        fitting.find(toy(), toy().check({"fitted": "nowhere.safetensors"}), model)


def test_a_damaged_fit_is_named(model: Model) -> None:
    made = training.train(asked(model))
    assert made.path is not None
    made.path.write_bytes(b"not tensors")
    with pytest.raises(FaithmapError, match=rf"{re.escape(str(made.path))} holds no fit"):
        fitting.find(toy(), toy().check({}), model)


def test_a_damaged_fit_costs_its_own_line_alone(model: Model, tmp_path: Path) -> None:
    made = training.train(asked(model))
    assert made.path is not None
    made.path.write_bytes(b"not tensors")
    board = run_toy(tmp_path / "run").leaderboard().set_index("explainer")
    assert "holds no fit" in board.loc["toy-fitted", "status"]
    assert board.loc["gradcam", "status"] == "ok"


def test_a_fit_that_changes_meanwhile_is_noticed(model: Model) -> None:
    made = training.train(asked(model))
    other = training.train(asked(model, seed=1))
    assert made.path is not None and other.path is not None
    made.path.write_bytes(other.path.read_bytes())
    with pytest.raises(FaithmapError, match="has changed since this run began"):
        made.tensors()


def test_halves_keep_what_does_not_fit_in_them(tmp_path: Path) -> None:
    given = {"count": torch.tensor(70000.0), "wide": torch.tensor([1e6, 1.0]), "plain": torch.tensor([0.5])}
    fit = fitting.write(tmp_path / "a-b.safetensors", given, {"key": "b"}, half=True)
    assert all(torch.equal(value, given[name]) for name, value in fit.tensors().items())


def test_half_precision_can_be_asked_for_later(model: Model) -> None:
    whole = training.train(asked(model))
    half = training.train(asked(model), half=True)
    assert half.path == whole.path and half.record["half"] and half.digest != whole.digest


def test_half_precision_is_what_is_digested(model: Model, tmp_path: Path) -> None:
    whole = training.train(asked(model))
    half = training.train(asked(model), out=tmp_path / "half", half=True)
    assert whole.digest != half.digest
    assert torch.equal(half.tensors()["colour"], whole.tensors()["colour"].half().float())


def test_python_explains_with_a_fit_or_says_how_to_make_one(model: Model) -> None:
    images = torch.rand(2, 3, 96, 96)
    with pytest.raises(
        RequestError,
        match=r"`faithmap train toy-fitted --model shapes/resnet --dataset DATASET --plugin toy_fitted\.py`",
    ):
        faithmap.explain(model, images, explainer="toy-fitted")
    made = training.train(asked(model))
    maps = faithmap.explain(model, images, explainer="toy-fitted", power=1.0)
    colour = made.tensors()["colour"].view(1, 3, 1, 1)
    assert torch.allclose(maps, (images - colour).square().sum(1).sqrt(), atol=1e-6)
    assert faithmap.explain(model, images, explainer="toy-fitted", learn=False).shape == (2, 96, 96)


def test_advice_names_changed_parameters(model: Model) -> None:
    params = toy().check({"start": 0.5, "learn": False, "fitted": "fabc"})
    advice = fitting.advice(toy(), params, model)
    assert "`faithmap train 'toy-fitted[start=0.5,learn=false]' --model shapes/resnet" in advice
    assert "--model 'mine' --request FILE.toml" in fitting.advice(
        toy(), toy().check({}), model, "'mine' --request FILE.toml"
    )
    infocam = registry.get("explainer", "infocam")
    said = fitting.advice(infocam, infocam.check({"statistics": "fitted"}), model)
    assert "`faithmap train 'infocam[statistics=fitted]' --model shapes/resnet" in said


def run_toy(out: Path, **lists: Any) -> Any:
    config = {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1},
        "models": [{"name": lists.get("model", "shapes/resnet")}],
    }
    explainers = lists.get("explainers", [{"name": "toy-fitted"}, {"name": "gradcam"}])
    return faithmap.run(
        config | {"explainers": explainers, "datasets": [lists.get("dataset", {"name": "shapes"})]},
        out=out, figures=False,
    )  # fmt: skip


def test_a_run_without_a_fit_says_what_to_do_and_goes_on(tmp_path: Path) -> None:
    board = run_toy(tmp_path / "run").leaderboard().set_index("explainer")
    assert board.loc["toy-fitted", "status"].startswith("skipped: not fitted for this model; `faithmap train")
    assert board.loc["gradcam", "status"] == "ok"


def test_a_run_finds_the_fit_and_counts_it(model: Model, tmp_path: Path) -> None:
    run_toy(tmp_path / "run")
    made = training.train(asked(model))
    done = run_toy(tmp_path / "run")  # the same folder: the skipped cell is computed now
    line = done.leaderboard().set_index("explainer").loc["toy-fitted"]
    assert line["fit_images"] == 12 and line["params_added"] == 3
    assert line["fit_seconds"] == made.record["seconds"]
    assert torch.isnan(torch.tensor(done.leaderboard().set_index("explainer").loc["gradcam", "fit_images"]))
    entry = done.manifest["explainers"]["toy-fitted"]["fits"]["shapes/resnet"]
    assert entry["digest"] == made.digest and entry["scored_too"] == []
    text = (done.path / "leaderboard.md").read_text()
    assert "Fit images" in text and "Fitted on images of this very table" not in text


def test_the_fit_is_part_of_the_key_of_a_map(model: Model, tmp_path: Path) -> None:
    training.train(asked(model))
    first = run_toy(tmp_path / "run").manifest["cells"]
    second = training.train(asked(model, seed=1))
    assert second.path is not None
    runs = []
    for name, text in (("key", second.key), ("begin", second.key[:5]), ("path", str(second.path))):
        named = [{"name": "toy-fitted", "fitted": text}, {"name": "gradcam"}]
        runs.append(run_toy(tmp_path / name, explainers=named))
    others = [set(run.manifest["cells"]) for run in runs]
    assert others[0] == others[1] == others[2]  # how it is named is no part of it
    assert len(set(first) & others[0]) == len(first) - 1
    assert not any(second.path.name in params for params in runs[2].rows()["params"])


def test_a_board_says_when_a_method_was_fitted_on_its_images(model: Model, tmp_path: Path) -> None:
    dataset = load_dataset(Spec("shapes", {}))
    request = training.Training(
        toy(), toy().check({}), model, dataset, choose(dataset.samples, "eval", 8),
        training.fit_options(toy(), {}), "eval", 8,
    )  # fmt: skip
    training.train(request)
    done = run_toy(tmp_path / "run")
    assert (
        "**Fitted on images of this very table**: `toy-fitted`." in (done.path / "leaderboard.md").read_text()
    )


def test_a_board_counts_what_was_noted(tmp_path: Path) -> None:
    from faithmap.data import choose as pick

    samples = pick(load_dataset(Spec("shapes", {})).samples, "eval", 4)
    brightness = sorted(float(sample.image().mean()) for sample in samples)
    for dim, said in (
        (0.0, ""),
        (sum(brightness[1:3]) / 2, "- `toy-fitted`, 2 images: the image is dim"),
        (sum(brightness[:2]) / 2, "- `toy-fitted`, 1 image: the image is dim"),
    ):
        out = tmp_path / f"{dim:.4f}"
        run_toy(out, explainers=[{"name": "toy-fitted", "learn": False, "dim": dim}, {"name": "gradcam"}])
        text = (out / "leaderboard.md").read_text()
        assert said in text
        assert ("Noted of maps that are scored all the same" in text) == bool(said)


class KilledError(BaseException):
    """Stands in for a kill."""


class KillAt(training.Silent):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, values: Any) -> None:
        if step == self.at:
            raise KilledError


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


def test_a_damaged_checkpoint_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        training.train(asked(model), KillAt(4), out=tmp_path, every=0.0)
    (checkpoint,) = tmp_path.glob("*.checkpoint")
    checkpoint.write_bytes(b"half a fi")
    with pytest.raises(FaithmapError, match=r"checkpoint .* is damaged .*--fresh"):
        training.train(asked(model), out=tmp_path)
    training.train(asked(model), out=tmp_path, fresh=True)


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


def test_the_command_says_what_was_made(tmp_path: Path, home: Path) -> None:
    code, said = typed("train", "toy-fitted", "--model", "shapes/resnet",
                       "--dataset", "shapes[split=train,n=8]", "--set", "epochs=2")  # fmt: skip
    assert code == 0
    assert "toy-fitted fitted to shapes/resnet on 8 images of shapes: 3 parameters" in said
    (file,) = (home / "fitted" / "toy-fitted").glob("*.safetensors")
    assert f"wrote {file}" in said


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gradcam"], "explainer 'gradcam' is not fitted: it explains any model as it is"),
        (["toy-fitted", "--set", "epoch=3"], "has no option 'epoch'; did you mean 'epochs'?"),
        (["toy-fitted", "--set", "epochs=many"], "option 'epochs': got 'many', expected int"),
        (["toy-fitted", "--set", "epochs"], "'epochs' is no option; write key=value"),
        (["toy-fitted", "--part", "some"], "expected one of"),
        (["toy-fitted[learn=false]"], "needs no fit with these parameters"),
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
    assert not list(home.rglob("*.safetensors"))


def test_the_kit_fits_and_passes() -> None:
    results = conformance.check_explainer("toy-fitted", {"cnn": make_cnn, "vit": make_vit}, slow=False)
    assert not [result for result in results if result.status == "failed"]
    passed = {result.check for result in results if result.status == "passed"}
    assert {"check_fit", "check_resume", "check_maps", "check_batch"} <= passed


def test_two_folders_join_with_their_fits(model: Model, tmp_path: Path) -> None:
    from faithmap.folders import read_runs

    first = training.train(asked(model))
    vit = load_model("shapes/vit")
    training.train(asked(vit))
    run_toy(tmp_path / "resnet")
    run_toy(tmp_path / "vit", model="shapes/vit")
    _, merged = read_runs([tmp_path / "resnet", tmp_path / "vit"])
    assert set(merged["explainers"]["toy-fitted"]["fits"]) == {"shapes/resnet", "shapes/vit"}
    training.train(asked(model, seed=1))
    assert first.path is not None
    first.path.unlink()
    run_toy(tmp_path / "again")
    with pytest.raises(RequestError, match="another fit of 'toy-fitted' for model 'shapes/resnet'"):
        read_runs([tmp_path / "resnet", tmp_path / "again"])


def test_a_board_names_the_fit_and_no_folder_of_this_machine(model: Model, tmp_path: Path) -> None:
    code, said = typed("train", "toy-fitted", "--model", "shapes/resnet",
                       "--dataset", "shapes[split=train,n=8]")  # fmt: skip
    assert code == 0, said
    done = run_toy(tmp_path / "run")
    fit = fitting.find(toy(), toy().check({}), model)
    assert fit is not None
    text = (done.path / "leaderboard.md").read_text()
    assert (
        f"- **fit** of `toy-fitted` to `shapes/resnet`: `{fit.key}` (tensors `{fit.digest}`), 8 images"
        in text
    )
    record = done.manifest["explainers"]["toy-fitted"]["fits"]["shapes/resnet"]["record"]
    assert "command" not in record and "ids" not in record["data"]


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


class Deaf:
    """A method that keeps checkpoints and never looks at them."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Counts."""
        for step in range(1, 7):
            session.report(step, 6, {"loss": 1 / step})
            session.checkpoint({"step": step}.copy)
        return {"value": torch.ones(())}

    def load(self, model: Model, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing to keep."""

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


class Forgetful:
    """A method whose checkpoint lacks its momentum."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Momentum towards one."""
        value, momentum, start = torch.zeros(()), torch.zeros(()), 0
        if state := session.resume():
            value, start = state["value"], state["step"]
        for step in range(start + 1, 7):
            momentum = 0.9 * momentum + (1 - value)
            value = value + 0.1 * momentum
            session.report(step, 6, {"loss": float(1 - value)})
            session.checkpoint({"value": value, "step": step}.copy)
        return {"value": value}

    def load(self, model: Model, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the value."""
        self.value = tensors["value"]

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1) * self.value


class Restless(Forgetful):
    """A method that trains the model."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """A weight is changed."""
        with torch.no_grad():
            next(model.module.parameters()).add_(1.0)
        return {"value": torch.ones(())}

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


class Random(Restless):
    """A method that draws from the global state."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Not seeded by the session."""
        return {"value": torch.rand((), generator=STREAM)}

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


STREAM = torch.Generator()


@pytest.mark.parametrize(
    ("method", "check", "words"),
    [
        (Forgetful, "check_resume", "the same curve"),
        (Deaf, "check_resume", "begins at its first step again"),
        (Restless, "check_fit", "after the fit, weights"),
        (Random, "check_fit", "two fits with the same seed differ"),
    ],
)
def test_the_kit_finds_a_bad_fit(method: type, check: str, words: str) -> None:
    facts = {"forwards": 0, "backwards": 0, "class_specific": False}
    registry.explainer(version=1, source="a test", name=f"planted-{method.__name__}", **facts)(method)
    results = conformance.check_explainer(f"planted-{method.__name__}", {"cnn": make_cnn}, slow=False)
    found = {result.check: result.message for result in results if result.status == "failed"}
    assert set(found) == {check}, found
    assert words in found[check]
