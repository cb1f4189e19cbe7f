"""`[[fits]]`: one command that fits what a request needs, then runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import asked, toy, typed
from torch import Tensor

import faithmap
from faithmap import engine, fitting, progress, training
from faithmap.config import load_config
from faithmap.errors import RequestError
from faithmap.models import Model, load_model
from faithmap.plan import make_grid
from faithmap.registry import get

pytestmark = pytest.mark.usefixtures("toy_fitted", "home")

RECIPE = {"name": "toy-fitted", "dataset": "shapes[split=train,n=12]"}


def request_of(**changes: Any) -> dict[str, Any]:
    return {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1},
        "models": [{"name": "shapes/resnet"}],
        "explainers": [{"name": "toy-fitted"}, {"name": "toy-fitted", "start": 1.0}, {"name": "gradcam"}],
        "datasets": [{"name": "shapes"}],
        "fits": [RECIPE],
        **changes,
    }


def files(home: Path, folder: str = "requested") -> list[str]:
    return sorted(file.name for file in (home / folder / "toy-fitted").glob("*.safetensors"))


def test_a_run_fits_each_variant_and_scores_it(tmp_path: Path, home: Path) -> None:
    done = faithmap.run(request_of(), out=tmp_path / "run", figures=False)
    board = done.leaderboard().set_index("explainer")
    assert list(board.loc[["toy-fitted", "toy-fitted[start=1.0]"], "fit_images"]) == [12, 12]
    assert (board["status"] == "ok").sum() == 3
    assert len(files(home)) == 2


def test_fits_are_those_of_train_and_are_made_once(tmp_path: Path, home: Path) -> None:
    made = training.train(asked(load_model("shapes/resnet")))
    before = made.path.stat().st_mtime_ns if made.path else 0
    for _ in range(2):
        done = faithmap.run(request_of(), out=tmp_path / "run", figures=False)
    assert len(files(home)) == len(files(home, "fitted")) == 1  # one was there
    assert made.path is not None and made.path.stat().st_mtime_ns == before
    entry = done.manifest["explainers"]["toy-fitted"]["fits"]["shapes/resnet"]
    assert entry["digest"] == made.digest


def test_another_fit_of_the_same_explainer_is_not_taken(tmp_path: Path, home: Path) -> None:
    other = training.train(asked(load_model("shapes/resnet"), seed=5))
    grid = make_grid(load_config(request_of()))
    assert [list(use.wanted) for use in grid.explainers[:2]] == [["shapes/resnet"], ["shapes/resnet"]]
    named = request_of(explainers=[{"name": "toy-fitted", "fitted": other.key}])
    grid = make_grid(load_config(named))
    assert grid.explainers[0].fits["shapes/resnet"].digest == other.digest
    assert not grid.explainers[0].wanted


def test_what_a_request_fits_for_itself_serves_others_where_there_is_nothing_else(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, toy = load_model("shapes/resnet"), get("explainer", "toy-fitted")
    packaged = tmp_path / "packaged"
    places = [fitting.folders("toy-fitted")[0], packaged, fitting.requested_folder("toy-fitted")]
    monkeypatch.setattr(fitting, "folders", lambda name: places)
    one = request_of(explainers=[{"name": "toy-fitted"}])
    faithmap.run(one, out=tmp_path / "one", figures=False)
    made = fitting.find(toy, toy.check({}), model)
    assert made is not None and made.path is not None and home / "requested" in made.path.parents
    # Two of them: it has to be named which.
    faithmap.run({**one, "fits": [{**RECIPE, "seed": 7}]}, out=tmp_path / "two", figures=False)
    with pytest.raises(RequestError, match="has 2 fits"):
        fitting.find(toy, toy.check({}), model)
    # One that comes with the package goes before, and one that was typed for before that.
    shipped = training.train(asked(model, seed=1), out=packaged)
    assert fitting.find(toy, toy.check({}), model) == shipped
    own = training.train(asked(model, seed=2))
    assert fitting.find(toy, toy.check({}), model) == own
    assert fitting.find(toy, toy.check({"fitted": made.key}), model) == made
    assert len(files(home)) == 2 and len(files(home, "fitted")) == 1


def test_train_takes_over_what_a_request_has_made(tmp_path: Path, home: Path) -> None:
    faithmap.run(request_of(explainers=[{"name": "toy-fitted"}]), out=tmp_path / "run", figures=False)
    (name,) = files(home)
    made = training.train(asked(load_model("shapes/resnet")))
    assert not made.written and files(home) == [] and files(home, "fitted") == [name]
    assert sorted(file.suffix for file in (home / "fitted" / "toy-fitted").iterdir()) == [
        ".csv",
        ".safetensors",
    ]
    again = faithmap.run(request_of(explainers=[{"name": "toy-fitted"}]), out=tmp_path / "run", figures=False)
    assert files(home) == []
    assert again.manifest["explainers"]["toy-fitted"]["fits"]["shapes/resnet"]["digest"] == made.digest


def test_settings_of_a_fit_are_told_from_its_options() -> None:
    recipe = {**RECIPE, "epochs": 7, "seed": 3, "limit": 8, "part": "dev", "precision": "bf16",
              "dataset": {"name": "shapes", "split": "train", "n": 64}}  # fmt: skip
    grid = make_grid(load_config(request_of(fits=[recipe])))
    wanted = grid.explainers[0].wanted["shapes/resnet"]
    assert wanted.options["epochs"] == 7 and "seed" not in wanted.options
    assert (wanted.seed, wanted.limit, wanted.part, wanted.precision) == (3, 8, "dev", "bf16")
    assert len(wanted.samples) == 8
    whole = make_grid(load_config(request_of(run={"seed": 4}, fits=[{**RECIPE, "dataset": "shapes[n=200]"}])))
    assert whole.explainers[0].wanted["shapes/resnet"].seed == 4  # the run's
    assert len(whole.explainers[0].wanted["shapes/resnet"].samples) == 200  # no limit of its own, so all


class Listener(engine.Silent):
    """Keeps what it is told of fits, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def fitting(self) -> training.Watcher:
        self.told.append("a fit begins")
        return training.Silent()

    def fitted(self, explainer: str, model: str, counts: Sequence[str]) -> None:
        self.told += [f"{explainer} on {model}: {count}" for count in counts]

    def unfitted(self, explainer: str, model: str, reason: str) -> None:
        self.told.append(f"{explainer} on {model}: {reason}")


