"""Figure of how MagicNet's cubes move, made with the functions that move them: docs/figures/cubes.svg.

    python scripts/cube_figure.py docs/figures/cubes.svg

Cost: seconds. It needs nothing but this package.
"""

import argparse
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_dycon.cubes import draw_exchange, exchange, partition, recover

CUBES = (2, 2)
NAMES = ("labelled 1", "labelled 2", "unlabelled 1", "unlabelled 2")
KINDS = ("a", "b", "c", "d")  # of a patch: blue for labelled ones, yellow for unlabelled ones, two tones each
SIDE = 34  # of a cube, in units of the picture
STYLE = """
    text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle; }
    .name { font-size: 14.5px; font-weight: 600; }
    .small { font-size: 12px; }
    .left { text-anchor: start; }
    .line { fill: none; stroke: #57606a; stroke-width: 1.8; }
    .head { fill: #57606a; }
    .cube { stroke: #57606a; }
    .a { fill: #ddf4ff; } .b { fill: #80ccff; } .c { fill: #fff3d6; } .d { fill: #eac54f; }
    .box { fill: #eef0f2; stroke: #57606a; stroke-width: 1.5; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .line, .cube, .box { stroke: #9da7b3; }
      .head { fill: #9da7b3; }
      .a { fill: #0c2d4d; } .b { fill: #1158a6; } .c { fill: #3b2a06; } .d { fill: #7d5a0a; }
      .box { fill: #21262d; }
    }
"""


def patches() -> Tensor:
    """Return the patches (4, 1, 2, 2), one voxel a cube: 10 times the number of the patch, plus the place."""
    return (10 * torch.arange(4).view(4, 1) + torch.arange(4)).view(4, 1, *CUBES)


def grid(patch: Tensor, x: float, y: float, gap: float = 0.0) -> Iterator[str]:
    """Yield the cubes of a patch (2, 2), each in the colour of the patch and with the place that it comes from."""
    for row in range(CUBES[0]):
        for column in range(CUBES[1]):
            source, place = divmod(int(patch[row, column]), 10)
            left, top = x + column * (SIDE + gap), y + row * (SIDE + gap)
            yield f'<rect class="cube {KINDS[source]}" x="{left}" y="{top}" width="{SIDE}" height="{SIDE}"/>'
            yield text(str(place + 1), left + SIDE / 2, top + SIDE / 2 + 4, "small")


def text(words: str, x: float, y: float, kind: str) -> str:
    """Return a line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def arrow(x: float, y: float, length: float) -> str:
    """Return an arrow to the right."""
    head = f'<path class="head" d="M{x + length} {y} l-9 -5 v10 z"/>'
    return f'<path class="line" d="M{x} {y} h{length - 8}"/>{head}'


def picture(seed: int = 3) -> str:
    """Return the figure as SVG."""
    x = patches()
    origin = draw_exchange(4, 4, x.device, torch.Generator().manual_seed(seed))
    mixed = exchange(x, origin, CUBES)
    back = exchange(mixed, origin.argsort(0), CUBES)
    pieces = partition(x[:1], CUBES)
    whole = recover(pieces, CUBES)
    parts = [
        text("across: each place has a permutation of its own", 20, 24, "name left"),
        *(text(words, at, 52, "small") for words, at in (("patches", 160), ("student sees", 340), ("put back", 700))),
    ]
    for b, name in enumerate(NAMES):
        y = 64 + b * 82
        parts.append(text(name, 20, y + SIDE + 4, "small left"))
        for patch, left in ((x[b, 0], 126), (mixed[b, 0], 306), (back[b, 0], 666)):
            parts.extend(grid(patch, left, y))
        parts += [arrow(206, y + SIDE, 88), arrow(386, y + SIDE, 68), arrow(566, y + SIDE, 88)]
    parts += ['<rect class="box" x="462" y="64" width="96" height="314" rx="6"/>', text("student", 510, 225, "name")]
    parts += [
        text("nnU-Net's loss", 756, 64 + SIDE + 45, "small left"),
        text("pseudo-labels:", 756, 228 + SIDE + 36, "small left"),
        text("teacher and cubes", 756, 228 + SIDE + 54, "small left"),
        text("within: each cube is an input of its own", 20, 420, "name left"),
        text("labelled 1", 20, 470 + SIDE, "small left"),
        *grid(x[0, 0], 126, 464),
        arrow(206, 464 + SIDE, 88),
        *grid(pieces.view(*CUBES), 300, 458, gap=12),
        arrow(386, 464 + SIDE, 68),
        '<rect class="box" x="462" y="448" width="96" height="104" rx="6"/>',
        text("student", 510, 504, "name"),
        arrow(566, 464 + SIDE, 88),
        *grid(whole[0, 0], 666, 464),
        text("nnU-Net's loss, and:", 756, 470 + SIDE - 10, "small left"),
        text("which place is a cube from?", 756, 470 + SIDE + 8, "small left"),
    ]
    body = "\n  ".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 570" role="img" aria-labelledby="title desc">\n'
        '  <title id="title">How cubes move in MagicNet</title>\n'
        '  <desc id="desc">Two labelled and two unlabelled patches of four numbered cubes. Across: at each place the '
        "cubes change patches, the student sees the mixed patches, and its outputs go back to where they came from. "
        "Within: the cubes of a patch go through the student one by one and are put together again.</desc>\n"
        f"  <style>{STYLE}  </style>\n  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the figure goes")
    parser.parse_args().file.write_text(picture(), encoding="utf-8")
