"""open_clip's own vision transformers, read out at their class token, by the mean over patches or by attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    LayerNormFp32,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from patchrank.model import fidelity
from patchrank.model.adapter import Adapter, normed
from patchrank.model.attention import attend, attention_of, by_head, weighted_mean

QUICK_GELU = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)


class OpenClipViT(Adapter):
    """A `VisionTransformer` with a class token, whichever of open_clip's two attention classes it was built with.

    It is read at the class token, by the mean over patches (CLIPA) or by attention of learnt queries (CoCa).
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
        # Whether more than the class token is read of what the last block gives.
        self.all_read = visual.attn_pool is not None or visual.pool_type != "tok" or visual.output_tokens

    @classmethod
    def refusal(cls, visual: Any) -> str | None:
        """As `Adapter.refusal`."""
        if visual.attn_pool is not None and (visual.attn_pool_contrastive is not None or visual.pool_type != "tok"):
            return f"its image tower pools tokens by attention, {visual.attn_pool_type or visual.pool_type}"
        if visual.pool_type not in ("tok", "avg"):
            return f"its image tower pools tokens by '{visual.pool_type}'"
        if any(getattr(block.attn, "logit_scale", None) is not None for block in visual.transformer.resblocks):
            return "its blocks use scaled cosine attention"
        if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in visual.modules()):
            return "its image tower is quantized; prune the model that it was made of, and quantize that"
        return cls.replaced(visual)

    @classmethod
    def replaced(cls, visual: Any) -> str | None:
        """As `Adapter.replaced`."""
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
            + (f" pool {visual.pool_type}" if visual.pool_type != "tok" else "")
            + ("" if visual.attn_pool is None else f" by {visual.attn_pool.attn.num_heads} heads")
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
        self,
        x: Tensor,
        number: int,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Adapter.attention`.

        Where the class token alone is read, it attends in the last block to every token, but no other token's output is
        ever read: queries, output projection and MLP of that block are the class token's alone.
        """
        block, last = self.blocks[number], number == self.depth - 1 and not self.all_read
        query, key, value = _project(block.attn, block.ln_1(x), class_token_only=last)
        attended = attend(query, key, value, gates, bias, _dropout(block.attn))
        attended = _output(block.attn, attended)  # (C, n or 1, D)
        x = x[:, :1] if last else x
        return x + block.ls_1(getattr(block, "ln_attn", _IDENTITY)(attended)), key

    def mlp(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.mlp`."""
        block = self.blocks[number]
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    @property
    def recomputes(self) -> bool:
        """As `Adapter.recomputes`."""
        return self.visual.transformer.grad_checkpointing

    def final_norm(self, x: Tensor) -> Tensor:
        """As `Adapter.final_norm`."""
        return normed(self.visual.ln_post, x)

    def class_attention(self, x: Tensor, number: int, places: Tensor | None = None) -> Tensor:
        """As `Adapter.class_attention`."""
        visual, p = self.visual, self.prefix_tokens
        if visual.attn_pool is not None:
            query, key, _ = _pooling(visual.attn_pool, x, 1)
            return attention_of(query, key)[:, p:]
        block, by_class_token = self.blocks[number], visual.pool_type == "tok"
        query, key, _ = _project(block.attn, block.ln_1(x), class_token_only=by_class_token)
        return attention_of(query if by_class_token else query[:, :, p:], key)[:, p:]

    def readout(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `Adapter.readout`."""
        return self._pool(x, weights, queries=1)[0] @ self.visual.proj

    def output(self, x: Tensor, weights: Tensor | None = None, learnable: int = 0) -> Any:
        """As `Adapter.output`: with `output_tokens` the tokens beside it, of attention's queries or of patches."""
        visual = self.visual
        if not visual.output_tokens:
            return self.readout(x, weights)
        pooled, tokens = self._pool(x, weights, queries=None)
        return pooled @ visual.proj, tokens[:, 0 if visual.attn_pool is not None else learnable :]

    def _pool(self, x: Tensor, weights: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor]:
        """What the projection is given, (C, D), and the tokens that `output_tokens` gives away, in its dtype.

        Args:
            queries: how many of an attentional pooler's queries ask; the first is the one that is projected.
        """
        visual, p, exact = self.visual, self.prefix_tokens, self.visual.proj.dtype
        if visual.attn_pool is not None:
            query, key, value = _pooling(visual.attn_pool, x, queries)
            attn = visual.attn_pool.attn
            pooled = attend(query, key, value, weights, dropout=_dropout(attn))
            pooled = visual.ln_post(_output(attn, pooled).to(exact))  # (C, queries, E)
            return pooled[:, 0], pooled[:, 1:]
        if visual.pool_type == "avg":
            tokens = x[:, p:].to(exact)
            tokens = tokens if visual.final_ln_after_pool else visual.ln_post(tokens)
            pooled = weighted_mean(tokens, None if weights is None else weights[:, p:])
            return visual.ln_post(pooled) if visual.final_ln_after_pool else pooled, tokens
        if visual.final_ln_after_pool or not self.all_read:
            return visual.ln_post(x[:, 0].to(exact)), x[:, p:]
        x = visual.ln_post(x.to(exact))
        return x[:, 0], x[:, p:]

    def embed_multiply_adds(self) -> int:
        """As `Adapter.embed_multiply_adds`."""
        return self.visual.conv1.weight.numel() * self.num_tokens

    def block_multiply_adds(self, n: int, last: bool = False) -> int:
        """As `Adapter.block_multiply_adds`."""
        d = self.width
        if last and not self.all_read:  # keys and values of all tokens, the rest of the class token alone
            return 2 * d * d * n + 2 * d * d + 2 * n * d + self.mlp_multiply_adds(1)
        return 4 * d * d * n + 2 * n * n * d + self.mlp_multiply_adds(n)

    def mlp_multiply_adds(self, n: int) -> int:
        """As `Adapter.mlp_multiply_adds`."""
        return 2 * self.width * self.hidden * n

    def class_attention_multiply_adds(self, n: int) -> int:
        """As `Adapter.class_attention_multiply_adds`; the block's keys are computed a second time."""
        if self.visual.attn_pool is not None:
            return self._pooling_multiply_adds(n, 1, attention_alone=True)
        if self.visual.pool_type == "tok":
            return (2 * n + 1) * self.width**2 + n * self.width
        return 3 * n * self.width**2 + n * (n - self.prefix_tokens) * self.width

    def readout_multiply_adds(self, n: int) -> int:
        """As `Adapter.readout_multiply_adds`."""
        pooling = 0 if self.visual.attn_pool is None else self._pooling_multiply_adds(n, 1)
        return pooling + self.visual.proj.numel()

    def output_multiply_adds(self, n: int) -> int:
        """As `Adapter.output_multiply_adds`."""
        pool = self.visual.attn_pool
        pooling = 0 if pool is None else self._pooling_multiply_adds(n, len(pool.query))
        return pooling + self.visual.proj.numel()

    def _pooling_multiply_adds(self, n: int, queries: int, attention_alone: bool = False) -> int:
        """Of attentional pooling of n tokens, or of what tells its attention: values are computed beside the keys."""
        e = self.visual.attn_pool.query.shape[1]
        attention = queries * e * e + 2 * n * self.width * e + queries * n * e
        return attention + (0 if attention_alone else queries * n * e + queries * e * e)


