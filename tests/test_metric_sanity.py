"""Sanity checks: the cascade that takes weights away, and the scores on maps that are known."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from faithmap.again import with_model
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import bind
from faithmap.models import Model, load_model
from faithmap.randomising import cascade, layers_from_the_top
from faithmap.registry import get
from faithmap.scoring import project

NAMES = (
    "sanity_rank", "sanity_ssim", "sanity_auc_d", "sanity_class_gap", "sanity_least_gap", "sanity_self",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("shapes/resnet")


def score(batch: Batch, name: str, **params: Any) -> tuple[dict[str, Scored], torch.Tensor]:
    """The scores of a registered explainer's maps, as in a run, and the maps."""
    explainer = bind(get("explainer", name), get("explainer", name).parameters)
    batch, model, plugin = replace(batch, explainer=explainer), batch.context.model, get("metric", "sanity")
    maps = project(explainer(model, batch).float(), batch)
    return plugin.make(plugin.check(params))(model, batch, maps), maps


class TestCascade:
    def test_it_goes_from_the_logits_down(self) -> None:
        names = layers_from_the_top(make_cnn())
        holders = [n for n, m in make_cnn().module.named_modules() if list(m.parameters(recurse=False))]
        assert names == holders[::-1]

    def test_tokens_and_positions_go_last(self) -> None:
        names = layers_from_the_top(load_model("shapes/vit"))
        assert names[0].startswith("head") and names[-1] == ""
        assert set(names) == {
            n for n, m in load_model("shapes/vit").module.named_modules() if list(m.parameters(recurse=False))
        }

    @pytest.mark.parametrize("how", ["shuffled", "reinitialised"])
    def test_each_stage_adds_to_the_last_and_the_model_stays(self, how: str) -> None:
        model = make_cnn()
        before = copy.deepcopy(model.module.state_dict())
        names, digest = layers_from_the_top(model), model.digest()
        for stage, changed in enumerate(cascade(model, 3, how, seed=2), 1):
            gone = names[: -(-len(names) * stage // 3)]
            for name, value in changed.module.named_parameters():
                layer = name.rpartition(".")[0]
                constant = float(before[name].max()) == float(before[name].min())  # a bias of zeros
                assert constant or torch.equal(value, before[name]) == (layer not in gone), name
            assert changed.digest() != digest
        assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
        assert model.digest() == digest

    def test_shuffled_tensors_keep_their_entries(self) -> None:
        model = make_cnn()
        (changed,) = cascade(model, 1)
        for one, two in zip(model.module.parameters(), changed.module.parameters(), strict=True):
            assert torch.equal(one.flatten().sort().values, two.flatten().sort().values)

    def test_the_seed_decides_and_the_global_state_does_not(self) -> None:
        def weights(seed: int) -> torch.Tensor:
            (changed,) = cascade(make_cnn(), 1, "reinitialised", seed)
            return torch.cat([p.flatten() for p in changed.module.parameters()])

        state = torch.get_rng_state()
        first = weights(3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert torch.equal(first, weights(3))
        assert not torch.equal(first, weights(4))

    def test_no_pass_is_counted(self) -> None:
        model = make_cnn()
        with model.counting() as meter:
            list(cascade(model, 2))
        assert meter.forwards == 0

    def test_passes_on_the_copies_are_counted(self) -> None:
        model = make_cnn()
        with model.counting() as meter:
            for changed in cascade(model, 2):
                changed(torch.zeros(3, 3, 32, 32))
        assert meter.forwards == 6

    def test_what_holds_others_comes_where_it_begins(self) -> None:
        """torchvision's transformer: positions enter with the first block, and attention reads its output
        layer's weights without calling it."""
        names = layers_from_the_top(load_model("torchvision/vit_b_16", pretrained=False, input_size=32,
                                               kwargs={"image_size": 32}))  # fmt: skip
        first = "encoder.layers.encoder_layer_0."
        assert names.index("encoder") > names.index(f"{first}self_attention") > names.index(f"{first}mlp.0")
        assert names.index(f"{first}self_attention.out_proj") == names.index(f"{first}self_attention") - 1
        assert names[-2:] == ["conv_proj", ""]

    @pytest.mark.parametrize(("stages", "how"), [(0, "shuffled"), (2, "shuffle")])
    def test_wrong_requests_are_named(self, stages: int, how: str) -> None:
        with pytest.raises(RequestError, match=r"got 0, expected at least 1|did you mean 'shuffled'"):
            list(cascade(make_cnn(), stages, how))


class TestScores:
    @pytest.mark.parametrize("make", [make_cnn, make_vit])
    def test_equal_the_slow_rewrite(self, make: Any) -> None:
        model = make()
        batch = make_batch(model, count=3)
        found, maps = score(batch, "saliency", stages=2, steps=3)
        saliency = bind(get("explainer", "saliency"), get("explainer", "saliency").parameters)
        curves = []
        for changed in cascade(model, 2, seed=batch.seed):
            blank = with_model(batch, changed)
            bare = project(saliency(changed, blank).float(), batch)
            curves.append([spearmanr(a.flatten(), b.flatten())[0] for a, b in zip(maps, bare, strict=True)])
            alike = [
                structural_similarity(*[_stretched(x) for x in pair], data_range=1.0)
                for pair in zip(maps, bare, strict=True)
            ]
        assert torch.allclose(
            found["sanity_rank"].curves, torch.tensor(curves).T.to(torch.float32), atol=1e-5
        )
        assert torch.allclose(found["sanity_ssim"].values, torch.tensor(alike).float(), atol=1e-5)
        expected = _auc_d(model, batch, bare)
        assert torch.allclose(found["sanity_auc_d"].values, expected, atol=1e-4)
        own = _auc_d(model, batch, maps)
        least = replace(batch, targets=batch.logits.argmin(1))
        theirs = _auc_d(model, batch, project(saliency(model, least).float(), batch))
        assert torch.allclose(found["sanity_least_gap"].values, own - theirs, atol=1e-4)

    def test_what_looks_at_no_model_does_not_change(self, model: Model) -> None:
        found, _ = score(make_batch(model, count=2), "centre", stages=1, steps=2)
        assert found["sanity_rank"].values.tolist() == pytest.approx([1, 1])
        assert found["sanity_ssim"].values.tolist() == pytest.approx([1, 1])
        for name in ("sanity_class_gap", "sanity_least_gap"):
            assert found[name].values.tolist() == [0, 0]

    def test_what_looks_at_the_model_does(self, model: Model) -> None:
        found, _ = score(make_batch(model, count=4), "gradcam", stages=1, steps=2)
        assert float(found["sanity_rank"].values.abs().mean()) < 0.6

    def test_without_labels_the_papers_version_says_so(self, model: Model) -> None:
        batch = replace(make_batch(model, count=2), labels=None)
        found, _ = score(batch, "saliency", stages=1, steps=2)
        assert found["sanity_self"].values.isnan().all()
        assert found["sanity_self"].reasons == ["the image has no label"] * 2

    def test_the_other_class_is_never_the_target(self) -> None:
        module = __import__("faithmap.metrics.sanity", fromlist=["_another"])
        batch = make_batch(make_cnn(), count=30)
        drawn = module._another(batch)
        assert bool((drawn != batch.targets).all()) and len(set(drawn.tolist())) > 2
        assert torch.equal(drawn, module._another(batch))

    def test_the_least_likely_class_is_another_one_too(self) -> None:
        module = __import__("faithmap.metrics.sanity", fromlist=["_least"])
        batch = make_batch(make_cnn(classes=2), count=30)
        assert torch.equal(module._least(batch), 1 - batch.targets)

    def test_gaps_have_no_value_where_another_class_is_explained(self, model: Model) -> None:
        batch = make_batch(model, count=3)
        other = replace(batch, targets=(batch.predicted + torch.tensor([0, 1, 2])) % model.num_classes)
        found, _ = score(other, "gradcam", stages=1)
        for name in ("sanity_class_gap", "sanity_least_gap"):
            assert found[name].values.isnan().tolist() == [False, True, True]
            assert [bool(reason) for reason in found[name].reasons] == [False, True, True]

    def test_it_must_be_named(self) -> None:
        facts = get("metric", "sanity").facts
        assert not facts.default and set(facts.scores) == set(NAMES)


def _stretched(map_: torch.Tensor) -> np.ndarray:
    return ((map_ - map_.min()) / (map_.max() - map_.min())).double().numpy()


def _auc_d(model: Model, batch: Batch, maps: torch.Tensor) -> torch.Tensor:
    """AUC-D by agreement at thirds of 0.9, from the metric that every board has."""
    plugin = get("metric", "perturbation")
    return plugin.make(plugin.check({"steps": 3}))(model, batch, maps)["auc_d"].values
