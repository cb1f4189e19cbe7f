"""What a run says of its variants: `variants.md`, `variants.csv`, a figure, and a table on the terminal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from faithmap.orders import Contrast, Orders, read_orders, variants_frame
from faithmap.records import VARIANTS
from faithmap.report._format import DASH, code, count, file_stem, table
from faithmap.report._provenance import plain
from faithmap.report.figures import INK, PALETTE, drawn
from faithmap.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: The pages, and how the names of the figures begin.
PAGE, TABLE, FIGURE = "variants.md", "variants.csv", "variants-"
AXIS_NAMES = {
    "target": "Class explained", "map_grid": "Map grid", "fill": "Fill", "span": "Span", "reading": "Reading",
}  # fmt: skip


def clear_variants(path: Path) -> None:
    """Remove the variants of a run, their pages included."""
    shutil.rmtree(path / VARIANTS, ignore_errors=True)
    clear_pages(path)


def clear_pages(path: Path) -> None:
    """Remove the pages alone."""
    for file in [path / PAGE, path / TABLE, *(path / "figures").glob(f"{FIGURE}*.png")]:
        file.unlink(missing_ok=True)


def write_variants(path: Path, *, figures: bool = True) -> list[Path]:
    """Write the pages of a run's variants; returns the files, none where it has no variants."""
    from faithmap.leaderboard import board_csv

    orders = read_orders(path)
    clear_pages(path)
    if not orders:
        return []
    contents = {TABLE: board_csv(variants_frame(orders)).encode()}
    drawings = {_figure(each): each for each in orders if figures and each.comparable}
    contents |= {name: ranks_figure(each) for name, each in drawings.items()}
    contents[PAGE] = render_variants(orders, list(drawings)).encode()
    for name, content in contents.items():
        write_bytes(path / name, content)
    return [path / name for name in contents]


def _figure(each: Orders) -> str:
    return f"figures/{FIGURE}{file_stem(each.model, each.dataset)}.png"


def render_variants(orders: Sequence[Orders], figures: Sequence[str] = ()) -> str:
    """The page as GitHub Markdown, ending in one newline."""
    parts = ["# The same methods under other published variants", _introduction()]
    for each in orders:
        parts += _section(each, figures)
    return "\n\n".join(parts) + "\n"


def _introduction() -> str:
    return (
        "AUC-D by perturbation, computed in every combination of the choices that papers make differently. "
        "*Reversed* is the share of the pairs of methods whose means stand in another order. Its brackets "
        "hold the share of pairs whose true order is reversed, with 95% confidence: at least the pairs "
        "that are significantly ordered in both variants, and the other way round; at most all but those "
        "that are significantly ordered in both, and the same way. Many variants are not many "
        "experiments: all of them score the same maps of the same images."
    )


def _counted(each: Orders) -> str:
    """How many images are compared, and why not all."""
    if each.images == each.asked:
        return count(each.images, "image")
    return (
        f"{each.images} of {count(each.asked, 'image')} (the others cannot be read, have no label, or "
        "no value under some variant)"
    )


def _section(each: Orders, figures: Sequence[str]) -> list[str]:
    parts = [f"## {code(each.model)} on {code(each.dataset)}"]
    if not each.comparable:
        parts.append(
            f"Not compared: {count(len(each.methods), 'method')} and {count(each.images, 'image')} have a "
            "value under every variant; two methods and an image are needed."
        )
        return parts + _left_out(each)
    mean, largest, surely = each.any_two()
    said = (
        f"{count(len(each.methods), 'method')}, {count(each.pairs, 'pair')}, "
        f"{count(len(each.variants), 'variant')}, {_counted(each)}. Between two variants "
        f"taken at random {mean:.1f}% of the pairs are reversed ({surely:.1f}% significantly), between the "
        f"two that differ most {largest:.1f}%. All variants and pairs taken as one family at 95%, "
        f"{each.reversed_somewhere} of the {each.pairs} pairs are significantly reversed between some two "
        "variants."
    )
    where = _first(each) + ("" if each.scored else ", which is not on the run's board")
    parts += [
        said,
        f"One choice changed, the others as in {where} ({each.variants[0].title}), and over all settings of "
        "the others:",
    ]
    header = ["Choice", "Between", "Reversed (%)", "Kendall's tau", "Mean elsewhere (%)", "Largest (%)"]
    parts.append(table(header, [_contrast_line(contrast) for contrast in each.contrasts()], left=2))
    parts += ["Where each method stands:", _methods_table(each)]
    if _figure(each) in figures:
        parts.append(f"![Ranks over all variants]({_figure(each)})")
    return parts + _left_out(each)


def _first(each: Orders) -> str:
    """What the first variant is: the run's own, or one that it has not scored."""
    return "the run" if each.scored else "the first variant"


