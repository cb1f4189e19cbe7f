"""`faithmap finetune`: a head, or a whole network, learns the classes of a dataset, with checkpoints.

With `train = "head"` (linear probing) the network stays as it is. Where its head is one linear layer and no
image is varied, what goes into the head is computed once and kept, and the head learns on that. In every
other case images pass through the network at each step.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faithmap import fitting, tuned
from faithmap.batch import seed_of
from faithmap.config import located
from faithmap.data import LoadedDataset, traces
from faithmap.errors import FaithmapError, RequestError
from faithmap.explaining import describe, full_float32
from faithmap.fitting import Fit
from faithmap.heads import Head, find_head, logits_of, put_head
from faithmap.kept_features import Kept, keep
from faithmap.learning_record import NAMED, circumstances, curve_csv, data_entry, device_name
from faithmap.models import Model
from faithmap.records import Sample, Spec, digest
from faithmap.store import write_bytes
from faithmap.training import (
    EVERY,
    Session,
    Silent,
    TrainingData,
    Watcher,
    check_finite,
    check_readable,
    making,
    stoppable,
)  # fmt: skip
from faithmap.tuning_options import augmented, make_optimizer, make_scheduler

#: Raised when what is learnt from the same request changes.
VERSION = 1


@dataclass(frozen=True)
class Finetuning:
    """A checked request: a model, what it learns from, what it is tested on, and how."""

    name: str
    model: Model
    #: Name and parameters that the architecture is built from again.
    base: Mapping[str, Any]
    dataset: LoadedDataset
    samples: tuple[Sample, ...]
    test_dataset: LoadedDataset
    test_samples: tuple[Sample, ...]
    #: As `faithmap.tuning_options.finetune_options` gives them.
    options: Mapping[str, Any]
    part: str = "all"
    limit: int | None = None
    #: The share of the dataset that is held out for the test; None where the test has a dataset of its own.
    hold_out: float | None = None
    seed: int = 0
    precision: str = "fp32"
    workers: int = 0

    def __post_init__(self) -> None:
        if len(self.present) < 2:
            raise RequestError(
                f"dataset '{self.dataset.label}': the {len(self.samples)} images to learn from are all of "
                "one class; give images of two classes or more"
            )

    @cached_property
    def head(self) -> Head:
        """Where the model's logits are made."""
        size = self.model.input_size
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.model.device)
        try:
            return find_head(self.model.module, self.model.normalise(images))
        except RequestError as error:
            raise RequestError(f"model '{self.model.name}': {error}") from error

    @property
    def present(self) -> set[int]:
        """The classes that there are images to learn from of."""
        return {sample.label for sample in self.samples if sample.label is not None}

    @cached_property
    def classes(self) -> int:
        """The number of classes: as many as have names, or the largest label and one."""
        labels = [sample.label or 0 for sample in (*self.samples, *self.test_samples)]
        return max(len(self.dataset.class_names or ()), max(labels) + 1)

    @property
    def class_names(self) -> list[str] | None:
        """The classes in words, by label; blank where the dataset has no word."""
        names = list(self.dataset.class_names or ())
        return [*names, *[""] * (self.classes - len(names))] if names else None

    @cached_property
    def key(self) -> str:
        """The key of how the weights come about; the images of the test have no part in it."""
        ids = [(sample.id, sample.label) for sample in self.samples]
        found = digest(
            "finetune", VERSION, self.model.weights_digest(), tuned.transform_of(self.model), self.base,
            self.dataset.key, ids, self.classes, dict(self.options), self.seed, self.precision, length=11,
        )  # fmt: skip
        return f"t{found}"  # a letter first: on the command line it is no number

    @property
    def test_key(self) -> str:
        """The key of the images of the test."""
        ids = [(sample.id, sample.label) for sample in self.test_samples]
        return digest(self.test_dataset.key, ids, length=12)

    @property
    def file(self) -> Path:
        """Where the fine-tuned model lies."""
        return tuned.folder() / f"{self.name}-{self.key}{fitting.SUFFIX}"


def base_of(spec: Spec, model: Model) -> dict[str, Any]:
    """Name and parameters that the architecture of a request's model is built from again.

    Weights and transform are left out: they are in the fine-tuned file. Of a model that was fine-tuned
    itself it is what that one was built from.
    """
    if model.tuned:
        return dict(model.tuned["base"])
    name, params = located(spec)
    own = () if ".py:" in name else ("weights", "head", "pretrained", "revision", *tuned.KEYS)
    return {"name": name, "params": {key: value for key, value in params.items() if key not in own}}


