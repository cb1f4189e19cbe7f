"""How a model is fine-tuned: options with their defaults, timm's optimisers and schedules, varied images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from faithmap.errors import RequestError, nearest
from faithmap.parameters import check_type, with_defaults

TRAIN = ("head", "all")
AUGMENT = ("none", "flip", "crop")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

#: Every option with its default; None where it depends on what is trained (`BY_TRAIN`) or on the schedule
#: (`by_schedule`).
OPTIONS: dict[str, Any] = {
    "train": "head",
    "epochs": None,
    "optimizer": "adamw",
    "lr": None,
    "weight_decay": 0.01,
    "momentum": 0.9,
    #: All parameters learn at one rate; below 1, layers further from the head learn more slowly (timm's).
    "layer_decay": 1.0,
    "schedule": "cosine",
    "warmup_epochs": None,
    "min_lr": 0.0,
    #: Epochs between two steps ("step"), or of the last decay ("wsd", "rsqrt"; below 1 a share of all).
    "decay_epochs": None,
    #: Epochs after which "multistep" steps.
    "decay_milestones": None,
    #: Of a step; of "poly" the power.
    "decay_rate": None,
    "batch_size": 64,
    "augment": None,
    "label_smoothing": 0.0,
    #: The gradient's norm is cut to this; 0 leaves it.
    "clip_grad": 0.0,
    #: Weigh the loss so that each class counts alike, however many images it has.
    "balanced": False,
}
BY_TRAIN: dict[str, dict[str, Any]] = {
    "head": {"epochs": 50, "lr": 1e-3, "warmup_epochs": 0, "augment": "none"},
    "all": {"epochs": 10, "lr": 1e-4, "warmup_epochs": 1, "augment": "crop"},
}


def by_schedule(schedule: str, epochs: int) -> dict[str, Any]:
    """The defaults that depend on the schedule."""
    return {
        "decay_epochs": epochs / 3 if schedule == "step" else 0.2,
        "decay_milestones": [epochs / 2, 3 * epochs / 4],
        "decay_rate": 1.0 if schedule == "poly" else 0.1,
    }


def finetune_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning, `given` over the defaults.

    Raises:
        RequestError: an option is unknown, of another type, or out of range.
    """
    examples = OPTIONS | BY_TRAIN["head"] | by_schedule("cosine", 1)
    for key, value in given.items():
        if key not in OPTIONS:
            raise RequestError(f"finetune has no option '{key}'; {nearest(key, OPTIONS)}")
        check_type(f"finetune, option '{key}'", value, examples[key])
    known = {key: value for key, value in given.items() if value is not None}
    for key, choices in (("train", TRAIN), ("augment", AUGMENT), ("schedule", SCHEDULES)):
        if key in known and known[key] not in choices:
            raise RequestError(
                f"finetune, option '{key}': got {known[key]!r}, expected one of {', '.join(choices)}"
            )
    defaults = OPTIONS | BY_TRAIN[known.get("train", "head")]
    schedule, epochs = known.get("schedule", OPTIONS["schedule"]), known.get("epochs", defaults["epochs"])
    options = with_defaults(defaults | by_schedule(schedule, epochs), known)
    for key, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("clip_grad", 0)):
        if options[key] < least:
            raise RequestError(f"finetune, option '{key}': got {options[key]}, expected {least} or more")
    if not 0 < options["lr"] < math.inf:
        raise RequestError(f"finetune, option 'lr': got {options['lr']}, expected a number above 0")
    for key, most, what in (
        ("label_smoothing", 1, "1"), ("min_lr", options["lr"], "the rate, lr")
    ):  # fmt: skip
        if not 0 <= options[key] <= most:
            raise RequestError(f"finetune, option '{key}': got {options[key]}, expected 0 to {what}")
    milestones = list(options["decay_milestones"])
    if milestones != sorted(milestones):
        raise RequestError(f"finetune, option 'decay_milestones': got {milestones}, expected rising epochs")
    _check_optimizer(str(options["optimizer"]))
    if options["train"] == "head" and options["layer_decay"] != 1.0:
        raise RequestError("finetune, option 'layer_decay': a head is one layer; give it with train = all")
    if schedule == "none" and options["layer_decay"] != 1.0:
        raise RequestError(
            f"layer_decay = {options['layer_decay']} is applied by a schedule, and schedule = 'none' has "
            "none; use schedule = constant"
        )
    if options["warmup_epochs"] >= options["epochs"]:
        if "warmup_epochs" in known:
            raise RequestError(
                f"finetune, option 'warmup_epochs': got {options['warmup_epochs']} of {options['epochs']} "
                "epochs in all, expected fewer"
            )
        options["warmup_epochs"] = 0
    return options