def _replaced(visual: Any) -> Iterator[str | None]:
    """What stands between the modules and their weights, as of `fidelity.refusal`, module by module."""
    yield fidelity.refusal(visual, "its image tower")
    yield fidelity.refusal(visual.transformer, "its transformer", (Transformer,))
    if visual.attn_pool is not None:
        yield fidelity.refusal(visual.attn_pool, "its attentional pooler", (AttentionalPooler,))
        yield from _attention_replaced(visual.attn_pool.attn, "the attention of its pooler", (nn.MultiheadAttention,))
    for number, block in enumerate(visual.transformer.resblocks):
        yield fidelity.refusal(block, f"its block {number}", (ResidualAttentionBlock, CustomResidualAttentionBlock))
        kinds = (nn.MultiheadAttention, Attention)
        yield from _attention_replaced(block.attn, f"the attention of its block {number}", kinds)


def _attention_replaced(attn: Any, where: str, kinds: tuple[type, ...]) -> Iterator[str | None]:
    yield fidelity.refusal(attn, where, kinds)
    if not isinstance(attn, Attention):  # which calls its output projection, as we do; the other does not
        known = (nn.Linear, NonDynamicallyQuantizableLinear)
        yield fidelity.refusal(attn.out_proj, f"the output projection in {where}", known)


