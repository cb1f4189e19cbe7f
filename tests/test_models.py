"""Models from every source: their anatomy, their weights, and what is said when a request is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import faithmap
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model, load_model

SLOW = pytest.mark.slow
SWIN = "timm/swin_tiny_patch4_window7_224"
#: name, side, kwargs, family, layer, grid at that side.
ANATOMIES = [
    ("timm/resnet18", 64, {}, "cnn", "layer4", (2, 2)),
    ("timm/mobilenetv2_100", 64, {}, "cnn", "bn2", (2, 2)),
    pytest.param("timm/vgg11", 64, {}, "cnn", "features", (2, 2), marks=SLOW),
    ("timm/convnext_atto", 64, {}, "cnn", "norm_pre", (2, 2)),
    ("timm/vit_tiny_patch16_224", 64, {"img_size": 64}, "vit", "blocks.11.norm1", (4, 4)),
    ("timm/deit_tiny_distilled_patch16_224", 64, {"img_size": 64}, "vit", "blocks.11.norm1", (4, 4)),
    pytest.param(SWIN, 64, {"img_size": 64}, "vit", "norm", (2, 2), marks=SLOW),
    ("torchvision/resnet18", 64, {}, "cnn", "layer4", (2, 2)),
    pytest.param(
        "torchvision/vit_b_16", 64, {"image_size": 64}, "vit", "encoder.layers.encoder_layer_11.ln_1", (4, 4),
        marks=SLOW,
    ),
    ("torchvision/densenet121", 64, {}, "cnn", "features", (2, 2)),
]  # fmt: skip


def untrained(name: str, size: int, **kwargs: Any) -> Model:
    return load_model(name, pretrained=False, input_size=size, kwargs=kwargs)


class TestAnatomy:
    @pytest.mark.parametrize(("name", "side", "kwargs", "family", "layer", "grid"), ANATOMIES)
    def test_is_found(
        self, name: str, side: int, kwargs: dict[str, Any], family: str, layer: str, grid: tuple[int, int]
    ) -> None:
        torch.manual_seed(0)
        model = untrained(name, side, **kwargs)
        if name == "torchvision/vit_b_16":  # its head starts as zeros, which let no gradient through
            nn.init.normal_(model.module.heads.head.weight)
        assert (model.family, model.target_layer, model.grid, model.num_classes) == (
            family,
            layer,
            grid,
            1000,
        )
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        context = Context(model, images)
        features, gradients = context.activations(), context.gradients(torch.tensor([0, 1]))
        assert features.shape == gradients.shape and tuple(features.shape[2:]) == grid
        # Gradients reach the cells themselves, not only a class token.
        assert bool((gradients.abs().amax((1, 2, 3)) > 0).all())

    @SLOW
    @pytest.mark.parametrize(
        ("name", "grid"),
        [("timm/resnet18", (7, 7)), ("timm/vit_tiny_patch16_224", (14, 14)), (SWIN, (7, 7))],
    )
    def test_at_full_size(self, name: str, grid: tuple[int, int]) -> None:
        model = load_model(name, pretrained=False)
        assert (model.input_size, model.grid) == ((224, 224), grid)

    def test_prefix_tokens_are_dropped(self) -> None:
        model = untrained("timm/deit_tiny_distilled_patch16_224", 64, img_size=64)
        tokens = torch.arange(18.0).view(1, 18, 1)
        folded = model.features(tokens)
        assert torch.equal(folded[0, 0], torch.arange(2.0, 18.0).view(4, 4))

    def test_a_transformer_with_class_token_and_images_that_are_not_square(self) -> None:
        model = load_model(
            "timm/test_vit",
            pretrained=False,
            input_size=(32, 64),
            kwargs={"img_size": (32, 64), "patch_size": 8},
        )
        assert model.grid == (4, 8)

    def test_channels_last_maps_that_are_not_square(self) -> None:
        torch.manual_seed(0)
        model = load_model(
            SWIN, pretrained=False, input_size=(64, 128),
            kwargs={"img_size": (64, 128), "depths": (1, 1, 1, 1), "embed_dim": 24},
        )  # fmt: skip
        assert model.grid == (2, 4)

    def test_another_layer_of_channels_last_maps(self) -> None:
        torch.manual_seed(0)
        model = load_model(
            SWIN, pretrained=False, input_size=64,
            kwargs={"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24},
        )  # fmt: skip
        features = Context(model, torch.rand(1, 3, 64, 64)).activations("layers.2")
        assert tuple(features.shape) == (1, 96, 4, 4)


class Own(nn.Module):
    """Somebody's network: tokens (B, 16, 6) of a 4x4 grid at 16 pixels, no class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.mix = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.mix(self.embed(images).flatten(2).transpose(1, 2)).relu()
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def fold(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, 4, 4)


