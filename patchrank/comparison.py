"""Ways of pruning side by side: top-1 and cosine of what they leave of a model, and how they match golden rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.baselines import Usefulness
from patchrank.matching import matching_rate
from patchrank.pairs import PairBatch
from patchrank.predictor import count_kept, select
from patchrank.prompts import VisualTokens
from patchrank.vit import Tower

UNPRUNED = "unpruned"
_FIGURES = ("images", "labelled", "hits", "cosine", "ranked", "matching")  # the columns of `Comparison.sums`


@dataclass(frozen=True)
class Method:
    """One way of pruning.

    Attributes:
        usefulness: tells which tokens stay; all do where None.
        tokens: learnable tokens that go along.
        classes: (K, E) normalised class embeddings of its own, which learnable text tokens give.
    """

    usefulness: Usefulness | None = None
    tokens: VisualTokens | None = None
    classes: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """The figures of one method at one keep rate: means over images.

    Attributes:
        method: its name.
        keep: share of the patch tokens that stay.
        images: how many were compared.
        top1: share of the labelled images that are classified right; None without class embeddings or labels.
        cosine: to the embedding of the whole image without learnable tokens.
        matching: matching rate at m; None where the images have no golden rankings, or nothing is pruned.
    """

    method: str
    keep: float
    images: int
    top1: float | None
    cosine: float
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
        self.tower = tower
        self.methods = {UNPRUNED: Method(), **methods}
        self.counts = {keep: count_kept(tower.num_tokens, keep, "--keep-rates") for keep in keep_rates}
        self.classes = classes
        self.m = m
        self._cells = [
            (name, keep)
            for name, method in self.methods.items()
            for keep in (keep_rates if method.usefulness else (1.0,))
        ]
        self.sums = torch.zeros(len(self._cells), len(_FIGURES), dtype=torch.float64)

    @torch.no_grad()
    def add(self, batch: PairBatch) -> None:
        """Prune a batch of images in every way."""
        full_tokens = self.tower.prefix(batch.pixels)  # (B, 1 + N, D)
        full = self.tower.suffix(full_tokens)  # (B, E)
        ranking = None if batch.ranking is None else batch.ranking.to(full.device)
        for name, method in self.methods.items():
            tokens = full_tokens if method.tokens is None else method.tokens.prefix(self.tower, batch.pixels)
            patches = tokens[:, : 1 + self.tower.num_tokens]  # (B, 1 + N, D), without learnable tokens
            usefulness = None if method.usefulness is None else method.usefulness(patches, batch)  # (B, N)
            for row, (row_name, keep) in enumerate(self._cells):
                if row_name != name:
                    continue
                kept = None if usefulness is None else select(usefulness, self.counts[keep])
                embeddings = self.tower.suffix(tokens, kept)  # (B, E)
                figures = self._labelled(embeddings, method, batch)
                figures |= {"images": len(full), "cosine": F.cosine_similarity(embeddings, full).double().sum().item()}
                if ranking is not None and usefulness is not None:
                    rates = matching_rate(usefulness, ranking, self.m or self.counts[keep])
                    figures |= {"ranked": len(full), "matching": rates.double().sum().item()}
                self.sums[row] += torch.tensor([figures.get(figure, 0.0) for figure in _FIGURES], dtype=torch.float64)

    def rows(self) -> list[Row]:
        """The figures so far, method by method in the order given, keep rate by keep rate."""
        result = []
        for (name, keep), sums in zip(self._cells, self.sums.tolist(), strict=True):
            images, labelled, hits, cosine, ranked, matching = sums
            result.append(
                Row(
                    method=name,
                    keep=keep,
                    images=int(images),
                    top1=hits / labelled if labelled else None,
                    cosine=cosine / images if images else float("nan"),
                    matching=matching / ranked if ranked else None,
                )
            )
        return result

    def _labelled(self, embeddings: Tensor, method: Method, batch: PairBatch) -> dict[str, float]:
        classes = self.classes if method.classes is None else method.classes
        if classes is None:
            return {}
        prediction = (embeddings @ classes.to(embeddings).T).argmax(dim=1).cpu()  # (B,); a length changes no argmax
        labelled = batch.labels >= 0
        return {"labelled": labelled.sum().item(), "hits": (labelled & (prediction == batch.labels)).sum().item()}


def render(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal: a line a method, top-1 in %, cosine and matching rate in % by keep rate."""
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
