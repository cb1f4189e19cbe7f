"""Fine-tuned models by name: found, loaded, explained, run; and requests that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import explain as maps_of
from conftest import make_cnn, some_batch
from fits import typed
from tunings import ORDER, RESNET, asked

from faithmap import finetuning, fitting
from faithmap.context import Context
from faithmap.data import held_out
from faithmap.errors import FaithmapError, RequestError
from faithmap.heads import find_head
from faithmap.models import Model, load_model
from faithmap.records import Sample, Spec

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def resnet() -> Model:
    return load_model("shapes/resnet")


# The model by name


def test_the_command_says_how_it_went_and_a_run_takes_the_model(home: Path, tmp_path: Path) -> None:
    code, said = typed("finetune", *ORDER)
    assert code == 0, said
    assert "the head of shapes/resnet fine-tuned to 8 classes on" in said
    assert "images of shapes that were held out: accuracy" in said and "balanced accuracy" in said
    assert "`faithmap run --models tuned/mine` takes it" in said
    (file,) = (home / "models").glob("mine-t*.safetensors")
    out = tmp_path / "run"
    code, said = typed("run", "--models", "tuned/mine", "--datasets", "shapes[split=train,n=24]",
                       "--explainers", "gradcam", "--metrics", "drop", "--limit", "4", "--part", "all",
                       "--out", out)  # fmt: skip
    assert code == 0, said
    entry = json.loads((out / "manifest.json").read_text())["models"]["tuned/mine"]
    assert entry["classes"] == 8 and entry["tuned"]["scored_too"] == ["shapes"]
    assert entry["tuned"]["record"]["key"] in file.stem
    assert "ids" not in entry["tuned"]["record"]["data"]
    assert "The model was fine-tuned on images of this very table" in (out / "leaderboard.md").read_text()
    code, said = typed("list", "models")
    assert code == 0 and "tuned/mine" in said


def test_a_model_is_found_by_name_key_and_path(resnet: Model, tmp_path: Path) -> None:
    one = finetuning.finetune(asked(resnet))
    assert one.path is not None
    by_name = load_model("tuned/mine")
    assert by_name.name == "tuned/mine" and by_name.num_classes == 8
    assert by_name.class_names == resnet.class_names
    assert by_name.transform == resnet.transform and torch.equal(by_name.mean, resnet.mean)
    assert by_name.target_layer == resnet.target_layer and by_name.family == "cnn"
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(one.path.read_bytes())
    for name in (f"tuned/mine-{one.key[:5]}", str(one.path), str(moved)):
        assert load_model(name).weights_digest() == by_name.weights_digest()
    assert load_model(str(moved), layer="layer3").target_layer == "layer3"
    other = finetuning.finetune(asked(resnet, seed=1))
    with pytest.raises(
        RequestError, match=r"there are 2 fine-tuned models 'tuned/mine'.*beginning of its key"
    ):
        load_model("tuned/mine")
    assert load_model(f"tuned/mine-{other.key[:6]}").tuned["key"] == other.key
    assert by_name.weights_digest() != load_model(f"tuned/mine-{other.key}").weights_digest()


def test_a_request_file_names_a_tuned_file_beside_it(resnet: Model, tmp_path: Path) -> None:
    from faithmap.config import load_config
    from faithmap.plan import load_named

    made = finetuning.finetune(asked(resnet))
    assert made.path is not None
    (tmp_path / "mine.safetensors").write_bytes(made.path.read_bytes())
    request = tmp_path / "r.toml"
    request.write_text('[[models]]\nname = "mine.safetensors"\n')
    model = load_named(load_config(str(request)).models[0])
    assert model.name == "mine.safetensors" and model.num_classes == 8


def test_a_tuned_model_is_tuned_again(resnet: Model) -> None:
    finetuning.finetune(asked(resnet))
    first = load_model("tuned/mine")
    base = finetuning.base_of(Spec("tuned/mine"), first)
    assert base == RESNET
    second = replace(asked(first, base=base), name="twice")
    made = finetuning.finetune(second)
    assert made.record["model"]["weights"] == first.weights_digest()
    assert load_model("tuned/twice").num_classes == 8


def test_the_commit_of_the_first_weights_is_no_part_of_what_is_built_again(resnet: Model) -> None:
    kwargs = {"img_size": 32, "patch_size": 4}
    published = {"pretrained": True, "revision": "0" * 40, "kwargs": kwargs}
    model = load_model("timm/test_vit", pretrained=False, kwargs=kwargs, input_size=32)
    base = finetuning.base_of(Spec("timm/test_vit", published), model)
    assert base == {"name": "timm/test_vit", "params": {"kwargs": kwargs}}
    # Files that were written while it was kept can be read as well.
    kept = {"name": "timm/test_vit", "params": {"kwargs": kwargs, "revision": "0" * 40}}
    for record in (base, kept):
        made = finetuning.finetune(replace(asked(model, base=record), name="pinned"))
        assert load_model(str(made.path)).num_classes == 8


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm/test_vit", {"img_size": 32, "patch_size": 4}),
        ("torchvision/squeezenet1_1", {}),
        ("timm/deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_any_architecture_comes_back(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    side = 64 if "squeeze" in name else 32
    model = load_model(name, pretrained=False, input_size=side, mean=0.4, kwargs=kwargs)
    spec = Spec(name, {"pretrained": False, "input_size": side, "mean": 0.4, "kwargs": kwargs})
    request = asked(model, n=8, base=finetuning.base_of(spec, model), options={"epochs": 1})
    assert request.base == {"name": name, "params": {"kwargs": kwargs}}
    finetuning.finetune(request)
    loaded = load_model("tuned/mine")
    assert loaded.num_classes == 8 and loaded.input_size == (side, side)
    assert torch.equal(loaded.mean, model.mean)
    assert loaded.target_layer == model.target_layer and loaded.grid == model.grid


def test_an_architecture_with_heads_for_training_comes_back(tmp_path: Path) -> None:
    import torchvision

    file = tmp_path / "w.pth"
    kwargs = {"aux_logits": False, "init_weights": False}
    torch.save(torchvision.models.googlenet(**kwargs).state_dict(), file)
    params = {"weights": str(file), "input_size": 64}
    model = load_model("torchvision/googlenet", **params)
    spec = Spec("torchvision/googlenet", params)
    finetuning.finetune(asked(model, n=8, base=finetuning.base_of(spec, model), options={"epochs": 1}))
    assert load_model("tuned/mine").num_classes == 8


def test_a_model_of_ones_own_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import faithmap, torch\nfrom torch import nn\n"
        "def build(width=4):\n"
        "    net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                        nn.Flatten(), nn.Linear(width, 5))\n"
        "    return faithmap.Model(net, mean=0.5, std=0.5, input_size=16)\n"
    )
    spec = Spec(f"{file}:build", {"width": 6})
    model = load_model(spec.name, width=6)
    finetuning.finetune(asked(model, n=8, base=finetuning.base_of(spec, model), options={"epochs": 1}))
    assert load_model("tuned/mine").module[0].out_channels == 6


EXPLAINERS = {
    "shapes/resnet": ["gradcam", "gradcam++", "scorecam", "layercam", "fullgrad", "lrp", "saliency"],
    "shapes/vit": [
        "gradcam", "raw-attention", "rollout", "generic-attention", "attention-guided-cam", "partial-lrp",
        "explainability", "attnlrp", "lrp",
    ],
    "shapes/convnext": ["gradcam", "hirescam", "lrp", "occlusion"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINERS)
def test_every_family_of_explainers_explains_it(name: str) -> None:
    from faithmap import registry
    from faithmap.explaining import undefined

    base = load_model(name)
    finetuning.finetune(asked(base, n=8, base={"name": name, "params": {}}, options={"epochs": 1}))
    model = load_model("tuned/mine")
    assert (model.target_layer, model.grid, model.family) == (base.target_layer, base.grid, base.family)
    batch = some_batch(model, 2)
    for explainer in EXPLAINERS[name]:
        plugin = registry.get("explainer", explainer)
        assert undefined(plugin, model, frozenset()) == undefined(plugin, base, frozenset())
        if undefined(plugin, model, frozenset()):
            continue
        maps = maps_of(explainer, model, batch, **dict(plugin.facts.check_params))
        assert maps.shape[0] == 2 and bool(torch.isfinite(maps).all()), explainer
        assert float(maps.std()) > 0, explainer


def test_gradcam_of_a_tuned_head_is_the_closed_form(resnet: Model) -> None:
    """Behind mean pooling and a linear head the weights of the channels are the head's own."""
    finetuning.finetune(asked(resnet))
    model = load_model("tuned/mine")
    batch = some_batch(model, 2)
    features = Context(model, batch.images).activations()
    weights = model.module.fc.weight.detach()[batch.targets]
    cam = (weights[:, :, None, None] * features).sum(1).relu() / features[0, 0].numel()
    assert torch.allclose(maps_of("gradcam", model, batch), cam, atol=1e-5 * float(cam.max()))


