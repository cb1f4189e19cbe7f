"""`--variants`: every variant is what a run of its own gives, nothing is computed twice, and the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_cnn
from rich.console import Console

import faithmap
from faithmap import boards, multiverse, registry, units
from faithmap.batch import Batch
from faithmap.config import VariantSettings, load_config
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, explain_batch
from faithmap.models import Model
from faithmap.orders import READINGS, read_orders
from faithmap.records import Sample
from faithmap.store import RunStore

IMAGES = 8
EXPLAINED: list[int] = []
FILLS = ("black", "mean")
GRIDS = ("model", "native", 4)


def noise_images() -> torch.Tensor:
    return torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def plugins(own_plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two datasets are known, and images explained are counted, while a test runs."""

    def counting(call: Any, network: Model, batch: Batch) -> MapSet:
        EXPLAINED.append(len(batch))
        return explain_batch(call, network, batch)

    monkeypatch.setattr(units, "explain_batch", counting)
    EXPLAINED.clear()

    @registry.dataset(version=1, source="a test", license="CC0", revision="1")
    def noisy() -> list[Sample]:
        """Noise with labels, which a network that has learnt nothing rarely meets."""
        return [Sample(f"n-{i}", image, i % 5) for i, image in enumerate(noise_images())]

    @registry.dataset(version=1, source="a test", license="CC0", revision="1", gives=())
    def unlabelled() -> list[Sample]:
        """The same without labels."""
        return [Sample(f"n-{i}", image) for i, image in enumerate(noise_images())]


def model() -> Model:
    made = make_cnn()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # classes change as pixels go
    return made


def config(dataset: str = "noisy", variants: Any = None, **run: Any) -> dict[str, Any]:
    chosen = {"fills": list(FILLS), "map_grids": list(GRIDS)} if variants is None else variants
    return {
        "run": {"limit": IMAGES, "part": "all", "batch_size": 4, "device": "cpu", "threads": 1,
                "own_nulls": [], "null_draws": 1, **run},
        "datasets": [dataset],
        "explainers": ["gradcam", "saliency", "centre"],
        "metrics": ["perturbation"],
        **({"variants": chosen} if chosen else {}),
    }  # fmt: skip


def run(out: Path, network: Model | None = None, **changes: Any) -> faithmap.Run:
    return faithmap.run(config(**changes), models=[network or model()], out=out, figures=False)


def runs_of_their_own(out: Path, target: str, grid: str) -> pd.DataFrame:
    """Mean AUC-D by explainer and score, by the ordinary way of asking for the variants of one grid."""
    request = config(variants=False, target=target, map_grid=int(grid) if grid.isdigit() else grid)
    request["metrics"] = [
        {"name": "perturbation", "fill": fill, "span": span, "steps": steps, "label": f"{fill} {span}"}
        for fill in FILLS
        for span, steps in ((0.9, 9), (1.0, 10))
    ]
    rows = faithmap.run(request, models=[model()], out=out, figures=False).rows()
    rows = rows[rows["metric"].str.startswith("auc_d")]
    means: pd.DataFrame = rows.groupby(["explainer", "metric"])["value"].mean().unstack()
    return means


