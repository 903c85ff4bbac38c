"""What patchrank asks of an image tower: the interface that each kind of tower implements in a file of its own.

A sequence is (C, n, D). The prefix tokens come first (a class token, registers) and always stay; then come the patches
that are there. Learnable tokens may stand before or behind the patches: attention does not ask for the order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchrank.model.matching import merge


def embedding_of(output: Any) -> Tensor:
    """The embeddings, (C, E), of what an image tower returned: some give tokens beside them."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def linear_multiply_adds(module: nn.Module) -> int:
    """Of a module's linear layers, for one token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of tokens in its own dtype, which may be another: (C, n, D) likewise."""
    return norm(x.to(next((each.dtype for each in norm.parameters()), x.dtype)))


@dataclass(frozen=True)
class Along:
    """What is done to tokens on their way through the blocks.

    Attributes:
        before: changes them before every block: (C, n, D) and its number -> (C, n, D); nothing where None.
        merges: how many pairs of patches become one token each, by block, between its attention and its MLP (see
            `matching.merge`). A token counts in attention as often as it stands for a patch.
        first, patches: those that may merge, at first .. first + patches - 1 before the first block.
        sizes: (C, n) float32, the patches that each token stands for already; one where None. Gates take their place.
    """

    before: Callable[[Tensor, int], Tensor] | None = None
    merges: Mapping[int, int] = field(default_factory=dict)
    first: int = 0
    patches: int = 0
    sizes: Tensor | None = None


NOTHING = Along()


