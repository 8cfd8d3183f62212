"""Small charts as inline SVG: curves over versions, heat maps, bars. Text in, text out; nothing to load.

Every word from outside is escaped here. Colours come from the page's style sheet by class name.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

Cell = tuple[float, str, str]  # how strong its colour is (0 to 1), what is written in it, what it is about
_LEFT, _TOP, _BOTTOM = 56, 14, 26  # margins of curves, pixels

_KINDS = ("q", "k", "v", "out", "mlp_gate", "mlp_in", "mlp_out")  # in the order of a block


def matrix_kinds(names: Iterable[str]) -> list[str]:
    """The kinds among names of matrices such as `vision.3.mlp_in`, in the order of a block, others last."""
    kinds = {name.split(".")[-1] for name in names}
    return [*(kind for kind in _KINDS if kind in kinds), *sorted(kinds - set(_KINDS))]


def curves(
    series: Mapping[str, Sequence[tuple[int, float]]], *, width: int = 520, height: int = 200, digits: int = 2
) -> str:
    """Curves over version numbers with a common scale from the smallest to the largest value.

    Args:
        series: name → (version, value) of each point.
        digits: of the values at the scale.
    """
    points = [point for values in series.values() for point in values]
    if not points:
        return '<p class="none">nothing to show yet</p>'
    low, high = min(value for _, value in points), max(value for _, value in points)
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def place(x: float, value: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (value - low) / (high - low) if high > low else 0.5
        wide, tall = width - _LEFT - 16, height - _TOP - _BOTTOM
        return _LEFT + across * wide, _TOP + (1 - up) * tall

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for value in (low, high) if high > low else (low,):
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.{digits}f}</text>')
    ends = {"start": first, "end": last} if last > first else {"mid": first}
    parts += [
        f'<text class="{kind}" x="{place(x, low)[0]:.1f}" y="{height - 6}">version {x}</text>'
        for kind, x in ends.items()
    ]
    for number, (name, values) in enumerate(series.items()):
        dots = [(*place(x, value), x, value) for x, value in values]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in dots)
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
        parts += [
            f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(name)}, version {version}: {value:.4g}</title></circle>"
            for x, y, version, value in dots
        ]
    legend = "".join(
        f'<span class="key c{number}">{escape(name)}</span>' for number, name in enumerate(series)
    )
    return f'{"".join(parts)}</svg><p class="legend">{legend}</p>'


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], Cell], *, size: int = 22
) -> str:
    """A grid of coloured cells with names beside and above; cells that are missing stay empty."""
    left = 8 + 7 * max((len(row) for row in rows), default=0)
    is_slanted = any(len(name) * 7 > size for name in columns)
    top = 8 + (6 * max((len(name) for name in columns), default=0) if is_slanted else 14)
    width, height = left + size * len(columns) + (top if is_slanted else 4), top + size * len(rows) + 4
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for number, name in enumerate(columns):
        x = left + size * (number + 0.5)
        turn = f' transform="rotate(-45 {x:.0f} {top - 6})"' if is_slanted else ""
        kind = "start" if is_slanted else "mid"
        parts.append(f'<text class="{kind}" x="{x:.0f}" y="{top - 6}"{turn}>{escape(name)}</text>')
    places = ((top + size * (number + 0.5) + 4, name) for number, name in enumerate(rows))
    parts += [f'<text class="end" x="{left - 5}" y="{y:.0f}">{escape(name)}</text>' for y, name in places]
    for (row, column), (wanted, words, about) in cells.items():
        x, y = left + size * column, top + size * row
        strength = min(1.0, max(0.0, wanted))
        parts.append(
            f'<rect class="cell" x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" '
            f'fill-opacity="{0.06 + 0.94 * strength:.2f}"><title>{escape(about)}</title></rect>'
        )
        tone = "on" if strength > 0.55 else "off"
        middle = f'x="{x + size / 2 - 0.5:.1f}" y="{y + size / 2 + 3.5:.1f}"'
        parts.append(f'<text class="mid small {tone}" {middle}>{escape(words)}</text>')
    return f"{''.join(parts)}</svg>"


def bars(values: Sequence[tuple[str, Sequence[int]]], *, width: int = 460) -> str:
    """Horizontal bars, each of a few parts one after the other, with their sum behind."""
    most = max((sum(parts) for _, parts in values), default=0)
    left = 10 + 7 * max((len(name) for name, _ in values), default=0)
    room = max(60, width - left - 48)
    out = [
        f'<svg viewBox="0 0 {left + room + 48} {len(values) * 18 + 4}" width="{left + room + 48}" role="img">'
    ]
    for number, (name, parts) in enumerate(values):
        y, x = number * 18 + 2, float(left)
        out.append(f'<text class="end" x="{left - 6}" y="{y + 12}">{escape(name)}</text>')
        for kind, part in enumerate(parts):
            wide = room * part / most if most else 0.0
            out.append(f'<rect class="c{kind}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="14"/>')
            x += wide
        out.append(f'<text x="{x + 5:.1f}" y="{y + 12}">{sum(parts)}</text>')
    return f"{''.join(out)}</svg>"
