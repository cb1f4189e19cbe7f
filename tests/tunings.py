"""Requests to fine-tune to some shapes, for tests."""

from __future__ import annotations

from typing import Any

from faithmap import tuning_options
from faithmap.data import choose, held_out, load_dataset
from faithmap.finetuning import Finetuning
from faithmap.models import Model
from faithmap.records import Spec

RESNET = {"name": "shapes/resnet", "params": {}}
ORDER = ["--model", "shapes/resnet", "--dataset", "shapes[split=train,n=24]", "--epochs", "2",
         "--name", "mine", "--threads", "1"]  # fmt: skip


def asked(model: Model, n: int = 16, **changes: Any) -> Finetuning:
    """A request to fine-tune to some shapes, a quarter of them held out."""
    dataset = load_dataset(Spec("shapes", {"split": "train", "n": n}))
    samples, tested = held_out(choose(dataset.samples, "all", None), 0.25)
    options = tuning_options.finetune_options({"epochs": 2, "batch_size": 5, **changes.pop("options", {})})
    base = changes.pop("base", RESNET)
    return Finetuning("mine", model, base, dataset, samples, dataset, tested, options, **changes)
