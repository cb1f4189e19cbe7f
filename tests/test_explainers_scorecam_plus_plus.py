"""ScoreCAM++ against a slow rewrite, against numbers worked out by hand, and on planted models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch_of, explain, inside, make_cnn, make_vit
from torch import Tensor, nn

import slow_scorecam_plus_plus as slow
from faithmap import cam, perturb
from faithmap._planted import planted_batch, planted_model
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.registry import get
from faithmap.resize import upsample

NAME = "scorecam++"
READINGS: list[dict[str, Any]] = [
    {},
    *({"activation": name} for name in (*slow.GATES, "min-max") if name != "tanh"),
    {"summed": "raw"},
    {"baseline": "zero"},
    {"baseline": "zero", "summed": "raw", "space": "pixel", "stretch": True},
    {"clamp": True, "activation": "swish"},
    {"threshold": 0.2},
    {"score": "logit", "stretch": True},
]
#: Of these a transformer, whose features are signed, is tried on.
SIGNED_READINGS = [{}, {"summed": "raw"}, {"clamp": True, "activation": "swish"}, {"threshold": 0.2}]


def fresh(model: Model, images: Tensor, targets: list[int]) -> Batch:
    """A batch in which nothing is computed yet."""
    ids = tuple(f"image-{i}" for i in range(len(images)))
    return Batch(images, torch.tensor(targets), ids, Context(model, images))


class Fixed(nn.Module):
    """Features that hang on nothing; the logits are the image's mean and zero."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = Given(features)

    def forward(self, images: Tensor) -> Tensor:
        nothing = 0 * self.features(images).sum((1, 2, 3))
        return torch.stack([images.mean((1, 2, 3)) + nothing, torch.zeros(len(images))], 1)


class Given(nn.Module):
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, images: Tensor) -> Tensor:
        assert isinstance(self.features, Tensor)
        return self.features.expand(len(images), -1, -1, -1)


def fixed_model(features: list[list[list[float]]]) -> Model:
    """A white image and masks of its own size: each score is the sigmoid of a mask's mean."""
    module = Fixed(torch.tensor([features]))
    side = len(features[0])
    return Model(module, mean=0.0, std=1.0, input_size=side, target_layer="features", name="fixed")


def white(model: Model) -> Batch:
    return fresh(model, torch.ones(1, 3, *model.input_size), [0])


