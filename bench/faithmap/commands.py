"""What `faithmap run`, `train`, `finetune`, `show` and `explain` do, behind their flags."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from faithmap.config import Config, RunSettings, load_config, parse_spec, split_list, write_spec
from faithmap.errors import DataError, FaithmapError, RequestError, nearest
from faithmap.listing import load_plugins
from faithmap.records import Sample, Spec

#: Images that could not be read are named up to this many.
SHOWN_NAMES = 8

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.data import LoadedDataset
    from faithmap.finetuning import Finetuning
    from faithmap.fitting import Fit
    from faithmap.models import Model
    from faithmap.training import Training


def request(
    source: str | None,
    lists: Mapping[str, str | None],
    settings: Mapping[str, Any],
    plugins: Sequence[Path],
    offline: bool,
    variants: bool = False,
) -> Config:
    """Turn the flags of `faithmap run` into a `Config`."""
    if offline:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[variable] = "1"
    load_plugins(plugins)
    given = {}
    for key, text in lists.items():
        if text is None:
            continue
        given[key] = split_list(text)
        if not given[key]:
            raise RequestError(f"--{key} is empty; give a comma list of names")
    config = load_config(source).with_run(**settings).with_lists(**given)
    return config.with_variants() if variants else config


def run(
    config: Config,
    console: Console,
    errors: Console,
    *,
    out: Path | None,
    engine: str,
    fresh: bool,
    save_maps: bool,
) -> int:
    """Run, print the summary, and return 1 where anything failed."""
    from faithmap import boards, progress, runner
    from faithmap.boards import print_failures, print_summary

    started = time.monotonic()
    done = runner.run(
        config, out=out, observer=progress.observer(errors), fresh=fresh, engine=engine, save_maps=save_maps
    )
    print_summary(done.path, console)
    if config.published:
        boards.compare([done.path], config.published, None, console)
    if config.variants:
        boards.print_variants(done.path, console)
    console.print(f"done in {progress.clock(time.monotonic() - started)}", highlight=False)
    for line in boards.unfitted(done.path):
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
    for file in done.written:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    return print_failures(done.path, errors) or int(bool(done.failed_fits))


def dry_run(config: Config, console: Console, *, out: Path | None = None, fresh: bool = False) -> int:
    """Say what a run would compute, with times measured on two images.

    Args:
        config: the request.
        console: where the answer goes.
        out: the run's folder, as for `run`; what it holds is not computed again.
        fresh: what it holds would be dropped.
    """
    from faithmap import progress
    from faithmap.estimate import estimate

    plan = estimate(config, out, fresh=fresh)
    for line in plan.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    already = f"{plan.stored} of them stored already; for the others " if plan.stored else ""
    console.print(
        f"in all {plan.units} units, {already}about {plan.forwards:,.0f} images forwarded, "
        f"{progress.clock(plan.seconds)} (measured on two images of each model and dataset)",
        highlight=False,
        soft_wrap=True,
    )
    return 0


@dataclass(frozen=True, slots=True)
class Learning:
    """The flags that `faithmap train` and `faithmap finetune` have in common."""

    part: str = "all"
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    threads: int | None = None
    workers: int = 0

    def settings(self) -> RunSettings:
        """Checked settings; the threads are set.

        Its limit means nothing: without the flag it is that of the default run, which is for scoring.
        """
        import torch

        from faithmap.runner import usable_cores

        given = {key: getattr(self, key) for key in ("part", "limit", "seed", "device", "precision")}
        settings = load_config(None).with_run(**given).run
        if self.workers < 0 or (self.threads is not None and self.threads < 1):
            raise RequestError(
                f"--workers {self.workers}, --threads {self.threads}: expected 0 or more, and 1 or more"
            )
        torch.set_num_threads(self.threads or usable_cores())
        return settings


def training(
    explainer: str, model: str, dataset: str, request: Path | None, options: Sequence[str], how: Learning
) -> Training:
    """Turn the flags of `faithmap train` into a checked request, its model on the device."""
    from faithmap.config import parse_option
    from faithmap.explaining import EVERYTHING, undefined
    from faithmap.plan import load_named
    from faithmap.registry import get
    from faithmap.runner import resolve_device
    from faithmap.training import Training, fit_options

    spec = parse_spec(explainer)
    plugin = get("explainer", spec.name)
    params = plugin.check(spec.params)
    settings = how.settings()
    checked = fit_options(plugin, dict(parse_option(text) for text in options))
    network = load_named(_of_request(request, "models", model))
    reason = undefined(plugin, network, EVERYTHING, params)
    if reason:
        raise RequestError(f"explainer '{plugin.name}': {reason}")
    images, samples = _images(_of_request(request, "datasets", dataset), how.part, how.limit)
    network.to(resolve_device(settings.device)).eval()
    return Training(
        plugin, params, network, images, samples, checked, settings.part, how.limit, settings.seed,
        settings.precision, how.workers,
    )  # fmt: skip


def finetuning(
    model: str,
    dataset: str,
    test_dataset: str | None,
    request: Path | None,
    options: Sequence[str],
    flags: Mapping[str, Any],
    how: Learning,
    *,
    name: str | None,
    hold_out: float | None,
) -> Finetuning:
    """Turn the flags of `faithmap finetune` into a checked request, its model on the device.

    `flags` are options that have a flag of their own; those that are None are not given.
    """
    from faithmap import tuned
    from faithmap.config import parse_option
    from faithmap.data import held_out
    from faithmap.finetuning import Finetuning, base_of, labelled, refuse_overlap
    from faithmap.plan import load_named
    from faithmap.runner import resolve_device
    from faithmap.tuning_options import finetune_options

    settings = how.settings()
    given = {key: value for key, value in flags.items() if value is not None}
    checked = finetune_options({**dict(parse_option(text) for text in options), **given})
    if hold_out is not None and (test_dataset is not None or not 0 < hold_out < 1):
        raise RequestError(
            f"--hold-out {hold_out}: expected a share between 0 and 1, and no --test-dataset beside it"
        )
    spec = _of_request(request, "models", model)
    images, samples = _images(_of_request(request, "datasets", dataset), how.part, how.limit)
    samples = labelled(images, samples)
    if test_dataset is None:
        hold_out = 0.2 if hold_out is None else hold_out
        samples, test_samples = held_out(samples, hold_out)
        test_images = images
    else:
        test_images, test_samples = _images(_of_request(request, "datasets", test_dataset), how.part, None)
        test_samples = labelled(test_images, test_samples)
        refuse_overlap(images, samples, test_images, test_samples)
    if not samples or not test_samples:
        raise RequestError(
            f"dataset '{images.label}': of {len(images.samples)} images {len(samples)} are left to "
            f"learn from and {len(test_samples)} to test on; give more images, another --hold-out, or "
            "--test-dataset"
        )
    network = load_named(spec)
    by_itself = f"{spec.title.rpartition('/')[2]}-{images.label}"
    called = tuned.usable_name(name or by_itself, asked=name is not None)
    network.to(resolve_device(settings.device)).eval()
    return Finetuning(
        called, network, base_of(spec, network), images, samples, test_images, test_samples, checked,
        settings.part, how.limit, hold_out, settings.seed, settings.precision, how.workers,
    )  # fmt: skip


def _images(spec: Spec, part: str, limit: int | None) -> tuple[LoadedDataset, tuple[Sample, ...]]:
    """A dataset, and what is taken of it."""
    from faithmap.data import choose, load_dataset

    images = load_dataset(spec)
    return images, choose(images.samples, part, limit)


def show(
    dataset: str,
    request: Path | None,
    options: Sequence[str],
    model: str | None,
    console: Console,
    errors: Console,
    *,
    part: str,
    limit: int,
    out: Path | None,
) -> int:
    """Write the figure of a dataset's first samples, boxes and masks drawn."""
    from faithmap import showing
    from faithmap.config import PATH_KEYS, located, parse_option

    settings = load_config(None).with_run(part=part, limit=limit).run
    spec = _of_request(request, "datasets", dataset)
    given = located(Spec(spec.name, dict(parse_option(text) for text in options)))[1]
    # What is typed is relative to where it is typed, whatever file names the dataset.
    given = {
        key: str(Path(value).absolute()) if key in PATH_KEYS and isinstance(value, str) else value
        for key, value in given.items()
    }
    network = _of_request(request, "models", model) if model is not None else None
    return showing.show(
        spec, given, network, part=settings.part, limit=settings.limit or limit, out=out, console=console,
        errors=errors,
    )  # fmt: skip


