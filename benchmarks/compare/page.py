"""Result page: writes tables between the markers of docs/compare.md, and charts as SVG files."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.compare.report import render_tables
from lit_vlm.reports.charts import AxisScale, compute_ticks

ROOT = Path(__file__).parents[2]
PAGE, PICTURES = ROOT / "docs/compare.md", ROOT / "docs/images"
WIDTH, LEFT, RIGHT, ROW, TOP, FOOT = 780, 310, 60, 34, 10, 46
STYLE = (  # inline, because the page that shows it has no style sheet
    "text{font:13px system-ui,sans-serif;fill:#1c1f23}.faint{fill:#6b7280;font-size:12px}.grid{stroke:#e3e4e0}"
    ".bar{fill:#2563eb}.short{fill:#d97706}.bound{stroke:#1c1f23;stroke-width:2}.asked{stroke:#c8343a;stroke-width:2;"
    "stroke-dasharray:4 3}"
    "@media(prefers-color-scheme:dark){text{fill:#e8e9ea}.faint{fill:#98a0aa}.grid{stroke:#30353b}.bar{fill:#7aa2ff}"
    ".bound{stroke:#e8e9ea}}"
)


def write_page(results: Path, page: Path = PAGE, pictures: Path = PICTURES) -> None:
    """Write all results for which the page has markers."""
    text = page.read_text(encoding="utf-8")
    for name, result in read_results(results).items():
        for title, table in render_tables(result).items():
            marker = f"<!-- figures of benchmarks/results/{name}.json: {title} -->"
            pattern = re.compile(re.escape(marker) + r"\n.*?<!-- /figures -->", re.DOTALL)
            text = pattern.sub(lambda _, m=marker, t=table: f"{m}\n{t}\n<!-- /figures -->", text)
        drawing = draw_chart(result)
        if drawing and f"images/{name}.svg" in text:
            (pictures / f"{name}.svg").write_text(drawing, encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """Read the results, by file name without extension."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("compare_*.json"))}


def draw_chart(result: dict[str, Any]) -> str:
    """Draw a bar chart of the ratios with bound and goal, or of the ablations with their predictions; "" for others."""
    if "ladder" in result:
        rows = [(row["off"], row["measured"], row["predicted"], None) for row in result["ladder"]]
        return draw_bar_chart(rows, f"{result['case']}: time with one optimisation off / time with all on")
    if "bars" in result:
        rows = [
            (f"{bar['peer']}{' *' if 'kept' in bar['ours'] else ''}", bar["cpu"], bar["bound"], bar["bar"])
            for bar in result["bars"]
        ]
        return draw_bar_chart(rows, f"{result['case']}: CPU seconds of the peer / lit_vlm")
    return ""


def draw_bar_chart(rows: list[tuple[str, float | None, float, float | None]], label: str) -> str:
    """Draw horizontal bars from zero. A row is (name, value, analytical bound, goal)."""
    height = TOP + ROW * len(rows) + FOOT
    max_value = max(max(value or 0, bound, bar or 0) for _, value, bound, bar in rows)
    x = AxisScale(0, 1.08 * max_value, LEFT, WIDTH - RIGHT)
    floor = TOP + ROW * len(rows)
    parts = []
    for tick in compute_ticks(0, 1.08 * max_value):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="faint" x="{x(tick)}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>')
    for i, (name, value, bound, bar) in enumerate(rows):
        parts.append(_draw_row(x, TOP + ROW * i, name, value, bound, bar))
    has_goal = any(bar is not None for *_, bar in rows)
    legend = "black line: bound; red dashes: required" if has_goal else "black line: predicted"
    parts.append(f'<text class="faint" x="{LEFT}" y="{floor + 36}">{legend}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"


def _draw_row(x: AxisScale, top: int, name: str, value: float | None, bound: float, bar: float | None) -> str:
    middle = top + ROW / 2 + 4
    parts = [f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>']
    if value is not None:
        style = "bar" if bar is None or value >= bar else "short"
        width = round(x(value) - x(0), 1)
        parts.append(f'<rect class="{style}" x="{x(0)}" y="{top + 7}" width="{width}" height="{ROW - 14}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{middle}">{value:.2f}</text>')
    for position, style in ((bound, "bound"), (bar, "asked")):
        if position is not None:
            parts.append(
                f'<line class="{style}" x1="{x(position)}" x2="{x(position)}" y1="{top + 3}" y2="{top + ROW - 3}"/>'
            )
    return "".join(parts)
