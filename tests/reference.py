"""The slow, obvious search: one image, one candidate, one block at a time, through open_clip's own modules.

It shares no code with `patchrank.search` or `patchrank.model.tower` and is the oracle for both.
"""

from __future__ import annotations

import math

import torch


def grid_of(visual):
    """Rows and columns of patches, as each library names them."""
    if hasattr(visual, "grid"):
        return visual.grid
    return (visual.trunk.patch_embed if hasattr(visual, "trunk") else visual).grid_size


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
    """`classes` are the bank where that is what images are compared with."""
    if name == "preservation":
        return cosine(embedding, full)
    if name == "similarities":
        others = classes[[cosine(full, each) <= 0.999 for each in classes]]
        whole, likely = (softmax(each, others, logit_scale) for each in (full, embedding))
        return 1 - sum(p * math.log(p / q) for p, q in zip(whole.tolist(), likely.tolist(), strict=True))
    likely = softmax(embedding, classes, logit_scale)
    return (likely.max() if name == "confidence" else likely[label]).item()


def steps(config, num_tokens):
    """For each step of a search how many tokens leave."""
    goal = num_tokens - math.floor(config.keep * num_tokens + 0.5)
    counts = []
    while not counts or (sum(counts) < goal and (config.steps is None or len(counts) < config.steps)):
        counts.append(min(config.remove_per_step, goal - sum(counts)))
    return counts


def by_scores(config, everything, blocks, embedding_of, score_of):
    alive = set(everything)
    scores, step, gone, candidates = {}, dict.fromkeys(everything, 0), [], 0
    for number, count in enumerate(steps(config, len(everything)), start=1):
        wanted = alive
        if number > 1 and config.rescore is not None:
            order = sorted(alive, key=lambda token: (-scores[token], token))
            wanted = set(order[: config.rescore * config.remove_per_step])
        heard = {token: [] for token in wanted}
        for block in blocks:
            if block & wanted:
                candidates += 1
                value = score_of(embedding_of(alive - block))
                for token in block & wanted:
                    heard[token].append(value)
        for token, values in heard.items():
            scores[token] = sum(values) / len(values)
        for token in sorted(wanted, key=lambda token: (-scores[token], token))[:count]:
            gone.append(token)
            step[token] = number
            alive = alive - {token}
    gone += sorted(alive, key=lambda token: (-scores[token], token))
    return gone, scores, step, candidates


def by_effects(config, everything, blocks, embedding_of, score_of):
    alive = set(everything)
    now = embedding_of(alive)
    effects, scores, step, gone, candidates = {}, {}, dict.fromkeys(everything, 0), [], 0
    for number, count in enumerate(steps(config, len(everything)), start=1):
        wanted = alive
        if number > 1 and config.rescore is not None:
            order = sorted(alive, key=lambda token: (-score_of(now + effects[token]), token))
            wanted = set(order[: config.rescore * config.remove_per_step])
        heard = {token: [] for token in wanted}
        for block in blocks:
            if block & wanted:
                candidates += 1
                change = embedding_of(alive - block) - now
                for token in block & wanted:
                    heard[token].append(change / len(block & alive))
        for token, values in heard.items():
            effects[token] = sum(values) / len(values)
        sets, left = [], alive
        for _ in range(1 if config.steps == 1 or count == 0 else min(config.proposals, len(alive) // count)):
            chosen, then, said = [], now, {}
            for _ in range(count):
                token = min(left, key=lambda token: (-score_of(then + effects[token]), token))
                said[token] = score_of(then + effects[token])
                then = then + effects[token]
                chosen.append(token)
                left = left - {token}
            sets.append((chosen, then, said))
        if config.steps == 1:
            best, now = 0, sets[0][1]
        else:
            candidates += len(sets)
            found = [embedding_of(alive - set(chosen)) for chosen, _, _ in sets]
            best = max(range(len(sets)), key=lambda one: (score_of(found[one]), -one))
            for one, (chosen, then, _) in enumerate(sets):
                for token in chosen if one != best else []:
                    effects[token] = effects[token] + (found[one] - then) / count
            now = found[best]
        chosen, _, said = sets[best]
        scores.update(said)
        step.update(dict.fromkeys(chosen, number))
        gone += chosen
        alive = alive - set(chosen)
    while alive:
        token = min(alive, key=lambda token: (-score_of(now + effects[token]), token))
        scores[token] = score_of(now + effects[token])
        now = now + effects[token]
        gone.append(token)
        alive = alive - {token}
    return gone, scores, step, candidates


@torch.no_grad()
def search(visual, image, config, cut, classes=None, logit_scale=100.0, label=None, keep_rates=()):
    """One image's ranking, score and step by token id, and per keep rate (cosine, prediction, confidence)."""
    rows, columns = grid_of(visual)
    everything = range(rows * columns)
    start = prefix(visual, image, cut)
    full = embed(visual, start, everything)

    blocks = []
    for row in range(rows - config.block + 1):
        for column in range(columns - config.block + 1):
            side = range(config.block)
            blocks.append({(row + i) * columns + column + j for i in side for j in side})

    find = by_effects if config.rank_by == "effects" else by_scores

    def embedding_of(kept):
        return embed(visual, start, kept)

    def score_of(embedding):
        return token_score(config.score, embedding, full, classes, logit_scale, label)

    gone, scores, step, candidates = find(config, set(everything), blocks, embedding_of, score_of)
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
