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

from patchrank.data import shards
from patchrank.errors import UserError, run
from patchrank.report.gallery import GONE, heat_map
from patchrank.store import rankings, storage
from patchrank.tokens import tokens_kept

PATCH, GAP, COLUMNS = 8, 12, 10  # pixels a token, pixels between pictures, images shown


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
    photos = {(uri, key): photo for uri in {row["shard"] for row in picks} for key, photo in shards.photos(uri)}
    canvas = Image.new("RGB", (len(picks) * (width + GAP) + GAP, 4 * (height + GAP) + GAP), "white")
    for column, row in enumerate(picks):
        ranking = np.array(row["ranking"])
        if (row["shard"], row["key"]) not in photos:
            raise UserError(f"{row['shard']}: has no image {row['key']} any more, which was ranked; search again")
        pictures = (photos[row["shard"], row["key"]], heat_map(ranking, grid))
        panels = [picture.resize((width, height), Image.Resampling.NEAREST) for picture in pictures]
        for keep in (0.6, 0.4):
            mask = np.zeros(rows * columns, dtype=bool)
            mask[ranking[: tokens_kept(len(ranking), keep)]] = True
            pixels = mask.reshape(grid).repeat(PATCH, axis=0).repeat(PATCH, axis=1)[..., None]
            panels.append(Image.fromarray(np.where(pixels, np.asarray(panels[0]), GONE).astype(np.uint8)))
        for line, panel in enumerate(panels):
            canvas.paste(panel, (GAP + column * (width + GAP), GAP + line * (height + GAP)))
    try:
        canvas.save(args.picture, optimize=True)
    except (OSError, ValueError) as error:  # the latter where the name's ending is unknown
        raise UserError(f"{args.picture}: cannot be written ({storage.one_line(error)})") from None
    print(f"{args.picture}: {len(picks)} images")
    return 0


if __name__ == "__main__":
    run(main)
