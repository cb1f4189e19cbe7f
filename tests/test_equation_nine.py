"""The signs that tell the two readings of SCAN's equation 9 apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faithmap import equation_nine as nine
from faithmap import fitting, reconstruction
from faithmap.config import parse_spec
from faithmap.data import load_dataset
from faithmap.errors import DataError, RequestError
from faithmap.models import load_model
from faithmap.registry import get
from faithmap.stats import bca
from faithmap.training import Training, fit_options, train

REQUEST = """
[run]
limit = 4
part = "eval"

[[models]]
name = "shapes/vit"

[[datasets]]
name = "shapes"

[[explainers]]
name = "scan"
width = 0.125
layer = "block:1/3"

[[explainers]]
name = "gradcam"
"""


def planted(count: int = 6, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A reconstruction of zero, and targets whose squared errors are exponential."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.empty(count, side, side).exponential_(10.0, generator=generator)
    return torch.zeros(count, 3, side, side), errors.sqrt()[:, None].expand(-1, 3, -1, -1)


class TestMeasured:
    @pytest.mark.parametrize(("sign", "rho"), [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
    def test_the_rank_correlation_has_the_sign_of_what_confidence_follows(
        self, sign: float, rho: float
    ) -> None:
        colours, target = planted()
        squared = target.square().mean(1)
        confidence = 0.5 + sign * 0.4 * squared / squared.max()
        for line in nine.measured(confidence, colours, target, (8, 8), 4.0):
            assert line["rho"] == pytest.approx(rho) and line["rho_pixels"] == pytest.approx(rho)

    def test_the_other_columns_in_closed_form(self) -> None:
        confidence = torch.tensor([[[0.2, 0.4], [0.6, 0.8]]])
        target = torch.tensor([1.0, 0.0, -1.0])[None, :, None, None].expand(1, 3, 2, 2)
        (line,) = nine.measured(confidence, torch.zeros(1, 3, 2, 2), target, (2, 2), 4.0)
        assert line["area_excess"] == pytest.approx(0.5 - 0.2)
        assert line["error"] == pytest.approx(2 / 3)
        assert line["spread"] == pytest.approx(np.std([0.2, 0.4, 0.6, 0.8]))

    def test_cells_leave_out_a_pattern_within_them(self) -> None:
        colours, target = planted(2)
        checks = torch.ones(8, 8)
        checks[::2, ::2] = 0
        squared = target.square().mean(1)
        squared_cells = torch.nn.functional.avg_pool2d(squared[:, None], 2).repeat_interleave(2, 2)
        rising = squared_cells.repeat_interleave(2, 3)[:, 0]
        (line, _) = nine.measured(rising + 100 * checks, colours, target, (4, 4), 4.0)
        assert line["rho"] == pytest.approx(1) and line["rho_pixels"] < 0.6

    def test_what_knowing_no_image_leaves(self) -> None:
        targets = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 1.0, 0.5)])
        assert nine.blind_errors(targets) == pytest.approx([0.25, 0.25, 0.0])


@pytest.mark.parametrize(("weighting", "reading"), [("amplified", "9a"), ("discounted", "9b")])
def test_the_losses_lead_to_the_signs(weighting: str, reading: str) -> None:
    """Confidences that are free in every pixel, led by the losses alone, end with the signs of a reading."""
    colours, target = planted(side=24)
    logits = torch.zeros(6, 24, 24, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        found = reconstruction.losses(logits.sigmoid(), colours, target, weighting=weighting)
        optimiser.zero_grad()
        found.total.sum().backward()
        optimiser.step()
    lines = nine.measured(logits.detach().sigmoid(), colours, target, (24, 24), 4.0)
    rho, excess = (bca([[line[name] for line in lines]]) for name in ("rho", "area_excess"))
    assert nine.verdict(rho, excess) == reading


def test_the_verdict_is_open_where_an_interval_holds_zero() -> None:
    below, above, either = (bca([values]) for values in ([-2.0, -1, -3], [2.0, 1, 3], [-1.0, 1, 0.1]))
    assert nine.verdict(below, below) == "9a" and nine.verdict(above, above) == "9b"
    for pair in ((below, above), (above, below), (below, either), (either, above)):
        assert nine.verdict(*pair) == "open"


class TestCommand:
    @pytest.fixture
    def request_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv(fitting.HOME_VARIABLE, str(tmp_path / "home"))
        file = tmp_path / "request.toml"
        file.write_text(REQUEST, encoding="utf-8")
        return file

    def fit(self) -> None:
        plugin, dataset = get("explainer", "scan"), load_dataset(parse_spec("shapes[split=train,n=8]"))
        params = plugin.check({"width": 0.125, "layer": "block:1/3"})
        options = fit_options(plugin, {"epochs": 1, "batch_size": 4})
        train(Training(plugin, params, load_model("shapes/vit"), dataset, dataset.samples, options))

    def test_writes_a_line_for_each_image_and_percentile(
        self, request_file: Path, tmp_path: Path, capsys: Any
    ) -> None:
        self.fit()
        assert nine.main([str(request_file), "--out", str(tmp_path / "out")]) == 0
        lines = nine.read_lines(tmp_path / "out" / "equation-9.csv")
        assert len(lines) == 2 * 4 and {line["percentile"] for line in lines} == {"85.0", "95.0"}
        assert len({line["image_id"] for line in lines}) == 4
        text = (tmp_path / "out" / "equation-9.md").read_text(encoding="utf-8")
        assert text == nine.page(lines)
        told = capsys.readouterr().out
        assert told == nine.summary(lines) and told.count("\n") == 4
        assert "| `shapes/vit` | `scan` | 9a | " in told and told.count("| 85 | 4 |") == 1
        for line in lines:
            assert (
                float(line["error"]) > 0 and float(line["blind_error"]) > 0 and abs(float(line["rho"])) <= 1
            )

    def test_lines_of_other_models_stay_and_own_ones_are_replaced(
        self, request_file: Path, tmp_path: Path
    ) -> None:
        self.fit()
        out = tmp_path / "out"
        assert nine.main([str(request_file), "--out", str(out)]) == 0
        first = (out / "equation-9.csv").read_text(encoding="utf-8")
        head, *rest = first.splitlines(keepends=True)
        others = [line.replace("shapes/vit", "another/vit") for line in rest]
        spoiled = [line.rpartition(",")[0] + ",0.5\n" for line in rest]
        (out / "equation-9.csv").write_text("".join([head, *spoiled, *others]), encoding="utf-8")
        assert nine.main([str(request_file), "--out", str(out)]) == 0
        assert (out / "equation-9.csv").read_text(encoding="utf-8") == "".join([head, *others, *rest])
        assert (out / "equation-9.md").read_text(encoding="utf-8").count("`another/vit`") == 2

    @pytest.mark.parametrize("damage", [",spread", "", ",nan", ",x"])
    def test_a_damaged_file_is_told_and_left_as_it_is(
        self, request_file: Path, tmp_path: Path, damage: str
    ) -> None:
        file = tmp_path / "equation-9.csv"
        head = ",".join([*nine.CELL, "image_id", *nine.SCORES])
        line = "net,shapes,scan,amplified,95.0,a,0.1,0.1,0.1,0.1,0.1"
        text = (
            f"{head.removesuffix(damage)}\n{line},0.1\n"
            if damage == ",spread"
            else f"{head}\n{line}{damage}\n"
        )
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"equation-9\.csv is damaged .* delete it"):
            nine.main([str(request_file), "--out", str(tmp_path)])
        assert file.read_text(encoding="utf-8") == text and not list(tmp_path.glob("*.md"))

    def test_a_decoder_that_is_not_there_is_told_with_the_command(
        self, request_file: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RequestError, match=r"scan on shapes/vit: not fitted.*faithmap train 'scan"):
            nine.main([str(request_file), "--out", str(tmp_path / "out")])
        assert not list((tmp_path / "out").glob("*"))

    def test_a_decoder_that_serves_several_entries_is_measured_once_and_made_by_the_recipe(
        self, request_file: Path, tmp_path: Path
    ) -> None:
        again = REQUEST.replace("width = 0.125", 'label = "scan (90)"\nwidth = 0.125\npercentile = 90.0')
        entry = again[again.index("[[explainers]]") : again.index('[[explainers]]\nname = "gradcam"')]
        recipe = """
[[fits]]
name = "scan"
dataset = "shapes[split=train,n=8]"
epochs = 1
batch_size = 4
"""
        request_file.write_text(f"{REQUEST}\n{entry}\n{recipe}", encoding="utf-8")
        assert nine.main([str(request_file), "--out", str(tmp_path / "out")]) == 0
        lines = nine.read_lines(tmp_path / "out" / "equation-9.csv")
        assert [line["percentile"] for line in lines[::4]] == ["85.0", "95.0", "90.0"]
        assert len(lines) == 3 * 4 and {line["explainer"] for line in lines[8:]} == {"scan (90)"}

    def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
        self, request_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fit()
        monkeypatch.setattr(nine, "lines_of", lambda grid: pytest.fail("measured in vain"))
        with pytest.raises(RequestError, match=r"--out .*request.toml: no folder can be made there"):
            nine.main([str(request_file), "--out", str(request_file)])

    def test_a_request_without_scan_is_told(self, request_file: Path, tmp_path: Path) -> None:
        text = REQUEST.replace('name = "scan"\nwidth = 0.125\nlayer = "block:1/3"', 'name = "random"')
        request_file.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match="names no explainer 'scan'"):
            nine.main([str(request_file), "--out", str(tmp_path / "out")])
