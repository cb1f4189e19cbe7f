"""Explainers that are fitted: a fit is kept by content, found by a run, and named on its board."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cnn
from fits import asked, toy, typed

import faithmap
from faithmap import fitting, registry, training
from faithmap.data import choose, load_dataset
from faithmap.errors import FaithmapError, RequestError
from faithmap.models import Model, load_model
from faithmap.records import Spec

pytestmark = pytest.mark.usefixtures("toy_fitted", "home")


@pytest.fixture
def model() -> Model:
    return load_model("shapes/resnet")


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


def test_an_explainer_may_say_how_many_numbers_it_uses(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy().target, "numbers_used", lambda _, tensors: len(tensors), raising=False)
    assert training.train(asked(model)).record["params_added"] == 1


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
    assert asked(cropped).served != asked(model).served  # a decoder of squeezed images explains no crops
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


def test_a_fit_that_comes_with_the_package_serves_where_the_user_has_none(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "packaged"
    monkeypatch.setattr(fitting, "folders", lambda name: [fitting.home() / "fitted" / name, packaged])
    shipped = training.train(asked(model), out=packaged)
    assert fitting.find(toy(), toy().check({}), model) == shipped
    own = training.train(asked(model, seed=1))
    assert fitting.find(toy(), toy().check({}), model) == own
    assert fitting.find(toy(), toy().check({"fitted": shipped.key}), model) == shipped


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
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1},
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
