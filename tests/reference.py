"""The slow, obvious search: one image, one candidate, one block at a time, through open_clip's own modules.

It shares no code with `patchrank.search` or `patchrank.vit` and is the oracle for both.
"""

from __future__ import annotations

import math

import torch


def embed(visual, prefix, kept):
    """The embedding of one image, (E,), from its tokens before the cut, (1 + N, D), when only `kept` go on."""
    tokens, cut = prefix
    x = torch.stack([tokens[0]] + [tokens[1 + token] for token in sorted(kept)])[None]  # (1, 1 + n, D)
    for block in visual.transformer.resblocks[cut:]:
        x = block(x)
    return visual._pool(x)[0][0] @ visual.proj


def prefix(visual, image, cut):
    """Tokens of one image before block `cut`, (1 + N, D), and the cut."""
    x = visual._embeds(image[None])
    for block in visual.transformer.resblocks[:cut]:
        x = block(x)
    return x[0], cut


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def softmax(embedding, classes, logit_scale):
    return (logit_scale * (embedding / embedding.norm()) @ classes.T).softmax(0)


def token_score(name, embedding, full, classes, logit_scale, label):
    if name == "preservation":
        return cosine(embedding, full)
    likely = softmax(embedding, classes, logit_scale)
    return (likely.max() if name == "confidence" else likely[label]).item()


@torch.no_grad()
def search(visual, image, config, cut, classes=None, logit_scale=100.0, label=None, keep_rates=()):
    """One image's ranking, score and step by token id, and per keep rate (cosine, prediction, confidence)."""
    rows, columns = visual.grid_size
    everything = range(rows * columns)
    start = prefix(visual, image, cut)
    full = embed(visual, start, everything)

    blocks = []
    for row in range(rows - config.block + 1):
        for column in range(columns - config.block + 1):
            side = range(config.block)
            blocks.append({(row + i) * columns + column + j for i in side for j in side})

    alive = set(everything)
    scores, step, gone = {}, dict.fromkeys(everything, 0), []
    goal = len(alive) - math.floor(config.keep * len(alive) + 0.5)
    candidates = number = 0
    while number == 0 or (len(gone) < goal and (config.steps is None or number < config.steps)):
        number += 1
        wanted = alive
        if number > 1 and config.rescore is not None:
            order = sorted(alive, key=lambda token: (-scores[token], token))
            wanted = set(order[: config.rescore * config.remove_per_step])
        heard = {token: [] for token in wanted}
        for block in blocks:
            if block & wanted:
                candidates += 1
                embedding = embed(visual, start, alive - block)
                value = token_score(config.score, embedding, full, classes, logit_scale, label)
                for token in block & wanted:
                    heard[token].append(value)
        for token, values in heard.items():
            scores[token] = sum(values) / len(values)
        for token in sorted(wanted, key=lambda token: (-scores[token], token))[: config.remove_per_step]:
            if len(gone) < goal:
                gone.append(token)
                step[token] = number
                alive = alive - {token}
    gone += sorted(alive, key=lambda token: (-scores[token], token))
    ranking = gone[::-1]

    pruned = []
    for keep in keep_rates:
        embedding = embed(visual, start, ranking[: math.floor(keep * len(ranking) + 0.5)])
        likely = None if classes is None else softmax(embedding, classes, logit_scale)
        pruned.append((cosine(embedding, full), likely))
    return {
        "full": full,
        "ranking": ranking,
        "score": [scores[token] for token in everything],
        "step": [step[token] for token in everything],
        "candidates": candidates,
        "pruned": pruned,
    }
