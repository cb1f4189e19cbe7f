"""The command line: `faithmap run`, `leaderboard`, `explain`, `train`, `finetune`, `check`, and more.

Exit codes: 0 done; 1 something failed (listed, with reasons); 2 the request was wrong (one
sentence, no traceback); 130 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from faithmap import __version__
from faithmap._memory import keep_freed_memory
from faithmap.errors import FaithmapError, PluginError, RequestError
from faithmap.records import PRIMARY_SCORE

app = typer.Typer(
    name="faithmap",
    help="Which heat map can you trust, on this model and this data, at what cost?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
OUT = Console(emoji=False)
ERR = Console(stderr=True, emoji=False)
if not OUT.is_terminal:
    OUT = Console(width=120, emoji=False)  # a log or a pipe has no width of its own

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A file that registers explainers, metrics or datasets.")
]
# What several commands have in common.
Request = Annotated[
    Path | None, typer.Option(help="A TOML file whose models and datasets are meant by their names.")
]
LearningModel = Annotated[str, typer.Option(help="A model's name, as in --request or with parameters.")]
LearningDataset = Annotated[str, typer.Option(help="The images to learn from, likewise.")]
Part = Annotated[str, typer.Option(help="eval, dev or all.")]
Limit = Annotated[
    int | None, typer.Option(help="Images to learn from, balanced over the classes; by default all.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
Threads = Annotated[int | None, typer.Option(help="Threads on a CPU; by default every core.")]
Workers = Annotated[int, typer.Option(help="Processes that read images; 0 reads them here and keeps them.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever there is.")]
INTERRUPTED, GO_ON = 130, "interrupted; run the same command again to go on from here"
Comma = "Comma list; parameters in brackets: name[key=value]."


def app_main() -> NoReturn:
    """Run the command line and turn every error that we raise into a sentence and an exit code."""
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = app(list(arguments), standalone_mode=False)
    except (RequestError, PluginError) as error:
        return _say(error, 2)
    except FaithmapError as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return _say(GO_ON, INTERRUPTED)
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        shown = getattr(error, "format_message", None)  # click's own complaints about flags
        if shown is None:
            raise
        return _say(shown(), 2)
    if code == INTERRUPTED:  # typer makes an exit of the interrupt
        return _say(GO_ON, code)
    return int(code or 0)


def _say(message: object, code: int) -> int:
    ERR.print(f"faithmap: {message}", markup=False, highlight=False, soft_wrap=True)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"faithmap {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which heat map can you trust, on this model and this data, at what cost?"""