FAILING = [
    {"name": "toy-fitted", "start": float("inf"), "label": "diverges"},
    {"name": "toy-fitted", "start": float("inf"), "power": 1.0, "label": "likewise"},
    {"name": "toy-fitted"},
    {"name": "gradcam"},
]


def test_a_fit_that_fails_costs_its_own_line_alone(tmp_path: Path, home: Path) -> None:
    listener = Listener()
    done = faithmap.run(
        request_of(explainers=FAILING), out=tmp_path / "run", figures=False, observer=listener
    )
    board = done.leaderboard().set_index("explainer")
    reason = "not fitted: the fit of 'toy-fitted' ended with NaN or infinity in 'colour'; nothing was kept"
    assert list(board.loc[["toy-fitted", "gradcam"], "status"]) == ["ok", "ok"]
    for label in ("diverges", "likewise"):  # they share a fit, which is tried once
        assert board.loc[label, "status"].startswith(f"skipped: {reason}")
        assert f"- `{label}`: skipped: not fitted: the fit of" in (done.path / "leaderboard.md").read_text()
    assert len(done.failed_fits) == 2 and done.failed_fits[0].startswith(
        f"diverges on shapes/resnet: {reason}"
    )
    told = [text.partition(":")[0] for text in listener.told]
    assert told == [
        "a fit begins", "diverges on shapes/resnet", "a fit begins", "likewise on shapes/resnet",
        "a fit begins",
    ]  # fmt: skip
    assert len(files(home)) == 1 and not list(home.rglob("*.lock"))


def test_the_command_says_so_when_it_happens_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "request.toml"
    file.write_text(
        '[run]\nlimit = 4\nown_nulls = []\nnull_draws = 1\nthreads = 1\n[[models]]\nname = "shapes/resnet"\n'
        '[[datasets]]\nname = "shapes"\n[[metrics]]\nname = "drop"\n'
        '[[explainers]]\nname = "toy-fitted"\nstart = inf\n[[explainers]]\nname = "gradcam"\n'
        '[[fits]]\nname = "toy-fitted"\ndataset = "shapes[split=train,n=12]"\n'
    )
    code, said = typed("run", file, "--out", tmp_path / "run")
    assert code == 1
    assert "toy-fitted on shapes/resnet: not fitted: the fit of 'toy-fitted' ended with NaN" in said
    log = capsys.readouterr().err
    assert log.index("Lower its learning rate, or fit in fp32; the run goes on without it") < log.index(
        " units"
    )


