"""An image tower cut before block L: what comes before runs once an image, what comes after once a candidate.

tower = Tower(model.visual, cut=3)
tokens = tower.prefix(images)              # the full sequence, class embedding first
tower.suffix(tokens)                       # = model.encode_image(images)
tower.suffix(tokens, kept)                 # the embedding when only the tokens `kept` go on
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.model.kinds import adapt


def default_cut(blocks: int) -> int:
    """The block before which tokens leave: a quarter of the depth, 3 of 12 as in the paper."""
    return min(blocks - 1, max(1, blocks // 4))


class Tower(nn.Module):
    """A frozen copy of an image tower, cut before block `cut` (blocks count from 0).

    The blocks run in `dtype`; the readout, which sees the class token alone, runs in float32 (float64 where `dtype` is
    float64), and so do all embeddings that leave the tower.

    Args:
        visual: the image tower; it is not changed.
        cut: 0 <= cut < number of blocks; a quarter of the depth where None.
        dtype: float32, bfloat16, float16 or float64.
        device: where the copy lives.
        name: the model's name, for error messages.

    Attributes:
        adapter: what is known of the tower's kind.

    Raises:
        UserError: the tower is of a kind that cannot be cut (see `adapt`), or it has no block `cut`.
    """

    visual: Any  # open_clip has no types

    def __init__(
        self,
        visual: nn.Module,
        cut: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "this model",
    ) -> None:
        super().__init__()
        blocks = adapt(visual, name).depth
        cut = default_cut(blocks) if cut is None else cut
        if not 0 <= cut < blocks:
            raise UserError(f"{name} has {blocks} blocks: the cut must be 0 to {blocks - 1}, not {cut}")
        self.cut = cut
        self.dtype = dtype
        self.visual = copy.deepcopy(visual).eval().requires_grad_(False)
        self.adapter = adapt(self.visual, name)
        self.adapter.prepare(dtype, device)
        self.grid = self.adapter.grid

    @property
    def num_tokens(self) -> int:
        """N, the number of patch tokens; the class token is not counted."""
        return self.adapter.num_tokens

    @property
    def length(self) -> int:
        """p + N, the tokens of a whole image."""
        return self.adapter.length

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.adapter.width

    @property
    def embed_dim(self) -> int:
        """E, the width of an embedding."""
        return self.adapter.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adapter.device

    def prefix(self, images: Tensor, extra: Tensor | None = None) -> Tensor:
        """Tokens before block `cut`.

        Args:
            images: (B, 3, H, W), preprocessed, any floating dtype.
            extra: (b, D), further tokens that go through all blocks beside those of every image, after the patches.

        Returns:
            (B, p + N + b, D) in the tower's dtype; the p prefix tokens come first (the class token), then the patches
            row by row. A gradient flows to `extra` and to `images` where they ask for one; the tower's own weights
            never do.
        """
        x = self.adapter.embed(images.to(self.device, non_blocking=True).to(self.dtype))  # (B, p + N, D)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (B, p + N + b, D)
        return self.adapter.run(x, stop=self.cut)

    def suffix(
        self, tokens: Tensor, kept: Tensor | None = None, image: Tensor | None = None, gates: Tensor | None = None
    ) -> Tensor:
        """Embeddings of images of which only some tokens go past the cut.

        Args:
            tokens: (B, p + N + b, D) from `prefix`; the b tokens after the patches always stay.
            kept: (C, n) int64 token ids in 0 .. N-1; all tokens where None.
            image: (C,) int64, the row of `tokens` that each row of `kept` belongs to; row c where None (then C = B).
            gates: (C, n) float, how much there is of each patch that goes on, as `Adapter.run` has it; a gradient flows
                to them. All of it where None.

        Returns:
            (C, E) float32 (float64 for a float64 tower), not normalised, as `encode_image` gives them.
        """
        p = self.adapter.prefix_tokens
        if kept is None:
            x = tokens if image is None else tokens[image]  # (C, p + N + b, D)
        else:
            rows = torch.arange(kept.shape[0], device=kept.device) if image is None else image
            first = torch.arange(p, device=kept.device).expand(len(kept), -1)  # (C, p)
            extra = torch.arange(self.length, tokens.shape[1], device=kept.device).expand(len(kept), -1)  # (C, b)
            positions = torch.cat([first, kept + p, extra], dim=1)  # (C, p + n + b)
            x = tokens[rows[:, None], positions]  # (C, p + n + b, D)
        if gates is not None:
            gates = F.pad(gates, (p, tokens.shape[1] - self.length), value=1.0)  # (C, p + n + b)
        return self.adapter.readout(self.adapter.run(x, self.cut, gates=gates))  # (C, E)

    def prefix_multiply_adds(self) -> int:
        """Exact multiply-adds of `prefix` for an image; norms and activations not counted."""
        return self.adapter.embed_multiply_adds() + self.cut * self.adapter.block_multiply_adds(self.length)

    def suffix_multiply_adds(self, kept: int) -> int:
        """Exact multiply-adds of `suffix` for a candidate of `kept` patch tokens; norms and activations not counted."""
        n, blocks = self.adapter.prefix_tokens + kept, self.adapter.depth - self.cut - 1
        last = self.adapter.block_multiply_adds(n, last=True) + self.adapter.readout_multiply_adds(n)
        return blocks * self.adapter.block_multiply_adds(n) + last

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of whole images, (B, 3, H, W) -> (B, E): the unpruned model."""
        return self.suffix(self.prefix(images))


