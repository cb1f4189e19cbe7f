"""LIME, KernelSHAP and their superpixels against planted models, enumeration, libraries and slow rewrites."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import slow_perturbation
from faithmap import registry, superpixels
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import bind, forked_random_state
from faithmap.models import Model
from faithmap.records import canonical_json

SIDE = 24


def explain(name: str, model: Model, batch: Batch, **params: object) -> torch.Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def some_batch(model: Model, count: int = 2) -> Batch:
    """Smooth images of differing colours, so that SLIC finds regions of many shapes."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(5))
    images = nn.functional.interpolate(coarse, size=model.input_size, mode="bicubic").clamp(0, 1)
    return Batch(images, torch.arange(count), tuple("abcdef"[:count]), Context(model, images))


def make_linear(side: int = SIDE) -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 4))
    return Model(module, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), input_size=side, name="linear")


def effects(model: Model, batch: Batch, regions: superpixels.Superpixels, fill: str) -> list[np.ndarray]:
    """What showing each region adds to a linear model's target logit: known in closed form."""
    weights = model.module[1].weight.detach().view(-1, 3, *model.input_size) / model.std
    result = []
    for i, count in enumerate(regions.counts):
        image, labels = batch.images[i].double().numpy(), regions.labels[i].numpy()
        for_target = weights[int(batch.targets[i])].double().numpy()
        planes = []
        for region in range(count):
            shown = [other != region for other in range(count)]
            gone = slow_perturbation.hidden(image, labels, shown, fill)
            planes.append(float((for_target * (image - gone)).sum()))
        result.append(np.array(planes))
    return result


def score_of(model: Model, target: int, kind: str) -> Callable[[np.ndarray], float]:
    def score(image: np.ndarray) -> float:
        with torch.no_grad():
            logits = model(torch.from_numpy(image)[None].float())[0].double()
        return float(logits[target] if kind == "logit" else logits.softmax(0)[target])

    return score


class TestSuperpixels:
    @pytest.mark.parametrize("size", [(24, 24), (40, 24), (17, 33)])
    def test_labels_are_whole_and_connected(self, size: tuple[int, int]) -> None:
        from scipy.ndimage import label

        coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        images = nn.functional.interpolate(coarse, size=size, mode="bilinear")
        regions = superpixels.superpixels(images, 12)
        assert regions.labels.shape == (2, *size)
        for labels, count in zip(regions.labels, regions.counts, strict=True):
            assert labels.unique().tolist() == list(range(count)) and 6 <= count <= 24
            assert all(label(labels.numpy() == region)[1] == 1 for region in range(count))

    @pytest.mark.parametrize(("size", "asked"), [((4, 4), 2), ((3, 9), 2), ((9, 3), 3), ((2, 2), 50)])
    def test_an_image_that_slic_leaves_whole_is_cut_into_cells(
        self, size: tuple[int, int], asked: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import skimage.segmentation

        monkeypatch.setattr(skimage.segmentation, "slic", lambda image, **_: np.full(image.shape[:2], 1))
        regions = superpixels.superpixels(torch.full((1, 3, *size), 0.5), asked)
        assert regions.counts[0] >= 2
        assert regions.labels.unique().tolist() == list(range(regions.counts[0]))

    def test_an_image_of_one_colour_has_regions(self) -> None:
        assert superpixels.superpixels(torch.full((1, 3, 32, 32), 0.5), 12).counts[0] >= 2

    def test_an_image_is_cut_as_if_alone(self) -> None:
        images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(3))
        together = superpixels.superpixels(images, 9)
        for i in range(3):
            assert torch.equal(superpixels.superpixels(images[i : i + 1], 9).labels[0], together.labels[i])

    @pytest.mark.parametrize("fill", ["segment", "mean", "black"])
    def test_hidden_images_are_the_slow_ones(self, fill: str) -> None:
        seen: list[torch.Tensor] = []
        model = make_linear()
        model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
        images = some_batch(model).images
        regions = superpixels.superpixels(images, 9)
        shown = [torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < 0.5 for n in regions.counts]
        superpixels.coalition_scores(model, images, torch.tensor([0, 1]), regions, shown, fill=fill)
        masked = iter(torch.cat(seen))
        for i in range(2):
            for row in shown[i].tolist():
                expected = slow_perturbation.hidden(
                    images[i].double().numpy(), regions.labels[i].numpy(), row, fill
                )
                assert np.abs(next(masked).numpy() - expected).max() < 1e-6

    def test_a_blurred_fill_hides_every_shape(self) -> None:
        model = make_linear()
        images = some_batch(model).images
        regions = superpixels.superpixels(images, 9)
        assert superpixels.hiding_colours(images, regions, "blur").shape == images.shape

    def test_chunks_neither_change_scores_nor_counts(
        self, cnn: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        regions = superpixels.superpixels(images, 9)
        shown = [torch.rand(n, c) < 0.5 for n, c in zip((7, 4), regions.counts, strict=True)]
        whole = superpixels.coalition_scores(cnn, images, torch.tensor([0, 1]), regions, shown)
        monkeypatch.setattr(superpixels, "chunk_size", lambda _model, _size: 3)
        with cnn.counting() as meter:
            parts = superpixels.coalition_scores(cnn, images, torch.tensor([0, 1]), regions, shown)
        assert meter.forwards == 11 and [len(part) for part in parts] == [7, 4]
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(whole, parts, strict=True))

    def test_ridge_equals_scikit_learns(self) -> None:
        from sklearn.linear_model import Ridge

        generator = torch.Generator().manual_seed(0)
        x, y, w = (torch.rand(*shape, generator=generator) for shape in ((40, 6), (40,), (40,)))
        fitted = Ridge(alpha=0.7).fit(
            x.double().numpy(), y.double().numpy(), sample_weight=w.double().numpy()
        )
        assert superpixels.weighted_ridge(x, y, w, 0.7).numpy() == pytest.approx(fitted.coef_, abs=1e-10)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"segments": 1}, "got segments 1"),
            ({"compactness": 0.0}, "expected segments >= 2, compactness > 0"),
            ({"sigma": -1.0}, "sigma >= 0"),
            ({"fill": "segments"}, "unknown fill 'segments'; did you mean 'segment'"),
            ({"score": "logits"}, "unknown score 'logits'; did you mean 'logit'"),
            ({"n_samples": 1}, "n_samples"),
        ],
    )
    @pytest.mark.parametrize("name", ["lime", "kernel-shap"])
    def test_wrong_parameters_are_refused(
        self, name: str, params: dict[str, object], message: str, cnn: Model
    ) -> None:
        with pytest.raises(RequestError, match=message):
            explain(name, cnn, some_batch(cnn), **{"n_samples": 4, **params})