class TestFormula:
    @pytest.mark.parametrize(
        ("make", "params"),
        [(make_cnn, params) for params in READINGS] + [(make_vit, params) for params in SIGNED_READINGS],
        ids=lambda value: str(getattr(value, "__name__", value)),
    )
    def test_equals_the_slow_rewrite(self, make: Callable[[], Model], params: dict[str, Any]) -> None:
        model = make().double()
        # Of the small network every class: where weights are negative, some maps are empty.
        targets = list(range(5)) if model.family == "cnn" else [0]
        batch = fresh(model, batch_of(model, 1).images.expand(len(targets), -1, -1, -1), targets)
        maps = explain(NAME, model, batch, **params)

        def predict(image: slow.Array) -> slow.Array:
            with torch.no_grad():
                logits: slow.Array = model(torch.from_numpy(image)[None])[0].double().numpy()
            return logits

        rest = {key: value for key, value in params.items() if key != "space"}
        colour = np.full(3, 0.0 if params.get("space") == "pixel" else 0.5)
        features = batch.activations()[0].double().numpy()
        assert maps.shape == (len(targets), *batch.size)
        assert bool((maps > 0).any())
        for found, target in zip(maps.numpy(), targets, strict=True):
            expected = slow.scorecam_plus_plus(
                predict, batch.images[0].numpy(), features, target, colour, **rest
            )
            assert np.abs(found - expected).max() <= 2e-4 * expected.max()

    def test_by_hand(self) -> None:
        """tanh(ln 3) = 0.8 and tanh(ln 2) = 0.6: masks of means 0.2 and 0.3, and a dead one."""
        three, two = math.log(3), math.log(2)
        model = fixed_model([[[three, 0], [0, 0]], [[0, two], [two, 0]], [[0, 0], [0, 0]]])
        maps = explain(NAME, model, white(model))
        first, second = slow.sigmoid(0.2), slow.sigmoid(0.3)
        expected = torch.tensor([[[0.8 * first, 0.6 * second], [0.6 * second, 0.0]]])
        assert torch.allclose(maps, expected)
        stretched = explain(NAME, model, white(model), stretch=True)
        assert torch.allclose(stretched, expected / expected.max())
        # The code ends here; the change of confidence takes off what the blank image scores, one half.
        change = explain(NAME, model, white(model), baseline="zero")
        assert torch.allclose(
            change, torch.tensor([[[0.8 * (first - 0.5), 0.6 * (second - 0.5)], [0.6 * (second - 0.5), 0]]])
        )

    @pytest.mark.parametrize(
        ("activation", "at_ln_3", "at_zero"),
        [
            ("tanh", 0.8, 0.0),
            ("sigmoid-relu", 3 / 4, 0.5),
            ("sigmoid-relu-half", math.sqrt(3) / (1 + math.sqrt(3)), 0.5),
            ("mish", math.log(3) * 15 / 17, 0.0),  # tanh(ln(1 + 3))
            ("swish", math.log(3) * 3 / 4, 0.0),
            ("relu", math.log(3), 0.0),
            ("identity", math.log(3), 0.0),
            ("min-max", 1.0, 0.0),
        ],
    )
    def test_the_ablation_by_hand(self, activation: str, at_ln_3: float, at_zero: float) -> None:
        three = math.log(3)
        model = fixed_model([[[three, 0], [0, three]]])
        alpha = slow.sigmoid((at_ln_3 + at_zero) / 2)
        gated = explain(NAME, model, white(model), activation=activation)
        high, low = alpha * at_ln_3, alpha * at_zero
        assert torch.allclose(gated, torch.tensor([[[high, low], [low, high]]]), atol=1e-6)
        # Gated masks, features summed as they are: what the paper calls normalisation only.
        raw = explain(NAME, model, white(model), activation=activation, summed="raw")
        assert torch.allclose(raw, torch.tensor([[[alpha * three, 0], [0, alpha * three]]]), atol=1e-6)

    def test_saturated_gates_leave_a_bright_map_and_the_stretch_takes_its_floor_off(self) -> None:
        """Features of 3 and 4 are far apart; behind tanh they are 0.5% apart."""
        model = fixed_model([[[4.0, 3.0], [3.0, 3.0]]])
        plain = explain(NAME, model, white(model))
        assert float(plain.min()) > 0.99 * float(plain.max())
        assert explain(NAME, model, white(model), stretch=True).tolist() == [[[1.0, 0.0], [0.0, 0.0]]]

    def test_threshold_and_clamp(self) -> None:
        model = fixed_model([[[math.log(3), math.log(2)], [-math.log(2), 0.0]]])
        signed = explain(NAME, model, white(model))
        assert torch.allclose(signed, slow.sigmoid(0.2) * torch.tensor([[[0.8, 0.6], [0.0, 0.0]]]))
        clamped = explain(NAME, model, white(model), clamp=True)
        assert torch.allclose(clamped, slow.sigmoid(0.35) * torch.tensor([[[0.8, 0.6], [0.0, 0.0]]]))
        cut = explain(NAME, model, white(model), threshold=0.7)
        assert torch.allclose(cut, slow.sigmoid(0.2) * torch.tensor([[[0.8, 0.0], [0.0, 0.0]]]))

    def test_one_relu_at_the_end(self) -> None:
        """A ReLU on every term would keep the half of the first channel that the second outweighs."""
        model = fixed_model([[[1.0, 0.0], [0.0, 0.0]], [[-3.0, 0.0], [0.0, 1.0]]])
        maps = explain(NAME, model, white(model))
        assert float(maps[0, 0, 0]) == 0
        assert float(maps[0, 1, 1]) > 0

    def test_is_score_cams_official_reading_with_its_gate_and_its_sum(self, cnn: Model) -> None:
        """Score-CAM's authors: min-max masks, probabilities, no softmax over channels, features summed."""
        batch = batch_of(cnn, 2)
        official = explain(
            "scorecam", cnn, batch, score="probability", channel_softmax=False, space="normalised"
        )
        ours = explain(NAME, cnn, batch, activation="min-max", summed="raw")
        assert torch.allclose(ours, upsample(official, batch.size), rtol=1e-4, atol=1e-6)


