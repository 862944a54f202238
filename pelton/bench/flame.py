"""Profiles as pictures: step -> layer -> module -> op; width is time, colour the fraction of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from .profile import Part, Phase
from .units import duration

_SCALE = (
    (0.0, (0xC9, 0x3A, 0x4B)), (0.35, (0xEF, 0x8A, 0x47)), (0.6, (0xF3, 0xCF, 0x63)), (0.8, (0x9C, 0xCB, 0x86)),
    (1.0, (0x2A, 0x9D, 0x8F)),
)  # fmt: skip
_OUTSIDE = "#c9ccd1"
_WIDTH, _MARGIN, _ROW = 1200, 20, 28
#: Of a whole step, in pixels.
PLOT_WIDTH = _WIDTH - 2 * _MARGIN
_LETTER = 6.7  # pixels of a letter at 12 px
_FONT = "font-family='ui-sans-serif,system-ui,Segoe UI,Helvetica,Arial,sans-serif'"


def colour(fraction: float) -> str:
    """#rrggbb: red far below the roofline, amber halfway, teal on it."""
    fraction = min(max(fraction, 0.0), 1.0)
    index = next(i for i, (high, _) in enumerate(_SCALE[1:]) if fraction <= high)
    (low, a), (high, b) = _SCALE[index : index + 2]
    t = (fraction - low) / (high - low)
    return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in zip(a, b, strict=True))


def svg(model: str, phases: Sequence[Phase]) -> str:
    """One self-contained picture: for each phase the layers merged, and below them every layer."""
    parts: list[str] = []
    y = 34.0
    parts.append(_text(_MARGIN, y, f"{model}: where the time of a step goes", size=18, weight=600))
    y = _legend(parts, y + 14) + 30
    for phase in phases:
        y = _phase(parts, phase, y) + 34
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {y:.0f}' width='{_WIDTH}' height='{y:.0f}' "
        f"{_FONT}>\n<rect width='100%' height='100%' fill='#ffffff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def html(model: str, phases: Sequence[Phase]) -> str:
    """A page with the picture and, for each phase, the table of ops. It needs nothing from elsewhere."""
    tables = "\n".join(_table(phase) for phase in phases)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(model)}: profile</title>
