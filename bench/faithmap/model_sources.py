"""Where models come from: timm, torchvision, Hugging Face, DINO, the embedded zoo, a user's own file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faithmap.errors import RequestError, nearest
from faithmap.models import CROP_MODES, Model

COMMON_KEYS = (
    "weights", "pretrained", "mean", "std", "input_size", "crop_pct", "interpolation", "crop_mode",
    "layer", "family", "kwargs", "head", "revision",
)  # fmt: skip
#: Sources whose published weights lie on Hugging Face's hub.
ON_THE_HUB = ("timm", "hf")
#: Attributes of torchvision's networks that hold heads for training alone.
AUXILIARY = ("aux1", "aux2", "AuxLogits")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


def build(name: str, params: Mapping[str, Any]) -> Model:
    """Build the model that a name stands for; see `faithmap.models.load_model`."""
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return _from_file(Path(file), function, params)
    source, _, rest = name.partition("/")
    if name.endswith(".safetensors") or (source == "tuned" and rest):
        from faithmap import tuned

        return tuned.load(name, params)
    if source not in SOURCES or not rest:
        raise RequestError(
            f"unknown model '{name}'; expected timm/NAME, torchvision/NAME, hf/ID, dino/NAME, shapes/NAME, "
            "tuned/NAME, a file that `faithmap finetune` wrote, or file.py:function"
        )
    for key in params:
        if key not in COMMON_KEYS:
            raise RequestError(f"model '{name}' has no parameter '{key}'; {nearest(key, COMMON_KEYS)}")
    if params.get("head") and source != "dino":
        raise RequestError(f"model '{name}' takes no head = FILE; only dino/NAME does")
    if params.get("revision") and (source not in ON_THE_HUB or not _wants_download(params)):
        raise RequestError(
            f"model '{name}' takes no revision: it is that of weights which are fetched from the hub, for "
            "timm/NAME and hf/ID"
        )
    interpolation = params.get("interpolation")
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise RequestError(
            f"model '{name}', interpolation: got {interpolation!r}; "
            f"{nearest(str(interpolation), INTERPOLATIONS)}"
        )
    if params.get("weights") and params.get("pretrained"):
        raise RequestError(f"model '{name}': give weights = PATH or pretrained = true, not both")
    module, config = SOURCES[source](rest, params)
    if params.get("weights") and source != "dino":  # whose weights may lie in two files
        inner = module.network if isinstance(module, _LogitsOnly) else module
        load_weights(inner, Path(str(params["weights"])), name)
    config |= {key: params[key] for key in CONFIG_KEYS if params.get(key) is not None}
    built, word = _built_for(module)
    if built and params.get("input_size") is None:
        config["input_size"] = built
    model = Model(module, target_layer=params.get("layer"), family=params.get("family"), name=name, **config)
    if built and model.input_size != built:
        height, width = model.input_size
        raise RequestError(
            f"model '{name}': it is built for input_size {list(built)}, asked for {[height, width]}; give "
            f"kwargs = {{ {word} = {height if height == width else [height, width]} }} besides, where the "
            "weights allow"
        )
    return model


def _built_for(module: nn.Module) -> tuple[tuple[int, int] | None, str]:
    """The (height, width) that a transformer takes, if it takes no other, and its library's word for it."""
    embed = getattr(module, "patch_embed", None)
    if getattr(embed, "strict_img_size", False):  # timm's
        size, word = getattr(embed, "img_size", None), "img_size"
    else:  # torchvision's
        size, word = getattr(module, "image_size", None), "image_size"
    if isinstance(size, int):
        size = (size, size)
    return (tuple(size) if size else None), word


CONFIG_KEYS = ("mean", "std", "input_size", "crop_pct", "interpolation", "crop_mode")


def load_weights(module: nn.Module, path: Path, name: str) -> None:
    """Load a safetensors file or a state dict into a network, exactly.

    Raises:
        RequestError: the file is missing or unreadable, or its tensors do not fit the network.
    """
    load_state(module, read_state(path, name), path, name)


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, name: str) -> None:
    """Load tensors that were read from a file into a network, exactly.

    Raises:
        RequestError: they do not fit the network.
    """
    leave_auxiliary(module, state)
    fault = misfit(module.state_dict(), state)
    if fault:
        raise RequestError(f"model '{name}': the weights in {path} do not fit: {fault}")
    module.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    )