def check_tower(visual: nn.Module, name: str = "this model") -> None:
    """As `adapt`."""
    adapt(visual, name)


def embed_multiply_adds(visual: Any) -> int:
    """Of the patch embedding of an image."""
    rows, columns = visual.grid_size
    return visual.conv1.weight.numel() * rows * columns


def block_multiply_adds(visual: Any, n: int, class_token_only: bool = False) -> int:
    """Exact multiply-adds of one block on a sequence of n tokens, as `run_block` computes it."""
    mlp = visual.transformer.resblocks[0].mlp.c_fc
    d, hidden = mlp.in_features, mlp.out_features
    if class_token_only:  # keys and values of all tokens, the rest of the class token alone
        return 2 * d * d * n + 2 * d * d + 2 * n * d + 2 * d * hidden
    return (4 * d * d + 2 * d * hidden) * n + 2 * n * n * d


def run_block(block: Any, x: Tensor, class_token_only: bool = False) -> Tensor:
    """One residual attention block: (C, n, D) -> (C, n, D), or (C, 1, D) where only the class token is wanted.

    The class token of the last block attends to every token, but no other token's output is ever read: its queries,
    output projection and MLP are the class token's alone.
    """
    attended = attend(block.attn, *project(block.attn, block.ln_1(x), class_token_only))
    return run_mlp(block, add_attended(block, x[:, :1] if class_token_only else x, attended))


def add_attended(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The first residual of a block, (C, n, D) twice -> (C, n, D)."""
    return x + block.ls_1(getattr(block, "ln_attn", _IDENTITY)(attended))


def run_mlp(block: Any, x: Tensor) -> Tensor:
    """The MLP of a block with its residual, (C, n, D) -> (C, n, D)."""
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def project(attn: Any, x: Tensor, class_token_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the weights of either of open_clip's attention classes.

    Args:
        attn: the block's attention.
        x: (C, n, D), normalised.
        class_token_only: whether only the class token asks.

    Returns:
        (C, heads, n or 1, D / heads), and twice (C, heads, n, D / heads).
    """
    width, weight, bias = x.shape[-1], attn.in_proj_weight, attn.in_proj_bias
    if class_token_only:
        query = F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width])  # (C, 1, D)
        key, value = F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    else:
        query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
    query, key, value = (  # (C, heads, n or 1, D / heads)
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    if isinstance(attn, Attention):
        query, key = attn.ln_q(query), attn.ln_k(key)
    return query, key, value


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fused attention and its output projection, on what `project` returns -> (C, n or 1, D).

    Args:
        bias: what is added to the logits, broadcast to (C, heads, n or 1, n); nothing where None.
    """
    y = _attend(query, key, value, bias)
    if isinstance(attn, Attention):
        if attn.head_scale is not None:
            y = y * attn.head_scale
        y = attn.ln_inner(y.transpose(1, 2).flatten(2))
    else:
        y = y.transpose(1, 2).flatten(2)  # (C, n or 1, D)
    return attn.out_proj(y)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value, (C, heads, q, d), twice (C, heads, n, d) -> (C, heads, q, d)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # PyTorch's fused kernel takes twice the time of two matrix products here; a chunk's weights fit the cache.
        logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
        return (logits if bias is None else logits + bias).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, bias)


_IDENTITY = nn.Identity()
