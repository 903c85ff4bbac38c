"""Learnable tokens beside the patches (and before the class names), which make up for what pruning takes away.

tokens = VisualTokens(TokensConfig(tower.width))
embeddings = tokens.embeddings(tower, images, choose)     # gradients reach the tokens, the tower stays as it is

With text tokens (section 3.3 of the paper, arXiv 2409.14607): b learnable tokens P_t in front of the tokens of a class
name, as in CoOp, and the visual ones are P_v = M P_t, as in MaPLe:

prompted = PromptedText(model, names)
tokens = VisualTokens(TokensConfig(tower.width, text_width=prompted.width))
classes = prompted(tokens.text)                           # (K, E), with a gradient
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.flags import at_least, flag
from patchrank.model import artifacts
from patchrank.model.adapter import Adapter, Along
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.pruning import merging

PLACES = ("input", "cut")
NAME = "tokens"  # of its files
BEFORE = {"scaled": False, "merged": 0.0}  # fields of `TokensConfig` that files of before do not have
MERGED = 0.375  # `TokensConfig.merged` of what is trained
SHIFTS = ("shifts", "scales")  # parameters of `VisualTokens`


@dataclass(frozen=True)
class TokensConfig:
    """The shape of learnable tokens. Raises UserError for a value that makes no sense."""

    width: int  # D of the tower
    count: int = flag(
        4, "learnable tokens, which take the places of as many patches (%(default)s)", group="tokens", name="tokens"
    )  # b
    # Before block L ("cut") or before the first ("input").
    place: str = flag("cut", f"where they join the patches: {' or '.join(PLACES)} (%(default)s)")
    text_width: int | None = None  # d_t of the text tower; the visual tokens are then a linear map of text tokens
    shifted: int = 0  # blocks from the cut on before which all tokens are shifted
    scaled: bool = False  # whether they are scaled there, too
    merged: float = 0.0  # share of all patches that become one with others past the cut

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise UserError(f"--place {self.place}: must be one of {', '.join(PLACES)}")
        at_least(self, 0, "count")
        if not 0 <= self.merged < 1:
            raise UserError(f"--merged {self.merged:g}: must be 0, for none, or a share of the patches below 1")

    @property
    def nothing(self) -> bool:
        """Whether a predictor is as good without."""
        return not self.count and not self.shifted and not self.merged


class VisualTokens(nn.Module):
    """What makes up for the patches that leave: b learnable tokens that go through the tower beside the others and are
    never pruned, learnable shifts, and, as there is nothing to learn of it, that later on patches merge.

    Shifts are vectors that are added to tokens before every block from the cut on, times the share of tokens that have
    left, so that an image of which nothing leaves stays as it is; scales are vectors that tokens are multiplied by
    before that, 1 and as much of them. They take no matrix products. Learnable tokens are so renewed from block to
    block, as in deep prompt tuning (arXiv 2203.12119); to scale and shift what a frozen model makes is that of SSF
    (arXiv 2210.08823).

    Where patches merge, more of them go past the cut at the same multiply-adds (see `patchrank.pruning.merging`).

    Attributes:
        visual: (b, D), where they are free.
        text, coupling: (b, d_t) and the map M, where they are coupled to text tokens; `visual` is then None.
        shifts: (blocks, 2 + b, D): of the prefix tokens, of the patches, and of each learnable token; None without.
        scales: likewise.
    """

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: nn.Parameter | None = None
        self.text: nn.Parameter | None = None
        if config.text_width is None:
            self.visual = nn.Parameter(torch.randn(config.count, config.width) * 0.02)
        else:
            self.text = nn.Parameter(torch.randn(config.count, config.text_width) * 0.02)  # as CoOp does
            self.coupling = nn.Linear(config.text_width, config.width, bias=False)
        rows = torch.zeros(config.shifted, 2 + config.count, config.width)
        self.shifts = nn.Parameter(rows) if config.shifted else None
        self.scales = nn.Parameter(rows.clone()) if config.shifted and config.scaled else None

    def extra(self) -> Tensor:
        """The visual tokens, (b, D)."""
        return self.coupling(self.text) if self.visual is None else self.visual

    def prefix(self, tower: Tower, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """`Tower.prefix` with these tokens behind the patches.

        Args:
            images: (B, 3, H, W).
            tokens: (B, p + N, D), what `Tower.prefix` makes of them, where that is known already.

        Returns:
            (B, p + N + b, D).
        """
        if self.config.place == "input":
            return tower.prefix(images, self.extra())
        if tokens is None:
            with torch.no_grad():
                tokens = tower.prefix(images)  # (B, p + N, D)
        return self.append(tokens)

    def append(self, tokens: Tensor) -> Tensor:
        """Tokens before the cut with these behind them, for the place "cut": (B, p + N, D) -> (B, p + N + b, D)."""
        return torch.cat([tokens, self.extra().to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)

    def merges(self, adapter: Adapter, schedule: Mapping[int, int]) -> dict[int, int]:
        """How many pairs of patches become one token each, by block, where they leave by a schedule."""
        return merging.beside_dropping(adapter, schedule, self.config.merged)

    def along(self, adapter: Adapter, cut: int, patches: int, *, behind: bool = True) -> Along:
        """What is done to tokens from the cut on.

        Args:
            patches: that go past the cut; those with a gate of 0 do not.
            behind: whether learnable tokens stand behind the patches, or between them and the prefix tokens.
        """
        b, p = self.config.count, adapter.prefix_tokens
        merges = self.merges(adapter, {cut: patches})
        return Along(self._shifting(adapter, cut, patches, behind), merges, p if behind else p + b, patches)

    def _shifting(
        self, adapter: Adapter, cut: int, patches: int, behind: bool
    ) -> Callable[[Tensor, int], Tensor] | None:
        """As `Along.before`; arguments as of `along`."""
        if self.shifts is None:
            return None
        shifts, scales, b, p = self.shifts, self.scales, self.config.count, adapter.prefix_tokens
        left = max(0.0, 1 - (patches + b) / adapter.num_tokens)  # a learnable token takes the place of a patch

        def each(rows: Tensor, x: Tensor) -> Tensor:
            """(2 + b, D) -> (p + n + b, D), what there is for each token of x."""
            rows = (left * rows).to(x.dtype)
            prefix, others, own = rows[:1].expand(p, -1), rows[1:2].expand(x.shape[1] - p - b, -1), rows[2:]
            return torch.cat([prefix, others, own] if behind else [prefix, own, others])

        def shifted(x: Tensor, number: int) -> Tensor:
            """(C, p + n + b, D) likewise."""
            if not 0 <= number - cut < len(shifts):
                return x
            if scales is not None:
                x = x * (1 + each(scales[number - cut], x))
            return x + each(shifts[number - cut], x)

        return shifted

    def embeddings(self, tower: Tower, images: Tensor, choose: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Embeddings of pruned images.

        Args:
            tower: the frozen tower.
            images: (B, 3, H, W), preprocessed.
            choose: (B, p + N + b, D) tokens before the cut -> (B, n) int64 ids of those that stay; no gradient flows
                through it. All stay where None.

        Returns:
            (B, E) float32, not normalised.
        """
        tokens = self.prefix(tower, images)
        kept = None
        if choose is not None:
            with torch.no_grad():
                kept = choose(tokens)
        patches = tower.num_tokens if kept is None else kept.shape[1]
        return tower.suffix(tokens, kept, along=self.along(tower.adapter, tower.cut, patches))


