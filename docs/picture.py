"""Draw the README's picture from the rankings of the embedded test images.

    python jobs/search.py --model embedded --shards patchrank/assets/shards/test-000000.tar.gz --out test-rankings
    python docs/picture.py test-rankings docs/rankings.png

A column an image: the image; its golden ranking, from dark (of no use) to bright (most useful); what is left of it at
keep rates 0.6 and 0.4.
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

from patchrank import images, rankings, shards
from patchrank.errors import run
from patchrank.search import tokens_kept

GONE = (120, 170, 230)  # the colour of tokens that have left
PATCH, GAP, COLUMNS = 8, 12, 10  # pixels a token, pixels between pictures, images shown
# A perceptually even scale from dark violet over green to yellow (viridis, by its colours at five points).
SCALE = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)


def heat(ranking: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The place of every token in the ranking as a colour, (rows, columns, 3) uint8."""
    place = np.empty(len(ranking))
    place[ranking] = np.linspace(1, 0, len(ranking))  # 1 is the most useful
    points = np.linspace(0, 1, len(SCALE))
    colours = np.stack([np.interp(place, points, SCALE[:, channel]) for channel in range(3)], axis=-1)
    return colours.round().astype(np.uint8).reshape(*grid, 3)


def main() -> int:
    """Draw the first image of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", help="rankings folder")
    parser.add_argument("picture", help="PNG file to write")
    args = parser.parse_args()
    corpus = rankings.open(args.rankings)
    rows, columns = grid = tuple(corpus.settings["grid"])
    height, width = rows * PATCH, columns * PATCH

    chosen: dict[int, dict] = {}
    for row in corpus.dataset.to_table(columns=["key", "shard", "label", "ranking"]).to_pylist():
        chosen.setdefault(row["label"], row)
    picks = [chosen[label] for label in sorted(chosen)[:COLUMNS]]
    encoded = {
        (uri, sample.key): sample.image
        for uri in {row["shard"] for row in picks}
        for sample in shards.read(uri)
        if isinstance(sample, shards.Sample)
    }
    canvas = Image.new("RGB", (len(picks) * (width + GAP) + GAP, 4 * (height + GAP) + GAP), "white")
    for column, row in enumerate(picks):
        ranking = np.array(row["ranking"])
        photo = images.decode(encoded[row["shard"], row["key"]]).resize((width, height), Image.Resampling.NEAREST)
        panels = [photo, Image.fromarray(heat(ranking, grid)).resize((width, height), Image.Resampling.NEAREST)]
        for keep in (0.6, 0.4):
            mask = np.zeros(rows * columns, dtype=bool)
            mask[ranking[: tokens_kept(len(ranking), keep)]] = True
            pixels = mask.reshape(grid).repeat(PATCH, axis=0).repeat(PATCH, axis=1)[..., None]
            panels.append(Image.fromarray(np.where(pixels, np.asarray(photo), GONE).astype(np.uint8)))
        for line, panel in enumerate(panels):
            canvas.paste(panel, (GAP + column * (width + GAP), GAP + line * (height + GAP)))
    canvas.save(args.picture, optimize=True)
    print(f"{args.picture}: {len(picks)} images")
    return 0


if __name__ == "__main__":
    run(main)
