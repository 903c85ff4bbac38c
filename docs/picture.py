r"""Draw the pictures of images and their golden rankings: the README's, and that of the embedded test images.

    pip install --no-deps --target wheel scikit-image==0.26.0
    printf 'path\nastronaut.png\nchelsea.png\ncoffee.png\nrocket.jpg\n' > photos.csv
    python jobs/make_shards.py --csv photos.csv --root wheel/skimage/data --no-shuffle --out photos
    python jobs/search.py --model ViT-B-16 --pretrained openai --shards photos --out photo-rankings
    python docs/picture.py photo-rankings docs/photos.png --patch 14

By scikit-image's own notes on them (skimage/data/_fetchers.py) the first and the last are in the public domain (NASA,
SpaceX), and the others CC0 (Stefan van der Walt, Rachel Michetti).

    python jobs/search.py --model embedded --shards patchrank/assets/shards/test-000000.tar.gz --out test-rankings
    python docs/picture.py test-rankings docs/rankings.png

A column an image, the first of each class, or the first ones where there are no labels: the image; its golden ranking,
from dark (of no use) to bright (most useful); what is left of it at keep rates 0.6 and 0.4.
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageOps

from patchrank.data import shards
from patchrank.errors import UserError, run
from patchrank.report.gallery import GONE, heat_map
from patchrank.store import rankings, storage
from patchrank.tokens import tokens_kept

GAP, COLUMNS = 12, 10  # pixels between pictures, images shown


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", help="rankings folder")
    parser.add_argument("picture", help="PNG file to write")
    parser.add_argument("--patch", type=int, default=8, metavar="N", help="pixels a patch (%(default)s)")
    args = parser.parse_args()
    if args.patch < 1:
        raise UserError(f"--patch {args.patch}: must be at least 1")
    corpus = rankings.open(args.rankings)
    rows, columns = grid = tuple(corpus.settings["grid"])
    height, width = rows * args.patch, columns * args.patch

    found = corpus.dataset.head(1000, columns=["key", "shard", "label", "ranking"]).to_pylist()
    chosen: dict[int, dict] = {}
    for number, row in enumerate(found):
        chosen.setdefault(number if row["label"] is None else row["label"], row)
    picks = [chosen[label] for label in sorted(chosen)[:COLUMNS]]
    photos = {(uri, key): photo for uri in {row["shard"] for row in picks} for key, photo in shards.photos(uri)}
    canvas = Image.new("RGB", (len(picks) * (width + GAP) + GAP, 4 * (height + GAP) + GAP), "white")
    for column, row in enumerate(picks):
        ranking = np.array(row["ranking"])
        if (row["shard"], row["key"]) not in photos:
            raise UserError(f"{row['shard']}: has no image {row['key']} any more, which was ranked; search again")
        photo = photos[row["shard"], row["key"]]
        pixelated = photo.width < width  # a small image keeps its pixels
        resampling = Image.Resampling.NEAREST if pixelated else Image.Resampling.LANCZOS
        panels = [ImageOps.fit(photo, (width, height), resampling)]  # the middle, as the model sees it
        panels.append(heat_map(ranking, grid).resize((width, height), Image.Resampling.NEAREST))
        for keep in (0.6, 0.4):
            mask = np.zeros(rows * columns, dtype=bool)
            mask[ranking[: tokens_kept(len(ranking), keep)]] = True
            pixels = mask.reshape(grid).repeat(args.patch, axis=0).repeat(args.patch, axis=1)[..., None]
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
