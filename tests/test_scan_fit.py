"""How SCAN's decoder learns: the curve, checkpoints, what a fit returns, and what can be learnt at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import inside, make_batch
from scan_fits import Data, KilledError, Session, curve_of, make_data, make_scan
from torch import Tensor, nn

from faithmap import fitting, gradient_masks, registry, seen_features, training
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.decoder_training import DecoderTraining
from faithmap.errors import FaithmapError, RequestError
from faithmap.models import Model, load_model


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
        data = make_data(model, 5)
        training = DecoderTraining(make_scan(mask=mask), model, 0, "fp32")
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

    def test_a_number_of_steps_leaves_no_trace_of_epochs(self) -> None:
        """They would tell two fits apart that are one, and say nothing true of either in its record."""
        scan = registry.get("explainer", "scan")
        one, other = (training.fit_options(scan, {"steps": 7, "epochs": n}) for n in (3, 5))
        assert one == other and "epochs" not in one and one["steps"] == 7
        assert training.fit_options(scan, {"epochs": 3})["epochs"] == 3

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


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [("shapes/resnet", "stage:-1", "stage:-2"), ("shapes/vit", "block:6/12", "block:9/12")],
)
def test_a_decoder_serves_whoever_spells_out_the_defaults(name: str, own: str, other: str) -> None:
    """The decoder that ships for a model, by its width and its layer's names, and nothing else by them."""
    model, scan = load_model(name), registry.get("explainer", "scan")
    shipped = fitting.find(scan, scan.check({}), model)
    assert shipped is not None
    dotted = gradient_masks.layout_of(model).layer
    for same in ({"width": 0.25}, {"layer": own}, {"layer": dotted}, {"layer": dotted, "width": 0.25}):
        assert fitting.find(scan, scan.check(same), model) == shipped, same
    for different in ({"width": 0.5}, {"layer": other}, {"width": 0.25, "layer": other}):
        assert fitting.find(scan, scan.check(different), model) is None, different
    # A transformer's decoder has no skips to leave out.
    bare = fitting.find(scan, scan.check({"skips": False}), model)
    assert bare == (shipped if name == "shapes/vit" else None)
    # Where there is no such layer, the key says so little as before: the message comes with the decoder.
    assert scan.make({"layer": "nowhere", "width": 0.25}).as_default(model) == set()


class Redness(nn.Module):
    """Two features, redness and brightness by cell; class 1 is the red there is, class 0 the light."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.AvgPool2d(4), nn.Linear(2, 2)
        self.head.weight.data = torch.tensor([[0.0, 2.0], [32.0, 0.0]])
        self.head.bias.data.zero_()

    def forward(self, images: Tensor) -> Tensor:
        red = (images[:, 0] - images[:, 1:].mean(1)).relu()
        logits: Tensor = self.head(self.body(torch.stack([red, images.mean(1)], 1)).mean((2, 3)))
        return logits


def with_a_red_patch(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain grey images, each of another grey, with a red patch and, as large, a square of another grey.

    Also where the patch is, and where the square: one lies on the left, the other on the right.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 1, 1, generator=generator).repeat(1, 3, 32, 32)
    patches, squares = torch.zeros(2, count, 32, 32, dtype=torch.bool)
    drawn = torch.randint(0, 6, (count, 2), generator=generator)
    sides = torch.randint(0, 2, (count,), generator=generator)
    greys = torch.rand(count, generator=generator)
    for i in range(count):
        for where, y, side in ((patches, drawn[i, 0], sides[i]), (squares, drawn[i, 1], 1 - sides[i])):
            where[i, 4 * y : 4 * y + 12, 20 * side : 20 * side + 12] = True
        images[i, :, squares[i]] = greys[i]
    return (
        torch.where(patches[:, None], torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1), images),
        patches,
        squares,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("weighting", "found"), [("amplified", True), ("discounted", False)])
def test_what_the_class_rests_on_can_be_reconstructed_and_the_rest_not(weighting: str, found: bool) -> None:
    """The masked features tell the red patch, and nothing of the grey around it or of the grey square.

    Eq. 9a makes the decoder confident where it errs little, on the patch, and of less than the target
    area; 9b where it errs much, around it, and of more.
    """
    model = Model(Redness(), mean=0.0, std=1.0, input_size=32, name="redness", target_layer="body")
    scan, session = make_scan(width=0.25, blur=0.5, weighting=weighting), Session()
    images = with_a_red_patch(1600, 0)[0]
    labels = torch.ones(1600, dtype=torch.long)
    fit = scan.fit(model, Data(images, labels), session, epochs=1, batch_size=16, rate=5e-3)
    scan.load(model, fit)
    images, patches, squares = with_a_red_patch(16, 1)
    batch = Batch(images, labels[:16], tuple(f"image-{i}" for i in range(16)), Context(model, images))
    maps = scan(model, batch)
    inside_patch, around = float(maps[patches].mean()), float(maps[~patches].mean())
    inside_square = float(maps[squares].mean())
    if found:
        assert inside_patch > 0.6 and around < 0.2 and inside_square < 0.2
    else:
        assert inside_patch < 0.2 and around > inside_patch + 0.1 and inside_square > inside_patch + 0.1
    assert (session.curve[100]["confidence"] < 0.2) == found
    scan.output = "error"
    errors = scan(model, batch)
    assert float(errors[patches].mean()) < 0.7 * float(errors[~patches].mean())