def test_every_variant_is_what_a_run_of_its_own_gives(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    (orders,) = read_orders(done.path, resamples=50)
    assert orders.methods == ("gradcam", "saliency")
    assert len(orders.variants) == 2 * 3 * 2 * 2 * 3 == len(set(orders.variants))
    wrong = done.rows().drop_duplicates("image_id").eval("label != predicted").sum()
    assert 0 < wrong < IMAGES
    for target in ("predicted", "label"):
        for grid in map(str, GRIDS):
            means = runs_of_their_own(tmp_path / f"{target}-{grid}", target, grid)
            here = [v for v in orders.variants if (v.target, v.map_grid) == (target, grid)]
            assert len(here) == 2 * 2 * 3
            for v in here:
                suffix, label = READINGS[v.reading], f"{v.fill} {v.span}"
                score = f"auc_d{suffix}" + (("-" if suffix else "@") + label) * (label != "black 0.9")
                found = orders.means[orders.variants.index(v)]
                assert found == pytest.approx(means.loc[list(orders.methods), score], abs=1e-4)


def test_the_runs_own_variant_comes_first_and_agrees_with_its_board(tmp_path: Path) -> None:
    done = run(tmp_path / "run", target="label", map_grid="native")
    (orders,) = read_orders(done.path, resamples=50)
    own = orders.variants[0]
    assert (own.target, own.map_grid, own.fill, own.span) == ("label", "native", "black", 0.9)
    board = done.leaderboard().set_index("explainer")["auc_d"]
    assert orders.means[0] == pytest.approx(board[list(orders.methods)], abs=1e-4)


def test_maps_and_passes_are_shared(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    rows = done.rows().drop_duplicates("image_id")
    wrong = int((rows["label"] != rows["predicted"]).sum())
    # Three grids and two fills see each map of two methods that the run has made, whose labels are
    # explained where they differ. A control and a null are made for the run; the null, which is drawn on
    # the grid, for each grid and class as well.
    methods, own, null = 2 * (IMAGES + wrong), 2 * IMAGES, 3 * (IMAGES + wrong)
    assert sum(EXPLAINED) == methods + own + null
    assert not (done.path / "variants" / "maps").exists()
    EXPLAINED.clear()
    network = model()
    with network.counting() as meter:
        run(tmp_path / "run", network)
    assert (meter.forwards, EXPLAINED) == (0, [])


def test_what_is_lost_is_computed_again_and_nothing_else(tmp_path: Path) -> None:
    done = run(tmp_path / "run")
    before = (done.path / "variants.csv").read_bytes()
    store = RunStore(done.path / "variants")
    lost = sorted(store.rows_path.rglob("*.parquet"))[:3]
    for file in lost:
        file.unlink()
    network = model()
    with network.counting() as meter:
        run(tmp_path / "run", network)
    assert 0 < meter.forwards <= len(lost) * (4 * (2 * 2 * 10 + 1) + 8)
    assert (done.path / "variants.csv").read_bytes() == before
    faithmap.run(config(variants=False), models=[model()], out=done.path, figures=False, fresh=True)
    assert not (done.path / "variants").exists()


def test_without_labels_two_axes_are_shorter(tmp_path: Path) -> None:
    (orders,) = read_orders(run(tmp_path / "run", dataset="unlabelled").path, resamples=50)
    assert {v.target for v in orders.variants} == {"predicted"}
    assert {v.reading for v in orders.variants} == {"agreement", "probability"}
    assert orders.images == IMAGES


def test_a_grid_that_is_the_models_own_is_not_counted_twice(tmp_path: Path) -> None:
    assert model().grid == (8, 8)
    done = run(tmp_path / "run", variants={"map_grids": ["model", 8], "fills": ["black"]})
    (orders,) = read_orders(done.path, resamples=50)
    assert {v.map_grid for v in orders.variants} == {"model"}


def test_a_method_that_fails_is_left_out_with_the_reason(tmp_path: Path) -> None:
    @registry.explainer(version=1, source="a test", forwards=0, backwards=0, class_specific=False)
    def moody(model: Model, batch: Batch) -> torch.Tensor:
        """Raises on one image."""
        if "n-3" in batch.ids:
            raise ValueError("not this one")
        return batch.images.mean(1)

    request = config(variants={"map_grids": ["model"], "fills": ["black"]})
    request["explainers"].append("moody")
    done = faithmap.run(request, models=[model()], out=tmp_path / "run", figures=False)
    (orders,) = read_orders(done.path, resamples=50)
    assert orders.methods == ("gradcam", "saliency")
    assert orders.left_out == {"moody": "failed on 12.5% of the images"}


def test_a_request_may_be_widened(tmp_path: Path) -> None:
    """Maps of all labels are there already when the predicted class, which shares most, is asked for."""
    alone = {"fills": ["black"], "map_grids": ["model"], "targets": ["label"]}
    run(tmp_path / "run", variants=alone, target="label")
    both = {**alone, "targets": ["label", "predicted"]}
    wide = run(tmp_path / "run", variants=both, target="label")
    new = run(tmp_path / "new", variants=both, target="label")
    (one,), (two,) = read_orders(wide.path, resamples=50), read_orders(new.path, resamples=50)
    assert one.variants == two.variants and one.images == IMAGES
    assert one.means == pytest.approx(two.means, abs=1e-4)


def test_a_stopped_run_shows_what_was_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = run(tmp_path / "run", limit=4)
    before = (small.path / "variants.csv").read_bytes()
    said = Console(width=120, record=True)
    boards.status(small.path, said)
    assert said.export_text().strip().endswith("complete")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(multiverse, "_predicted", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    boards.status(small.path, said)
    assert "variants unfinished; run the same command again" in said.export_text()
    assert boards.rebuild([small.path], None, Console(quiet=True)) == 0
    assert (small.path / "variants.csv").read_bytes() == before
    (orders,) = read_orders(run(tmp_path / "run").path, resamples=50)
    assert orders.images == IMAGES


@pytest.mark.parametrize(
    ("metrics", "own", "scored"),
    [
        ([{"name": "perturbation", "fill": "mean"}], ("mean", 0.9), True),
        ([{"name": "perturbation", "span": 1.0, "steps": 10}], ("black", 1.0), True),
        ([{"name": "perturbation", "steps": 5}], ("black", 0.9), False),
        (["drop"], ("black", 0.9), False),
    ],
)
def test_the_first_variant_is_the_runs_own_where_it_has_one(
    tmp_path: Path, metrics: list[Any], own: tuple[str, float], scored: bool
) -> None:
    request = {**config(variants={"fills": ["black"], "map_grids": ["model"]}), "metrics": metrics}
    done = faithmap.run(request, models=[model()], out=tmp_path / "run", figures=False)
    (orders,) = read_orders(done.path, resamples=50)
    assert (orders.variants[0].fill, orders.variants[0].span, orders.scored) == (*own, scored)
    page = (done.path / "variants.md").read_text()
    assert ("Rank in the run" in page) is scored and ("not on the run's board" in page) is not scored
    if scored:
        board = done.leaderboard().set_index("explainer")
        column = next(name for name in board.columns if name[:5] == "auc_d" and board[name].notna().all())
        assert orders.means[0] == pytest.approx(board.loc[list(orders.methods), column], abs=1e-4)


def test_an_unreliable_method_is_left_out(tmp_path: Path) -> None:
    @registry.explainer(version=1, source="a test", forwards=0, backwards=0)
    def careless(model: Model, batch: Batch) -> torch.Tensor:
        """Sees the other images of its batch."""
        return batch.images.mean(1) * len(batch) + torch.rand(batch.images.shape[2:])

    request = config(variants={"map_grids": ["model"], "fills": ["black"]})
    request["explainers"].append("careless")
    done = faithmap.run(request, models=[model()], out=tmp_path / "run", figures=False)
    (orders,) = read_orders(done.path, resamples=50)
    assert orders.left_out == {"careless": "unreliable: it fails checks of the kit"}


def test_a_method_from_outside_may_read_the_grid(tmp_path: Path) -> None:
    @registry.explainer(version=1, source="a test", forwards=0, backwards=0, class_specific=False)
    def gridded(model: Model, batch: Batch) -> torch.Tensor:
        """Other maps on another grid."""
        side = 32 if batch.grid is None else batch.grid[0]
        return batch.images.mean(1)[:, :: 32 // side, :: 32 // side]

    request = config(
        variants={"map_grids": ["native", "model"], "fills": ["black"], "targets": ["predicted"]}
    )
    request["explainers"].append("gridded")
    done = faithmap.run(request, models=[model()], out=tmp_path / "run", figures=False)
    (orders,) = read_orders(done.path, resamples=50)
    alone = {**config(variants=False, map_grid="native"), "explainers": ["gridded", "random-grid"]}
    native = faithmap.run(alone, models=[model()], out=tmp_path / "native", figures=False).leaderboard()
    v = next(v for v, variant in enumerate(orders.variants) if variant.map_grid == "native")
    assert orders.variants[v].reading == "agreement" and orders.variants[v].span == 0.9
    found = orders.means[v, orders.methods.index("gridded")]
    assert found == pytest.approx(native.set_index("explainer").loc["gridded", "auc_d"], abs=1e-4)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    request = {**config(variants={"fills": ["black"]}), "explainers": ["gradcam", "rollout", "raw-attention"]}
    done = faithmap.run(request, models=[model()], out=tmp_path / "run", figures=False)
    (orders,) = read_orders(done.path)
    assert not orders.comparable and set(orders.left_out) == {"rollout", "raw-attention"}
    page = (done.path / "variants.md").read_text()
    assert "Not compared: 1 method and 8 images have a value" in page and "defined for vit" in page

    @registry.dataset(version=1, source="a test", license="CC0", revision="2")
    def partly() -> list[Sample]:
        """Three of the images have a label."""
        return [Sample(f"n-{i}", image, i if i < 3 else None) for i, image in enumerate(noise_images())]

    done = run(tmp_path / "partly", dataset="partly", variants={"fills": ["black"], "map_grids": ["model"]})
    assert (
        "3 of 8 images (the others cannot be read, have no label" in (done.path / "variants.md").read_text()
    )


def test_nothing_stale_is_left(tmp_path: Path) -> None:
    pages = ("variants.md", "variants.csv", "figures/variants-tiny-cnn-noisy.png")
    less = {"fills": ["black"], "map_grids": ["model"], "targets": ["predicted"]}
    done = faithmap.run(config(variants=less), models=[model()], out=tmp_path / "run")
    other = faithmap.run(config("unlabelled", variants=False), models=[model()], out=tmp_path / "other")
    out = tmp_path / "out"
    assert boards.rebuild([done.path], out, Console(quiet=True)) == 0
    assert all((out / page).is_file() for page in pages) and not (out / "images.json").exists()
    assert boards.rebuild([done.path, other.path], out, Console(quiet=True)) == 0
    assert not any((out / page).exists() for page in (*pages, "variants"))
    faithmap.run(config(variants=False), models=[model()], out=done.path, fresh=True)
    assert not any((done.path / page).exists() for page in (*pages, "variants"))


# --- requests --------------------------------------------------------------------------------------


def test_requests(tmp_path: Path) -> None:
    assert load_config({}).variants is None
    assert load_config({"variants": False}).variants is None
    assert load_config({"variants": True}).variants == VariantSettings()
    assert load_config({}).with_variants().variants == VariantSettings()
    some = load_config({"variants": {"fills": ["blur"], "map_grids": [7, "native", 7]}})
    assert some.with_variants().variants == VariantSettings(fills=("blur",), map_grids=(7, "native"))
    file = tmp_path / "request.toml"
    file.write_text('[variants]\ntargets = ["label"]\n')
    assert load_config(file).variants == VariantSettings(targets=("label",))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"fils": ["black"]}, "did you mean 'fills'"),
        ({"fills": "black"}, "fills = 'black' must be a list"),
        ({"fills": []}, "must name at least one"),
        ({"targets": ["best"]}, "expected one of predicted, label, second"),
        ({"map_grids": ["coarse"]}, 'expected "model", "native" and sides in cells'),
        ({"map_grids": [1]}, 'expected "model", "native" and sides in cells'),
        ("all", "variants must be true, or a table"),
    ],
)
def test_bad_requests(given: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence.replace("[", r"\[")):
        load_config({"variants": given})