def _of_request(request: Path | None, kind: str, name: str) -> Spec:
    """A model or dataset as a TOML file names it, else as it is written."""
    if request is None:
        return parse_spec(name)
    specs = getattr(load_config(str(request)), kind)
    for spec in specs:
        if spec.title == name:
            found: Spec = spec
            return found
    raise RequestError(
        f"{request} names no {kind[:-1]} '{name}'; {nearest(name, [spec.title for spec in specs])}"
    )


def train(
    asked: Training, console: Console, errors: Console, *, out: Path | None, half: bool, fresh: bool
) -> int:
    """Fit, and say where the fit lies and how it is used."""
    from faithmap import progress
    from faithmap import training as fits
    from faithmap.fitting import counts, spec_text, told_images
    from faithmap.learning_record import told_counts

    started = time.monotonic()
    made = fits.train(asked, progress.watcher(errors), out=out, half=half, fresh=fresh)
    record = made.record
    taken = progress.clock(time.monotonic() - started)
    data = record["data"]
    images = told_images(data["images"], data.get("seen"))
    said = [
        f"{record['explainer']} fitted to {record['model']['name']} on {images} of {data['dataset']}: "
        f"{record['params_added']:,} parameters, {record['seconds']:.0f} s of fitting ({taken} now)"
    ]
    said += told_counts(record, counts(asked.plugin)) + _unreadable(data)
    params = {**asked.params, "fitted": str(made.path)} if out else asked.params
    spec = shlex.quote(spec_text(asked.plugin, params))
    said += [_where(made), f"fit {made.key}: `faithmap run --explainers {spec}` takes it"]
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _unreadable(*parts: Mapping[str, Any]) -> list[str]:
    """A line that names images which were to be learnt from, or tested on, and could not be read."""
    number = sum(part["unreadable"] for part in parts)
    names = [name for part in parts for name in part.get("unreadable_ids", ())]
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if number > SHOWN_NAMES else "")
    counted = (
        "1 image could not be read and was" if number == 1 else f"{number} images could not be read and were"
    )
    return [f"{counted} left out: {shown}"] if number else []


