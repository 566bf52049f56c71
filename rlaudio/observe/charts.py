"""Small SVG drawings for the report page. Numbers in, escaped markup out; colours come from the page's CSS classes."""

import math
from collections.abc import Collection, Sequence

from markupsafe import Markup

_FOREST_WIDTH, _FOREST_HEIGHT, _EDGE = 400, 26, 16
_CURVE_WIDTH, _CURVE_HEIGHT = 300, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 10, 22


def forest_limit(intervals: Sequence[tuple[float, float]]) -> float:
    """A round number L such that the axis [-L, L] holds every interval."""
    widest = max((abs(x) for pair in intervals for x in pair), default=0.0)
    for step in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0):
        if widest <= step:
            return step
    return math.ceil(widest)


def forest_row(mean: float, low: float, high: float, *, limit: float, tone: str, label: str) -> Markup:
    """One dot with its whisker on the axis [-limit, limit], zero marked.

    Args:
        tone: CSS class: "rose", "fell" or "unclear".
        label: what a screen reader says.
    """
    x = [_forest_x(value, limit) for value in (mean, low, high)]
    middle = _FOREST_HEIGHT / 2
    return Markup(
        '<svg class="forest {tone}" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">'
        '<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{h}"/>'
        '<path class="whisker" d="M{low:.1f} {m}H{high:.1f}M{low:.1f} {top}V{bottom}M{high:.1f} {top}V{bottom}"/>'
        '<circle class="dot" cx="{mean:.1f}" cy="{m}" r="4.5"/></svg>'
    ).format(
        tone=tone,
        label=label,
        w=_FOREST_WIDTH,
        h=_FOREST_HEIGHT,
        zero=_FOREST_WIDTH / 2,
        m=middle,
        top=middle - 4,
        bottom=middle + 4,
        mean=x[0],
        low=x[1],
        high=x[2],
    )


def forest_axis(*, limit: float) -> Markup:
    """The scale under the rows, in percentage points."""
    ticks = Markup("").join(
        Markup('<text x="{x:.1f}" y="12" text-anchor="middle">{text}</text>').format(
            x=_forest_x(value, limit), text=f"{100 * value:+.0f}" if value else "0"
        )
        for value in (-limit, -limit / 2, 0.0, limit / 2, limit)
    )
    return Markup(
        '<svg class="forest axis" viewBox="0 0 {w} 16" width="{w}" height="16" aria-hidden="true">{t}</svg>'
    ).format(w=_FOREST_WIDTH, t=ticks)


def curve(points: Sequence[tuple[int, float]], *, label: str) -> Markup:
    """A metric over steps: every value faint, a centred moving mean in front, the range on the axes.

    Args:
        points: (step, value) by rising step, at least one.
        label: what a screen reader says before first and last value.
    """
    steps, values = [p[0] for p in points], [p[1] for p in points]
    smooth = _moving_mean(values, max(1, len(values) // 10))
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    span = max(steps[-1] - steps[0], 1)

    def line(ys: Sequence[float]) -> str:
        spots = (
            f"{_LEFT + (s - steps[0]) / span * (_CURVE_WIDTH - _LEFT - _RIGHT):.1f} "
            f"{_TOP + (high - y) / (high - low) * (_CURVE_HEIGHT - _TOP - _BOTTOM):.1f}"
            for s, y in zip(steps, ys, strict=True)
        )
        return "M" + "L".join(spots)

    return Markup(
        '<svg class="curve" viewBox="0 0 {w} {h}" role="img" aria-label="{label}: from {first} to {last}">'
        '<path class="frame" d="M{left} {top}V{bottom}H{right}"/>'
        '<text x="{tx}" y="{ty1}" text-anchor="end">{high}</text>'
        '<text x="{tx}" y="{bottom}" text-anchor="end">{low}</text>'
        '<text x="{left}" y="{ty3}">step {s0}</text><text x="{right}" y="{ty3}" text-anchor="end">{s1}</text>'
        '<path class="raw" d="{raw}"/><path class="smooth" d="{smooth}"/></svg>'
    ).format(
        w=_CURVE_WIDTH,
        h=_CURVE_HEIGHT,
        label=label,
        first=f"{smooth[0]:.3g}",
        last=f"{smooth[-1]:.3g}",
        left=_LEFT,
        right=_CURVE_WIDTH - _RIGHT,
        top=_TOP,
        bottom=_CURVE_HEIGHT - _BOTTOM,
        tx=_LEFT - 5,
        ty1=_TOP + 8,
        ty3=_CURVE_HEIGHT - 6,
        high=f"{high:.2f}",
        low=f"{low:.2f}",
        s0=steps[0],
        s1=steps[-1],
        raw=line(values),
        smooth=line(smooth),
    )


def bars(counts: Sequence[int], *, marked: Collection[int] = ()) -> Markup:
    """A histogram over 0, 1, ...: each bar with its count above and its place below; those `marked` stand out."""
    width, height, edge = 520, 190, 22
    step = width / max(len(counts), 1)
    highest = max([*counts, 1])
    drawn = Markup("").join(
        Markup(
            '<rect class="{tone}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3"/>'
            '<text x="{m:.1f}" y="{ty:.1f}" text-anchor="middle">{count}</text>'
            '<text x="{m:.1f}" y="{bottom}" text-anchor="middle">{place}</text>'
        ).format(
            tone="marked" if place in marked else "",
            x=place * step + 0.1 * step,
            w=0.8 * step,
            h=(tall := (height - 2 * edge) * count / highest),
            y=height - edge - tall,
            m=(place + 0.5) * step,
            ty=height - edge - tall - 5,
            bottom=height - 6,
            count=count,
            place=place,
        )
        for place, count in enumerate(counts)
    )
    label = ", ".join(f"{place}: {count}" for place, count in enumerate(counts))
    return Markup('<svg class="bars" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{drawn}</svg>').format(
        w=width, h=height, label=label, drawn=drawn
    )


def shares(parts: Sequence[int], *, classes: Sequence[str]) -> Markup:
    """One bar cut into parts of a whole, each with its CSS class."""
    width, total = 240, max(sum(parts), 1)
    starts = [width * sum(parts[:index]) / total for index in range(len(parts))]
    drawn = Markup("").join(
        Markup('<rect class="{tone}" x="{x:.1f}" y="3" width="{w:.1f}" height="12"/>').format(
            tone=tone, x=start, w=width * part / total
        )
        for tone, start, part in zip(classes, starts, parts, strict=True)
    )
    return Markup('<svg class="shares" viewBox="0 0 {w} 18" aria-hidden="true">{drawn}</svg>').format(
        w=width, drawn=drawn
    )


def waveform(peaks: Sequence[float]) -> Markup:
    """The loudness of a sound as bars; the page colours the part already played."""
    bars = "".join(f"M{4 * i + 2} {12 - max(1.0, 11 * p):.1f}v{2 * max(1.0, 11 * p):.1f}" for i, p in enumerate(peaks))
    return Markup(
        '<svg class="wave" viewBox="0 0 {w} 24" preserveAspectRatio="none" aria-hidden="true">'
        '<path d="{bars}"/><path class="played" d="{bars}"/></svg>'
    ).format(w=4 * len(peaks), bars=bars)


def _forest_x(value: float, limit: float) -> float:
    half = _FOREST_WIDTH / 2 - _EDGE
    return _FOREST_WIDTH / 2 + max(-1.0, min(1.0, value / limit)) * half


def _moving_mean(values: Sequence[float], radius: int) -> list[float]:
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