class PromptedText(nn.Module):
    """Class embeddings of a frozen text tower with learnable tokens in front of the class names.

    Args:
        model: with its text tower; it is not changed.
        names: the K class names.
        count: b, the learnable tokens.
        template: what the text tower reads after them, with {} for the name.

    Raises:
        UserError: the model was loaded without its text tower, the tower is of a kind that cannot take the tokens, or a
            class name is too long for its context.
    """

    def __init__(self, model: Model, names: Sequence[str], count: int, template: str = "{}.") -> None:
        super().__init__()
        text, pool, end = _text_tower(model)
        ids = model.tokenizer()([template.format(name) for name in names])  # (K, context), padded behind the end token
        ends = ids.argmax(dim=1) if pool == "argmax" else ids.eq(end).int().argmax(dim=1)  # (K,)
        length = int(ends.max()) + 1 + count  # what comes after the end token is never attended to
        if length > model.clip.context_length:
            name = names[int(ends.argmax())]
            raise UserError(
                f"--tokens {count}: with the class name {name!r} that is {length} text tokens, and the text tower of "
                f"{model.name} takes {model.clip.context_length}; use fewer tokens or shorter names"
            )
        ids = ids[:, : length - count]
        self.count = count
        self.transformer = copy.deepcopy(text.transformer).requires_grad_(False)
        self.ln_final = copy.deepcopy(text.ln_final).requires_grad_(False)
        with torch.no_grad():
            self.register_buffer("names", text.token_embedding(ids), persistent=False)  # (K, length - b, d_t)
        self.register_buffer("ends", ends + count, persistent=False)
        self.register_buffer("positions", text.positional_embedding[:length].detach().clone(), persistent=False)
        self.register_buffer("mask", text.attn_mask[:length, :length].clone(), persistent=False)
        self.projection = copy.deepcopy(text.text_projection)
        if self.projection is not None:
            self.projection.requires_grad_(False)

    names: Tensor
    ends: Tensor
    positions: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        """d_t, the width of a text token."""
        return self.positions.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Class embeddings: (b, d_t) -> (K, E) float32, normalised; a gradient flows to the tokens."""
        learned = tokens.to(self.names.dtype).expand(len(self.names), -1, -1)  # (K, b, d_t)
        x = torch.cat([self.names[:, :1], learned, self.names[:, 1:]], dim=1) + self.positions  # (K, length, d_t)
        x = self.ln_final(self.transformer(x, attn_mask=self.mask))
        x = x[torch.arange(len(x), device=x.device), self.ends]  # (K, d_t)
        if isinstance(self.projection, nn.Linear):
            x = self.projection(x)
        elif self.projection is not None:
            x = x @ self.projection
        return F.normalize(x.float(), dim=-1)


def _text_tower(model: Model) -> tuple[Any, str, Any]:
    """The text tower, how it is read out, and the id of its end token where that matters."""
    if not model.has_text:
        raise UserError(
            f"{model.name}: its text tower is missing, or its file holds the image tower alone, so it takes no text "
            "tokens"
        )
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer

    clip = model.clip
    if type(clip) is CLIP:
        text, pool, end = clip, clip.text_pool_type, clip.text_eos_id
        reason = None
    else:
        text = getattr(clip, "text", None)
        pool, end = getattr(text, "pool_type", None), getattr(text, "eos_id", None)
        reason = None
        if not isinstance(text, TextTransformer):
            reason = f"is a {type(text).__name__}"
        elif text.cls_emb is not None:
            reason = "has a class token"
    if reason is None and pool not in ("argmax", "eos"):
        reason = f"is read out by '{pool}'"
    if reason is None and text.attn_mask is None:
        reason = "attends in both directions"
    if reason:
        raise UserError(f"{model.name}: its text tower {reason}; text tokens need a causal one read at its end token")
    return text, str(pool), end


def save(folder: str, tokens: VisualTokens, record: Mapping[str, Any]) -> None:
    """Write FOLDER/tokens.safetensors and FOLDER/tokens.json; `record` as for `patchrank.pruning.predictor.save`.

    Raises:
        UserError: the folder cannot be written.
    """
    artifacts.save(folder, NAME, tokens.state_dict(), {**record, "config": asdict(tokens.config)})


def load(folder: str, tower: Tower | None = None, weights: str | None = None) -> tuple[VisualTokens, dict[str, Any]]:
    """The tokens of a folder, float32, on the CPU, and the content of tokens.json.

    Args:
        folder: that `save` wrote.
        tower, weights: the tower that they shall serve and the digest of its weights; not compared where None.

    Raises:
        UserError: no tokens there, damaged ones, or tokens for another model or cut; says what differs.
    """
    tensors, record = artifacts.load(folder, NAME)
    with artifacts.readable(folder, NAME):
        tokens = VisualTokens(TokensConfig(**record["config"]))
        tokens.load_state_dict(tensors)
        model = dict(record["model"])
    artifacts.check(f"{folder}: these tokens were", model, tower, weights)
    return tokens, record