def _where(made: Fit) -> str:
    """Where the outcome lies: written just now, or found as it was asked for."""
    return f"wrote {made.path}" if made.written else f"{made.path} was there already"


def finetune(asked: Finetuning, console: Console, errors: Console, *, fresh: bool) -> int:
    """Fine-tune, and say how well it went, where the model lies and how it is used."""
    from faithmap import finetuning, progress, tuned

    started = time.monotonic()
    made = finetuning.finetune(asked, progress.watcher(errors), fresh=fresh)
    record, test = made.record, made.record["test"]
    data, options = record["data"], record["options"]
    taken = progress.clock(time.monotonic() - started)
    whole = "the whole network" if options["train"] == "all" else "the head"
    said = [
        f"{whole} of {record['model']['name']} fine-tuned to {record['classes']} classes on {data['images']} "
        f"images of {data['dataset']}: {record['steps']} steps, {record['seconds']:.0f} s ({taken} now)",
        f"{test['images']} images of {test['dataset']}"
        + (" that were held out" if test["hold_out"] else "")
        + f": accuracy {_interval(test, 'accuracy')}, "
        f"balanced accuracy {_interval(test, 'balanced_accuracy')}",
    ]
    said += _unreadable(data, test)
    if record["without_images"]:
        said.append(
            f"{record['without_images']} of the {record['classes']} classes have no image to learn from; "
            "where labels are another model's, a class map makes them 0, 1, ..."
        )
    others = [file for file in tuned.known().get(asked.name, ()) if file != made.path]
    name = f"{tuned.SOURCE}/{asked.file.stem if others else asked.name}"
    said += [_where(made), f"`faithmap run --models {shlex.quote(name)}` takes it"]
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _interval(test: Mapping[str, Any], score: str) -> str:
    return f"{test[score]:.1f}% ({test[f'{score}_low']:.1f} to {test[f'{score}_high']:.1f})"