def labelled(dataset: LoadedDataset, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The samples that have a label.

    Raises:
        RequestError: none has.
    """
    found = tuple(sample for sample in samples if sample.label is not None)
    if not found:
        raise RequestError(f"dataset '{dataset.label}' has no labels, so there is nothing to learn from it")
    return found


def refuse_overlap(
    dataset: LoadedDataset, samples: Sequence[Sample], test: LoadedDataset, test_samples: Sequence[Sample]
) -> None:
    """Refuse to test on images that are learnt from.

    Raises:
        RequestError: there are such images.
    """
    learnt = set(traces(dataset, samples))
    known = zip(test_samples, traces(test, test_samples), strict=True)
    both = [sample.id for sample, trace in known if trace in learnt]
    if both:
        raise RequestError(
            f"{len(both)} of the {len(test_samples)} images of '{test.label}' are among those to learn from, "
            f"'{min(both)}' for one; name another --test-dataset, or leave it out: a share is then held out"
        )


def finetune(
    request: Finetuning, watcher: Watcher | None = None, *, fresh: bool = False, every: float = EVERY
) -> Fit:
    """Fine-tune, test, keep the model, and return its record; what is there already is not made again.

    A killed one goes on from its last checkpoint when the same request is made again. The request's own
    model is left as it is.

    Args:
        request: what learns what.
        watcher: is told how it goes on.
        fresh: begin anew, whatever there is.
        every: seconds between two checkpoints.

    Raises:
        RequestError: the model has no head to replace, no image can be read, or another process makes it.
        FaithmapError: it failed, or ended in NaN.
    """
    file, watcher = request.file, watcher or Silent()
    with making(file, "see that it can be written to"), full_float32():
        if file.is_file() and not fresh:
            made = tuned.read(file)
        else:
            made = _make(request, watcher, fresh, every)
        if dict(made.record.get("test") or {}).get("key") != request.test_key:
            test = _test(request, tuned.load(str(file), {}), watcher)
            made = fitting.write(file, made.tensors(), {**made.record, "test": test})
    return made


def _make(request: Finetuning, watcher: Watcher, fresh: bool, every: float) -> Fit:
    file, checkpoint = request.file, request.file.with_suffix(".checkpoint")
    shelf = file.with_suffix(".features")
    if fresh:
        checkpoint.unlink(missing_ok=True)
        _clear(shelf)
    title = f"{tuned.SOURCE}/{request.name} · {request.model.name} · {request.dataset.label}"
    on = device_name(request.model)
    session = Session(request.seed, request.precision, checkpoint, watcher, every, title=title, device=on)
    head = request.head
    module = copy.deepcopy(request.model.module)
    put_head(module, head.layers, request.classes, seed_of(request.seed, "head") % 2**31)
    model = request.model.around(module, request.class_names)
    model.precision = request.precision
    cached = request.options["train"] == "head" and head.direct and request.options["augment"] == "none"
    try:
        with stoppable(session), torch.enable_grad():
            source: Kept | TrainingData
            if cached:
                source = keep(model, head, request.samples, session, shelf, request.workers)
            else:
                source = TrainingData(request.samples, model, request.seed, request.workers)
                session.unreadable = source.unreadable
            _learn(request, model, head, source, session)
    except (FaithmapError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise FaithmapError(f"fine-tuning '{request.model.name}' failed: {describe(error)}") from error
    finally:
        watcher.end()
    check_readable(source)  # type: ignore[arg-type]
    module.eval()
    tensors = {name: value.detach().clone() for name, value in module.state_dict().items()}
    check_finite(tensors, f"fine-tuning '{request.model.name}'")
    made = fitting.write(file, tensors, _record(request, session, source.unreadable))
    write_bytes(file.with_suffix(".csv"), curve_csv(session.curve).encode())
    checkpoint.unlink(missing_ok=True)
    _clear(shelf)
    return made


def _clear(shelf: Path) -> None:
    shutil.rmtree(shelf, ignore_errors=True)


def _learn(
    request: Finetuning, model: Model, head: Head, source: Kept | TrainingData, session: Session
) -> None:
    """Take all steps of the optimiser that are left."""
    options, module = request.options, model.module
    layers = [module.get_submodule(name) for name in head.layers]
    whole = options["train"] == "all"
    learning = module if whole else nn.ModuleList(layers)
    module.requires_grad_(whole)
    learning.requires_grad_(True)
    optimizer = make_optimizer(learning, options)
    batch, epochs = int(options["batch_size"]), int(options["epochs"])
    per_epoch = source.steps(batch)
    scheduler = make_scheduler(optimizer, options, per_epoch)
    state = session.resume()
    done = 0
    if state is not None:
        with session.restoring():
            done = int(state["step"])
            learning.load_state_dict(state["learning"])
            optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None and done:
        scheduler.step_update(done)
    weights = _class_weights(request).to(model.device) if options["balanced"] else None
    loss_of = nn.CrossEntropyLoss(weight=weights, label_smoothing=float(options["label_smoothing"]))
    devices = [model.device] if model.device.type == "cuda" else []
    step = done
    with torch.random.fork_rng(devices=devices):
        for epoch in range(done // per_epoch, epochs):
            for inputs, labels in source.batches(batch, epoch, start=step - epoch * per_epoch):
                step += 1
                if not len(labels):
                    continue
                torch.manual_seed(seed_of(request.seed, "step", str(step)))  # of dropout, resumed or not
                if whole:  # a single image has no statistics for batch normalisation
                    module.train(len(labels) > 1)
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(_logits(request, model, layers, inputs, step), labels)
                loss.backward()
                if options["clip_grad"]:
                    nn.utils.clip_grad_norm_(learning.parameters(), float(options["clip_grad"]))
                rate = float(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if scheduler is not None:
                    scheduler.step_update(step)
                session.report(step, epochs * per_epoch, {"loss": float(loss.detach()), "lr": rate})
                session.checkpoint(partial(_state, step, learning, optimizer))


def _state(step: int, learning: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"step": step, "learning": learning.state_dict(), "optimizer": optimizer.state_dict()}


def _logits(request: Finetuning, model: Model, layers: Sequence[nn.Module], inputs: Any, step: int) -> Tensor:
    if not isinstance(inputs, Tensor):  # what goes into the head
        return logits_of(layers, inputs)
    generator = torch.Generator().manual_seed(seed_of(request.seed, "augment", str(step)))
    logits: Tensor = model(augmented(inputs, str(request.options["augment"]), generator))
    return logits


def _class_weights(request: Finetuning) -> Tensor:
    """Weights that make each class count alike: one over its number of images; 0 where it has none."""
    labels = torch.tensor([sample.label for sample in request.samples])
    counts = torch.bincount(labels, minlength=request.classes).float()
    return torch.where(counts > 0, len(labels) / (counts.clamp(min=1) * len(request.present)), 0.0)


def _record(request: Finetuning, session: Session, unreadable: Mapping[str, str]) -> dict[str, Any]:
    model = request.model
    return {
        "key": request.key,
        "name": request.name,
        "base": dict(request.base),
        "head": list(request.head.layers),
        "classes": request.classes,
        "class_names": request.class_names,
        "without_images": request.classes - len(request.present),
        "model": {
            "name": model.name, "weights": model.weights_digest(), "transform": tuned.transform_of(model),
            **model.asked,
        },
        "options": dict(request.options),
        "data": data_entry(
            request.dataset, request.samples, unreadable, part=request.part, limit=request.limit
        ),
        **circumstances(session, model),
    }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How many images of each class were recognised."""

    hits: Tensor
    counts: Tensor
    level: float = field(default=0.95)

    @property
    def figures(self) -> dict[str, float]:
        """Accuracy and balanced accuracy in percent, with 95% intervals.

        Accuracy has Wilson's. Balanced accuracy is the mean of the recalls of all classes with images;
        its interval adds up the distances to the ends of their Wilson intervals in squares (Zou and Donner
        2008, MOVER). A class of one or two images makes it wide, as it should.
        """
        from faithmap.stats import wilson

        there = self.counts > 0
        hits, counts = self.hits[there].double(), self.counts[there].double()
        recall = hits / counts
        low, high = (torch.from_numpy(end) for end in wilson(hits.numpy(), counts.numpy(), self.level))
        balanced, classes = float(recall.mean()), len(recall)
        below = float((recall - low).square().sum().sqrt()) / classes
        above = float((high - recall).square().sum().sqrt()) / classes
        share = float(hits.sum() / counts.sum())
        ends = [float(end) for end in wilson(float(hits.sum()), float(counts.sum()), self.level)]
        values = {
            "accuracy": share, "accuracy_low": ends[0], "accuracy_high": ends[1],
            "balanced_accuracy": balanced, "balanced_accuracy_low": max(balanced - below, 0.0),
            "balanced_accuracy_high": min(balanced + above, 1.0),
        }  # fmt: skip
        return {name: round(100 * value, 4) for name, value in values.items()}


def _test(request: Finetuning, model: Model, watcher: Watcher) -> dict[str, Any]:
    """Classify the images of the test."""
    model.to(request.model.device)
    model.precision = request.precision
    data = TrainingData(request.test_samples, model, request.seed, request.workers)
    size = int(request.options["batch_size"])
    hits = torch.zeros(request.classes, dtype=torch.long)
    counts = torch.zeros(request.classes, dtype=torch.long)
    watcher.begin(f"test · {request.test_dataset.label}", data.steps(size), 0)
    try:
        with torch.no_grad():
            for step, (images, labels) in enumerate(data.batches(size, 0, shuffle=False), 1):
                if len(labels):
                    right = model(images).argmax(1) == labels
                    counts += torch.bincount(labels.cpu(), minlength=request.classes)
                    hits += torch.bincount(labels[right].cpu(), minlength=request.classes)
                watcher.step(step, {"accuracy": 100 * float(hits.sum()) / max(int(counts.sum()), 1)})
    finally:
        watcher.end()
    check_readable(data)
    return {
        "key": request.test_key,
        "dataset": request.test_dataset.label,
        "revision": request.test_dataset.revision,
        "hold_out": request.hold_out,
        "images": int(counts.sum()),
        "unreadable": len(data.unreadable),
        "unreadable_ids": sorted(data.unreadable)[:NAMED],
        **Outcome(hits, counts).figures,
        "hits": hits.tolist(),
        "counts": counts.tolist(),
    }
