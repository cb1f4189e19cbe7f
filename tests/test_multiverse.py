"""`--variants`: every variant is what a run of its own gives, nothing is computed twice, and the pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_cnn
from rich.console import Console

import faithmap
from faithmap import boards, registry, units
from faithmap.batch import Batch
from faithmap.config import VariantSettings, load_config
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, explain_batch
from faithmap.models import Model
from faithmap.orders import READINGS, Orders, at_span, read_orders
from faithmap.records import Sample
from faithmap.store import RunStore

IMAGES = 8
EXPLAINED: list[int] = []
FILLS = ("black", "mean")
GRIDS = ("model", "native", 4)


def noise_images() -> torch.Tensor:
    return torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two datasets are known, and images explained are counted, while a test runs."""
    for kind in registry.KINDS:
        registry.plugins(kind)
    before = dict(registry._plugins)

    def counting(call: Any, network: Model, batch: Batch) -> MapSet:
        EXPLAINED.append(len(batch))
        return explain_batch(call, network, batch)

    monkeypatch.setattr(units, "explain_batch", counting)
    EXPLAINED.clear()

    @registry.dataset(version=1, source="a test", license="CC0", revision="1")
    def noisy() -> list[Sample]:
        """Noise with labels, which a network that has learnt nothing rarely meets."""
        return [Sample(f"n-{i}", image, i % 5) for i, image in enumerate(noise_images())]

    @registry.dataset(version=1, source="a test", license="CC0", revision="1")
    def unlabelled() -> list[Sample]:
        """The same without labels."""
        return [Sample(f"n-{i}", image) for i, image in enumerate(noise_images())]

    yield
    registry._plugins.clear()
    registry._plugins.update(before)


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
    # explained where they differ. A control and a null are made once for the run; the null, which is drawn
    # on the grid, once for each grid and class beside.
    methods, own, null = 2 * (IMAGES + wrong), 2 * IMAGES, 2 * IMAGES + 3 * wrong
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
    @registry.explainer(version=1, source="a test", forwards=0, backwards=0)
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


def test_areas_up_to_a_share_are_those_of_a_loop() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    rows = []
    for image in ("a", "b"):
        for reading in ("", "@label-black"):
            curves = {name: rng.random(11) for name in ("pos_auc", "neg_auc")}
            whole = {name: 100 * np.trapezoid(curve, dx=0.1) for name, curve in curves.items()}
            for name, curve in curves.items():
                rows.append((image, name + reading, whole[name], list(curve)))
            rows.append((image, "auc_d" + reading, whole["neg_auc"] - whole["pos_auc"], None))
        rows.append((image, "ties", 5.0, None))
    table = pd.DataFrame(rows, columns=["image_id", "metric", "value", "curve"])
    table = table.assign(model="m", dataset="d", explainer="e", params="{}", spec="s")
    found = at_span(table, 0.9)
    assert list(found.columns) == list(table.columns) and len(found) == len(table)
    assert np.allclose(at_span(table, 1.0)["value"], table["value"])
    for line in found.itertuples():
        kind, _, reading = line.metric.partition("@")
        areas = {}
        for name in ("pos_auc", "neg_auc"):
            title = f"{name}@{reading}" if reading else name
            here = table[(table["image_id"] == line.image_id) & (table["metric"] == title)]
            curve = here["curve"].iloc[0]
            areas[name] = sum(5 * (curve[i] + curve[i + 1]) for i in range(9))
        areas["auc_d"] = areas["neg_auc"] - areas["pos_auc"]
        assert line.value == pytest.approx(areas.get(kind, 5.0))


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


def planted(*means: tuple[float, ...], n: int = 40, noise: float = 1.0, seed: int = 0) -> Orders:
    """Variants of planted mean scores, a line of means for each."""
    from faithmap.orders import Variant

    rng = np.random.Generator(np.random.PCG64(seed))
    values = np.array(means)[:, :, None] + noise * rng.normal(size=(len(means), len(means[0]), n))
    variants = tuple(
        Variant("predicted", "model", fill, 0.9, "agreement")
        for fill in ("black", "mean", "blur", "noisy-linear")[: len(means)]
    )
    names = tuple("abcdef"[: len(means[0])])
    return Orders("m", "d", names, variants, values, {}, resamples=400)


class TestOrders:
    def test_a_planted_reversal(self) -> None:
        orders = planted((30, 20, 10), (30, 10, 20), (10, 20, 30))
        found = orders.disagreement(0, 1)
        assert (found.reversed, found.low, found.high) == pytest.approx((100 / 3,) * 3)
        assert found.tau == pytest.approx(1 / 3)
        everything = orders.disagreement(0, 2)
        assert (everything.reversed, everything.low, everything.tau) == pytest.approx((100, 100, -1))
        assert orders.reversed_somewhere == 3
        assert orders.any_two() == pytest.approx((200 / 3, 100, 200 / 3))
        assert orders.ranks.tolist() == [[1, 2, 3], [1, 3, 2], [3, 2, 1]]
        assert [c.values for c in orders.contrasts()] == [
            ("black", "mean"), ("black", "blur"), ("mean", "blur"),
        ]  # fmt: skip

    def test_what_noise_hides_is_neither_claimed_nor_excluded(self) -> None:
        orders = planted((0, 0, 0), (0, 0, 0), seed=3)
        found = orders.disagreement(0, 1)
        assert (found.low, found.high) == (0, 100)
        assert orders.reversed_somewhere == 0

    def test_the_same_order_is_known_to_be_the_same(self) -> None:
        orders = planted((30, 20, 10), (60, 40, 20))
        found = orders.disagreement(0, 1)
        assert (found.reversed, found.low, found.high, found.tau) == (0, 0, 0, 1)

    @pytest.mark.slow
    def test_the_bounds_cover_the_true_share(self) -> None:
        """Of 300 experiments at most 5% may miss it; three standard errors are allowed for."""
        rng = np.random.Generator(np.random.PCG64(1))
        missed = 0
        for trial in range(300):
            means = rng.normal(0, 0.35, size=(2, 4))
            i, j = np.triu_indices(4, 1)
            truth = 100 * float(((means[0, i] - means[0, j]) * (means[1, i] - means[1, j]) < 0).mean())
            found = planted(*map(tuple, means), n=60, seed=trial).disagreement(0, 1)
            missed += not found.low - 1e-9 <= truth <= found.high + 1e-9
        assert missed <= 300 * 0.05 + 3 * np.sqrt(300 * 0.05 * 0.95)
