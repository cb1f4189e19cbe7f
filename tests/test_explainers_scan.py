"""SCAN and its controls: training, checkpoints, what a fit returns, maps, and what is noted of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import explain, inside, make_batch, make_vit
from torch import Tensor, nn

import slow_scan
from faithmap import gradient_masks, registry, seen_features
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import FaithmapError, RequestError
from faithmap.explaining import bind, explain_batch
from faithmap.models import Model
from faithmap.reconstruction import blurred_target, confidence_of
from faithmap.scoring import Heading, rows_of, score_maps, use_metric


@dataclass
class Data:
    """Images and labels in memory; the order is a function of the seed and the epoch."""

    images: Tensor
    labels: Tensor
    seed: int = 0
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int, *, drop_last: bool = False) -> int:
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self, batch_size: int, epoch: int, *, drop_last: bool = True, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append(epoch)
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self), generator=generator)
        for part in order.split(batch_size)[start:]:
            if len(part) == batch_size or not drop_last:
                yield self.images[part], self.labels[part]


class KilledError(Exception):
    pass


@dataclass
class Session:
    """Keeps the state after each step, and may be killed after one."""

    seed: int = 0
    precision: str = "fp32"
    kept: dict[str, Any] | None = None
    dies_after: int | None = None
    curve: dict[int, dict[str, float]] = field(default_factory=dict)

    def resume(self) -> dict[str, Any] | None:
        return self.kept

    def checkpoint(self, make_state: Callable[[], dict[str, Any]]) -> None:
        self.kept = make_state()
        if self.dies_after is not None and len(self.curve) >= self.dies_after:
            raise KilledError

    def report(self, step: int, steps: int, values: dict[str, float]) -> None:
        assert 1 <= step <= steps
        self.curve[step] = values


def make_data(model: Model, count: int = 10, seed: int = 2) -> Data:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *model.input_size, generator=generator)
    return Data(images, torch.randint(0, model.num_classes, (count,), generator=generator))


def make_scan(**params: Any) -> Any:
    plugin = registry.get("explainer", "scan")
    return plugin.make(plugin.check({"width": 0.125, **params}))


def fitted(model: Model, **params: Any) -> Any:
    scan = make_scan(**params)
    scan.load(model, scan.fit(model, make_data(model), Session(), epochs=1, batch_size=4))
    return scan


def curve_of(session: Session) -> np.ndarray:
    return np.array([list(session.curve[step].values()) for step in sorted(session.curve)])


class TestFit:
    @pytest.mark.parametrize("mask", gradient_masks.MASKS)
    def test_a_kill_and_a_resumption_change_nothing(self, model: Model, mask: str) -> None:
        settings = {"epochs": 2, "batch_size": 4}
        data, whole = make_data(model), Session()
        expected = make_scan(mask=mask).fit(model, data, whole, **settings)
        assert sorted(whole.curve) == [1, 2, 3, 4]
        first = Session(dies_after=3)  # in the middle of the second epoch
        with pytest.raises(KilledError):
            make_scan(mask=mask).fit(model, data, first, **settings)
        second = Session(kept=copy.deepcopy(first.kept))
        found = make_scan(mask=mask).fit(model, data, second, **settings)
        assert sorted(first.curve) == [1, 2, 3] and sorted(second.curve) == [4]
        joined = Session(curve={**first.curve, **second.curve})
        assert curve_of(joined) == pytest.approx(curve_of(whole), abs=1e-6)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)

    def test_what_is_returned_can_be_stored(self, model: Model, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = make_scan().fit(model, make_data(model), Session(), epochs=1, batch_size=4)
        save_file(tensors, tmp_path / "decoder.safetensors")
        assert all(value.dtype == torch.float32 for value in tensors.values())
        scan = make_scan()
        scan.load(model, load_file(tmp_path / "decoder.safetensors"))
        assert scan(model, make_batch(model, 1)).shape == (1, 32, 32)

    def test_another_seed_is_another_curve(self, cnn: Model) -> None:
        curves = []
        for seed in (0, 0, 1):
            session = Session(seed=seed)
            make_scan().fit(cnn, make_data(cnn), session, epochs=1, batch_size=4)
            curves.append(curve_of(session))
        assert np.array_equal(curves[0], curves[1]) and not np.allclose(curves[0], curves[2])

    def test_it_learns(self, cnn: Model) -> None:
        """Plain images of one colour: the error falls, and the confident area goes to its target."""
        colours = torch.rand(32, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        data, session = Data(colours.expand(-1, 3, 32, 32).contiguous(), torch.zeros(32).long()), Session()
        make_scan(width=0.25, mask="none").fit(cnn, data, session, epochs=12, batch_size=8, rate=3e-3)
        losses = [session.curve[step]["loss"] for step in sorted(session.curve)]
        assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:2])
        last = session.curve[max(session.curve)]
        assert last["area"] == pytest.approx(0.2) and abs(last["confidence"] - 0.2) < 0.12

    def test_the_model_and_the_global_state_are_as_before(self, model: Model) -> None:
        first = next(model.parameters()).requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(3)
        state = torch.get_rng_state()
        with torch.no_grad():
            make_scan().fit(model, make_data(model, 4), Session(), epochs=1, batch_size=4)
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()].count(False) == 1 and not first.requires_grad
        assert not any(module._forward_hooks or module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize(("kept", "passes"), [(True, 4), (False, 8)])
    def test_one_pass_of_the_model_each_way_for_an_image(
        self, model: Model, kept: bool, passes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a CPU what it gives is kept; else an epoch takes another."""
        monkeypatch.setattr(seen_features.SeenFeatures, "pays", lambda *_: kept)
        with model.counting() as meter:
            make_scan().fit(model, make_data(model, 4), Session(), epochs=2, batch_size=4)
        assert (meter.forwards, meter.backwards) == (passes, passes)

    @pytest.mark.parametrize("mask", ["gradient", "none"])
    def test_what_is_kept_is_what_is_computed_anew(self, model: Model, mask: str) -> None:
        """Image by image, in any company, and once alone."""
        module, data = inside("scan"), make_data(model, 5)
        training = module._Training(make_scan(mask=mask), model, 0, "fp32")
        training.keep_features(5, 2)
        assert training.seen is not None
        for chosen in ([0, 1, 2], [4, 2, 3, 0]):
            images, labels = data.images[chosen], data.labels[chosen]
            kept, anew = training.seen.get(images, labels), training._features(images, labels)
            assert torch.allclose(kept[0], anew[0], atol=1e-5)
            assert (kept[1] is None) == (anew[1] is None) == (mask == "none")
            if kept[1] is not None and anew[1] is not None:
                assert torch.allclose(kept[1], anew[1], atol=1e-5)
        with model.counting() as meter:
            again = training.seen.get(data.images[:3], data.labels[:3])
        assert meter.forwards == 0 and torch.equal(
            again[0], training.seen.get(data.images, data.labels)[0][:3]
        )

    def test_it_pays_where_it_is_used_again_and_fits(self, model: Model) -> None:
        layout = gradient_masks.layout_of(model)
        pays = seen_features.SeenFeatures.pays
        assert pays(model, layout, 1000, 2)
        assert not pays(model, layout, 1000, 1) and not pays(model, layout, 10**7, 2)

    def test_steps_in_all(self, cnn: Model) -> None:
        sessions = {steps: Session() for steps in (3, 5)}
        for steps, session in sessions.items():
            make_scan().fit(cnn, make_data(cnn), session, epochs=99, steps=steps, batch_size=4)
        assert [sorted(session.curve) for session in sessions.values()] == [[1, 2, 3], [1, 2, 3, 4, 5]]
        with pytest.raises(RequestError, match="expected one or more of the first three, 0 or more steps"):
            make_scan().fit(cnn, make_data(cnn), Session(), steps=-1)

    def test_labels_of_other_classes_are_refused(self, cnn: Model) -> None:
        data = make_data(cnn, 80)
        predicted = cnn(data.images).argmax(1)
        wrong = Data(data.images, (predicted + 1) % cnn.num_classes)
        with pytest.raises(
            RequestError, match=r"of the first \d+ labelled images .* predicts the label of 0"
        ):
            make_scan().fit(cnn, wrong, Session(), epochs=1, batch_size=16)
        make_scan(training_class="predicted").fit(cnn, wrong, Session(), epochs=1, batch_size=16)
        make_scan().fit(cnn, Data(data.images, predicted), Session(), epochs=1, batch_size=16)

    def test_labels_that_are_missing_are_predicted(self, cnn: Model) -> None:
        data = make_data(cnn)
        with torch.no_grad():
            predicted = cnn(data.images).argmax(1)
        curves = []
        for labels, training_class in (
            (torch.full((10,), -1), "label"), (predicted, "label"), (data.labels, "predicted"),
            (data.labels, "label"),
        ):  # fmt: skip
            session = Session()
            scan = make_scan(training_class=training_class)
            scan.fit(cnn, Data(data.images, labels), session, epochs=1, batch_size=4)
            curves.append(curve_of(session))
        assert np.array_equal(curves[0], curves[1]) and np.array_equal(curves[0], curves[2])
        assert not np.array_equal(curves[0], curves[3])

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("alpha", 8.0), ("flexibility", 0.5), ("lowest_percentile", 0.0), ("stretch", 1.5),
            ("squash", "sigmoid"), ("blur", 0.0), ("weighting", "discounted"), ("scalar", "probability"),
            ("mask", "positive"), ("layer", "stem"),
        ],
    )  # fmt: skip
    def test_what_training_depends_on(self, cnn: Model, name: str, value: Any) -> None:
        sessions = [Session(), Session()]
        for session, params in zip(sessions, ({}, {name: value}), strict=True):
            make_scan(**params).fit(cnn, make_data(cnn), session, epochs=1, batch_size=4)
        assert name in set(inside("scan").FIT_PARAMS)
        assert not np.allclose(curve_of(sessions[0]), curve_of(sessions[1]))

    def test_and_on_what_not(self, cnn: Model) -> None:
        plugin = registry.get("explainer", "scan")
        assert set(plugin.parameters) - set(inside("scan").FIT_PARAMS) == {"percentile", "output", "fitted"}
        sessions = [Session(), Session()]
        for session, params in zip(sessions, ({}, {"percentile": 80.0, "output": "error"}), strict=True):
            make_scan(**params).fit(cnn, make_data(cnn), session, epochs=1, batch_size=4)
        assert np.array_equal(curve_of(sessions[0]), curve_of(sessions[1]))

    def test_the_constant_rate_and_the_cosine(self, cnn: Model) -> None:
        for schedule, expected in (
            ("constant", [1e-3] * 4),
            ("cosine", [1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]),
        ):
            session = Session()
            make_scan().fit(cnn, make_data(cnn), session, epochs=2, batch_size=4, schedule=schedule)
            assert [session.curve[k]["rate"] for k in (1, 2, 3, 4)] == pytest.approx(expected)

    def test_fewer_images_than_a_batch(self, cnn: Model) -> None:
        session = Session()
        make_scan().fit(cnn, make_data(cnn, 3), session, epochs=3, batch_size=4)
        assert sorted(session.curve) == [1, 2, 3]

    def test_in_bf16(self, model: Model) -> None:
        session = Session(precision="bf16")
        tensors = make_scan().fit(model, make_data(model), session, epochs=1, batch_size=4)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())

    def test_unmasked_images_are_counted(self, cnn: Model) -> None:
        cnn.module.head.weight.data = -cnn.module.head.weight.data.abs()
        session = Session()
        make_scan().fit(cnn, make_data(cnn), session, epochs=1, batch_size=4)
        assert [values["unmasked"] for values in session.curve.values()] == [4, 4]

    def test_wrong_requests_are_named(self, cnn: Model) -> None:
        data = make_data(cnn)
        with pytest.raises(RequestError, match="got 10 images, epochs 0, batch_size 4"):
            make_scan().fit(cnn, data, Session(), epochs=0, batch_size=4)
        with pytest.raises(RequestError, match="schedule: got 'cosin'; did you mean 'cosine'"):
            make_scan().fit(cnn, data, Session(), schedule="cosin")
        with pytest.raises(RequestError, match="an image has label 7, and model 'tiny-cnn' knows 5 classes"):
            make_scan().fit(cnn, Data(data.images, torch.full((10,), 7)), Session(), batch_size=4)
        data.images[3] = torch.nan
        with pytest.raises(FaithmapError, match="the loss is nan at step"):
            make_scan(mask="none").fit(cnn, data, Session(), batch_size=4)

    def test_batches_that_cannot_be_read_are_left_out(self, cnn: Model) -> None:
        class Short(Data):
            def batches(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
                yield next(super().batches(*args, **kwargs))

        data, session = make_data(cnn), Session()
        make_scan().fit(cnn, Short(data.images, data.labels), session, epochs=2, batch_size=4)
        assert sorted(session.curve) == [1, 3]


class TestMaps:
    @pytest.mark.parametrize("mask", gradient_masks.MASKS)
    def test_shape_range_and_cost(self, model: Model, mask: str) -> None:
        scan = fitted(model, mask=mask)
        batch = make_batch(model, 3).select(range(3))
        facts = registry.get("explainer", "scan").facts
        with model.counting() as meter:
            maps = scan(model, batch)
        assert maps.shape == (3, 32, 32) and 0 <= float(maps.min()) < float(maps.max()) <= 1
        assert meter.forwards == 3 * facts.forwards
        assert meter.backwards == 3 * facts.backwards(model, {"mask": mask})

    def test_a_batch_equals_single_images(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 4)
        maps = scan(model, batch)
        for i in range(4):
            assert torch.allclose(scan(model, batch.select([i]))[0], maps[i], atol=1e-4)

    def test_equals_its_parts(self, cnn: Model) -> None:
        scan, batch = fitted(cnn, percentile=80.0, stretch=1.5), make_batch(cnn, 2)
        kept = [slow_scan.mask(gradient.double().numpy(), 80.0) for gradient in batch.gradients()]
        given = batch.activations() * torch.tensor(np.array(kept)).float()
        with torch.no_grad():
            decoded = scan._decoder(given, (8, 8))
        assert torch.allclose(scan(cnn, batch), confidence_of(decoded[:, 0], stretch=1.5), atol=1e-5)
        assert torch.allclose(scan.reconstruct(cnn, batch), ((decoded[:, 1:] + 1) / 2).clamp(0, 1), atol=1e-5)
        scan.output = "error"
        errors = (blurred_target(batch.images, (8, 8)) - decoded[:, 1:]).abs().mean(1)
        assert torch.allclose(scan(cnn, batch), errors, atol=1e-5)

    def test_the_percentile_and_the_class_matter(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 2)
        maps = scan(model, batch)
        scan.percentile = 0.0
        assert not torch.allclose(scan(model, batch), maps, atol=1e-3)
        scan.percentile, others = 95.0, copy.copy(batch)
        object.__setattr__(others, "targets", (batch.targets + 1) % 5)
        assert not torch.allclose(scan(model, others), maps, atol=1e-4)

    def test_the_random_mask_is_seeded_by_the_image(self, cnn: Model) -> None:
        scan, batch = fitted(cnn, mask="random"), make_batch(cnn, 3)
        maps = scan(cnn, batch)
        assert torch.equal(scan(cnn, batch), maps)
        assert torch.allclose(scan(cnn, batch.select([2, 0])), maps[[2, 0]], atol=1e-5)

    def test_halves_of_the_stored_precision_load(self, model: Model) -> None:
        scan, batch = make_scan(), make_batch(model, 2)
        tensors = scan.fit(model, make_data(model), Session(), epochs=1, batch_size=4)
        scan.load(model, tensors)
        maps = scan(model, batch)
        scan.load(model, {name: value.half() for name, value in tensors.items()})
        assert torch.allclose(scan(model, batch), maps, atol=0.02)
        assert not any(parameter.requires_grad for parameter in scan._decoder.parameters())
        assert not any(module.training for module in scan._decoder.modules())

    def test_images_that_are_not_square(self, cnn: Model) -> None:
        scan = fitted(cnn)
        images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
        batch = Batch(images, torch.tensor([0, 1]), ("a", "b"), Context(cnn, images))
        assert scan(cnn, batch).shape == (2, 48, 32)

    def test_in_bf16(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 2)
        model.precision = "bf16"
        maps = scan(model, batch.select([0, 1]))
        assert maps.dtype == torch.float32 and bool(torch.isfinite(maps).all())

    def test_without_a_decoder(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="faithmap train scan --model tiny-cnn --dataset DATASET"):
            make_scan()(cnn, make_batch(cnn, 1))

    def test_a_decoder_of_another_model(self, cnn: Model) -> None:
        tensors = make_scan().fit(cnn, make_data(cnn), Session(), epochs=1, batch_size=4)
        for scan, model in (
            (make_scan(width=0.25), cnn),
            (make_scan(), make_vit()),
            (make_scan(layer="stem"), cnn),
        ):
            with pytest.raises(RequestError, match="these tensors are no decoder of width"):
                scan.load(model, tensors)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"alpha": 0.0}, "alpha: got 0, expected above 0"),
            ({"percentile": 101.0}, "percentile: got 101, expected 0 or more, up to 100"),
            ({"lowest_percentile": -1.0}, "lowest_percentile: got -1"),
            ({"width": 0.0}, "width: got 0, expected above 0, up to 8"),
            ({"flexibility": -0.1}, "flexibility: got -0.1"),
            ({"blur": -1.0}, "blur: got -1"),
            ({"stretch": -1.0}, "stretch: got -1"),
            ({"weighting": "confident"}, "weighting: got 'confident'"),
            ({"mask": "gradients"}, "did you mean 'gradient'"),
            ({"output": "errors"}, "output: got 'errors'; did you mean 'error'"),
            ({"scalar": "softmax"}, "scalar: got 'softmax'"),
            ({"squash": "sin"}, "squash: got 'sin'"),
            ({"training_class": "truth"}, "training_class: got 'truth'"),
        ],
    )  # fmt: skip
    def test_wrong_parameters_are_named(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            make_scan(**params)

    def test_models_whose_grid_does_not_fit(self, cnn: Model) -> None:
        facts = registry.get("explainer", "scan").facts
        odd = Model(cnn.module, mean=0.5, std=0.5, input_size=30)
        assert facts.defined_for is not None and facts.defined_for(cnn) is None
        assert "power of two" in str(facts.defined_for(odd))


class Redness(nn.Module):
    """Two features, redness and brightness by cell; class 1 is the red there is, class 0 the light."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.AvgPool2d(4), nn.Linear(2, 2)
        self.head.weight.data = torch.tensor([[0.0, 8.0], [8.0, 0.0]])
        self.head.bias.data.zero_()

    def forward(self, images: Tensor) -> Tensor:
        red = (images[:, 0] - images[:, 1:].mean(1)).relu()
        logits: Tensor = self.head(self.body(torch.stack([red, images.mean(1)], 1)).mean((2, 3)))
        return logits


def with_a_red_patch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Plain grey images, each of another grey, with one red patch; and where the patch is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 1, 1, generator=generator).expand(-1, 3, 32, 32)
    patches = torch.zeros(count, 32, 32, dtype=torch.bool)
    for i, (y, x) in enumerate(4 * torch.randint(0, 6, (count, 2), generator=generator)):
        patches[i, y : y + 12, x : x + 12] = True
    return torch.where(patches[:, None], torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1), images), patches


@pytest.mark.slow
@pytest.mark.parametrize(("weighting", "found"), [("amplified", True), ("discounted", False)])
def test_what_the_class_rests_on_can_be_reconstructed_and_the_rest_not(weighting: str, found: bool) -> None:
    """The masked features tell the red patch and nothing of the grey around it.

    Eq. 9a makes the decoder confident where it errs little, on the patch, and of less than the target
    area; 9b where it errs much, around it, and of more.
    """
    model = Model(Redness(), mean=0.0, std=1.0, input_size=32, name="redness", target_layer="body")
    scan, session = make_scan(width=0.25, blur=0.5, weighting=weighting), Session()
    images = with_a_red_patch(1600, 0)[0]
    labels = torch.ones(1600, dtype=torch.long)
    fit = scan.fit(model, Data(images, labels), session, epochs=1, batch_size=16, rate=5e-3)
    scan.load(model, fit)
    images, patches = with_a_red_patch(16, 1)
    batch = Batch(images, labels[:16], tuple(f"image-{i}" for i in range(16)), Context(model, images))
    maps = scan(model, batch)
    inside_patch, around = float(maps[patches].mean()), float(maps[~patches].mean())
    if found:
        assert inside_patch > 0.6 and around < 0.2
    else:
        assert inside_patch < 0.2 and around > inside_patch + 0.1
    assert (session.curve[100]["confidence"] < 0.2) == found
    scan.output = "error"
    errors = scan(model, batch)
    assert float(errors[patches].mean()) < 0.7 * float(errors[~patches].mean())


class TestNotes:
    def test_an_image_without_positive_gradients_is_noted(self, cnn: Model) -> None:
        """Class 0 has negative weights alone: nothing speaks for it, and nothing is masked."""
        cnn.module.head.weight.data[0] = -1.0
        batch = make_batch(cnn, 3)
        object.__setattr__(batch, "targets", torch.tensor([1, 0, 2]))
        scan = fitted(cnn)
        for call in (scan, bind(registry.get("explainer", "masked-features"), {})):
            found = explain_batch(call, cnn, batch)
            assert found.status == ["ok"] * 3
            assert found.reasons == ["", gradient_masks.UNMASKED, ""]
        assert batch.notes == {}  # each explainer's notes are its own

    def test_rows_carry_the_note(self, cnn: Model) -> None:
        from faithmap.config import Spec

        cnn.module.head.weight.data[:] = -cnn.module.head.weight.data.abs()
        batch = make_batch(cnn, 2)
        found = explain_batch(bind(registry.get("explainer", "masked-features"), {}), cnn, batch)
        use = use_metric(Spec("perturbation", {}))
        rows = rows_of(
            Heading("m", "d", "e", "{}", "model", 0), use, batch, score_maps(use, cnn, batch, found)
        )
        assert {row.status for row in rows} == {"ok"} and {row.reason for row in rows} == {
            gradient_masks.UNMASKED
        }

    def test_two_notes_of_an_image_and_its_selection(self, cnn: Model) -> None:
        batch = make_batch(cnn, 2)
        batch.note(torch.tensor([True, False]), "one")
        batch.note(torch.tensor([True, True]), "two")
        assert batch.notes == {0: "one; two", 1: "two"}
        assert batch.select([1]).notes == {}


class TestControls:
    def test_masked_features_of_a_cnn(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3)
        maps = explain("masked-features", cnn, batch, percentile=80.0)
        for i in range(3):
            pair = (tensor[i].double().numpy() for tensor in (batch.activations(), batch.gradients()))
            assert maps[i].numpy() == pytest.approx(slow_scan.masked_mean(*pair, 80.0), abs=1e-6)

    def test_masked_features_of_a_transformer(self, vit: Model) -> None:
        batch = make_batch(vit, 2)
        name = gradient_masks.analysed_layer(vit)
        maps = explain("masked-features", vit, batch)
        for i in range(2):
            values, gradients = (
                tensor[i].double().numpy()
                for tensor in (
                    batch.context.outputs(name),
                    batch.context.output_gradients(batch.targets, name),
                )
            )
            expected = (values * slow_scan.mask(gradients, 95.0)).mean(1)[1:].reshape(8, 8)
            assert maps[i].numpy() == pytest.approx(expected, abs=1e-6)

    def test_scan_untrained_is_scan_with_seeded_weights(self, model: Model) -> None:
        from faithmap.batch import seed_of
        from faithmap.decoders import seeded_decoder

        batch = make_batch(model, 2)
        maps = explain("scan-untrained", model, batch, width=0.125, seed=4)
        scan = make_scan()
        decoder = seeded_decoder(
            gradient_masks.layout_of(model), 0.125, seed_of(4, "scan", "weights"), torch.device("cpu")
        )
        scan.load(
            model, {name: value for name, value in decoder.state_dict().items() if value.is_floating_point()}
        )
        assert torch.allclose(maps, scan(model, batch), atol=1e-6)
        assert not torch.allclose(maps, explain("scan-untrained", model, batch, width=0.125), atol=1e-3)

    def test_roles(self) -> None:
        roles = [
            registry.get("explainer", name).facts.role
            for name in ("scan", "masked-features", "scan-untrained")
        ]
        assert roles == ["method", "control", "control"]