def read_state(path: Path, name: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a safetensors file or a state dict, by name.

    Raises:
        RequestError: the file is missing or unreadable, or holds something else.
    """
    path = path.expanduser()
    if not path.is_file():
        raise RequestError(
            f"model '{name}': no weights file at {path}; give the path of a safetensors file or state dict"
        )
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RequestError(
            f"model '{name}': {path} could not be read as weights ({type(error).__name__}); expected a "
            "safetensors file or a state dict saved by torch.save"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RequestError(f"model '{name}': {path} holds no state dict; expected names with tensors")
    return state


def leave_auxiliary(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take away heads for training alone that a network is built with and a state dict has not.

    torchvision's GoogLeNet and Inception have them unless it downloads their weights itself.
    """
    for name in AUXILIARY if getattr(module, "aux_logits", False) else ():
        if getattr(module, name, None) is not None and not any(key.startswith(f"{name}.") for key in state):
            setattr(module, name, None)
            module.aux_logits = False  # type: ignore[assignment]


def misfit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """Say in a few words how two state dicts differ; empty where they fit."""
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    wrong = [key for key in expected.keys() & given.keys() if expected[key].shape != given[key].shape]
    if wrong:
        key = min(wrong)
        return f"'{key}' has shape {tuple(given[key].shape)}, expected {tuple(expected[key].shape)}" + (
            f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, such as '{missing[0]}'")
    if surplus:
        parts.append(f"{len(surplus)} are unknown, such as '{surplus[0]}'")
    return ", ".join(parts)


def _wants_download(params: Mapping[str, Any]) -> bool:
    return bool(params.get("pretrained", not params.get("weights")))


def unavailable(
    name: str,
    error: Exception,
    instead: str = "give weights = PATH, or pretrained = false for random weights",
) -> RequestError:
    """What is said where published weights cannot be fetched, and what to do instead."""
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return RequestError(
        f"the published weights of '{name}' cannot be had ({type(error).__name__}: {first}); {instead}"
    )


def _at_revision(name: str, revision: str) -> str:
    """The hub's name of the weights that timm takes for a model, at a commit, tag or branch."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights or not config.hf_hub_id:
        raise RequestError(f"timm/{name}: its published weights are not on the hub; leave out revision")
    where = str(config.hf_hub_id)
    if where.endswith("/"):  # the owner alone
        where += ".".join(part for part in (name.split(".")[0], config.tag) if part)
    return f"{where}@{revision}"


def _timm(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name.split(".")[0]):
        raise RequestError(f"timm has no model '{name}'; {nearest(name, timm.list_models())}")
    kwargs = dict(params.get("kwargs") or {})
    download = _wants_download(params)
    if params.get("revision"):
        kwargs["pretrained_cfg_overlay"] = {"hf_hub_id": _at_revision(name, str(params["revision"]))}
    try:
        module = timm.create_model(name, pretrained=download, **kwargs)
    except (TypeError, AssertionError) as error:
        raise RequestError(f"timm/{name} does not take kwargs {kwargs}: {error}") from error
    except Exception as error:
        if not download:
            raise
        raise unavailable(f"timm/{name}", error) from error
    config = resolve_model_data_config(module)
    mode = config.get("crop_mode") or "center"
    if mode not in CROP_MODES and "crop_mode" not in params:
        raise RequestError(
            f"timm/{name} is evaluated with crop_mode '{mode}', which is not known here; give "
            f"crop_mode = one of {', '.join(CROP_MODES)}"
        )
    return module, {
        "mean": config["mean"], "std": config["std"], "input_size": config["input_size"][1:],
        "crop_pct": config["crop_pct"], "interpolation": config["interpolation"],
        "crop_mode": mode,
    }  # fmt: skip


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _torchvision(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise RequestError(f"torchvision has no classifier '{name}'; {nearest(name, known)}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    config: dict[str, Any] = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": 224, "crop_pct": 0.875,
        "interpolation": "bilinear",
    }  # fmt: skip
    preset = weights.transforms()
    config |= {
        "mean": tuple(preset.mean), "std": tuple(preset.std), "input_size": preset.crop_size[0],
        "crop_pct": preset.crop_size[0] / preset.resize_size[0], "interpolation": preset.interpolation.value,
    }  # fmt: skip
    kwargs = dict(params.get("kwargs") or {})
    if name in ("googlenet", "inception_v3"):
        # As torchvision sets it with its own weights, which expect colours on a scale of their own.
        kwargs = {"transform_input": True, "init_weights": False, **kwargs}
    download = _wants_download(params)
    try:
        module = torchvision.models.get_model(name, weights=weights if download else None, **kwargs)
    except (TypeError, AssertionError) as error:
        raise RequestError(f"torchvision/{name} does not take kwargs {kwargs}: {error}") from error
    except Exception as error:
        if not download:
            raise
        raise unavailable(f"torchvision/{name}", error) from error
    return module, config


class _LogitsOnly(nn.Module):
    """A Hugging Face classifier that returns its logits instead of an output record."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = network.config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(pixel_values=images).logits
        return logits


def _huggingface(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers
    except ImportError as error:
        raise RequestError(
            f"hf/{name} needs the package transformers; run: pip install transformers"
        ) from error
    revision = str(params.get("revision") or "main")
    try:
        if _wants_download(params):
            network = transformers.AutoModelForImageClassification.from_pretrained(name, revision=revision)
        else:
            network = transformers.AutoModelForImageClassification.from_config(
                transformers.AutoConfig.from_pretrained(name)
            )
        processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise unavailable(f"hf/{name}", error) from error
    return _LogitsOnly(network), _processing(processor)


#: Pillow's numbers of its filters, which the hub's processors keep.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _processing(processor: Any) -> dict[str, Any]:
    """The evaluation transform of a processor of the hub.

    It resizes to a square (as ViT's), resizes the shorter side and crops (as ResNet's), or states the crop as
    a share of the shorter side (as ConvNeXt's, below 384 pixels).
    """
    size = dict(processor.size)
    side = int(size["height"] if "height" in size else size["shortest_edge"])
    config: dict[str, Any] = {"mean": processor.image_mean, "std": processor.image_std, "input_size": side}
    filtered = getattr(processor, "resample", None)
    config["interpolation"] = FILTERS.get(int(filtered) if filtered is not None else 2, "bilinear")
    crop = getattr(processor, "crop_size", None)
    share = getattr(processor, "crop_pct", None)
    if crop is not None and bool(getattr(processor, "do_center_crop", False)):
        inner = int(dict(crop)["height"])
        return {**config, "input_size": inner, "crop_pct": inner / side, "crop_mode": "center"}
    if share is not None and "shortest_edge" in size and side < 384:
        return {**config, "crop_pct": float(share), "crop_mode": "center"}
    return {**config, "crop_mode": "squash"}


def _shapes(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from faithmap import zoo

    if name not in zoo.NAMES:
        raise RequestError(f"there is no embedded model 'shapes/{name}'; {nearest(name, zoo.NAMES)}")
    trained = bool(params.get("pretrained", not params.get("weights")))
    if params.get("kwargs"):
        raise RequestError(f"shapes/{name} takes no kwargs: its architecture is fixed by its weights")
    module = zoo.load(name) if trained else zoo.build(name)
    card = zoo.card(name)
    return module, {
        "mean": card["mean"], "std": card["std"], "input_size": card["input_size"],
        "class_names": card["classes"],
    }  # fmt: skip


def _dino(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from faithmap import dino

    return dino.build(name, params)


def _from_file(file: Path, function: str, params: Mapping[str, Any]) -> Model:
    """Call `function` of a user's file; the parameters are its keyword arguments."""
    from faithmap.registry import import_file

    target = f"{file}:{function}"
    file = file.expanduser().resolve()
    module = import_file(file)
    build_function: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(build_function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RequestError(f"{file} has no function '{function}'; {nearest(function, names)}")
    try:
        inspect.signature(build_function).bind(**params)
    except TypeError as error:
        raise RequestError(f"{target} does not take the parameters given: {error}") from error
    try:
        model = build_function(**params)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{target} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, Model):
        raise RequestError(
            f"{target} returned a {type(model).__name__}; expected "
            "faithmap.Model(module, mean=..., std=..., input_size=...)"
        )
    return model


SOURCES: dict[str, Callable[[str, Mapping[str, Any]], tuple[nn.Module, dict[str, Any]]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
    "dino": _dino,
    "shapes": _shapes,
}