@app.command()
def run(
    request: Annotated[
        str | None,
        typer.Argument(metavar="[PRESET | FILE.toml]", help="What to run; by default the preset quickstart."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help=f"Models, by name as in the request, or file.py:function. {Comma}")
    ] = None,
    datasets: Annotated[str | None, typer.Option(help=f"Datasets. {Comma}")] = None,
    explainers: Annotated[
        str | None, typer.Option(help=f"Explainers, or lines of the request by their labels. {Comma}")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"Metrics, or lines of the request by their labels. {Comma}")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Images of each dataset, balanced over the classes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")] = None,
    part: Annotated[str | None, typer.Option(help="eval, dev or all.")] = None,
    target: Annotated[str | None, typer.Option(help="Class explained: predicted, label or second.")] = None,
    map_grid: Annotated[str | None, typer.Option(help="model, native, or a side in cells.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="auto, or a number of images.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; by default runs/<preset>-<hash>.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Where units run: local.")] = "local",
    plugin: Plugins = None,
    variants: Annotated[
        bool,
        typer.Option("--variants", help="Also say how the order moves under published variants of the test."),
    ] = False,
    save_maps: Annotated[bool, typer.Option("--save-maps", help="Keep the maps under maps/.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop what the folder holds of an earlier run.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never ask the network for weights or data.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and how long; run nothing.")
    ] = False,
) -> None:
    """Run explainers over models and datasets, score every map, and write leaderboards."""
    from faithmap import commands

    config = commands.request(
        request,
        lists={"models": models, "datasets": datasets, "explainers": explainers, "metrics": metrics},
        settings={
            "limit": limit, "seed": seed, "part": part, "target": target, "map_grid": _number(map_grid),
            "device": device, "precision": precision, "batch_size": _number(batch_size),
        },
        plugins=plugin or [],
        offline=offline,
        variants=variants,
    )  # fmt: skip
    if dry_run:
        _exit(commands.dry_run(config, OUT, out=out, fresh=fresh))
    _exit(commands.run(config, OUT, ERR, out=out, engine=engine, fresh=fresh, save_maps=save_maps))


@app.command()
def leaderboard(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that `faithmap run` wrote.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the board, and the rows behind it, here.")] = None,
) -> None:
    """Rebuild every table and figure from the stored rows, without a forward pass."""
    from faithmap import boards

    _exit(boards.rebuild(runs, out, OUT))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that `faithmap run` wrote.")
    ],
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="SOURCE[:TABLE]",
            help="Published figures to compare with, such as scan-2026:table1 (repeatable); by default all.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Instead of papers, one of the run's own lines: every other one's difference from it.",
        ),
    ] = None,
    within: Annotated[
        bool,
        typer.Option("--within", help="Instead of papers, the lines of each method against its first."),
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --against or --within, the score; by default auc_d."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the whole comparison to this Markdown file; of the run's own lines, to .md or .csv."
        ),
    ] = None,
) -> None:
    """Set the order of methods beside the orders that papers print, from the stored rows alone.

    Published tables of CNNs stand beside CNNs, those of transformers beside transformers, where both
    have three methods and a score in common. Prints how far the orders agree; the page names the pairs
    that disagree, and in what each table differs from the run.

    With --against, all lines of the run are set against one of them, image by image: how much better or
    worse each is, with an interval and a p value. With --within, the same of every line that is a method
    with other parameters, against the first line of that method.
    """
    from faithmap import boards

    if [bool(with_), against is not None, within].count(True) > 1:
        raise RequestError(
            "--with compares with papers, --against with a line of the run, --within with the first line of "
            "each method; give one of them"
        )
    if against is None and not within:
        if score is not None:
            raise RequestError("--score goes with --against or --within, which say what to compare with")
        _exit(boards.compare(runs, with_ or [], out, OUT))
    _exit(boards.compare_lines(runs, against, score or PRIMARY_SCORE, out, OUT))


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="explainers, fits, metrics, datasets, models or presets.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list of objects, each with a name.")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """List what can be named in a request."""
    from faithmap import listing

    listing.load_plugins(plugin or [])
    _exit(listing.show(kind, as_json, OUT, ERR))


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Annotated[str, typer.Option(help="A model's name; parameters in brackets.")],
    out: Annotated[Path, typer.Option(help="The figure to write (.png, .pdf or .svg).")],
    explainers: Annotated[str, typer.Option(help=f"Explainers. {Comma}")] = "gradcam",
    target: Annotated[
        int | None, typer.Option(help="The class explained; by default the prediction.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of explainers that draw.")] = 0,
    plugin: Plugins = None,
) -> None:
    """Draw one image with the heat map of each explainer over it, and what an explainer reconstructs."""
    from faithmap import commands, listing

    listing.load_plugins(plugin or [])
    _exit(commands.explain(image, model, explainers, target, out, device, seed, OUT, ERR))


@app.command()
def train(
    explainer: Annotated[
        str, typer.Argument(metavar="EXPLAINER", help="An explainer that is fitted; parameters in brackets.")
    ],
    model: LearningModel,
    dataset: LearningDataset,
    request: Request = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the fit, such as epochs=5; `faithmap list fits` names them all.",
        ),
    ] = None,
    part: Part = "all",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "fp32",
    threads: Threads = None,
    workers: Workers = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the fit; by default the user's.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep the fit in half precision.")] = False,
    fresh: Fresh = False,
    plugin: Plugins = None,
) -> None:
    """Fit an explainer to a model; `faithmap run` finds the fit. The same command goes on after a kill."""
    from faithmap import commands, listing

    listing.load_plugins(plugin or [])
    how = commands.Learning(part, limit, seed, device, precision, threads, workers)
    asked = commands.training(explainer, model, dataset, request, option or [], how)
    _exit(commands.train(asked, OUT, ERR, out=out, half=half, fresh=fresh))