def explain(
    image: Path,
    model: str,
    explainers: str,
    target: int | None,
    out: Path,
    device: str,
    seed: int,
    console: Console,
    errors: Console,
) -> int:
    """Write the figure of one image under several explainers; 1 where one of them failed."""
    from faithmap import heatmaps
    from faithmap.models import load_model
    from faithmap.registry import get
    from faithmap.runner import resolve_device
    from faithmap.transforms import prepare

    if not image.is_file():
        raise RequestError(f"no such image: {image}")
    heatmaps.check_target(out)
    specs = [parse_spec(text) for text in split_list(explainers)]
    if not specs:
        raise RequestError("--explainers is empty; give a comma list of names")
    for spec in specs:
        get("explainer", spec.name).check(spec.params)
    model_spec = parse_spec(model)
    network = load_model(model_spec.name, **model_spec.params).to(resolve_device(device))
    try:
        prepared = prepare(Sample(id=image.name, image=image), network.transform)
    except DataError as error:
        raise RequestError(f"{error}; give an image file") from error
    batch = prepared.image.unsqueeze(0).to(network.device)
    logits = heatmaps.logits(network, batch)
    chosen = int(logits.argmax()) if target is None else target
    if not 0 <= chosen < len(logits):
        raise RequestError(
            f"--target {chosen} is out of range; the model has {len(logits)} classes (0 to {len(logits) - 1})"
        )
    panels, failed = _panels(network, batch, chosen, specs, seed, console, errors)
    heatmaps.draw(prepared.image, panels, heatmaps.title(network, logits, chosen), out)
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _panels(
    network: Model,
    batch: Tensor,
    target: int,
    specs: Sequence[Spec],
    seed: int,
    console: Console,
    errors: Console,
) -> tuple[list[tuple[str, Tensor]], bool]:
    """What is drawn of one image (1, 3, H, W), with titles; and whether something is missing.

    Raises:
        FaithmapError: nothing can be drawn.
    """
    from faithmap import api

    panels: list[tuple[str, Tensor]] = []
    failed: list[FaithmapError] = []
    names = [spec.title for spec in specs]
    for spec in specs:
        try:
            asked = api.ask(network, batch, [target], spec.name, seed, spec.params)
            maps, notes = asked.maps()
        except FaithmapError as error:  # the other panels do not suffer
            failed.append(error)
            continue
        # Of one explainer with several settings, the settings tell the panels apart.
        title = spec.title if names.count(spec.title) == 1 else write_spec(spec.name, spec.params)
        panels.append((title.replace("[", "\n[", 1), maps[0]))
        for note in notes:
            console.print(f"{title}: {note}", markup=False, highlight=False, soft_wrap=True)
        if not asked.reconstructs:
            continue
        try:
            panels.append((f"{title}:\nreconstruction", asked.reconstruction()[0]))
        except FaithmapError as error:
            failed.append(error)
    if not panels:
        raise failed[0]
    for reason in failed:
        errors.print(f"not drawn: {reason}", markup=False, highlight=False, soft_wrap=True)
    return panels, bool(failed)