def _check_optimizer(name: str) -> None:
    """Refuse a name that timm has no optimiser of."""
    import timm.optim

    known = [str(entry) for entry in timm.optim.list_optimizers()]
    if name.removeprefix("lookahead_") not in known:
        raise RequestError(f"timm has no optimiser '{name}'; {nearest(name, known)}")


def make_optimizer(learning: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """timm's optimiser of a name, over the parameters of a module.

    Raises:
        RequestError: it cannot be made here.
    """
    import timm.optim

    name = str(options["optimizer"])
    more: dict[str, Any] = (
        {} if options["layer_decay"] == 1.0 else {"layer_decay": float(options["layer_decay"])}
    )
    try:
        return timm.optim.create_optimizer_v2(
            learning, opt=name, lr=float(options["lr"]), weight_decay=float(options["weight_decay"]),
            momentum=float(options["momentum"]), **more,
        )  # fmt: skip
    except Exception as error:
        raise RequestError(
            f"timm's optimiser '{name}' cannot be made here ({type(error).__name__}: {error}); name another"
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, options: Mapping[str, Any], per_epoch: int) -> Any:
    """timm's schedule of a name, to be told of every step; None for "none".

    What it gives depends on the step alone, so that it needs no state in a checkpoint.

    Raises:
        RequestError: timm does not take the options.
    """
    import timm.scheduler

    name = str(options["schedule"])
    if name == "none":
        return None
    # Without a warm-up this schedule has no time scale of its own.
    more: dict[str, Any] = (
        {"stable_timescale": 1.0} if name == "rsqrt" and not options["warmup_epochs"] else {}
    )
    try:
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer, sched=name, num_epochs=int(options["epochs"]), min_lr=float(options["min_lr"]),
            warmup_epochs=int(options["warmup_epochs"]), decay_rate=float(options["decay_rate"]),
            decay_epochs=float(options["decay_epochs"]), decay_milestones=list(options["decay_milestones"]),
            warmup_lr=float(options["lr"]) / 100, step_on_epochs=False, updates_per_epoch=per_epoch, **more,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise RequestError(f"timm's schedule '{name}' does not take these options: {error}") from error
    if scheduler is None:
        raise RequestError(f"the timm that is installed has no schedule '{name}'; name another")
    return scheduler


def augmented(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W), varied: mirrored by halves, and for "crop" also cropped and resized.

    A crop holds 35% to 100% of what the model sees of the image, at aspect ratios of 3:4 to 4:3.

    Args:
        images: as the evaluation transform gives them.
        how: "none", "flip" or "crop".
        generator: what is drawn from, on the CPU.
    """
    if how == "none":
        return images
    count = len(images)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool()
    if how == "flip":
        return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)
    area, log_ratio, across, down = (torch.rand(count, generator=generator) for _ in range(4))
    area = 0.35 + 0.65 * area
    ratio = torch.exp((2 * log_ratio - 1) * math.log(4 / 3))
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = torch.where(mirrored, -width, width)
    place[:, 0, 2] = (2 * across - 1) * (1 - width)
    place[:, 1, 1] = height
    place[:, 1, 2] = (2 * down - 1) * (1 - height)
    grid = functional.affine_grid(place.to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False, padding_mode="border")
