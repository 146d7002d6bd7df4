"""The pictures of the reports: SVG text from matplotlib, to stand inside an HTML page.

In:   draw_intervals([("reflected", [(0, 0.94, 0.91, 0.96, False)])], "accuracy", left=0.9, width=8.6, line=0.34)
Out:  '<svg role="img" aria-label="accuracy" viewBox="0 0 619.2 64.8" …>…</svg>': one line with a mark at 0.94 and its interval
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508f", "#3d3d3d", "#4a9fd8", "#c48a00", "#6f52a8")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
"""one fewer than colours, so that 56 runs differ in one or the other"""


def draw_intervals(
    lines: Sequence[tuple[str, Sequence[tuple[int, float, float, float, bool]]]],
    title: str,
    left: float,
    width: float,
    line: float,
) -> Markup:
    """An SVG of labelled lines from top to bottom; each holds marks (number of the run, value, low, high, hollow). Sizes in inches."""
    gap = 1.2 if max((len(marks) for _, marks in lines), default=1) > 1 else 0.0  # in marks, between two lines
    total = sum(len(marks) + gap for _, marks in lines)
    margin_left, margin_bottom = 1.75, 0.48
    height = max(total, 1) * line + margin_bottom + 0.08

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes(
            (
                margin_left / width,
                margin_bottom / height,
                1 - (margin_left + 0.15) / width,
                1 - (margin_bottom + 0.08) / height,
            )
        )
        ticks, y = [], 0.0
        for number, (_, marks) in enumerate(lines):
            if number % 2 == 0:
                axes.axhspan(y - 0.5 - gap / 2, y + len(marks) - 0.5 + gap / 2, color="#f4f5f7", linewidth=0, zorder=0)
            ticks.append(y + (len(marks) - 1) / 2)
            for run, value, low, high, hollow in marks:
                colour = COLOURS[run % len(COLOURS)]
                axes.plot(
                    [low, high],
                    [y, y],
                    color=colour,
                    linewidth=1.1 if hollow else 1.8,
                    alpha=0.45 if hollow else 0.85,
                    solid_capstyle="butt",
                    zorder=2,
                )
                face = "white" if hollow else colour
                axes.plot(
                    [value],
                    [y],
                    MARKERS[run % len(MARKERS)],
                    color=colour,
                    markerfacecolor=face,
                    markersize=5,
                    zorder=3,
                )
                y += 1
            y += gap
        axes.set_ylim(y - 0.5 - gap / 2, -0.5 - gap / 2)
        axes.set_xlim(max(0.0, int(left * 10) / 10 - 0.02), 1.02)
        axes.set_yticks(ticks, [name if len(name) <= 26 else f"{name[:25]}…" for name, _ in lines], color="#1f2933")
        axes.set_xlabel(title, color="#52606d")
        axes.tick_params(length=0, labelcolor="#1f2933")
        axes.grid(axis="x", color="#d9dde3", linewidth=0.7, zorder=1)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)

    return draw_svg(width, height, title, f"{title}{lines}", paint)


def draw_svg(width: float, height: float, label: str, salt: str, paint: Callable[["Figure"], None]) -> Markup:
    """A figure of so many inches as inline SVG; `salt` keeps its inner names apart from those of the page's other figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9.5}
    ):
        figure = Figure(figsize=(width, height))
        paint(figure)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the text is drawn by the browser, in its own fonts
            figure.savefig(
                buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The viewBox gives the proportions; the page's style gives the width.
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', lambda found: f'{found[1]} role="img" aria-label="{escape(label)}"', svg, count=1
    )
    return Markup(re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