def _left_out(each: Orders) -> list[str]:
    lines = [f"- {code(label)}: {plain(reason)}" for label, reason in each.left_out.items()]
    return ["Left out:", "\n".join(lines)] if lines else []


def _contrast_line(contrast: Contrast) -> list[str]:
    return [
        AXIS_NAMES[contrast.axis],
        " / ".join(contrast.values),
        interval(contrast),
        tau(contrast),
        f"{contrast.mean:.1f}",
        f"{contrast.largest:.1f}",
    ]


def tau(contrast: Contrast) -> str:
    """Kendall's tau; a dash where one of the two orders is all ties."""
    found = contrast.here.tau
    return DASH if math.isnan(found) else f"{found:.2f}"


def interval(contrast: Contrast) -> str:
    """The share reversed with its bounds: `12.1 [3.0, 45.5]`."""
    here = contrast.here
    return f"{here.reversed:.1f} [{here.low:.1f}, {here.high:.1f}]"


def _methods_table(each: Orders) -> str:
    ranks, low, high = each.ranks, *each.intervals
    lines = []
    for m in np.argsort(ranks[0], kind="stable"):
        own = f"{ranks[0, m]} ({low[0, m]}{DASH}{high[0, m]})"
        lines.append(
            [
                code(each.methods[m]), own, f"{each.means[0, m]:.1f}", f"{np.median(ranks[:, m]):g}",
                f"{ranks[:, m].min()}{DASH}{ranks[:, m].max()}", f"{100 * (ranks[:, m] == 1).mean():.0f}",
            ]
        )  # fmt: skip
    where = _first(each)
    header = [
        "Explainer", f"Rank in {where}", f"AUC-D in {where}", "Median rank", "Ranks over all variants",
        "First in (%)",
    ]  # fmt: skip
    return table(header, lines)


def ranks_figure(each: Orders) -> bytes:
    """How often each method has each rank, over all variants, as a PNG."""
    return drawn(partial(_draw_ranks, each), height=1.5 + 0.32 * len(each.methods))


def _draw_ranks(each: Orders, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    panel = figure.subplots()
    order = np.argsort(each.ranks[0], kind="stable")
    for row, m in enumerate(order):
        ranks, times = np.unique(each.ranks[:, m], return_counts=True)
        panel.plot([ranks.min(), ranks.max()], [row, row], color="#CCCCCC", linewidth=1.2, zorder=1)
        panel.scatter(
            ranks, [row] * len(ranks), s=260 * times / len(each.variants), color=PALETTE[0], alpha=0.75,
            linewidths=0, zorder=2,
        )  # fmt: skip
        panel.plot(
            [each.ranks[0, m]], [row], marker="|", markersize=13, markeredgewidth=2, color=PALETTE[1],
            linestyle="none", zorder=3, label=f"in {_first(each)}" if row == 0 else None,
        )  # fmt: skip
    panel.set_yticks(range(len(order)), [each.methods[m] for m in order], color=INK)
    panel.set(xlim=(0.4, len(order) + 0.6), ylim=(len(order) - 0.4, -0.6), xlabel="Rank by AUC-D (1 is best)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_title(
        f"Ranks over {len(each.variants)} published variants: {each.model} on {each.dataset}\n"
        "area of a dot: share of the variants"
    )
    panel.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, borderaxespad=0.2)
    figure.tight_layout()


def variants_table(each: Orders) -> Table:
    """What one model and dataset that are comparable have to say, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    mean, largest, surely = each.any_two()
    made = Table(
        title=(
            f"{each.model} on {each.dataset}: {len(each.methods)} methods, {len(each.variants)} variants, "
            f"{_counted(each)}"
        ),
        header_style="bold",
        pad_edge=False,
        caption=(
            f"Between any two variants {mean:.1f}% of {each.pairs} pairs are reversed on average "
            f"({surely:.1f}% significantly), {largest:.1f}% at most; {each.reversed_somewhere} pairs are "
            "significantly reversed between some two (one family at 95%)."
        ),
        caption_justify="left",
    )
    for title in ("Choice", "Between", "Pairs reversed, % [95%]", "tau", "Elsewhere: mean, largest"):
        made.add_column(Text(title), justify="left" if title in ("Choice", "Between") else "right")
    last = ""
    for contrast in each.contrasts():
        if last and contrast.axis != last:
            made.add_section()
        made.add_row(
            AXIS_NAMES[contrast.axis] if contrast.axis != last else "",
            " / ".join(contrast.values), Text(interval(contrast)), tau(contrast),
            f"{contrast.mean:.1f}, {contrast.largest:.1f}",
        )  # fmt: skip
        last = contrast.axis
    return made