# Requests


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "epoch=3"], "finetune has no option 'epoch'; did you mean 'epochs'?"),
        (["--set", "balanced=yes"], "option 'balanced': got 'yes', expected bool"),
        (["--train", "tail"], "option 'train': got 'tail', expected one of head, all"),
        (["--schedule", "cosin"], "option 'schedule': got 'cosin', expected one of cosine"),
        (["--optimizer", "adamx"], "timm has no optimiser 'adamx'"),
        (["--set", "augment=blur"], "option 'augment': got 'blur', expected one of none, flip, crop"),
        (["--lr", "0"], "option 'lr': got 0.0, expected a number above 0"),
        (["--train", "all", "--schedule", "none", "--set", "layer_decay=0.7"], "use schedule = constant"),
        (["--lr", "nan"], "option 'lr': got nan, expected a number above 0"),
        (["--set", "min_lr=1"], "option 'min_lr': got 1.0, expected 0 to the rate, lr"),
        (["--set", "label_smoothing=1.5"], "option 'label_smoothing': got 1.5, expected 0 to 1"),
        (["--set", "decay_milestones=[3,1]"], "expected rising epochs"),
        (["--epochs", "3", "--set", "warmup_epochs=3"], "got 3 of 3 epochs in all, expected fewer"),
        (["--set", "epochs=0"], "option 'epochs': got 0, expected 1 or more"),
        (["--set", "layer_decay=0.7"], "option 'layer_decay': a head is one layer"),
        (["--hold-out", "1.5"], "--hold-out 1.5: expected a share between 0 and 1"),
        (["--hold-out", "0.999999"], "0 are left to learn from"),
        (["--name", "a/b"], "--name 'a/b': expected letters, digits"),
        (["--workers", "-1"], "expected 0 or more"),
        (["--test-dataset", "shapes[split=train,n=24]"], "images of 'shapes' are among those to learn from"),
    ],
)
def test_bad_requests_are_a_sentence(words: list[str], sentence: str) -> None:
    code, said = typed("finetune", "--model", "shapes/resnet", "--dataset", "shapes[split=train,n=24]",
                       "--threads", "1", *words)  # fmt: skip
    assert code == 2
    assert sentence in said