class Adapter(ABC):
    """An image tower taken apart. It holds the module and no weights of its own, so making one costs nothing.

    Attributes:
        module: the class of the modules that it is for.
        visual: the module.
        blocks: its blocks, each of which takes tokens and gives tokens, (C, n, D).
        prefix_tokens: p, the tokens before the patches: 1 for a class token alone.
        grid: rows and columns of patches.
        width: D, of a token.
        head_width: D / heads, of a query or key.
        hidden: of the MLPs.
        embed_dim: E, of an embedding.
        depth: the number of blocks.
        rotary: whether blocks ask for the place of a token (RoPE).
        all_read: whether the last block gives all tokens, or those alone that `readout` reads. Who needs all of them
            may set it.
        dtype: in which images are embedded and all blocks but some norms run.
        device: where the weights are.
    """

    module: ClassVar[type[nn.Module]]
    blocks: Any
    prefix_tokens: int
    grid: tuple[int, int]
    width: int
    head_width: int
    hidden: int
    embed_dim: int
    depth: int
    rotary: bool = False
    all_read: bool = True

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    @property
    def num_tokens(self) -> int:
        """N, the number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """p + N, the tokens of a whole image."""
        return self.prefix_tokens + self.num_tokens

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @classmethod
    def takes(cls, visual: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(visual, cls.module)

    @classmethod
    @abstractmethod
    def refusal(cls, visual: Any) -> str | None:
        """Why a module of that class cannot be cut or pruned all the same; None where it can."""

    @classmethod
    def replaced(cls, visual: Any) -> str | None:
        """What was put in the place of modules that are computed without calling them, as `fidelity.refusal` has it.

        Asked whenever a pruned tower is used, so it has to be quick; what `refusal` says where it is not overridden.
        """
        return cls.refusal(visual)

    @abstractmethod
    def structure(self) -> str:
        """The facts beside the weights that make another model of them: heads, patches, activations, norms.

        Facts rather than the text that PyTorch prints of a module: that changes with its version, and in low precision.
        """

    def content(self) -> tuple[Mapping[str, Tensor], str]:
        """What tells the module from others: its weights by name, and `structure`.

        The same for the same model, whichever library built it, where a kind can tell.
        """
        return self.visual.state_dict(), self.structure()

    @abstractmethod
    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the module, a copy that nobody else uses, ready for blocks in a dtype and a readout in float32.

        The readout is float64 where `dtype` is float64. Norms that compute in float32 keep unrounded weights.
        """

    @abstractmethod
    def unprepare(self) -> None:
        """Round the readout to the dtype of the blocks: a module's own forward pass runs in one dtype."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block: (C, 3, H, W) of the tower's dtype and device -> (C, p + N, D)."""

    @abstractmethod
    def attention(
        self,
        x: Tensor,
        number: int,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first half of a block, attention with its residual.

        Args:
            x: (C, n, D).
            number: the block, from 0.
            gates: (C, n) float, as for `through`.
            bias: (C, n) float, added to the logits of each key; nothing where None.
            places: as for `through`.

        Returns:
            (C, n, D), and the keys, (C, heads, n, D / heads). Of the last block only the tokens that `readout` reads
            are computed.
        """

    @abstractmethod
    def mlp(self, x: Tensor, number: int) -> Tensor:
        """The second half of a block, the MLP with its residual: (C, n, D) -> (C, n, D)."""

    @abstractmethod
    def class_attention(self, x: Tensor, number: int, places: Tensor | None = None) -> Tensor:
        """How much the class token attends to each patch in a block: (C, p + n, D) before it -> (C, n) float32.

        The mean over heads; where the readout is a mean over tokens, the mean over all that ask, too; where a learnt
        query pools tokens, what that attends to.

        Args:
            places: as for `through`.
        """

    @abstractmethod
    def readout(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Embeddings of what the last block gives: (C, n, D) -> (C, E), not normalised, in the readout's dtype.

        Args:
            x: as `through` gives it.
            weights: (C, n) float, how much each token counts where tokens are pooled: the gates of `through`, or the
                patches that each stands for. As much as any other where None.
        """

    def output(self, x: Tensor, weights: Tensor | None = None, learnable: int = 0) -> Any:
        """What the module's own forward pass returns for what the last block gives: `readout`, if not more.

        Args:
            x, weights: as for `readout`.
            learnable: so many of the tokens behind the prefix tokens are no patches.
        """
        return self.readout(x, weights)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The tokens alone of `through`, of whole images: (C, n, D) -> (C, n, D)."""
        return self.through(x, start, stop)[0]

    def through(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        gates: Tensor | None = None,
        recompute: bool = False,
        along: Along = NOTHING,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Blocks `start` to `stop` - 1; to the last one where `stop` is None.

        Args:
            x: (C, n, D).
            gates: (C, n) float, how much there is of each token as a key: attention weights a become
                a_j g_j / sum_k a_k g_k. A token with gate 0 is not there for the others. Gates are multiplied, as the
                logarithm of 0 has no gradient. Prefix tokens have gate 1; so has every token where None. Where tokens
                merge their gates are added.
            recompute: whether a block that a gradient flows through keeps its input alone, and is run again backwards.
            along: what is done to the tokens on the way; nothing merges where the tower is `rotary`.
            places: (C or 1, n) int64, the patch ids 0 .. N-1 of tokens, N of those that have no place (prefix tokens,
                learnable ones). Asked for where the tower is `rotary` alone; in the order of an image, learnable tokens
                behind the patches, where None.

        Returns:
            (C, n, D), of the last block only the tokens that `readout` reads; (C, n), the gates or, without any, the
            sizes of the tokens, None where there were none and nothing merged; and (C, n) int64, where in `x` each
            token stood, None where nothing merged.
        """
        behind, order = x.shape[1] - along.first - along.patches, None
        counts, gated = (along.sizes, False) if gates is None else (gates, True)
        for number in range(start, self.depth if stop is None else stop):
            x = x if along.before is None else along.before(x, number)
            merging = along.first, x.shape[1] - along.first - behind, along.merges.get(number, 0)
            if recompute and torch.is_grad_enabled():
                x, counts, stood = checkpoint(
                    self._block, x, number, counts, gated, places, merging, use_reentrant=False
                )
            else:
                x, counts, stood = self._block(x, number, counts, gated, places, merging)
            if stood is not None:
                order = stood if order is None else order.gather(1, stood)  # (C, n)
        return x, counts, order

    def _block(
        self,
        x: Tensor,
        number: int,
        counts: Tensor | None,
        gated: bool,
        places: Tensor | None,
        merging: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of `merging` the first patch, how many there are, and how many pairs of them become one."""
        (first, patches, merges), stood = merging, None
        # Of sizes the logarithm, which fused attention takes.
        gates, bias = (counts, None) if gated or counts is None else (None, counts.log())
        x, key = self.attention(x, number, gates, bias, places)
        if merges:
            exact = torch.promote_types(x.dtype, torch.float32)
            counts = x.new_ones(x.shape[:2], dtype=exact) if counts is None else counts
            x, counts, stood = merge(x, counts, key.mean(dim=1), merges, first, patches)
        del key  # is not needed for the MLP
        return self.mlp(x, number), counts, stood

    @property
    def recomputes(self) -> bool:
        """Whether the module was told to keep the input of a block alone for gradients (`set_grad_checkpointing`)."""
        return False

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after all blocks, of all tokens, in its own dtype: (C, n, D) likewise."""
        raise NotImplementedError

    def own_embeddings(self, images: Tensor) -> Tensor:
        """What the module's own forward pass makes of whole images: (C, 3, H, W) -> (C, E)."""
        return embedding_of(self.visual(images))

    def own_block(self, x: Tensor, number: int) -> Tensor:
        """What the module's own block makes of the tokens of a whole image, to compare with: (C, n, D) likewise."""
        return self.blocks[number](x)

    def in_order(self, n: int, device: torch.device) -> Tensor:
        """The places of the first n tokens of an image and of learnable ones behind them, as for `through`: (1, n)."""
        ids = torch.arange(n, device=device) - self.prefix_tokens
        return ids.where((ids >= 0) & (ids < self.num_tokens), self.num_tokens)[None]

    @abstractmethod
    def embed_multiply_adds(self) -> int:
        """Exact multiply-adds of `embed` for an image; norms and activations are not counted, here and below."""

    @abstractmethod
    def block_multiply_adds(self, n: int, last: bool = False) -> int:
        """Of a block on n tokens; `last` where only those that `readout` reads are computed."""

    @abstractmethod
    def mlp_multiply_adds(self, n: int) -> int:
        """The part of the MLP in a block on n tokens."""

    @abstractmethod
    def class_attention_multiply_adds(self, n: int) -> int:
        """Of `class_attention` on n tokens."""

    @abstractmethod
    def readout_multiply_adds(self, n: int) -> int:
        """Of `readout` after blocks on n tokens."""

    def output_multiply_adds(self, n: int) -> int:
        """Of `output` after blocks on n tokens."""
        return self.readout_multiply_adds(n)

    def full_multiply_adds(self) -> int:
        """Of an image in the module's own forward pass."""
        n = self.length
        return self.embed_multiply_adds() + self.depth * self.block_multiply_adds(n) + self.output_multiply_adds(n)
