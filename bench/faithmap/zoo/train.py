"""Train an embedded model: `python -m faithmap.zoo.train NAME`; writes NAME.safetensors and NAME.json.

A run is reproducible from its seed at one number of threads. Only images of split "train" are
learnt from; "val" is watched meanwhile, and "test" is looked at once, at the end, with the weights
as they are shipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap import registry, zoo

MEAN = STD = (0.5, 0.5, 0.5)
GRID = 12
#: Highest learning rate; weight of the auxiliary loss at the start (it fades to a tenth).
RECIPES: dict[str, tuple[float, float]] = {"resnet": (4e-3, 1.0), "vit": (2e-3, 1.0), "convnext": (3e-3, 1.0)}


def rendered(split: str, n: int, cache: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 (N, 3, S, S), labels (N,), and how much of each cell is object (N, 12, 12).

    A folder `cache` keeps them for the training of the next model.
    """
    file = cache / f"{split}-{n}.safetensors" if cache else None
    if file and file.is_file():
        kept = load_file(file)
        return kept["images"], kept["labels"], kept["shares"]
    samples = registry.get("dataset", "shapes").make({"split": split, "n": n})()
    images, labels, shares = [], [], []
    for sample in samples:
        images.append((sample.image() * 255).round().to(torch.uint8))
        labels.append(sample.label)
        shares.append(F.adaptive_avg_pool2d(sample.mask().float()[None], GRID)[0])
    made = {"images": torch.stack(images), "labels": torch.tensor(labels), "shares": torch.stack(shares)}
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, file)
    return made["images"], made["labels"], made["shares"]