class TestDeadChannels:
    """Masks that are the same everywhere only dim the image."""

    @staticmethod
    def killed(cnn: Model, channels: int, bias: float = -1.0) -> None:
        with torch.no_grad():
            for channel in range(channels):
                cnn.module.body[0].weight[channel] = 0
                cnn.module.body[0].bias[channel] = bias

    @staticmethod
    def passes(cnn: Model, **params: Any) -> tuple[int, int]:
        """Images passed, and channels whose features are not constant; features and logits are there."""
        batch = batch_of(cnn, 3)
        alive = int((~cam.constant_channels(batch.activations())).sum())
        with cnn.counting() as meter:
            explain(NAME, cnn, batch, **params)
        return meter.forwards, alive

    def test_black_masks_cost_one_forward_in_all(self, cnn: Model) -> None:
        self.killed(cnn, 4)
        found, alive = self.passes(cnn)
        assert found == alive + 1

    def test_dim_masks_cost_one_forward_an_image(self, cnn: Model) -> None:
        self.killed(cnn, 4)
        found, alive = self.passes(cnn, activation="sigmoid-relu")
        assert found == alive + 3

    def test_different_constants_are_not_taken_for_each_other(self, cnn: Model) -> None:
        self.killed(cnn, 3, bias=0.5)
        with torch.no_grad():
            cnn.module.body[0].bias[2] = 0.25
        found, alive = self.passes(cnn)
        assert found == alive + 2 * 3

    def test_saturated_channels_are_dead_as_well(self) -> None:
        """In single precision the tanh of 20 and of 30 is 1: the mask shows the whole image."""
        model = fixed_model(
            [[[20.0, 30.0], [30.0, 20.0]], [[1.0, 0.0], [0.0, 0.0]], [[40.0, 50.0], [50.0, 50.0]]]
        )
        batch = white(model)
        _ = batch.logits
        with model.counting() as meter:
            maps = explain(NAME, model, batch)
        assert meter.forwards == 2
        whole, spot = slow.sigmoid(1.0), slow.sigmoid(math.tanh(1) / 4)
        expected = torch.full((1, 2, 2), 2 * whole)
        expected[0, 0, 0] += spot * math.tanh(1)
        assert torch.allclose(maps, expected)

    def test_what_falls_somewhere_is_not_judged_by_its_ends(self) -> None:
        """Swish of -2.4 and of about -0.53 are equal; what upsampling puts between is not."""
        inner = inside(NAME)
        low = torch.tensor(-2.4)
        ends = torch.stack([low, low]).view(1, 1, 1, 2).clone()
        grid = torch.linspace(-0.9, -0.2, 200001)
        ends[..., 1] = grid[(nn.functional.silu(grid) - nn.functional.silu(low)).abs().argmin()]
        gate = inner._gate("relu", False, 0.0)
        assert inner._constant(ends, gate, "relu", rising=False).tolist() == [[0.0]]
        flat: Callable[[Tensor], Tensor] = torch.zeros_like
        assert inner._constant(ends, flat, "swish", rising=False).isnan().all()
        assert inner._constant(ends, flat, "swish", rising=True).tolist() == [[0.0]]

    @pytest.mark.parametrize("bias", [-1.0, 1.0])
    @pytest.mark.parametrize("summed", ["gated", "raw"])
    def test_nothing_but_dead_channels_gives_a_flat_map(self, cnn: Model, bias: float, summed: str) -> None:
        self.killed(cnn, 6, bias)
        maps = explain(NAME, cnn, batch_of(cnn, 2), summed=summed)
        assert bool((maps.amax((1, 2)) - maps.amin((1, 2)) <= 1e-6 * maps.amax((1, 2))).all())
        assert bool((maps == 0).all()) == (bias < 0)
        assert bool((explain(NAME, cnn, batch_of(cnn, 2), summed=summed, stretch=True) == 0).all())

    def test_a_transformer_of_which_every_channel_is_dead(self, vit: Model) -> None:
        """No chunk without an image is passed, which a transformer would refuse."""
        nn.init.zeros_(vit.module.blocks[-1].norm1.weight)
        for name in (NAME, "scorecam"):
            assert bool((explain(name, vit, batch_of(vit, 1)).std() == 0).all())