@app.command()
def finetune(
    model: LearningModel,
    dataset: LearningDataset,
    test_dataset: Annotated[
        str | None, typer.Option(help="The images to test on, likewise; by default a share is held out.")
    ] = None,
    request: Request = None,
    train: Annotated[
        str | None, typer.Option(help="head (the default), which leaves the network as it is, or all.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="By default 50 for a head, 10 for all.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="timm's name; by default adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="By default 0.001 for a head, 0.0001 for all.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="By default 0.01.")] = None,
    schedule: Annotated[str | None, typer.Option(help="timm's name; by default cosine.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of a step; by default 64.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="More: augment (none, flip, crop), balanced, label_smoothing, warmup_epochs, min_lr, "
            "momentum, layer_decay, clip_grad, decay_epochs, decay_milestones, decay_rate.",
        ),
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option(help="The share held out, by hash of the ids; by default 0.2.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model is tuned/NAME from then on; by default MODEL-DATASET.")
    ] = None,
    part: Part = "all",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "fp32",
    threads: Threads = None,
    workers: Workers = 0,
    fresh: Fresh = False,
    plugin: Plugins = None,
) -> None:
    """Fine-tune a model to the classes of a dataset; it is tuned/NAME from then on.

    The same command goes on after a kill.
    """
    from faithmap import commands, listing

    listing.load_plugins(plugin or [])
    asked = commands.finetuning(
        model, dataset, test_dataset, request, option or [],
        {
            "train": train, "epochs": epochs, "optimizer": optimizer, "lr": lr,
            "weight_decay": weight_decay, "schedule": schedule, "batch_size": batch_size,
        },
        commands.Learning(part, limit, seed, device, precision, threads, workers),
        name=name, hold_out=hold_out,
    )  # fmt: skip
    _exit(commands.finetune(asked, OUT, ERR, fresh=fresh))


@app.command()
def show(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="A dataset's name, as in --request or with parameters.")
    ],
    request: Request = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the dataset.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose transform is shown; by default a crop of 224 from 256 pixels.")
    ] = None,
    part: Part = "all",
    limit: Annotated[int, typer.Option(help="Samples, balanced over the classes.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="The figure (.png, .pdf or .svg); by default DATASET.png.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Draw samples of a dataset as a model sees them, with their boxes and outlines of their masks."""
    from faithmap import commands, listing

    listing.load_plugins(plugin or [])
    _exit(commands.show(dataset, request, option or [], model, OUT, ERR, part=part, limit=limit, out=out))


@app.command()
def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME | FILE.py | all", help="A plugin's name (parameters in brackets), a file, or all."
        ),
    ],
    models: Annotated[
        str | None, typer.Option(help=f"Models to try explainers on; by default two embedded ones. {Comma}")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the slow check of memory.")] = False,
    only: Annotated[str | None, typer.Option(help="Checks to make, a comma list; by default all.")] = None,
    plugin: Plugins = None,
) -> None:
    """Check what every plugin promises; a failure says what to mend."""
    from faithmap import checking

    _exit(checking.check(what, models, plugin or [], quick, only, OUT, ERR))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="explainer, metric or dataset.")],
    name: Annotated[str, typer.Argument(help="The name in the register: small letters, digits, hyphens.")],
) -> None:
    """Write ./NAME.py, a plugin to begin with; it passes `faithmap check` as it stands."""
    from faithmap import scaffold

    _exit(scaffold.new(kind, name, OUT))


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder that `faithmap run` wrote.")],
) -> None:
    """Say how far a run has come, and what failed."""
    from faithmap import boards

    _exit(boards.status(run_dir, OUT))


@app.command()
def doctor() -> None:
    """Print versions, devices, torchvision's state, plugins that do not load, and caches."""
    from faithmap import diagnosis

    _exit(diagnosis.report(OUT))


def _number(text: str | None) -> Any:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


if __name__ == "__main__":
    app_main()
