"""Ways of pruning side by side: top-1 and cosine of what they leave of a model, and how they match golden rankings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.data.pair_batches import PairBatch
from patchrank.model.adapter import embedding_of
from patchrank.model.tower import Tower
from patchrank.pruning.methods import UNPRUNED, Method
from patchrank.pruning.schedule import at_keep_rate, budget
from patchrank.pruning.selector import Attention
from patchrank.tokens import count_kept, matching_rate, select

_FIGURES = ("images", "labelled", "hits", "cosine", "ranked", "matching")  # the columns of `Comparison.sums`


@dataclass(frozen=True)
class Pruned:
    """A batch of images pruned by one method at one keep rate.

    Attributes:
        method, keep: which.
        embeddings: (B, E) float32, not normalised.
        usefulness: (B, N) by token id, high = keep; None where nothing was chosen.
        kept: (B, n) int64, ascending ids of the tokens that stay; None likewise.
    """

    method: str
    keep: float
    embeddings: Tensor
    usefulness: Tensor | None = None
    kept: Tensor | None = None


class Pruner:
    """Prunes batches of images in every way at every keep rate.

    Args:
        tower: the model.
        methods: by name, on the tower's device; `UNPRUNED` is not among them.
        keep_rates: at which all of them prune, at equal multiply-adds (see `patchrank.pruning.schedule`).

    Raises:
        UserError: a keep rate that leaves no patch, or is above 1.
    """

    def __init__(self, tower: Tower, methods: Mapping[str, Method], keep_rates: Sequence[float]) -> None:
        self.tower, self.methods, self.keep_rates = tower, dict(methods), tuple(keep_rates)
        self._towers: dict[tuple[str, float], nn.Module] = {}
        self._patches: dict[tuple[str, float], int] = {}  # that stay
        adapter = tower.adapter
        for keep in keep_rates:
            count_kept(tower.num_tokens, keep, "--keep-rates")  # refuses those that make no sense
            for name, method in self.methods.items():
                if method.selector is not None:
                    schedule = at_keep_rate(adapter, method, tower.cut, keep, "--keep-rates")
                    self._patches[name, keep] = schedule.get(tower.cut, tower.num_tokens)
                elif method.image_tower is not None:
                    made = method.image_tower(tower.visual, budget(adapter, method, tower.cut, keep))
                    # An idle one is open_clip's own forward pass, which a tower's mix of dtypes is not for.
                    self._towers[name, keep] = tower if made.idle else made

    @torch.no_grad()
    def prune(self, batch: PairBatch) -> Iterator[Pruned]:
        """A batch pruned in every way, the unpruned one first; what is before the cut runs once for all of them."""
        tower, adapter = self.tower, self.tower.adapter
        full, count, attention = before_cut(tower, batch.pixels)  # (B, p + N, D)
        whole = tower.suffix(full)  # (B, E)
        yield Pruned(UNPRUNED, 1.0, whole)
        for name, method in self.methods.items():
            if method.image_tower is not None:
                pixels = batch.pixels.to(tower.device, tower.dtype)
                for keep in self.keep_rates:
                    yield Pruned(name, keep, embedding_of(self._towers[name, keep](pixels)).to(whole.dtype))
                continue
            tokens = full if method.tokens is None else method.tokens.prefix(tower, batch.pixels, full)
            if method.selector is None:
                yield Pruned(name, 1.0, tower.suffix(tokens))
                continue
            patches = tokens[:, : tower.length]  # (B, p + N, D), without learnable tokens
            usefulness = method.selector(patches, count, attention, batch)  # (B, N)
            for keep in self.keep_rates:
                stay = self._patches[name, keep]
                kept = select(usefulness, stay)
                if stay == tower.num_tokens or method.tokens is None:
                    embeddings = tower.suffix(full, kept)
                else:
                    along = method.tokens.along(adapter, tower.cut, stay)
                    # Which tokens are looked at, and which look, when they merge is by their order: here as in a
                    # `PrunedTower`.
                    ordered = usefulness.topk(stay, dim=1).indices  # (B, n), best first
                    embeddings = tower.suffix(tokens, ordered, along=along)
                yield Pruned(name, keep, embeddings, usefulness, kept)


def before_cut(tower: Tower, images: Tensor) -> tuple[Tensor, int, Attention]:
    """What a selector is told of (B, 3, H, W) images: the tokens before the cut, (B, p + N, D), N, and the attention in
    the block before it; none at the input."""
    if tower.cut == 0:
        return tower.prefix(images), tower.num_tokens, None
    earlier = copy.copy(tower)  # shares the weights
    earlier.cut = tower.cut - 1
    before = earlier.prefix(images)  # (B, p + N, D)
    attention = partial(tower.adapter.class_attention, before, earlier.cut)
    return tower.adapter.run(before, earlier.cut, tower.cut), tower.num_tokens, attention


@dataclass(frozen=True)
class Row:
    """The figures of one method at one keep rate: means over images.

    Attributes:
        method: its name.
        keep: rate, which decides what multiply-adds are compared (see `patchrank.pruning.schedule`).
        images: how many were compared.
        top1: share of the labelled images that are classified right; None without class embeddings or labels.
        cosine: to the embedding of the whole image without learnable tokens; None where there were no images.
        matching: matching rate at m; None where the images have no golden rankings, or nothing is pruned.
    """

    method: str
    keep: float
    images: int
    top1: float | None
    cosine: float | None
    matching: float | None


class Comparison:
    """Compares methods on batches of images; it begins with the unpruned model.

    Args:
        tower: the model.
        methods: by name.
        keep_rates: at which all of them prune.
        classes: (K, E) normalised class embeddings, or None (then there is no top-1).
        m: the tokens that the matching rate looks at; as many as stay where None.

    Attributes:
        sums: (rows, 6) float64, the sums over images that `rows` divides. Processes that share the images out can add
            theirs together.

    Raises:
        UserError: a keep rate that leaves nothing, or is above 1.
    """

    def __init__(
        self,
        tower: Tower,
        methods: Mapping[str, Method],
        keep_rates: Sequence[float],
        classes: Tensor | None = None,
        m: int | None = None,
    ) -> None:
        self.pruner = Pruner(tower, methods, keep_rates)
        self.classes = classes
        self.m = m
        rates = self.pruner.keep_rates
        self._cells = [(UNPRUNED, 1.0)] + [
            (name, keep) for name, method in methods.items() for keep in (rates if method.prunes else (1.0,))
        ]
        self.sums = torch.zeros(len(self._cells), len(_FIGURES), dtype=torch.float64)

    def add(self, batch: PairBatch) -> list[Pruned]:
        """Prune a batch of images in every way, and return what that made, the unpruned one first."""
        found = list(self.pruner.prune(batch))
        full = found[0].embeddings  # (B, E)
        for row, pruned in enumerate(found):
            figures = self._labelled(pruned, batch)
            cosine = F.cosine_similarity(pruned.embeddings, full).double().sum().item()
            figures |= {"images": len(full), "cosine": cosine}
            if batch.ranking is not None and pruned.usefulness is not None and pruned.kept is not None:
                ranking = batch.ranking.to(full.device)
                rates = matching_rate(pruned.usefulness, ranking, self.m or pruned.kept.shape[1])
                figures |= {"ranked": len(full), "matching": rates.double().sum().item()}
            self.sums[row] += torch.tensor([figures.get(figure, 0.0) for figure in _FIGURES], dtype=torch.float64)
        return found

    def rows(self) -> list[Row]:
        """The figures so far, method by method in the order given, keep rate by keep rate."""
        result = []
        for (name, keep), sums in zip(self._cells, self.sums.tolist(), strict=True):
            images, labelled, hits, cosine, ranked, matching = sums
            means = (_mean(hits, labelled), _mean(cosine, images), _mean(matching, ranked))
            result.append(Row(name, keep, int(images), *means))
        return result

    def figures(self, part: str, suffix: Mapping[str, str]) -> dict[str, float]:
        """Top-1 and cosine by name, as trainings log them: `part` begins the names, `suffix`, by method, ends them."""
        figures: dict[str, float] = {}
        for row in self.rows():
            whole = row.method == UNPRUNED
            end = "unpruned" if whole else f"at keep {row.keep:g}{suffix[row.method]}"
            names = {"top-1": row.top1, "cosine": None if whole else row.cosine}
            figures |= {f"{part}/{name} {end}": value for name, value in names.items() if value is not None}
        return figures

    def _labelled(self, pruned: Pruned, batch: PairBatch) -> dict[str, float]:
        method = self.pruner.methods.get(pruned.method)
        own = None if method is None else method.classes
        classes = self.classes if own is None else own
        if classes is None:
            return {}
        embeddings = pruned.embeddings
        prediction = (embeddings @ classes.to(embeddings).T).argmax(dim=1).cpu()  # (B,); a length changes no argmax
        labelled = batch.labels >= 0
        return {"labelled": labelled.sum().item(), "hits": (labelled & (prediction == batch.labels)).sum().item()}


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def render(rows: Sequence[Any]) -> str:
    """Rows, or others that tell as much, as a table for a terminal: top-1, cosine, matching rate, a line a method."""
    keep_rates = list(dict.fromkeys(row.keep for row in rows if row.method != UNPRUNED))
    figures = (
        ("top-1, %", "top1", "{:.1f}"),
        ("cosine", "cosine", "{:.4f}"),
        ("matching, %", "matching", "{:.1f}"),
    )
    width = max(len(text) for text in [*(row.method for row in rows), *(title for title, _, _ in figures)])
    blocks = []
    for title, name, spelled in figures:
        if all(getattr(row, name) is None for row in rows):
            continue
        lines = [f"{title:<{width}}" + "".join(f"{f'keep {keep:g}':>11}" for keep in keep_rates)]
        for method in dict.fromkeys(row.method for row in rows):
            by_keep = {row.keep: getattr(row, name) for row in rows if row.method == method}
            values = [by_keep.get(keep, by_keep.get(1.0)) for keep in keep_rates]
            if any(value is not None for value in values):
                scale = 1 if name == "cosine" else 100
                texts = ["" if value is None else spelled.format(scale * value) for value in values]
                lines.append(f"{method:<{width}}" + "".join(f"{text:>11}" for text in texts))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