class TestLime:
    @pytest.mark.parametrize("fill", ["segment", "black", "mean"])
    def test_recovers_a_planted_linear_model(self, fill: str) -> None:
        model = make_linear()
        batch = some_batch(model)
        regions = superpixels.superpixels(batch.images, 9)
        maps = explain("lime", model, batch, n_samples=80, segments=9, penalty=0.0, fill=fill, score="logit")
        for i, planted in enumerate(effects(model, batch, regions, fill)):
            found = [float(maps[i][regions.labels[i] == region].mean()) for region in range(len(planted))]
            assert found == pytest.approx(planted, abs=1e-4 * np.abs(planted).max())

    @pytest.mark.parametrize(
        ("width", "penalty", "fill", "score"),
        [
            (0.25, 1.0, "segment", "probability"),
            (0.1, 0.3, "black", "logit"),
            (2.0, 5.0, "mean", "probability"),
        ],
    )
    def test_equals_the_slow_fit(
        self, width: float, penalty: float, fill: str, score: str, cnn: Model
    ) -> None:
        batch = some_batch(cnn)
        params = {
            "n_samples": 30, "segments": 8, "kernel_width": width, "penalty": penalty,
            "fill": fill, "score": score,
        }  # fmt: skip
        maps = explain("lime", cnn, batch, **params)
        plugin = registry.get("explainer", "lime")
        drawn = batch.with_seed_key(canonical_json(["lime", plugin.check(params)]))
        regions = superpixels.superpixels(batch.images, 8)
        for i, count in enumerate(regions.counts):
            samples = (torch.rand(30, count, generator=drawn.generator(i)) < 0.5).tolist()
            samples[0] = [True] * count
            labels, image = regions.labels[i].numpy(), batch.images[i].double().numpy()
            predict = score_of(cnn, int(batch.targets[i]), score)
            values = [predict(slow_perturbation.hidden(image, labels, sample, fill)) for sample in samples]
            expected = slow_perturbation.lime(samples, values, width, penalty)[labels]
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_captum_recovers_the_same_model(self) -> None:
        from captum._utils.models.linear_model import SkLearnLinearRegression
        from captum.attr import Lime

        model = make_linear()
        batch = some_batch(model)
        regions = superpixels.superpixels(batch.images, 6)
        maps = explain(
            "lime", model, batch, n_samples=60, segments=6, penalty=0.0, fill="black", score="logit"
        )
        with forked_random_state(0, model.device):
            library = Lime(model, interpretable_model=SkLearnLinearRegression()).attribute(
                batch.images[:1], target=0, feature_mask=regions.labels[:1], n_samples=60
            )
        assert torch.allclose(maps[0], library[0, 0], atol=1e-3 * float(maps[0].abs().max()))

    def test_defaults_are_the_authors(self) -> None:
        defaults = registry.get("explainer", "lime").parameters
        assert (defaults["n_samples"], defaults["kernel_width"], defaults["penalty"]) == (1000, 0.25, 1.0)
        assert defaults["score"] == "probability"


