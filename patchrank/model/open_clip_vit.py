"""open_clip's own vision transformers, read out at their class token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNormFp32,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from patchrank.model import fidelity
from patchrank.model.adapter import Adapter

QUICK_GELU = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)


class OpenClipViT(Adapter):
    """A `VisionTransformer` with one prefix token, the class token.

    Attention is fused (`scaled_dot_product_attention`), whichever of open_clip's two attention classes the model was
    built with, except in bfloat16 on a CPU, where that is slow, and with gates.
    """

    module = VisionTransformer
    prefix_tokens = 1

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.blocks = visual.transformer.resblocks
        self.grid = tuple(visual.grid_size)
        self.width = visual.transformer.width
        self.head_width = self.width // self.blocks[0].attn.num_heads
        self.hidden = self.blocks[0].mlp.c_fc.out_features
        self.embed_dim = visual.proj.shape[1]
        self.depth = len(self.blocks)

    @classmethod
    def refusal(cls, visual: Any) -> str | None:
        """As `Adapter.refusal`."""
        if visual.attn_pool is not None:
            return "its image tower pools tokens by attention"
        if visual.pool_type != "tok":
            return f"its image tower pools tokens by '{visual.pool_type}'"
        if any(getattr(block.attn, "logit_scale", None) is not None for block in visual.transformer.resblocks):
            return "its blocks use scaled cosine attention"
        if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in visual.modules()):
            return "its image tower is quantized; prune the model that it was made of, and quantize that"
        return next(filter(None, _replaced(visual)), None)

    @property
    def dtype(self) -> torch.dtype:
        """As `Adapter.dtype`; open_clip leaves some other weights in float32."""
        return self.visual.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """As `Adapter.device`."""
        return self.visual.conv1.weight.device

    def structure(self) -> str:
        """As `Adapter.structure`."""
        visual, block = self.visual, self.blocks[0]
        return (
            f"heads {block.attn.num_heads} grid {visual.grid_size} patch {visual.conv1.stride} "
            f"activation {type(block.mlp.gelu).__name__} {getattr(block.mlp.gelu, 'approximate', None)} "
            f"norms {[module.eps for module in visual.modules() if isinstance(module, nn.LayerNorm)]} "
            f"pooled before the last {visual.final_ln_after_pool}"
        )

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """As `Adapter.prepare`."""
        visual = self.visual
        for block in self.blocks:
            fuse_quick_gelu(block.mlp)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        norms = [module for module in visual.modules() if isinstance(module, LayerNormFp32)]  # cast their inputs
        unrounded = [(norm, norm.state_dict(), torch.float32) for norm in norms]
        unrounded.append((visual.ln_post, visual.ln_post.state_dict(), exact))
        proj = visual.proj.data
        visual.to(device=device, dtype=dtype)
        for norm, weights, precision in unrounded:
            norm.to(precision).load_state_dict(weights)
        visual.proj.data = proj.to(device, exact)

    def unprepare(self) -> None:
        """As `Adapter.unprepare`."""
        self.visual.ln_post.to(self.dtype)
        self.visual.proj.data = self.visual.proj.data.to(self.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """As `Adapter.embed`."""
        return self.visual._embeds(images)

    def attention(
        self, x: Tensor, number: int, gates: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Adapter.attention`.

        The class token of the last block attends to every token, but no other token's output is ever read: its queries,
        output projection and MLP are the class token's alone.
        """
        block, last = self.blocks[number], number == self.depth - 1
        query, key, value = _project(block.attn, block.ln_1(x), class_token_only=last)
        attended = _output(block.attn, _attend(query, key, value, gates, bias))  # (C, n or 1, D)
        x = x[:, :1] if last else x
        return x + block.ls_1(getattr(block, "ln_attn", _IDENTITY)(attended)), key

    def mlp(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.mlp`."""
        block = self.blocks[number]
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def class_attention(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.class_attention`: the mean over heads of softmax(q k^T / sqrt(d))."""
        block = self.blocks[number]
        # (C, heads, 1, d) and (C, heads, 1 + n, d), d = D / heads
        query, key, _ = _project(block.attn, block.ln_1(x), class_token_only=True)
        logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5  # (C, heads, 1, 1 + n)
        return logits.softmax(dim=-1).mean(dim=1)[:, 0, self.prefix_tokens :]

    def readout(self, x: Tensor) -> Tensor:
        """As `Adapter.readout`."""
        return self.visual.ln_post(x[:, 0].to(self.visual.proj.dtype)) @ self.visual.proj

    def embed_multiply_adds(self) -> int:
        """As `Adapter.embed_multiply_adds`."""
        return self.visual.conv1.weight.numel() * self.num_tokens

    def block_multiply_adds(self, n: int, last: bool = False) -> int:
        """As `Adapter.block_multiply_adds`."""
        d = self.width
        if last:  # keys and values of all tokens, the rest of the class token alone
            return 2 * d * d * n + 2 * d * d + 2 * n * d + self.mlp_multiply_adds(1)
        return 4 * d * d * n + 2 * n * n * d + self.mlp_multiply_adds(n)

    def mlp_multiply_adds(self, n: int) -> int:
        """As `Adapter.mlp_multiply_adds`."""
        return 2 * self.width * self.hidden * n

    def class_attention_multiply_adds(self, n: int) -> int:
        """As `Adapter.class_attention_multiply_adds`; the block's keys are computed a second time."""
        return (2 * n + 1) * self.width**2 + n * self.width

    def readout_multiply_adds(self, n: int) -> int:
        """As `Adapter.readout_multiply_adds`."""
        return self.visual.proj.numel()


def _replaced(visual: Any) -> Iterator[str | None]:
    """What stands between the modules and their weights, as of `fidelity.refusal`, module by module."""
    yield fidelity.refusal(visual, "its image tower")
    yield fidelity.refusal(visual.transformer, "its transformer", (Transformer,))
    for number, block in enumerate(visual.transformer.resblocks):
        yield fidelity.refusal(block, f"its block {number}", (ResidualAttentionBlock, CustomResidualAttentionBlock))
        where = f"the attention of its block {number}"
        yield fidelity.refusal(block.attn, where, (nn.MultiheadAttention, Attention))
        if not isinstance(block.attn, Attention):  # which calls its output projection, as we do; the other does not
            kinds = (nn.Linear, NonDynamicallyQuantizableLinear)
            yield fidelity.refusal(block.attn.out_proj, f"the output projection in {where}", kinds)


def fuse_quick_gelu(mlp: Any) -> None:
    """Make an MLP with QuickGELU, as OpenAI's weights have it, one with SiLU that computes the same.

    QuickGELU, x sigmoid(1.702 x), is three passes over the widest activation; SiLU, x sigmoid(x), is one. The factor
    goes into the weights before it and out of those after it, unless a norm stands between.
    """
    plain = all(fidelity.refusal(module, "", (nn.Linear,)) is None for module in (mlp.c_fc, mlp.c_proj))
    plain = plain and not any(parametrize.is_parametrized(module) for module in (mlp.c_fc, mlp.c_proj))
    if plain and isinstance(mlp.gelu, QuickGELU) and isinstance(getattr(mlp, "ln", _IDENTITY), nn.Identity):
        with torch.no_grad():
            mlp.c_fc.weight *= QUICK_GELU
            mlp.c_fc.bias *= QUICK_GELU
            mlp.c_proj.weight /= QUICK_GELU
        mlp.gelu = nn.SiLU(inplace=True)


def _project(attn: Any, x: Tensor, class_token_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the weights of either of open_clip's attention classes.

    Args:
        attn: the block's attention.
        x: (C, n, D), normalised.
        class_token_only: whether only the class token asks.

    Returns:
        (C, heads, n or 1, D / heads), and twice (C, heads, n, D / heads).
    """
    width, weight, bias = x.shape[-1], attn.in_proj_weight, attn.in_proj_bias
    heads = attn.num_heads

    def by_head(parts: Tensor) -> Tensor:
        """(C, n, k D) -> (C, k heads, n, D / heads)."""
        return parts.unflatten(-1, (-1, width // heads)).transpose(1, 2)

    if class_token_only:
        query = by_head(F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width]))
        key, value = by_head(F.linear(x, weight[width:], None if bias is None else bias[width:])).chunk(2, dim=1)
    else:
        query, key, value = by_head(F.linear(x, weight, bias)).chunk(3, dim=1)
    if isinstance(attn, Attention):
        query, key = attn.ln_q(query), attn.ln_k(key)
    return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, bias: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value, with gates: (C, heads, q, d), twice (C, heads, n, d) -> the first's.

    Args:
        gates, bias: (C, n) each, or None.
    """
    scale = query.shape[-1] ** -0.5
    added = None if bias is None else bias.to(query.dtype)[:, None, None]  # (C, 1, 1, n)
    if gates is not None:
        logits = query * scale @ key.transpose(-1, -2)  # (C, heads, q, n)
        logits = logits if added is None else logits + added
        exact = torch.promote_types(query.dtype, torch.float32)  # what is left of a weight may be small
        weights = logits.softmax(dim=-1, dtype=exact) * gates.to(exact)[:, None, None]
        return (weights / weights.sum(dim=-1, keepdim=True)).to(value.dtype) @ value
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # PyTorch's fused kernel takes twice the time of two matrix products here; a chunk's weights fit the cache.
        logits = query * scale @ key.transpose(-1, -2)
        return (logits if added is None else logits + added).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, added)


def _output(attn: Any, y: Tensor) -> Tensor:
    """What heads attended to, through the output projection: (C, heads, q, D / heads) -> (C, q, D)."""
    if isinstance(attn, Attention):
        if attn.head_scale is not None:
            y = y * attn.head_scale
        y = attn.ln_inner(y.transpose(1, 2).flatten(2))
    else:
        y = y.transpose(1, 2).flatten(2)
    return attn.out_proj(y)


_IDENTITY = nn.Identity()