def normalised(images: Tensor) -> Tensor:
    """What the networks are fed: uint8 images scaled to [-1, 1]."""
    return images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, shares: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn and flip a batch, and shuffle its colour channels: none of it changes a shape's class."""
    turns, flip = (int(torch.randint(k, (), generator=generator)) for k in (4, 2))
    images, shares = images.rot90(turns, (2, 3)), shares.rot90(turns, (1, 2))
    if flip:
        images, shares = images.flip(3), shares.flip(2)
    return images[:, torch.randperm(3, generator=generator)], shares


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 8), and the last features as (B, 144, C)."""
    last = model.forward_features(images)  # type: ignore[operator]
    logits = model.forward_head(last)  # type: ignore[operator]
    if last.ndim == 4:
        return logits, last.flatten(2).transpose(1, 2)
    return logits, last[:, -GRID * GRID :]


def where_loss(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of each cell against: the label, by its share on the object, else background.

    Cells on the object count fivefold, being few.
    """
    log = scores.log_softmax(dim=2)
    share = shares.flatten(1)
    on = log.gather(2, labels[:, None, None].expand(-1, log.shape[1], 1))[..., 0]
    weighted = 5 * share * on + (1 - share) * log[..., -1]
    return -weighted.sum() / (5 * share + 1 - share).sum()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified rightly, in percent."""
    model.eval()
    device = next(model.parameters()).device
    hits = 0
    for start in range(0, len(labels), 128):
        predicted = model(normalised(images[start : start + 128].to(device))).argmax(1).cpu()
        hits += int((predicted == labels[start : start + 128]).sum())
    return 100 * hits / len(labels)


def train(name: str, options: argparse.Namespace) -> nn.Module:
    """Train with AdamW under a one-cycle schedule, from scratch or from the weights of an earlier round."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = zoo.build(name)
    if options.start:
        model.load_state_dict(zoo.load_from(name, options.start).state_dict())
    model.to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate, weight = RECIPES[name]
    rate *= options.rate
    # Thrown away after training: it only tells the cells apart into eight classes and background.
    width: int = model.num_features  # type: ignore[assignment]
    cells = nn.Linear(width, len(zoo.CLASSES) + 1).to(options.device)
    images, labels, shares = rendered("train", options.images, options.cache)
    watched = rendered("val", 512, options.cache)[:2]
    print(f"{name}: {len(images)} images rendered", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1] + list(cells.parameters())
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=rate
    )
    steps = options.epochs * (len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    started, step = time.perf_counter(), 0
    for epoch in range(options.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order, options.batch)[: len(images) // options.batch]:
            batch, share = augmented(images[chosen], shares[chosen], generator)
            truth, share = labels[chosen].to(options.device), share.to(options.device)
            logits, last = features(model, normalised(batch.to(options.device)))
            loss = F.cross_entropy(logits, truth)
            if weight:
                fading = weight * (1 - 0.9 * step / steps)
                loss = loss + fading * where_loss(cells(last), truth, share)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            step += 1
        seen = accuracy(model, *watched)
        print(f"epoch {epoch + 1:3d}  loss {loss.item():.3f}  val {seen:.1f}%  "
              f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, and write the card."""
    parser = argparse.ArgumentParser(prog="python -m faithmap.zoo.train", description=__doc__)
    parser.add_argument("name", choices=zoo.NAMES)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--images", type=int, default=16384, help="training images to render")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies the recipe's learning rate")
    parser.add_argument(
        "--start", type=Path, help="weights of an earlier round to go on from, beside their card"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps rendered images between trainings")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model = train(options.name, options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.safetensors"
    state = model.state_dict()
    halves = {key: value.cpu().half() if value.is_floating_point() else value for key, value in state.items()}
    save_file({key: value.cpu().contiguous() for key, value in halves.items()}, path)
    path.chmod(0o644)  # safetensors leaves files that only their owner may read
    seconds = time.perf_counter() - started
    (options.out / f"{options.name}.json").write_text(
        json.dumps(card(options, path, seconds), indent=2) + "\n", encoding="utf-8"
    )
    return 0


def card(options: argparse.Namespace, path: Path, seconds: float) -> dict[str, Any]:
    """Describe a trained file; its accuracy is that of the half-precision weights."""
    shipped = zoo.load_from(options.name, path)
    images, labels, _ = rendered("test", 2048, options.cache)
    held_out, default = accuracy(shipped, images, labels), accuracy(shipped, images[:512], labels[:512])
    print(f"{options.name}: {held_out:.2f}% of 2048 test images, {default:.2f}% of the first 512", flush=True)
    rate, weight = RECIPES[options.name]
    architecture, changes = zoo.ARCHITECTURES[options.name]
    method = (
        f"AdamW, one-cycle to {rate * options.rate:g}, {options.epochs} epochs of {options.images} images, "
        f"batch {options.batch}, augmented by flips, quarter turns and shuffled colour channels"
    )
    if weight:
        method += (
            f"; auxiliary loss (weight {weight:g}, fading to a tenth): a linear layer, dropped afterwards, "
            "tells from each cell of the last features the shape that covers it, or the background"
        )
    command = (
        f"python -m faithmap.zoo.train {options.name} --epochs {options.epochs} --images {options.images} "
    )
    command += f"--batch {options.batch} --seed {options.seed} --threads {options.threads}"
    command += "" if options.rate == 1 else f" --rate {options.rate:g}"
    epochs = options.epochs
    if options.start:
        before = json.loads(options.start.with_suffix(".json").read_text(encoding="utf-8"))
        method = f"{before['method']}. Then from there: {method}"
        command = f"{before['command']} --out first; {command} --start first/{options.name}.safetensors"
        epochs, seconds = epochs + before["epochs"], seconds + before["seconds"]
    else:
        method = f"from scratch: {method}"
    stem = {"stem": f"three 3x3 convolutions of stride 2 to {zoo.STEM} channels, batch norm, ReLU"}
    return {
        "name": f"shapes/{options.name}",
        "architecture": f"timm {architecture}",
        "kwargs": {**changes, "num_classes": len(zoo.CLASSES), **(stem if options.name == "vit" else {})},
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "mean": MEAN,
        "std": STD,
        "input_size": zoo.INPUT_SIZE,
        "feature_grid": [GRID, GRID],
        "classes": zoo.CLASSES,
        "dataset": "shapes (split train, mixed difficulty, one object)",
        "method": method,
        "command": command,
        "seed": options.seed,
        "epochs": epochs,
        "training_images": options.images,
        "accuracy_test_2048": round(held_out, 2),
        "accuracy_test_512": round(default, 2),
        "seconds": round(seconds),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__},
        "license": "Apache-2.0",
    }


if __name__ == "__main__":
    sys.exit(main())