class TestKernelShap:
    @pytest.mark.parametrize("budget", [40, 2048])
    def test_is_exact_on_an_additive_game(self, budget: int) -> None:
        model = make_linear()
        batch = some_batch(model)
        regions = superpixels.superpixels(batch.images, 9)
        maps = explain("kernel-shap", model, batch, n_samples=budget, segments=9, fill="black")
        for i, planted in enumerate(effects(model, batch, regions, "black")):
            found = [float(maps[i][regions.labels[i] == region].mean()) for region in range(len(planted))]
            assert found == pytest.approx(planted, abs=1e-4 * np.abs(planted).max())

    @pytest.mark.parametrize("score", ["logit", "probability"])
    def test_equals_shapley_values_by_enumeration(self, score: str, cnn: Model) -> None:
        batch = some_batch(cnn)
        regions = superpixels.superpixels(batch.images, 6)
        maps = explain("kernel-shap", cnn, batch, segments=6, score=score)
        for i, count in enumerate(regions.counts):
            assert 2 <= count <= 8
            labels, image = regions.labels[i].numpy(), batch.images[i].double().numpy()
            predict = score_of(cnn, int(batch.targets[i]), score)

            def value(shown: list[bool], image=image, labels=labels, predict=predict) -> float:  # type: ignore[no-untyped-def]
                return predict(slow_perturbation.hidden(image, labels, shown, "mean"))

            expected = slow_perturbation.shapley(value, count)[labels]
            assert np.abs(maps[i].numpy() - expected).max() <= 2e-4 * np.abs(expected).max()

    def test_sampling_tends_to_the_exact_values_and_always_adds_up(self, cnn: Model) -> None:
        batch = some_batch(cnn, 1)
        regions = superpixels.superpixels(batch.images, 12)
        exact = explain("kernel-shap", cnn, batch, n_samples=2 ** regions.counts[0], segments=12)
        sizes = torch.bincount(regions.labels.flatten()).float()
        errors = []
        for budget in (40, 1000):
            maps = explain("kernel-shap", cnn, batch, n_samples=budget, segments=12)
            # A region's value stands on each of its pixels: dividing by their number adds regions up.
            assert float((maps / sizes[regions.labels]).sum()) == pytest.approx(
                float((exact / sizes[regions.labels]).sum()), rel=1e-4, abs=1e-6
            )
            errors.append(float((maps - exact).abs().mean()))
        assert errors[1] < errors[0] / 2 and errors[1] < 0.05 * float(exact.abs().mean())

    def test_captum_agrees(self, cnn: Model) -> None:
        from captum.attr import KernelShap

        batch = some_batch(cnn, 1)
        regions = superpixels.superpixels(batch.images, 5)
        maps = explain("kernel-shap", cnn, batch, segments=5, fill="black")
        with forked_random_state(0, cnn.device):
            library = KernelShap(cnn).attribute(
                batch.images, target=0, feature_mask=regions.labels, n_samples=600, perturbations_per_eval=50
            )
        assert torch.allclose(maps, library[:, 0], atol=0.05 * float(maps.abs().max()))

    @pytest.mark.parametrize(("count", "budget"), [(2, 2), (3, 6), (5, 30), (8, 254), (9, 600)])
    def test_within_budget_all_coalitions_carry_the_kernel(self, count: int, budget: int) -> None:
        coalitions, weights = coalition_plan(count, budget)
        assert len(coalitions) == 2**count - 2 == len(coalitions.unique(dim=0))
        for row, weight in zip(coalitions.sum(1).tolist(), weights.tolist(), strict=True):
            assert weight == pytest.approx((count - 1) / (math.comb(count, row) * row * (count - row)))

    @pytest.mark.parametrize(("count", "budget"), [(12, 200), (30, 500), (50, 2048), (50, 2), (7, 3)])
    def test_a_small_budget_is_kept_and_loses_no_weight(self, count: int, budget: int) -> None:
        coalitions, weights = coalition_plan(count, budget)
        assert budget - 1 <= len(coalitions) <= budget and len(weights) == len(coalitions)
        rows, complements = (sorted(part.int().tolist()) for part in (coalitions, ~coalitions))
        assert rows == complements
        sizes = coalitions.sum(1)
        assert 1 <= int(sizes.min()) and int(sizes.max()) < count
        total = sum((count - 1) / (size * (count - size)) for size in range(1, count))
        assert float(weights.sum()) == pytest.approx(total)
        if budget == 2048:  # singles and their complements are all there
            assert int((sizes == 1).sum()) >= 50 and int((sizes == 49).sum()) >= 50


def coalition_plan(count: int, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plugin's own choice of coalitions."""
    module = inspect.getmodule(registry.get("explainer", "kernel-shap").target)
    coalitions, weights = module._coalitions(count, budget, torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    return coalitions, weights