class TestManners:
    @pytest.mark.parametrize("params", [{}, {"activation": "sigmoid-relu"}, {"summed": "raw"}], ids=str)
    def test_an_image_has_the_same_map_in_any_company(self, params: dict[str, Any], model: Model) -> None:
        batch = batch_of(model, 3)
        maps = explain(NAME, model, batch, **params)
        for i in range(3):
            assert torch.allclose(explain(NAME, model, batch.select([i]), **params)[0], maps[i], atol=1e-4)

    @pytest.mark.parametrize("chunk", [5, 64])
    def test_chunks_do_not_change_the_map(
        self, chunk: int, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = batch_of(model, 2)
        whole = explain(NAME, model, batch)
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        monkeypatch.setattr(cam, "chunk_size", lambda _model: chunk)
        maps = explain(NAME, model, batch)
        assert max(sizes) <= chunk
        assert torch.allclose(maps, whole, atol=1e-4)

    def test_declared_passes_are_a_bound(self, model: Model) -> None:
        facts = get("explainer", NAME).facts
        for params in ({}, {"baseline": "zero"}):
            with model.counting() as meter:
                explain(NAME, model, batch_of(model, 1), **params)
            assert callable(facts.forwards)
            assert meter.forwards <= facts.forwards(model, params)

    def test_masked_images_lie_as_the_model_likes_them(self, cnn: Model) -> None:
        orders: list[bool] = []
        cnn.module.register_forward_pre_hook(
            lambda _module, inputs: orders.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        batch = batch_of(cnn, 2)
        _ = batch.activations()
        orders.clear()
        explain(NAME, cnn, batch)
        liked = perturb.laid_out(cnn, torch.zeros(2, 3, 8, 8)).is_contiguous(
            memory_format=torch.channels_last
        )
        assert orders and all(order == liked for order in orders)

    @pytest.mark.parametrize(
        ("params", "words"),
        [
            ({"activation": "tan"}, "unknown activation 'tan'; did you mean 'tanh'"),
            ({"summed": "gate"}, "unknown summed 'gate'; did you mean 'gated'"),
            ({"baseline": "blank"}, "unknown baseline 'blank'; known are: none, zero"),
            ({"score": "probabilty"}, "did you mean 'probability'"),
            ({"space": "normalized"}, "did you mean 'normalised'"),
            ({"threshold": -0.5}, "threshold is -0.5; expected 0"),
            ({"threshold": float("inf")}, "threshold is inf; expected 0"),
            ({"threshold": float("nan")}, "parameter 'threshold': got nan, which is no number"),
        ],
    )
    def test_wrong_choices(self, params: dict[str, Any], words: str, cnn: Model) -> None:
        with pytest.raises(RequestError, match=words):
            explain(NAME, cnn, batch_of(cnn, 1), **params)


class Tagged(nn.Module):
    """Sees bright things in one channel and red tags in another; the class hangs on the tag alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def forward(self, images: Tensor) -> Tensor:
        features = self.seen(images)
        tag = features[:, 1].mean((1, 2))
        return torch.stack([300 * tag - 8, torch.zeros_like(tag)], 1)


class Seen(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.unbind(1)
        bright = 3 * images.amin(1)
        tag = 3 * (red - 2 * torch.maximum(green, blue)).clamp_min(0)
        return nn.functional.avg_pool2d(torch.stack([bright, tag], 1), 4)


class TestPlanted:
    def test_it_finds_the_tag_that_a_model_relies_on(self) -> None:
        """The object is large and lights up more; the answer is the tag in the corner."""
        images = torch.full((1, 3, 32, 32), 0.2)
        images[:, :, 10:26, 10:26] = 0.9
        images[0, :, 4:8, 4:8] = torch.tensor([0.9, 0.0, 0.0]).view(3, 1, 1)
        model = Model(Tagged(), mean=0.0, std=1.0, input_size=32, target_layer="seen", name="tagged")
        tag = torch.zeros(1, 32, 32, dtype=torch.bool)
        tag[:, 4:8, 4:8] = True
        batch = fresh(model, images, [0])
        for params in ({}, {"baseline": "zero"}, {"baseline": "zero", "activation": "min-max"}):
            maps = explain(NAME, model, batch, **params)
            assert bool(tag[0].flatten()[maps[0].argmax()])
            assert float(maps[tag].mean()) > 5 * float(maps[:, 10:26, 10:26].mean())

    def test_it_finds_the_coloured_patch(self) -> None:
        model = planted_model()
        batch = planted_batch(model)
        maps = explain(NAME, model, batch)
        assert batch.masks is not None
        for i in range(len(batch)):
            assert bool(batch.masks[i].flatten()[maps[i].argmax()])
            energy = maps[i][batch.masks[i]].sum() / maps[i].sum()
            assert energy > 2 * batch.masks[i].float().mean()
