"""What a run says of its variants: `variants.md`, `variants.csv`, a figure, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from faithmap.orders import Contrast, Orders, read_orders, variants_frame
from faithmap.report._format import DASH, code, count, file_stem, table
from faithmap.report.figures import INK, PALETTE, drawn
from faithmap.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

AXIS_NAMES = {
    "target": "Class explained", "map_grid": "Map grid", "fill": "Fill", "span": "Span", "reading": "Reading",
}  # fmt: skip


def write_variants(path: Path, *, figures: bool = True) -> list[Path]:
    """Write the pages of a run's variants; returns the files, none where it has no variants."""
    from faithmap.leaderboard import board_csv

    orders = read_orders(path)
    if not orders:
        return []
    contents = {"variants.csv": board_csv(variants_frame(orders)).encode()}
    drawings = {f"figures/variants-{file_stem(o.model, o.dataset)}.png": o for o in orders if figures}
    contents |= {name: ranks_figure(each) for name, each in drawings.items()}
    contents["variants.md"] = render_variants(orders, list(drawings)).encode()
    for name, content in contents.items():
        write_bytes(path / name, content)
    return [path / name for name in contents]


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


def _section(each: Orders, figures: Sequence[str]) -> list[str]:
    mean, largest, surely = each.any_two()
    said = (
        f"{count(len(each.methods), 'method')}, {count(each.pairs, 'pair')}, "
        f"{count(len(each.variants), 'variant')}, {count(each.images, 'image')}. Between two variants "
        f"taken at random {mean:.1f}% of the pairs are reversed ({surely:.1f}% significantly), between the "
        f"two that differ most {largest:.1f}%. All variants and pairs taken as one family at 95%, "
        f"{each.reversed_somewhere} of the {each.pairs} pairs are significantly reversed between some two "
        "variants."
    )
    parts = [f"## {code(each.model)} on {code(each.dataset)}", said]
    own = each.variants[0]
    parts.append(
        f"One choice changed, the others as in the run ({own.title}), and over all settings of the others:"
    )
    header = ["Choice", "Between", "Reversed (%)", "Kendall's tau", "Mean elsewhere (%)", "Largest (%)"]
    parts.append(table(header, [_contrast_line(contrast) for contrast in each.contrasts()], left=2))
    parts += ["Where each method stands:", _methods_table(each)]
    wanted = f"figures/variants-{file_stem(each.model, each.dataset)}.png"
    if wanted in figures:
        parts.append(f"![Ranks over all variants]({wanted})")
    if each.left_out:
        lines = [f"- {code(label)}: {reason}" for label, reason in each.left_out.items()]
        parts += ["Left out:", "\n".join(lines)]
    return parts


def _contrast_line(contrast: Contrast) -> list[str]:
    here = contrast.here
    return [
        AXIS_NAMES[contrast.axis],
        " / ".join(contrast.values),
        interval(contrast),
        f"{here.tau:.2f}",
        f"{contrast.mean:.1f}",
        f"{contrast.largest:.1f}",
    ]


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
    header = [
        "Explainer", "Rank in the run", "AUC-D in the run", "Median rank", "Ranks over all variants",
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
            linestyle="none", zorder=3, label="in the run" if row == 0 else None,
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
    """What one model and dataset have to say, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    mean, largest, surely = each.any_two()
    made = Table(
        title=f"{each.model} on {each.dataset}: {len(each.methods)} methods, {len(each.variants)} variants",
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
            " / ".join(contrast.values), Text(interval(contrast)), f"{contrast.here.tau:.2f}",
            f"{contrast.mean:.1f}, {contrast.largest:.1f}",
        )  # fmt: skip
        last = contrast.axis
    return made