def test_what_a_fit_counts_is_told_when_it_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(self: Any, model: Model, data: Any, session: Any, *, epochs: int = 1) -> dict[str, Tensor]:
        for step, (images, _) in enumerate(data.batches(4, 0), 1):
            session.report(step, data.steps(4), {"loss": 1.0, "dark": len(images) - step % 2})
        return {"colour": torch.zeros(3)}

    monkeypatch.setattr(toy().target, "fit", fit)
    monkeypatch.setattr(toy().target, "counts", {"dark": "left as they were"}, raising=False)
    listener = Listener()
    asked_for = request_of(explainers=[{"name": "toy-fitted"}, {"name": "gradcam"}], fits=[
        {"name": "toy-fitted", "dataset": "shapes[split=train,n=12]"}
    ])  # fmt: skip
    faithmap.run(asked_for, out=tmp_path / "run", figures=False, observer=listener)
    told = "toy-fitted on shapes/resnet: left as they were: 10 of 12 image passes"  # 3 + 4 + 3
    assert listener.told == ["a fit begins", told]
    progress.Lines(sys.stderr).fitted("toy-fitted", "shapes/resnet", ["left as they were: 10"])
    assert capsys.readouterr().err == "toy-fitted on shapes/resnet: left as they were: 10\n"


def skipped(done: faithmap.Run) -> str:
    """The one reason why the toy explains nothing."""
    rows = done.rows()
    (reason,) = set(rows[rows["explainer"] == "toy-fitted"]["reason"])
    return str(reason)


def test_the_reason_is_that_of_the_latest_run(tmp_path: Path, home: Path) -> None:
    from filelock import FileLock

    request = request_of(explainers=[{"name": "toy-fitted", "start": float("inf")}, {"name": "gradcam"}])
    asked_for = make_grid(load_config(request)).explainers[0].wanted["shapes/resnet"]
    lock = (home / "requested" / "toy-fitted" / asked_for.file_name).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        done = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert skipped(done).startswith(
        "not fitted: another process is making $FAITHMAP_HOME/requested/toy-fitted/"
    )
    done = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert skipped(done).startswith("not fitted: the fit of 'toy-fitted' ended with NaN")
    before = {file: file.stat().st_mtime_ns for file in done.path.rglob("*.parquet")}
    again = faithmap.run(request, out=tmp_path / "run", figures=False)
    assert before == {file: file.stat().st_mtime_ns for file in again.path.rglob("*.parquet")}


def test_ctrl_c_in_a_fit_ends_the_run(tmp_path: Path) -> None:
    class Impatient(Listener):
        def fitting(self) -> training.Watcher:
            class Stopping(training.Silent):
                def step(self, step: int, values: Any) -> None:
                    raise KeyboardInterrupt

            return Stopping()

    with pytest.raises(KeyboardInterrupt):
        faithmap.run(request_of(), out=tmp_path / "run", figures=False, observer=Impatient())


def test_without_its_images_any_fit_serves_and_none_says_what_is_missing(tmp_path: Path) -> None:
    lost = {"name": "toy-fitted", "dataset": {"name": "imagefolder", "root": str(tmp_path / "nowhere")}}
    grid = make_grid(load_config(request_of(fits=[lost])))
    reason = grid.explainers[0].unfitted["shapes/resnet"]
    assert "`faithmap train toy-fitted --model shapes/resnet" in reason
    assert "The request's own images for it are not here: no such folder" in reason
    assert not grid.explainers[0].wanted
    made = training.train(asked(load_model("shapes/resnet"), seed=5))
    grid = make_grid(load_config(request_of(fits=[lost])))
    assert grid.explainers[0].fits["shapes/resnet"].digest == made.digest


def test_a_recipe_whose_explainer_is_not_asked_for_is_left_alone() -> None:
    grid = make_grid(load_config(request_of(explainers=[{"name": "gradcam"}])))
    assert not any(use.wanted for use in grid.explainers)


def test_a_dry_run_says_so_and_fits_nothing(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "request.toml"
    file.write_text(
        '[run]\nlimit = 4\n[[models]]\nname = "shapes/resnet"\n[[datasets]]\nname = "shapes"\n'
        '[[explainers]]\nname = "toy-fitted"\n[[metrics]]\nname = "perturbation"\n'
        '[[fits]]\nname = "toy-fitted"\ndataset = "shapes[split=train,n=12]"\n'
    )
    code, said = typed("run", file, "--dry-run")
    assert code == 0, said
    assert "shapes/resnet: 1 fit first, on 12 images of shapes (toy-fitted); neither" in said
    assert not home.exists()


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"name": "toy-fited", "dataset": "shapes"}, "'toy-fited', which is no explainer; did you mean 'toy"),
        ({"name": "gradcam", "dataset": "shapes"}, "'gradcam' is not fitted: it explains any model as it is"),
        ({"name": "toy-fitted"}, "dataset is None; name the images to learn from"),
        ({**RECIPE, "epoch": 2}, "has no option 'epoch'; did you mean 'epochs'?"),
        ({**RECIPE, "limit": 0}, "'toy-fitted': limit = 0: expected a number of images of at least 1"),
        ({**RECIPE, "dataset": "shape"}, "did you mean 'shapes'?"),
    ],
)
def test_a_wrong_recipe_is_a_sentence(recipe: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_grid(load_config(request_of(fits=[recipe])))
    assert sentence in str(caught.value)
