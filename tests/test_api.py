"""`faithmap.explain` and `faithmap.score`: maps and scores of people's own tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_batch, make_cnn

import faithmap
from faithmap.errors import FaithmapError, RequestError
from faithmap.models import Model


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_explain_gives_maps_of_the_predictions(model: Model) -> None:
    maps = faithmap.explain(model, images(), explainer="gradcam")
    assert maps.shape == (3, *model.grid)
    predicted = model(images()).argmax(1)
    assert torch.equal(maps, faithmap.explain(model, images(), predicted, "gradcam"))


def test_explain_takes_targets_and_parameters() -> None:
    model = make_cnn()
    first = faithmap.explain(model, images(), [0, 0, 0], "integrated-gradients", n_steps=4)
    second = faithmap.explain(model, images(), [1, 1, 1], "integrated-gradients", n_steps=4)
    assert first.shape == (3, 32, 32)
    assert not torch.allclose(first, second)


def test_explain_is_seeded() -> None:
    model = make_cnn()
    draws = [faithmap.explain(model, images(), explainer="random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_score_needs_nothing_but_maps() -> None:
    model = make_cnn()
    frame = faithmap.score(model, images(), torch.rand(3, 8, 8))
    assert list(frame.columns) == ["image_id", "metric", "value", "status", "reason"]
    assert set(frame["image_id"]) == {"0", "1", "2"}
    assert {"pos_auc", "neg_auc", "auc_d", "average_drop", "increase", "area"} <= set(frame["metric"])
    assert "energy_pg" not in set(frame["metric"])
    values = frame.pivot(index="image_id", columns="metric", values="value")
    assert torch.allclose(
        torch.tensor((values["neg_auc"] - values["pos_auc"]).to_numpy()),
        torch.tensor(values["auc_d"].to_numpy()),
    )
    assert values["pos_auc"].between(0, 90).all()


def test_score_uses_the_truths_it_is_given() -> None:
    model = make_cnn()
    batch = make_batch(model)
    predicted = batch.predicted
    whole = {"labels": predicted, "masks": batch.masks}
    frame = faithmap.score(
        model, batch.images, torch.rand(4, 8, 8), metrics=["energy-pointing-game"], **whole
    )
    assert (frame[frame["metric"] == "energy_pg"]["status"] == "ok").all()
    truth = batch.masks.float() if batch.masks is not None else torch.zeros(0)
    perfect = faithmap.score(model, batch.images, truth, metrics=["energy-pointing-game"], **whole)
    assert perfect[perfect["metric"] == "energy_pg"]["value"].tolist() == [100.0] * 4
    alone = ["energy-pointing-game[most_share=1]"]
    maps = torch.rand_like(truth) + 0.1
    found = faithmap.score(model, batch.images, maps, metrics=alone, void=truth == 0, **whole)
    assert found[found["metric"].str.startswith("energy_pg")]["value"].tolist() == pytest.approx([100.0] * 4)


def test_score_reduces_maps_only_when_asked() -> None:
    model = make_cnn()
    maps = torch.rand(3, 32, 32)

    def auc(**settings: Any) -> list[float]:
        frame = faithmap.score(model, images(), maps, metrics=["perturbation"], **settings)
        return frame[frame["metric"] == "auc_d@probability"]["value"].tolist()

    assert auc() == auc(map_grid="native")
    assert auc(map_grid=8) == auc(map_grid="model")
    assert auc() != auc(map_grid=8)


def test_score_takes_parameters_and_ids() -> None:
    model = make_cnn()
    frame = faithmap.score(
        model, images(), torch.rand(3, 8, 8), metrics=["perturbation[fill=blur]"], ids=["a", "b", "c"]
    )
    assert "auc_d@blur" in set(frame["metric"])
    assert set(frame["image_id"]) == {"a", "b", "c"}


def test_empty_maps_have_a_status_and_no_value() -> None:
    maps = torch.rand(3, 8, 8)
    maps[1] = 0.0
    frame = faithmap.score(make_cnn(), images(), maps, metrics=["perturbation"])
    empty = frame[frame["image_id"] == "1"]
    assert set(empty["status"]) == {"empty"}
    assert empty["value"].isna().all()


GOOD = {"images": images(), "maps": torch.rand(3, 8, 8)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": torch.rand(3, 32, 32)}, "expected a float tensor"),
        ({"images": torch.rand(3, 1, 32, 32)}, "expected a float tensor"),
        ({"images": (images() * 255).byte()}, "divide bytes by 255"),
        ({"images": images() * 2 - 1}, "do not normalise"),
        ({"maps": torch.rand(2, 8, 8)}, r"maps have shape \(2, 8, 8\)"),
        ({"maps": torch.rand(3, 1, 8)}, "h, w > 1"),
        ({"targets": [0, 1]}, "targets are 2 values"),
        ({"targets": [0, 1, 9]}, "the model has 5 classes"),
        ({"labels": [0.5, 1.0, 2.0]}, "whole numbers"),
        ({"masks": torch.ones(3, 8, 8)}, "masks have shape"),
        ({"void": torch.ones(3, 32, 32)}, r"void has shape \(3, 32, 32\), masks None"),
        ({"boxes": [torch.zeros(1, 4)]}, "boxes are given for 1 images"),
        ({"ids": ["a", "a", "b"]}, "all different"),
        ({"metrics": ["energy-pointing-game"]}, "give labels=, masks= or boxes="),
        (
            {"metrics": ["pointing-game[region=box]"], "masks": torch.ones(3, 32, 32)},
            "needs each image's box",
        ),
        ({"metrics": ["cost"]}, "use faithmap.run"),
        ({"metrics": ["perturbations"]}, "did you mean 'perturbation'"),
        ({"map_grid": "coarse"}, "map_grid is 'coarse'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        faithmap.score(make_cnn(), **{**GOOD, **changes})
    assert "\n" not in str(caught.value)


def test_a_bare_network_is_refused_with_the_way_out() -> None:
    with pytest.raises(RequestError, match=r"wrap it: faithmap\.Model"):
        faithmap.explain(torch.nn.Linear(3, 3), images())  # type: ignore[arg-type]


def test_an_explainer_that_is_not_defined_is_refused() -> None:
    with pytest.raises(RequestError, match="explainer 'oracle': needs"):
        faithmap.explain(make_cnn(), images(), explainer="oracle")


def test_an_explainer_that_fails_names_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_cnn()
    broken = images()
    broken[1] = 0.5
    weight = model.module.head.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(FaithmapError, match="explainer 'saliency' failed on image 0: the map holds NaN"):
        faithmap.explain(model, broken, explainer="saliency")
