"""What an explainer gives beside its maps: reconstructions, and notes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_batch, make_cnn
from fits import asked, toy_registered, typed
from torch import Tensor

import faithmap
from faithmap import Batch, Model, api, explainer, heatmaps, registry, training
from faithmap.errors import FaithmapError, PluginError, RequestError
from faithmap.gradient_masks import UNMASKED
from faithmap.models import load_model
from faithmap.records import Sample
from faithmap.transforms import prepare

SCAN = "scan[width=0.125]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of fits with a small decoder for shapes/resnet."""
    home = tmp_path_factory.mktemp("home")
    plugin = registry.get("explainer", "scan")
    with toy_registered():
        request = asked(load_model("shapes/resnet"), 8)
    options = training.fit_options(plugin, {"steps": 2, "batch_size": 4})
    changed = {"plugin": plugin, "params": plugin.check({"width": 0.125}), "options": options}
    training.train(training.Training(**{**vars(request), **changed}), out=home / "fitted" / "scan")
    return home


@pytest.fixture
def home(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAITHMAP_HOME", str(trained))
    return trained


@pytest.fixture
def known() -> Iterator[None]:
    """What a test registers is forgotten behind it."""
    with toy_registered():
        yield


def pixels(file: Path) -> np.ndarray:
    with PIL.Image.open(file) as figure:
        return np.asarray(figure.convert("RGB"))


def drawn(photo: Path, explainers: str) -> tuple[int, str, np.ndarray]:
    """The exit code of `faithmap explain`, what it says, and the figure."""
    out = photo.with_name("maps.png")
    code, said = typed(
        "explain",
        photo,
        "--model",
        "shapes/resnet",
        "--device",
        "cpu",
        "--explainers",
        explainers,
        "--out",
        out,
    )
    return code, said, pixels(out)


def expected(photo: Path, names: list[tuple[str, str, dict[str, Any], bool]]) -> np.ndarray:
    """The figure of maps, and of reconstructions where these are wanted."""
    model = load_model("shapes/resnet")
    image = prepare(Sample(id="photo", image=photo), model.transform).image
    logits = heatmaps.logits(model, image[None])
    target = int(logits.argmax())
    shown: list[tuple[str, Tensor]] = []
    for title, name, params, both in names:
        shown.append((title, faithmap.explain(model, image[None], [target], name, **params)[0]))
        if both:
            picture = faithmap.reconstruct(model, image[None], [target], name, **params)
            assert picture.shape == (1, 3, *model.input_size)
            shown.append((f"{title}:\nreconstruction", picture[0]))
    file = photo.with_name("expected.png")
    heatmaps.draw(image, shown, heatmaps.title(model, logits, target), file)
    return pixels(file)


class TestScan:
    def test_the_reconstruction_is_drawn_beside_the_map(self, photo: Path, home: Path) -> None:
        code, said, figure = drawn(photo, f"{SCAN},centre")
        assert code == 0, said
        whole = expected(photo, [("scan", "scan", {"width": 0.125}, True), ("centre", "centre", {}, False)])
        without = expected(
            photo, [("scan", "scan", {"width": 0.125}, False), ("centre", "centre", {}, False)]
        )
        assert np.array_equal(figure, whole)
        assert figure.shape[1] * 3 == without.shape[1] * 4  # one panel more

    def test_explainers_without_one_are_as_before(self, photo: Path) -> None:
        code, said, figure = drawn(photo, "gradcam,centre")
        assert (code, said.count("\n")) == (0, 1)
        assert np.array_equal(
            figure, expected(photo, [("gradcam", "gradcam", {}, False), ("centre", "centre", {}, False)])
        )

    def test_settings_tell_the_panels_of_one_explainer_apart(self, photo: Path) -> None:
        code, said, figure = drawn(photo, "gradcam,gradcam[layer=layer3]")
        assert code == 0, said
        named = [("gradcam", {}), ("gradcam\n[layer=layer3]", {"layer": "layer3"})]
        assert np.array_equal(figure, expected(photo, [(title, "gradcam", p, False) for title, p in named]))

    def test_python_gives_what_the_decoder_gives(self, home: Path) -> None:
        model = load_model("shapes/resnet")
        images = torch.rand(2, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
        asked = api.ask(model, images, [1, 2], "scan", 0, {"width": 0.125})
        with model.counting() as meter:
            asked.maps()
            found = asked.reconstruction()
        assert (meter.forwards, meter.backwards) == (2, 2)  # one pass for both
        scan = registry.get("explainer", "scan").make({"width": 0.125})
        (file,) = (home / "fitted" / "scan").glob("*.safetensors")
        scan.load(model, faithmap.fitting.read(file).tensors())  # type: ignore[attr-defined]
        alone = scan.reconstruct(model, asked.batch.select([1]))  # type: ignore[attr-defined]
        assert found.shape == (2, 3, *model.input_size)
        assert torch.allclose(found[1:], alone, atol=1e-5)
        assert torch.equal(found, faithmap.reconstruct(model, images, [1, 2], width=0.125))

    def test_what_is_noted_is_printed_and_warned_of_once(
        self, photo: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, said, _ = drawn(photo, SCAN)
        assert code == 0 and UNMASKED not in said
        model = load_model("shapes/resnet")
        images = torch.rand(3, 3, *model.input_size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            faithmap.explain(model, images, explainer="scan", width=0.125)
        weight = model.module.get_submodule("fc").weight
        weight.data = -weight.data.abs()
        with pytest.warns(
            UserWarning, match=rf"^explainer 'masked-features' notes: {UNMASKED} \(image 0, 1, 2\)$"
        ) as told:
            faithmap.explain(model, images, explainer="masked-features")
        assert len(told) == 1 and told[0].filename == __file__
        monkeypatch.setattr("faithmap.models.load_model", lambda *_, **__: model)
        code, said, _ = drawn(photo, "masked-features,gradcam")
        assert code == 0 and said.count(f"masked-features: {UNMASKED}\n") == 1


def broken(what: str) -> Any:
    """A class that explains, and whose reconstruction is as it should be or wrong in some way."""

    @explainer(name="broken", version=1, source="a test", forwards=0, backwards=0, class_specific=False)
    class Broken:
        """Redness, and the image darkened."""

        def __call__(self, model: Model, batch: Batch) -> Tensor:
            """The red of each pixel."""
            batch.note(batch.images[:, 0].amax((1, 2)) > 0, "it is red")
            return batch.images[:, 0]

        def reconstruct(self, model: Model, batch: Batch) -> Any:
            """Half of the image."""
            batch.note(batch.images[:, 0].amax((1, 2)) > 0, "it is red")
            half = batch.images / 2
            if what == "raises":
                raise ZeroDivisionError("nothing to divide by")
            return {
                "grey": half.mean(1),
                "list": half.tolist(),
                "signed": half - 1,
                "nan": half * torch.nan,
            }.get(what, half)

    return Broken


WRONG = [
    ("raises", "explainer 'broken': its reconstruct raises ZeroDivisionError: nothing to divide by"),
    (
        "grey",
        "its reconstruct returned (1, 96, 96) for images (1, 3, 96, 96); expected a tensor (1, 3, H, W)",
    ),
    ("list", "its reconstruct returned a list; expected a tensor (1, 3, H, W) with values in [0, 1]"),
    ("signed", "its reconstruct returned values from -"),
    ("nan", "its reconstruct returned values from nan to nan; expected a tensor (1, 3, H, W) with values"),
]


@pytest.mark.usefixtures("known")
class TestProtocol:
    @pytest.mark.parametrize(("what", "sentence"), WRONG)
    def test_one_that_fails_costs_its_own_panel(self, photo: Path, what: str, sentence: str) -> None:
        broken(what)
        code, said, figure = drawn(photo, "broken,centre")
        assert code == 1 and sentence in said and said.count("not drawn: explainer 'broken': ") == 1
        assert "wrote" in said
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maps = expected(photo, [("broken", "broken", {}, False), ("centre", "centre", {}, False)])
        assert np.array_equal(figure, maps)

    @pytest.mark.parametrize(("what", "sentence"), WRONG)
    def test_and_in_python_it_is_a_sentence(self, what: str, sentence: str) -> None:
        broken(what)
        with pytest.raises(PluginError) as caught:
            faithmap.reconstruct(load_model("shapes/resnet"), torch.rand(1, 3, 96, 96), explainer="broken")
        assert sentence in str(caught.value)

    def test_a_class_that_is_not_fitted_may_have_one(self) -> None:
        broken("")
        images = torch.rand(2, 3, 32, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = faithmap.reconstruct(make_cnn(), images, explainer="broken")
        assert torch.equal(found, images / 2)
        with pytest.warns(UserWarning, match=r"notes: it is red \(image 0, 1\)"):
            faithmap.explain(make_cnn(), images, explainer="broken")

    def test_one_that_has_none_is_refused(self) -> None:
        with pytest.raises(
            RequestError, match="explainer 'gradcam' gives no reconstruction; name one that has"
        ):
            faithmap.reconstruct(make_cnn(), torch.rand(1, 3, 32, 32), explainer="gradcam")
        with pytest.raises(FaithmapError, match="'toy-fitted': not fitted for this model"):
            faithmap.reconstruct(make_cnn(), torch.rand(1, 3, 32, 32), explainer="toy-fitted")

    def test_each_image_draws_what_it_draws_for_its_map(self) -> None:
        @explainer(name="drawing", version=1, source="a test", per_image=True)
        class Drawing:
            """Noise."""

            def __call__(self, model: Model, batch: Batch) -> Tensor:
                """One draw."""
                return torch.rand(len(batch), *batch.size)

            def reconstruct(self, model: Model, batch: Batch) -> Tensor:
                """The same draw, in grey."""
                return torch.rand(len(batch), *batch.size)[:, None].expand(-1, 3, -1, -1)

        model = make_cnn()
        images = make_batch(model, 3).images
        found = faithmap.reconstruct(model, images, explainer="drawing")
        assert torch.equal(found[:, 1], faithmap.explain(model, images, explainer="drawing"))