def fuse_quick_gelu(mlp: Any, first: str = "c_fc", second: str = "c_proj", activation: str = "gelu") -> None:
    """Make an MLP with QuickGELU, as OpenAI's weights have it, one with SiLU that computes the same.

    QuickGELU, x sigmoid(1.702 x), is three passes over the widest activation; SiLU, x sigmoid(x), is one. The factor
    goes into the weights before it and out of those after it, unless a norm stands between.

    Args:
        first, second, activation: the names of its parts.
    """
    before, after, between = getattr(mlp, first), getattr(mlp, second), getattr(mlp, activation)
    norm = getattr(mlp, "ln", _IDENTITY)
    known: dict[Any, type] = {before: nn.Linear, between: type(between), norm: nn.Identity, after: nn.Linear}
    plain = all(fidelity.refusal(module, "", (kind,)) is None for module, kind in known.items())
    quick = type(between).__name__ in ("QuickGELU", "QuickGELUActivation")  # of either library
    if plain and quick and not any(parametrize.is_parametrized(module) for module in known):
        with torch.no_grad():
            before.weight *= QUICK_GELU
            before.bias *= QUICK_GELU
            after.weight /= QUICK_GELU
        setattr(mlp, activation, nn.SiLU(inplace=True))


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
    head_width = width // attn.num_heads
    if class_token_only:
        query = by_head(F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width]), head_width)
        both = F.linear(x, weight[width:], None if bias is None else bias[width:])
        key, value = by_head(both, head_width).chunk(2, dim=1)
    else:
        query, key, value = by_head(F.linear(x, weight, bias), head_width).chunk(3, dim=1)
    if isinstance(attn, Attention):
        query, key = attn.ln_q(query), attn.ln_k(key)
    return query, key, value


def _pooling(pooler: Any, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attentional pooler.

    Args:
        x: (C, n, D).
        queries: how many of its queries, the first; all where None.

    Returns:
        (C, heads, queries, d), and twice (C, heads, n, d), d = E / heads.
    """
    attn = pooler.attn
    if attn.in_proj_weight is None:  # tokens are wider or narrower than what they are pooled into
        weights = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    else:
        weights = attn.in_proj_weight.chunk(3)
    biases = (None, None, None) if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    asked, x = pooler.ln_q(pooler.query[:queries]), pooler.ln_k(x)
    # The shape, not len(x), which torch.export would take for a constant.
    asked = F.linear(asked, weights[0], biases[0]).expand(x.shape[0], -1, -1)  # (C, queries, E)
    key, value = (F.linear(x, weight, bias) for weight, bias in zip(weights[1:], biases[1:], strict=True))
    query, key, value = (by_head(part, attn.head_dim) for part in (asked, key, value))
    return query, key, value


def _dropout(attn: Any) -> float:
    """The share of attention weights that are dropped: some while training, none afterwards."""
    if not attn.training:
        return 0.0
    share: float = attn.attn_drop.p if isinstance(attn, Attention) else attn.dropout
    return share


def _output(attn: Any, y: Tensor) -> Tensor:
    """What heads attended to, through the output projection: (C, heads, q, D / heads) -> (C, q, D)."""
    if not isinstance(attn, Attention):
        return attn.out_proj(y.transpose(1, 2).flatten(2))
    if attn.head_scale is not None:
        y = y * attn.head_scale
    return attn.out_drop(attn.out_proj(attn.ln_inner(y.transpose(1, 2).flatten(2))))


_IDENTITY = nn.Identity()