<style>
body {{ font: 14px/1.45 ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c2430;
       background: #fff; margin: 0 auto; max-width: 1200px; padding: 0 0 40px }}
svg {{ width: 100%; height: auto; display: block }}
svg .cell:hover rect {{ stroke: #1c2430; stroke-width: 2 }}
section {{ margin: 0 20px 28px }}
h2 {{ font-size: 16px; margin: 0 0 6px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: 3px 14px 3px 0; text-align: right; white-space: nowrap }}
th {{ font-weight: 500; color: #667085; border-bottom: 1px solid #d8dce3 }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left }}
i {{ display: inline-block; height: 10px; border-radius: 2px; vertical-align: -1px; margin-right: 6px }}
</style>
</head>
<body>
{svg(model, phases)}
{tables}
</body>
</html>
"""


def _table(phase: Phase) -> str:
    head = "".join(f"<th>{h}</th>" for h in ("op", "calls", "time", "of step", "GB/s", "TFLOP/s", "roof", "bound by"))
    rows = []
    for part in phase.by_op():
        share, rate = part.seconds / phase.profiled_seconds, 1 / part.seconds if part.seconds > 0 else 0.0
        bar = f"<i style='width:{120 * share:.0f}px;background:{colour(part.roof_fraction)}'></i>"
        cells = (
            escape(part.name), f"{part.calls}", duration(part.seconds), f"{bar}{share:.1%}",
            f"{part.bytes * rate / 1e9:.1f}", f"{part.flops * rate / 1e12:.3f}", f"{part.roof_fraction:.0%}",
            escape(part.bound_by),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<section><h2>{escape(phase.title)}</h2><table><tr>{head}</tr>{''.join(rows)}</table></section>"


def _legend(parts: list[str], y: float) -> float:
    stops = "".join(f"<stop offset='{p:.0%}' stop-color='{colour(p)}'/>" for p, _ in _SCALE)
    parts.append(f"<defs><linearGradient id='roof'>{stops}</linearGradient></defs>")
    parts.append(_text(_MARGIN, y + 10, "Width is time. Colour is the fraction of the roofline:"))
    x = _MARGIN + 370
    parts.append(_text(x - 26, y + 10, "0 %"))
    parts.append(f"<rect x='{x}' y='{y}' width='160' height='12' rx='2' fill='url(#roof)'/>")
    parts.append(_text(x + 166, y + 10, "100 %"))
    parts.append(f"<rect x='{x + 230}' y='{y}' width='12' height='12' rx='2' fill='{_OUTSIDE}'/>")
    parts.append(_text(x + 248, y + 10, "outside calls"))
    return y + 12


def _phase(parts: list[str], phase: Phase, y: float) -> float:
    rate = f"{phase.num_tokens / phase.seconds:,.0f} tokens/s"
    parts.append(_text(_MARGIN, y, phase.title, size=15, weight=600))
    parts.append(
        _text(
            _MARGIN, y + 18,
            f"{duration(phase.seconds)} without profiling, {rate}; {duration(phase.profiled_seconds)} with it, where "
            f"the roofline allows {duration(phase.bound_seconds)} ({phase.bound_seconds / phase.profiled_seconds:.0%})",
            fill="#667085",
        )
    )  # fmt: skip
    y += 30
    merged = phase.tree(merge=True)
    scale = PLOT_WIDTH / phase.profiled_seconds
    depth = _icicle(parts, merged, _MARGIN, y, scale, phase.profiled_seconds, 0)
    left = _MARGIN + phase.call_seconds * scale
    outside = phase.outside_seconds
    _cell(parts, left, y + _ROW, outside * scale, "outside", f"outside calls: {duration(outside)}", _OUTSIDE)
    y += (depth + 1) * _ROW + 22
    parts.append(_text(_MARGIN, y, "every layer, in order", fill="#667085"))
    single = phase.tree(merge=False)
    single.name = ""
    y += 8
    depth = 0
    x = float(_MARGIN)
    for child in single.children.values():
        depth = max(depth, _icicle(parts, child, x, y, scale, phase.profiled_seconds, 0))
        x += child.seconds * scale
    return y + (depth + 1) * _ROW


def _icicle(parts: list[str], part: Part, x: float, y: float, scale: float, whole: float, level: int) -> int:
    """Draw a part and what it is made of below it; the number of rows below its own."""
    width = (part.seconds if level or part.name != "step" else whole) * scale
    roof = f"{part.roof_fraction:.0%} of the roofline ({part.bound_by})" if part.seconds else ""
    calls = f"{part.calls} calls, " if part.calls > 1 else ""
    rate = 1 / part.seconds if part.seconds > 0 else 0.0
    hint = (
        f"{part.name}: {calls}{duration(part.seconds)}, {part.seconds / whole:.1%} of the step; {roof}; "
        f"{part.bytes * rate / 1e9:.1f} GB/s, {part.flops * rate / 1e12:.3f} TFLOP/s"
    )
    label = "step" if part.name == "step" else f"{part.name} {part.seconds / whole:.0%}"
    _cell(parts, x, y, width, label, hint, colour(part.roof_fraction))
    depth = 0
    for child in part.children.values():
        depth = max(depth, 1 + _icicle(parts, child, x, y + _ROW, scale, whole, level + 1))
        x += child.seconds * scale
    return depth


def _cell(parts: list[str], x: float, y: float, width: float, label: str, hint: str, fill: str) -> None:
    if width <= 0.05:
        return
    letters = int((width - 8) / _LETTER)
    name = label.rpartition(" ")[0] or label
    shown = label if len(label) <= letters else name if len(name) <= letters else ""
    gap = 0.8 if width > 3 else 0.0
    text = _text(x + 4, y + 18, shown, fill="#10151c") if shown else ""
    parts.append(
        f"<g class='cell'><title>{escape(hint)}</title><rect x='{x:.2f}' y='{y}' width='{max(width - gap, 0.05):.2f}' "
        f"height='{_ROW - 2}' rx='2' fill={quoteattr(fill)}/>{text}</g>"
    )


def _text(x: float, y: float, text: str, *, size: int = 12, weight: int = 400, fill: str = "#1c2430") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}'>{escape(text)}</text>"
    )