def test_what_cannot_be_compared_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown fill 'pink'; there are: black"):
        run(tmp_path / "run", variants={"fills": ["pink"]})
    request = {**config(), "explainers": ["saliency", "centre"]}
    with pytest.raises(RequestError, match="the request has 1; name at least two methods"):
        faithmap.run(request, models=[model()], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faithmap.estimate import estimate

    monkeypatch.chdir(tmp_path)
    request = {**config(), "models": [{"name": "timm/test_resnet", "pretrained": False, "input_size": 32}]}
    plan = estimate(load_config(request))
    assert [line.partition("(")[2].partition(")")[0] for line in plan.lines[1:]] == [
        f"{target} class, {grid} grid" for target in ("predicted", "label") for grid in GRIDS
    ]
    assert f"at most {IMAGES} images" in plan.lines[-1]
    # Two methods and the null, two fills, two orders, ten steps, and the clean pass; the maps are there.
    assert all(" 121 forwards" in line for line in plan.lines[2:4]), plan.lines
    assert not list(tmp_path.iterdir())


def test_the_dry_run_leaves_out_variants_that_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faithmap.estimate import estimate

    monkeypatch.chdir(tmp_path)
    request = {**config(), "models": [{"name": "timm/test_resnet", "pretrained": False, "input_size": 32}]}
    found = []
    for step in (estimate, faithmap.run, estimate):
        torch.manual_seed(0)  # of the network's weights
        found.append(step(load_config(request), out="run"))
    whole, _, left = found
    # Of another class, the images that the model gets right are not explained again: they are "at most".
    predicted = [line for line in left.lines if "predicted class" in line]
    assert predicted and all(", 0 forwards and 0 ms" in line for line in predicted), left.lines
    assert left.units == whole.units and 0 < left.stored <= whole.units
    assert left.forwards < whole.forwards


# --- pages -----------------------------------------------------------------------------------------


def test_pages_are_rebuilt_from_rows_alone(tmp_path: Path) -> None:
    done = faithmap.run(config(), models=[model()], out=tmp_path / "run")
    written = {file.relative_to(done.path).as_posix() for file in done.written}
    figure = "figures/variants-tiny-cnn-noisy.png"
    assert {"variants.md", "variants.csv", figure} <= written
    assert boards.rebuild([done.path], tmp_path / "published", Console(quiet=True)) == 0
    for name in ("variants.md", "variants.csv", figure):
        assert (tmp_path / "published" / name).read_bytes() == (done.path / name).read_bytes()
    page = (done.path / "variants.md").read_text()
    (orders,) = read_orders(done.path)
    assert f"2 methods, 1 pair, {len(orders.variants)} variants, {IMAGES} images" in page
    assert f"![Ranks over all variants]({figure})" in page
    table = pd.read_csv(done.path / "variants.csv")
    assert len(table) == 2 * len(orders.variants)
    assert (table["n"] == IMAGES).all() and set(table["rank"]) <= {1, 2}
    assert (table["rank_low"] <= table["rank"]).all() and (table["rank"] <= table["rank_high"]).all()


def test_the_command_prints_how_the_order_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from faithmap import cli

    console = Console(width=120)
    monkeypatch.setattr(cli, "OUT", console)
    words = [
        "run", "--models", "timm/test_resnet[pretrained=false,input_size=32]", "--datasets", "noisy",
        "--limit", "3", "--part", "all", "--explainers", "gradcam,saliency", "--metrics", "perturbation",
        "--variants", "--out", str(tmp_path / "run"), "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "Pairs reversed, % [95%]" in said and "black / noisy-linear" in said
    assert (tmp_path / "run" / "variants.md").is_file()
