"""Whole runs: rows, resumption after kills, growth, refusals, failures, and people's own models."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_cnn, make_vit
from small_runs import call, command, comparable, rows_of

import faithmap
from faithmap import runner
from faithmap.config import load_config
from faithmap.errors import RequestError
from faithmap.plan import make_grid, plan_tasks
from faithmap.store import KEY_COLUMNS


def test_a_run_writes_rows_boards_and_a_manifest(place: Path) -> None:
    done = faithmap.run(place / "small.toml", out=place / "run")
    rows = done.rows()
    assert not rows.duplicated(KEY_COLUMNS).any()
    assert set(rows["explainer"]) == {"gradcam", "saliency", "random", "random-grid"}
    assert rows["image_id"].nunique() == 12
    assert (rows["status"] != "failed").all()
    curves = rows[(rows["metric"] == "pos_auc") & (rows["status"] == "ok")]["curve"]
    assert all(len(curve) == 10 for curve in curves)
    for name in ("manifest.json", "leaderboard.csv", "leaderboard.md"):
        assert (place / "run" / name).is_file()
    assert list((place / "run" / "figures").glob("*.png"))
    board = done.leaderboard()
    assert set(board["explainer"]) == {"gradcam", "saliency", "random", "random-grid"}
    text = (place / "run" / "manifest.json").read_text()
    assert str(place) not in text, "a manifest names no path of the machine"
    assert not list(place.rglob("*.unfinished"))


def test_rows_do_not_depend_on_what_else_is_asked_for(place: Path) -> None:
    config = load_config(place / "small.toml")
    both = comparable(faithmap.run(config, out=place / "both", figures=False).rows())
    alone = comparable(
        faithmap.run(config.with_lists(explainers=["saliency"]), out=place / "alone", figures=False).rows()
    )
    same = both[both["explainer"].isin(set(alone["explainer"]))].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, alone)


def test_a_second_run_computes_nothing_anew(place: Path) -> None:
    faithmap.run(place / "small.toml", out=place / "run", figures=False)
    files = {file: file.stat().st_mtime_ns for file in (place / "run" / "rows").rglob("*.parquet")}
    before = (place / "run" / "leaderboard.csv").read_bytes()
    faithmap.run(place / "small.toml", out=place / "run", figures=False)
    assert {file: file.stat().st_mtime_ns for file in (place / "run" / "rows").rglob("*.parquet")} == files
    assert (place / "run" / "leaderboard.csv").read_bytes() == before


def test_a_run_grows(place: Path) -> None:
    config = load_config(place / "small.toml")
    small = faithmap.run(config, out=place / "run", figures=False).rows()
    grown = faithmap.run(
        config.with_run(limit=18).with_lists(explainers=["gradcam", "saliency", "random", "edges"]),
        out=place / "run",
        figures=False,
    ).rows()
    assert grown["image_id"].nunique() == 18
    assert "edges" in set(grown["explainer"])
    assert not grown.duplicated(KEY_COLUMNS).any()
    kept = grown.merge(small, on=KEY_COLUMNS, suffixes=("", "_before"))
    assert len(kept) == len(small)
    pd.testing.assert_series_equal(kept["value"], kept["value_before"], check_names=False)
    shrunk = faithmap.run(config.with_run(limit=6), out=place / "run", figures=False)
    assert shrunk.rows()["image_id"].nunique() == 6
    assert set(shrunk.leaderboard()["n"]) == {6}


@pytest.mark.parametrize("tries", [3])
def test_kill_and_run_again(place: Path, tries: int) -> None:
    whole = call("small.toml", "--out", "whole", place=place)
    assert whole.returncode == 0, whole.stderr
    spacing = random.Random(7)
    kills = 0
    for _ in range(tries):
        process = subprocess.Popen(
            command("small.toml", "--out", "killed", place=place),
            cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        kills += _kill_while_writing(process, place / "killed", spacing)
    assert kills == tries, "the process was over before it could be killed"
    again = call("small.toml", "--out", "killed", place=place)
    assert again.returncode == 0, again.stderr
    pd.testing.assert_frame_equal(rows_of(place / "killed"), rows_of(place / "whole"))
    stored = pd.concat(
        [pd.read_parquet(file) for file in (place / "killed" / "rows").rglob("*.parquet")], ignore_index=True
    )
    assert not stored.duplicated(KEY_COLUMNS).any(), "no row is stored twice"


def _kill_while_writing(process: subprocess.Popen[bytes], folder: Path, spacing: random.Random) -> int:
    """Kill -9 some random moments after the process has written its first own unit."""
    before = len(list(folder.rglob("*.parquet")))
    while process.poll() is None and len(list(folder.rglob("*.parquet"))) <= before:
        time.sleep(0.005)
    time.sleep(spacing.uniform(0.0, 0.15))
    killed = process.poll() is None
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return int(killed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "seed = 0, asked for 1"),
        ({"target": "second"}, "target"),
        ({"map_grid": "native"}, "map_grid"),
    ],
)
def test_another_identity_is_refused(place: Path, settings: dict[str, Any], words: str) -> None:
    config = load_config(place / "small.toml").with_run(limit=4)
    faithmap.run(config, out=place / "run", figures=False)
    with pytest.raises(RequestError, match=words):
        faithmap.run(config.with_run(**settings), out=place / "run", figures=False)
    faithmap.run(config.with_run(**settings), out=place / "run", figures=False, fresh=True)


def test_other_weights_of_one_model_are_refused(place: Path) -> None:
    config = load_config(place / "small.toml").with_run(limit=4)
    first, second = make_cnn(seed=0), make_cnn(seed=1)
    faithmap.run(config, models=[first], out=place / "run", figures=False)
    with pytest.raises(RequestError, match="other weights for model 'tiny-cnn'"):
        faithmap.run(config, models=[second], out=place / "run", figures=False)


def test_boards_of_other_images_are_not_joined(place: Path) -> None:
    from faithmap.folders import read_runs

    whole = load_config(place / "small.toml").with_lists(explainers=["gradcam"], metrics=["drop"])
    faithmap.run(whole, out=place / "twelve", figures=False)
    faithmap.run(whole.with_run(limit=4), out=place / "four", figures=False)
    with pytest.raises(RequestError, match=r"four holds 4 images of 'squares', .*twelve 12, of which 4"):
        read_runs([place / "twelve", place / "four"])


def test_a_shard_without_truths_is_no_other_request(place: Path) -> None:
    """A box on one image of six, two images a shard: the others are left out with the reason."""
    import PIL.Image

    rng = np.random.default_rng(0)
    for i in range(6):
        PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    lines = [f'{i}.png,{i % 5},"{"2,2,20,20" if i == 1 else ""}"' for i in range(6)]
    (place / "some.csv").write_text("path,label,boxes\n" + "\n".join(lines) + "\n")
    request = {
        "run": {"part": "all", "batch_size": 2, "own_nulls": [], "device": "cpu"},
        "datasets": [{"name": "imagefolder", "index": str(place / "some.csv"), "root": str(place)}],
        "explainers": ["gradcam", "oracle"],
        "metrics": ["energy-pointing-game", "pointing-game"],
    }
    rows = faithmap.run(request, models=[make_cnn()], out=place / "run", figures=False).rows()
    energy = rows.query("metric == 'energy_pg' and explainer == 'gradcam'").set_index("image_id")
    assert len(energy) == 6
    assert (energy["reason"].drop("1.png") == "no object in the image").all()


def test_a_broken_image_is_a_row_and_the_rest_is_scored(place: Path) -> None:
    text = (place / "small.toml").read_text().replace('name = "squares"', 'name = "squares"\nbroken = 3')
    (place / "broken.toml").write_text(text.replace("limit = 12", "limit = 24"))
    done = call("broken.toml", "--out", "run", place=place)
    assert done.returncode == 1
    assert "the file is cut off" in done.stderr
    rows, manifest = runner.read_run(place / "run")
    unreadable = rows[rows["image_id"] == "square-003"]
    assert unreadable["status"].tolist() == ["failed"]
    assert unreadable["reason"].str.contains("the file is cut off").all()
    assert rows["image_id"].nunique() == 24
    assert manifest["datasets"]["squares"]["unreadable"] == 1
    board = pd.read_csv(place / "run" / "leaderboard.csv")
    assert set(board["n"]) == {23}
    again = call("broken.toml", "--out", "run", place=place)
    assert again.returncode == 1
    pd.testing.assert_frame_equal(rows_of(place / "run"), comparable(rows))


RAISES = '''
from faithmap import explainer

@explainer(version=1, source="a test")
def moody(model, batch):
    """Raises on one image."""
    import torch
    if "square-003" in batch.ids:
        raise RuntimeError("not this one")
    return torch.rand(len(batch), 8, 8, generator=batch.generator(0))
'''


def test_an_explainer_that_raises_costs_only_its_own_rows(place: Path) -> None:
    (place / "moody.py").write_text(RAISES)
    words = ("--explainers", "moody,gradcam", "--limit", "24", "--plugin", "moody.py", "--out", "run")
    done = call("small.toml", *words, place=place)
    assert done.returncode == 1
    assert "RuntimeError: not this one" in done.stderr
    rows, _ = runner.read_run(place / "run")
    own = rows[
        (rows["explainer"] == "moody") & (rows["metric"] == "auc_d") & ~rows["params"].str.contains("null")
    ]
    assert own.set_index("image_id")["status"].value_counts().to_dict() == {"ok": 23, "failed": 1}
    others = rows[rows["explainer"] == "gradcam"]
    assert (others["status"] != "failed").all()
    board = pd.read_csv(place / "run" / "leaderboard.csv").set_index("explainer")
    assert board.loc["moody", "failed"] == 1
    assert board.loc["gradcam", "failed"] == 0


def test_explainers_that_are_not_defined_are_skipped_with_the_reason(place: Path) -> None:
    (place / "vitonly.py").write_text(
        "from faithmap import explainer\n\n@explainer(version=1, source='a test', families={'vit'})\n"
        "def tokens(model, batch):\n    '''For transformers.'''\n    raise RuntimeError('never called')\n"
    )
    words = ("--explainers", "tokens,gradcam", "--plugin", "vitonly.py", "--limit", "4", "--out", "run")
    done = call("small.toml", *words, place=place)
    assert done.returncode == 0, done.stderr
    rows, _ = runner.read_run(place / "run")
    own = rows[rows["explainer"] == "tokens"]
    assert set(own["status"]) == {"skipped"}
    assert set(own["reason"]) == {"defined for vit, not for cnn"}


def test_a_users_own_network_by_file_and_by_object(place: Path) -> None:
    by_file = call("small.toml", "--models", "net.py:build", "--limit", "4", "--out", "file", place=place)
    assert by_file.returncode == 0, by_file.stderr
    config = load_config(place / "small.toml").with_run(limit=4)
    for model in (make_cnn(), make_vit()):
        done = faithmap.run(config, models=[model], out=place / model.name, figures=False)
        assert set(done.rows()["model"]) == {model.name}
        assert done.leaderboard(model=model.name)["auc_d"].notna().all()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--explainers", "gradcan"), "did you mean 'gradcam'"),
        (("--metrics", "perturbatoin"), "did you mean 'perturbation'"),
        (("--datasets", "shape"), "did you mean 'shapes'"),
        (("--models", "timm/resnet81"), "timm has no model 'resnet81'"),
        (("--models", "net.py:bild"), "has no function 'bild'; did you mean 'build'"),
        (("--models", "net.py:wrong"), "returned a Linear; expected faithmap.Model"),
        (("--models", "gone.py:build"), "no such file"),
        (("--models", "resnet18"), "expected timm/NAME"),
        (("--models", "timm/test_resnet[weights=none.safetensors]"), "no weights file at none.safetensors"),
        (("--models", "timm/test_resnet[pretrained=false,layr=x]"), "did you mean 'layer'"),
        (("--models", "timm/test_resnet[pretrained=false,layer=nope]"), "has no layer 'nope'"),
        (("--models", "timm/test_resnet[pretrained=false,mean=grey]"), "mean is 'grey'; expected one number"),
        (("--models", "timm/test_resnet[pretrained=false,crop_pct=0]"), "crop_pct is 0; expected a share"),
        (("--explainers", "gradcam[layer=nope]"), "has no layer 'nope'"),
        (("--metrics", "perturbation[fill=pink]"), "unknown fill 'pink'"),
        (("--limit", "0"), "at least 1"),
        (("--limit", "few"), "'--limit'"),
        (("--part", "test"), "expected one of eval, dev, all"),
        (("--device", "cuda:9"), "device 'cuda:9' is not there"),
        (("--device", "mps"), "device 'mps' has no double precision"),
        (("--engine", "ray"), "unknown engine 'ray'"),
        (("--explainers", "occlusion[windw=3]"), "no parameter 'windw'"),
        (("--out", "net.py"), "cannot write to net.py"),
        (("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_requests_end_with_2_and_one_sentence(place: Path, words: tuple[str, ...], sentence: str) -> None:
    from faithmap.cli import main

    done = _main("small.toml", *words, place=place, main=main)
    assert done[0] == 2, done[1]
    assert sentence in done[1]
    assert "Traceback" not in done[1]
    assert done[1].strip().count("\n") == 0, done[1]
    assert not list(place.rglob("*.parquet"))


def _main(*words: str, place: Path, main: Any) -> tuple[int, str]:
    """Run a command in this process and catch what it prints on stderr."""
    import io

    from faithmap import cli

    stream = io.StringIO()
    held = cli.ERR.file
    cli.ERR.file = stream
    try:
        code = main(["run", *words, "--plugin", str(place / "squares.py")])
    finally:
        cli.ERR.file = held
    return code, stream.getvalue()


def test_labels_out_of_range_are_refused(place: Path) -> None:
    with pytest.raises(RequestError, match="out of range for model 'tiny-cnn', which has 3 classes"):
        faithmap.run(place / "small.toml", models=[make_cnn(classes=3)], out=place / "run")


def test_maps_are_kept_when_asked_for(place: Path) -> None:
    import numpy as np

    config = load_config(place / "small.toml").with_run(limit=4)
    faithmap.run(config, out=place / "run", figures=False, save_maps=True)
    kept = [np.load(file) for file in (place / "run" / "maps").rglob("*.npz")]
    assert {entry["maps"].shape for entry in kept} >= {(4, 8, 8), (4, 32, 32)}
    assert all(entry["maps"].dtype == np.float32 and len(entry["ids"]) == 4 for entry in kept)


def test_the_manifest_says_what_a_row_depends_on(place: Path) -> None:
    done = faithmap.run(load_config(place / "small.toml").with_run(limit=4), out=place / "run", figures=False)
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["version"] == faithmap.__version__
    assert manifest["settings"]["threads"] >= 1
    assert manifest["settings"]["batch_size"] == 4
    assert (
        manifest["libraries"]["torch"] == torch.__version__.partition("+")[0]
        or manifest["libraries"]["torch"]
    )
    assert manifest["explainers"]["gradcam"]["version"] == 1
    assert manifest["datasets"]["squares"]["revision"] == "1"
    (model,) = manifest["models"].values()
    assert model["grid"] == [8, 8] and model["digest"] == manifest["identity"]["weights"]["net.py:build"]


def test_a_file_named_by_an_explainer_is_keyed_by_content(place: Path) -> None:
    from faithmap.bottleneck import fit_statistics

    model = make_cnn()

    def key_of(folder: Path, seed: int) -> str:
        folder.mkdir(exist_ok=True)
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        fit_statistics(model, [images]).save(folder / "seen.safetensors")
        config = folder / "iba.toml"
        config.write_text(
            '[[datasets]]\nname = "squares"\n[[explainers]]\nname = "iba"\nstatistics = "seen.safetensors"\n'
        )
        grid = make_grid(load_config(config), [model])
        task = plan_tasks(grid, model, grid.datasets[0][0])[0]
        assert task.cell.params["statistics"] == "seen.safetensors"  # as typed: no folder of this machine
        return task.cell.key

    first = key_of(place / "here", seed=1)
    assert key_of(place / "there", seed=1) == first
    assert key_of(place / "here", seed=2) != first
    config = load_config(place / "there" / "iba.toml").with_run(limit=2)
    done = faithmap.run(config, models=[model], out=place / "run", figures=False)
    scored = done.rows().query("explainer == 'iba' and metric == 'auc_d'")
    assert list(scored["status"]) == ["ok", "ok"]


def test_no_device_without_double_precision_is_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.resolve_device("auto") == "cpu"
    assert runner.resolve_device("mps") == "mps"  # explaining and fitting may try