@pytest.mark.parametrize(
    ("name", "params", "sentence"),
    [
        ("tuned/none", {}, "there is no fine-tuned model 'tuned/none'; .* holds none"),
        ("nowhere.safetensors", {}, "no such file: nowhere.safetensors"),
        ("tuned/none", {"weights": "w.pth"}, "'tuned/none' has no parameter 'weights'"),
        ("timm/resnet18", {"head": "h.pth"}, "takes no head = FILE; only dino/NAME does"),
    ],
)
def test_bad_names_are_a_sentence(name: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        load_model(name, **params)


def test_files_of_other_kinds_are_named(resnet: Model, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    with pytest.raises(RequestError, match="is no fine-tuned model, or damaged"):
        load_model(str(plain))
    fit = tmp_path / "fit.safetensors"
    fitting.write(fit, {"a": torch.zeros(2)}, {"key": "f1", "explainer": "scan"})
    with pytest.raises(RequestError, match="holds a fit of explainer 'scan', no fine-tuned model"):
        load_model(str(fit))
    made = finetuning.finetune(asked(resnet))
    other = tmp_path / "other.safetensors"
    fitting.write(other, made.tensors(), {**made.record, "classes": 5})
    with pytest.raises(RequestError, match="does not fit 'shapes/resnet' as it is built here"):
        load_model(str(other))


def test_one_class_is_nothing_to_learn(resnet: Model) -> None:
    request = asked(resnet)
    same = tuple(sample for sample in request.samples if sample.label == request.samples[0].label)
    with pytest.raises(RequestError, match="are all of one class"):
        replace(request, samples=same)


def test_what_diverges_is_not_kept(resnet: Model) -> None:
    request = asked(resnet, options={"lr": 1e38, "optimizer": "momentum", "epochs": 3})
    with pytest.raises(FaithmapError, match="ended with NaN or infinity in 'fc"):
        finetuning.finetune(request)
    assert not request.file.exists()


def test_nothing_readable_is_refused(resnet: Model) -> None:
    gone = tuple(Sample(id=f"{i}.png", image=Path(f"/nowhere/{i}.png"), label=i) for i in range(3))
    for options in ({}, {"augment": "flip"}):
        with pytest.raises(RequestError, match="none of the 3 images could be read"):
            finetuning.finetune(replace(asked(resnet, options=options), samples=gone))


def test_images_that_cannot_be_read_are_left_out(resnet: Model) -> None:
    request = asked(resnet)
    gone = Sample(id="gone.png", image=Path("/nowhere/gone.png"), label=1)
    made = finetuning.finetune(replace(request, samples=(*request.samples, gone)))
    assert made.record["data"]["unreadable"] == 1
    assert made.record["data"]["images"] == len(request.samples)


def test_a_share_is_held_out_by_hash() -> None:
    samples = [Sample(id=f"image-{i}", image="", label=0) for i in range(400)]
    kept, held = held_out(samples, 0.25)
    assert 70 < len(held) < 130 and len(kept) + len(held) == 400
    assert {sample.id for sample in held} >= {sample.id for sample in held_out(samples[::2], 0.25)[1]}
    assert {sample.id for sample in held} >= {sample.id for sample in held_out(samples, 0.1)[1]}


def test_a_class_without_an_image_is_told(resnet: Model) -> None:
    request = asked(resnet)
    few = tuple(sample for sample in request.samples if sample.label != request.samples[0].label)
    made = finetuning.finetune(replace(request, samples=few))
    assert made.record["without_images"] == 8 - len(request.present) + 1
    assert made.record["classes"] == 8


def test_a_small_network_of_tests_has_a_head() -> None:
    model = make_cnn()
    assert find_head(model.module, torch.rand(2, 3, 32, 32)).layers == ("head",)
