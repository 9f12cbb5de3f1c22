"""The ratios as an SVG picture: a group of bars for each comparison, and the targets."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aapo.benchmarks.peers.report import Ratio
from nemo_aapo.study.picture import COLOURS, FONT, HEIGHT, WIDTH, Panel, grid

GAP = 0.3
"""Between groups, of a group's width."""


def bars(ratios: Sequence[Ratio]) -> str:
    """The picture's text.

    Args:
        ratios: at least one.
    """
    arms = list(dict.fromkeys(r.comparison for r in ratios))
    kinds = list(dict.fromkeys((r.model, r.threads) for r in ratios))
    high = max(1.0, *(r.high for r in ratios))
    tick = 0.2 if high <= 2 else 0.5
    panel = Panel(64, WIDTH - 20, len(arms), 0.0, tick * (int(high / tick) + 1), tick)
    parts = [grid(panel, "CPU seconds of a step, ours / TRL's")]
    width = (1 - GAP) / len(kinds)
    for i, arm in enumerate(arms):
        of_arm = {(r.model, r.threads): r for r in ratios if r.comparison == arm}
        for k, kind in enumerate(kinds):
            parts.append(_bar(panel, of_arm[kind], i + GAP / 2 + k * width, width, COLOURS[k % len(COLOURS)]))
        if arm.target is not None:
            (left, y), (right, _) = panel.at(i + GAP / 4, arm.target), panel.at(i + 1 - GAP / 4, arm.target)
            line = f'x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {line} stroke="#000" stroke-width="2" stroke-dasharray="5 3"/>')
        x, y = panel.at(i + 0.5, 0.0)
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">({arm.arm})</text>')
    for k, (model, threads) in enumerate(kinds):
        x = panel.left + 20 + k * (panel.right - panel.left - 20) / len(kinds)
        name = f"{model}, {threads} thread{'' if threads == 1 else 's'}"
        parts.append(f'<rect x="{x:.1f}" y="{HEIGHT - 24}" width="12" height="12" fill="{COLOURS[k % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 18:.1f}" y="{HEIGHT - 13}">{name}</text>')
    title = "A training step beside TRL's; lines: lowest to highest turn; dashed: targets; 1: as fast as TRL"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{FONT}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<text x="{WIDTH / 2}" y="26" text-anchor="middle" font-size="15" font-weight="bold">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(panel: Panel, ratio: Ratio, start: float, width: float, colour: str) -> str:
    (left, top), (right, bottom) = panel.at(start, ratio.cpu), panel.at(start + 0.9 * width, 0.0)
    middle = (left + right) / 2
    number = middle + 4  # its left edge once it is turned
    _, low = panel.at(0, ratio.low)
    _, high = panel.at(0, ratio.high)
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="{colour}"/>'
        f'<line x1="{middle:.1f}" y1="{low:.1f}" x2="{middle:.1f}" y2="{high:.1f}" stroke="#222"/>'
        f'<text x="{number:.1f}" y="{bottom - 8:.1f}" font-size="12" '
        f'transform="rotate(-90 {number:.1f} {bottom - 8:.1f})">{ratio.cpu:.2f}</text>'
    )