class TestOwnModule:
    def test_layer_by_name_with_reshape(self) -> None:
        model = Model(Own(), mean=0.5, std=0.5, input_size=16, target_layer="mix", reshape=fold)
        assert (model.target_layer, model.grid, model.num_classes) == ("mix", (4, 4), 3)
        context = Context(model, torch.rand(2, 3, 16, 16))
        assert context.gradients(torch.tensor([0, 1])).shape == (2, 6, 4, 4)

    def test_layer_as_a_module(self) -> None:
        own = Own()
        model = Model(own, mean=0.5, std=0.5, input_size=16, target_layer=own.mix, reshape=fold)
        assert model.target_layer == "mix"
        with pytest.raises(RequestError, match="does not belong to the model"):
            Model(own, mean=0.5, std=0.5, input_size=16, target_layer=nn.Linear(1, 1))

    def test_tokens_without_reshape_are_explained(self) -> None:
        model = Model(Own(), mean=0.5, std=0.5, input_size=16, target_layer="mix")
        with pytest.raises(RequestError, match=r"shape \(1, 16, 6\); expected \(B, C, h, w\)"):
            _ = model.grid

    def test_misspelt_layer(self) -> None:
        model = Model(Own(), mean=0.5, std=0.5, input_size=16, target_layer="mixx", reshape=fold)
        with pytest.raises(RequestError, match="no layer 'mixx'; did you mean 'mix'"):
            _ = model.grid

    def test_family_as_given(self) -> None:
        model = Model(Own(), mean=0.5, std=0.5, input_size=16, target_layer="mix", reshape=fold, family="vit")
        assert model.family == "vit"

    def test_normalisation_lies_inside(self) -> None:
        own = Own()
        model = Model(own, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=16)
        images = torch.rand(2, 3, 16, 16)
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
        expected = own((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert torch.allclose(model(images), expected, atol=1e-6)

    def test_starts_in_evaluation_mode(self) -> None:
        model = Model(nn.Sequential(Own(), nn.Dropout(0.5)).train(), mean=0.5, std=0.5, input_size=16)
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"std": 0.0}, "expected positive numbers"),
            ({"mean": (0.5, 0.5)}, "one number or one for each of R, G, B"),
            ({"input_size": (16, 16, 3)}, r"a side in pixels or \(height, width\)"),
            ({"input_size": 0}, r"a side in pixels or \(height, width\)"),
        ],
    )
    def test_senseless_settings(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            Model(Own(), **{"mean": 0.5, "std": 0.5, "input_size": 16, **given})

    def test_what_is_not_a_tensor_of_logits(self) -> None:
        class Dicts(Own):
            def forward(self, images: Tensor) -> Any:
                return {"logits": super().forward(images)}

        model = Model(Dicts(), mean=0.5, std=0.5, input_size=16)
        with pytest.raises(RequestError, match="returns a dict; expected a tensor of logits"):
            model(torch.rand(1, 3, 16, 16))
        with pytest.raises(RequestError, match="returns a dict; expected a tensor of logits"):
            _ = model.grid

    def test_a_bare_module_is_refused_with_the_cure(self) -> None:
        with pytest.raises(RequestError, match=r"wrap it: faithmap.Model\(module, mean="):
            load_model(Own())  # type: ignore[arg-type]
        model = Model(Own(), mean=0.5, std=0.5, input_size=16)
        assert load_model(model) is model


class TestMeterAndDigest:
    def test_counts_images_within_the_block_and_around_it(self, cnn: Model) -> None:
        images = torch.rand(3, 3, 32, 32)
        with cnn.counting() as outer:
            cnn(images)
            with cnn.counting() as inner:
                cnn(images[:2])[0, 1].backward()
            assert (inner.forwards, inner.backwards) == (2, 1)
        assert (outer.forwards, outer.backwards) == (5, 1)

    def test_digest_knows_weights_architecture_and_normalisation(self) -> None:
        def make(std: float = 0.5, stride: int = 4, seed: int = 0, size: int = 16) -> str:
            torch.manual_seed(seed)
            own = Own()
            own.embed.stride = (stride, stride)
            return Model(own, mean=0.5, std=std, input_size=size).digest()

        assert make() == make()
        assert len({make(), make(std=0.4), make(stride=2), make(seed=1), make(size=32)}) == 5


class TestWeights:
    """`weights = PATH`, with timm's smallest network."""

    NAME = "timm/test_resnet"

    def state(self, seed: int = 7) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {
            key: value.clone()
            for key, value in load_model(self.NAME, pretrained=False).module.state_dict().items()
        }

    @pytest.mark.parametrize("form", ["safetensors", "state", "state_dict", "model"])
    def test_are_loaded(self, form: str, tmp_path: Path) -> None:
        state = self.state()
        if form == "safetensors":
            path = tmp_path / "w.safetensors"
            save_file(state, path)
        else:
            path = tmp_path / "w.pth"
            torch.save(state if form == "state" else {form: state}, path)
        loaded = load_model(self.NAME, weights=path)
        assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())
        assert loaded.digest() == load_model(self.NAME, weights=str(path)).digest()

    def test_half_precision_becomes_single(self, tmp_path: Path) -> None:
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state().items()}
        save_file(state, tmp_path / "w.safetensors")
        model = load_model(self.NAME, weights=tmp_path / "w.safetensors")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"no weights file at .*nothing\.pth"):
            load_model(self.NAME, weights=tmp_path / "nothing.pth")
        with pytest.raises(RequestError, match="no weights file at"):
            load_model(self.NAME, weights=tmp_path)

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
    @pytest.mark.parametrize("content", [b"", b"not weights at all" * 40])
    def test_corrupt_file(self, name: str, content: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match="could not be read as weights"):
            load_model(self.NAME, weights=tmp_path / name)

    def test_truncated_file(self, tmp_path: Path) -> None:
        for name, write in (("w.safetensors", save_file), ("w.pth", torch.save)):
            path = tmp_path / name
            write(self.state(), path)
            path.write_bytes(path.read_bytes()[:-1000])
            with pytest.raises(RequestError, match="could not be read as weights"):
                load_model(self.NAME, weights=path)

    def test_a_whole_pickled_network_is_refused(self, tmp_path: Path) -> None:
        torch.save(load_model(self.NAME, pretrained=False).module, tmp_path / "w.pth")
        with pytest.raises(RequestError, match="could not be read as weights"):
            load_model(self.NAME, weights=tmp_path / "w.pth")

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)])
    def test_something_else_saved_by_torch(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(RequestError, match="holds no state dict"):
            load_model(self.NAME, weights=tmp_path / "w.pth")

    @pytest.mark.parametrize("auxiliary", [True, False])
    def test_heads_for_training_may_be_there_or_not(self, auxiliary: bool, tmp_path: Path) -> None:
        """Official files of GoogLeNet have them; what torchvision downloads and saves again has not."""
        torch.manual_seed(0)
        import torchvision

        network = torchvision.models.googlenet(
            num_classes=5, aux_logits=auxiliary, transform_input=True, init_weights=False
        ).eval()
        torch.save(network.state_dict(), tmp_path / "w.pth")
        kwargs = {"num_classes": 5}
        model = load_model("torchvision/googlenet", weights=tmp_path / "w.pth", input_size=64, kwargs=kwargs)
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            expected = network((images - model.mean) / model.std)
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)

    def test_misfits_are_described(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        state = self.state()
        save_file(state, path)
        with pytest.raises(
            RequestError, match=r"'fc.bias' has shape \(1000,\), expected \(7,\) \(and 1 more\)"
        ):
            load_model(self.NAME, weights=path, kwargs={"num_classes": 7})
        save_file({key: value for key, value in state.items() if key != "fc.bias"}, path)
        with pytest.raises(RequestError, match=r"1 tensors are missing, such as 'fc\.bias'"):
            load_model(self.NAME, weights=path)
        save_file({**state, "extra": torch.zeros(1)}, path)
        with pytest.raises(RequestError, match="1 are unknown, such as 'extra'"):
            load_model(self.NAME, weights=path)


class TestRequests:
    @pytest.mark.parametrize(
        ("name", "params", "message"),
        [
            ("timm/resnet81", {}, "timm has no model 'resnet81'; did you mean .*'resnet18'"),
            (
                "torchvision/resnet81",
                {},
                "torchvision has no classifier 'resnet81'; did you mean .*'resnet18'",
            ),
            ("shapes/resnt", {}, "no embedded model 'shapes/resnt'; did you mean 'resnet'"),
            ("tim/resnet18", {}, "unknown model 'tim/resnet18'; expected timm/NAME"),
            ("resnet18", {}, "unknown model 'resnet18'; expected timm/NAME"),
            ("timm/", {}, "unknown model 'timm/'"),
            ("timm/resnet18", {"weight": "x"}, "no parameter 'weight'; did you mean 'weights'"),
            ("timm/resnet18", {"interpolation": "bicubik"}, "did you mean 'bicubic'"),
            ("timm/resnet18", {"weights": "x", "pretrained": True}, "not both"),
            ("timm/test_resnet", {"pretrained": False, "kwargs": {"depth": 3}}, "does not take kwargs"),
            ("torchvision/resnet18", {"pretrained": False, "kwargs": {"depth": 3}}, "does not take kwargs"),
            ("nowhere.py:make", {}, "no such file"),
        ],
    )
    def test_wrong_ones_say_what_is_right(self, name: str, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            load_model(name, **params)

    def test_transform_keys_override_the_published_ones(self) -> None:
        model = load_model(
            "timm/test_resnet", pretrained=False, mean=0.1, std=0.2, crop_pct=0.5, input_size=64
        )
        assert model.mean.flatten().tolist() == pytest.approx([0.1] * 3)
        assert (model.input_size, model.transform.crop_pct) == ((64, 64), 0.5)

    def test_layer_key(self) -> None:
        model = load_model("timm/test_resnet", pretrained=False, layer="layer2")
        assert model.target_layer == "layer2"

    def test_public_names(self) -> None:
        assert faithmap.load_model is load_model and faithmap.Model is Model


class TestFromFile:
    SOURCE = """
import torch
import faithmap

def small(classes=3):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, classes),
    )
    return faithmap.Model(net, mean=0.5, std=0.5, input_size=16)

def bare():
    return torch.nn.Identity()

def fails():
    raise RuntimeError("out of luck")
"""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "own.py"
        path.write_text(self.SOURCE)
        return path

    def test_calls_the_function(self, file: Path) -> None:
        assert load_model(f"{file}:small").num_classes == 3
        assert load_model(f"{file}:small", classes=5).num_classes == 5

    @pytest.mark.parametrize(
        ("function", "params", "message"),
        [
            ("smal", {}, "has no function 'smal'; did you mean 'small'"),
            ("small", {"clases": 5}, "does not take the parameters given"),
            ("bare", {}, r"returned a Identity; expected faithmap.Model"),
            ("fails", {}, "raised RuntimeError: out of luck"),
        ],
    )
    def test_faults_are_named(self, function: str, params: dict[str, Any], message: str, file: Path) -> None:
        with pytest.raises(RequestError, match=message):
            load_model(f"{file}:{function}", **params)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
def test_normalised_values_do_not_depend_on_the_order_in_memory(size: tuple[int, int]) -> None:
    """To the bit, and the order is kept."""
    model = Model(torch.nn.Flatten(), mean=(0.1, 0.2, 0.3), std=(0.3, 0.7, 1.1), input_size=8)
    images = torch.rand(3, 3, *size)
    pixelwise = images.contiguous(memory_format=torch.channels_last)
    found = model.normalise(pixelwise)
    assert torch.equal(found, model.normalise(images))
    assert found.stride() == pixelwise.stride()
    part = torch.rand(3, 3, 9, 9)[:, :, : size[0], : size[1]]
    assert torch.equal(model.normalise(part), model.normalise(part.contiguous()))


@pytest.mark.parametrize(
    ("name", "word"), [("timm/vit_tiny_patch16_224", "img_size"), ("torchvision/vit_b_16", "image_size")]
)
def test_a_transformer_takes_the_size_that_it_is_built_for(name: str, word: str) -> None:
    kwargs = {word: 64} | ({"depth": 1} if word == "img_size" else {})
    model = load_model(name, pretrained=False, kwargs=kwargs)
    assert model.input_size == (64, 64)
    told = rf"built for input_size \[64, 64\], asked for \[96, 96\].*{word} = 96"
    with pytest.raises(RequestError, match=told):
        load_model(name, pretrained=False, kwargs=kwargs, input_size=96)
