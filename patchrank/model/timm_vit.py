"""timm's vision transformers in open_clip: read out at the class token, by the mean, or by a learnt query."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchrank.model import fidelity
from patchrank.model.adapter import Adapter, linear_multiply_adds, normed
from patchrank.model.attention import attend, attention_of, by_head, weighted_mean

CLASS_TOKEN, MEAN, LEARNT_QUERY = "token", "avg", "map"  # as timm names them


class TimmViT(Adapter):
    """A `TimmModel` around a `VisionTransformer`: SigLIP, MobileCLIP, ViTamin."""

    module = TimmModel
    trunk: ClassVar[type[nn.Module]] = VisionTransformer
    known_blocks: ClassVar[tuple[type, ...]] = (Block,)
    known_attention: ClassVar[tuple[type, ...]] = (Attention,)

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        trunk = visual.trunk
        attention = trunk.blocks[0].attn
        self.blocks = trunk.blocks
        self.prefix_tokens = trunk.num_prefix_tokens
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.width = trunk.embed_dim
        self.heads = attention.num_heads
        self.head_width = attention.head_dim
        self.hidden = next(layer for layer in trunk.blocks[0].mlp.modules() if _is_linear(layer)).out_features
        self.depth = len(trunk.blocks)
        self.embed_dim = next(
            (layer.out_features for layer in reversed([trunk.head, *visual.head.modules()]) if _is_linear(layer)),
            self.width,
        )
        self.inner = self.heads * self.head_width  # of all heads together
        # Whether more than the class token is read of what the last block gives.
        self.all_read = trunk.global_pool != CLASS_TOKEN

    @classmethod
    def takes(cls, visual: nn.Module) -> bool:
        """As `Adapter.takes`: by what is inside."""
        return isinstance(visual, TimmModel) and isinstance(visual.trunk, cls.trunk)

    @classmethod
    def refusal(cls, visual: Any) -> str | None:
        """As `Adapter.refusal`."""
        trunk = visual.trunk
        if trunk.global_pool not in (CLASS_TOKEN, MEAN, LEARNT_QUERY):
            return f"its image tower pools tokens by '{trunk.global_pool}'"
        built, given = (" x ".join(map(str, size)) for size in (trunk.patch_embed.img_size, visual.image_size))
        if built != given:
            return f"its image tower is for images of {built}, not of {given}, as open_clip gives it"
        if trunk.dynamic_img_size:
            return "its image tower takes images of any size, so its tokens cannot be told by their number"
        return cls.replaced(visual)

    @classmethod
    def replaced(cls, visual: Any) -> str | None:
        """As `Adapter.replaced`."""
        return next(filter(None, cls._replaced(visual)), None)

    @property
    def dtype(self) -> torch.dtype:
        """As `Adapter.dtype`."""
        return self.blocks[0].norm1.weight.dtype

    @property
    def device(self) -> torch.device:
        """As `Adapter.device`."""
        return self.blocks[0].norm1.weight.device

    def structure(self) -> str:
        """As `Adapter.structure`."""
        trunk, pool = self.visual.trunk, self.visual.trunk.attn_pool
        activation = type(self.blocks[0].mlp.act).__name__.removesuffix("Tanh")  # see `transformers_content`
        return (
            f"{type(trunk).__name__} heads {self.heads} grid {self.grid} activation {activation} "
            f"norms {[module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)]} "
            f"pool {trunk.global_pool} {None if pool is None else pool.num_heads} prefix {self.prefix_tokens}"
        )

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """As `Adapter.prepare`; what a learnt query or the mean gathers is read out so, the gathering is not."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        unrounded = [(module, copy.deepcopy(module.state_dict())) for module in self._readout_modules()]
        self.visual.to(device=device, dtype=dtype)
        for module, weights in unrounded:
            module.to(exact).load_state_dict(weights)

    def unprepare(self) -> None:
        """As `Adapter.unprepare`."""
        for module in self._readout_modules():
            module.to(self.dtype)

    def _readout_modules(self) -> list[nn.Module]:
        """What comes after tokens are pooled, and the norm before where that costs little."""
        trunk = self.visual.trunk
        after = [trunk.fc_norm, trunk.head, self.visual.head]
        if trunk.attn_pool is None:
            return [trunk.norm, *after]
        return [trunk.attn_pool.proj, trunk.attn_pool.norm, trunk.attn_pool.mlp, *after]

    @property
    def _exact(self) -> torch.dtype:
        """The dtype of the readout."""
        return next((p.dtype for module in self._readout_modules() for p in module.parameters()), self.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """As `Adapter.embed`."""
        trunk = self.visual.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def attention(
        self,
        x: Tensor,
        number: int,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Adapter.attention`; in the last block the class token alone asks, where it alone is read."""
        block, last = self.blocks[number], number == self.depth - 1 and not self.all_read
        normed = self._normed(block, x)
        query, key, value = self._project(block.attn, normed, places, class_token_only=last)
        normed, x = (normed[:, :1], x[:, :1]) if last else (normed, x)
        attn = block.attn
        dropout = attn.attn_drop.p if attn.training else 0.0
        attended = attend(query, key, value, gates, bias, dropout).transpose(1, 2).flatten(2)  # (C, n or 1, heads d)
        attended = attn.norm(attended)
        if attn.gate is not None:
            attended = attended * attn.gate(normed).sigmoid()
        return self._attended(block, x, attn.proj_drop(attn.proj(attended))), key

    def _normed(self, block: Any, x: Tensor) -> Tensor:
        """What a block's attention is given: (C, n, D) likewise."""
        return block.norm1(x)

    def _attended(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        """Attention's residual: (C, n, D) twice -> (C, n, D)."""
        return x + block.drop_path1(block.ls1(attended))

    def mlp(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.mlp`."""
        block = self.blocks[number]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @property
    def recomputes(self) -> bool:
        """As `Adapter.recomputes`."""
        return self.visual.trunk.grad_checkpointing

    def final_norm(self, x: Tensor) -> Tensor:
        """As `Adapter.final_norm`."""
        return normed(self.visual.trunk.norm, x)

    def _project(
        self, attn: Any, x: Tensor, places: Tensor | None, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (C, n, D) -> (C, heads, n or 1, d), and twice (C, heads, n, d)."""
        weight, bias, inner = attn.qkv.weight, self._bias(attn), self.inner
        if class_token_only:
            asked = F.linear(x[:, :1], weight[:inner], None if bias is None else bias[:inner])
            others = F.linear(x, weight[inner:], None if bias is None else bias[inner:])
            query, (key, value) = by_head(asked, self.head_width), by_head(others, self.head_width).chunk(2, dim=1)
        else:
            query, key, value = by_head(F.linear(x, weight, bias), self.head_width).chunk(3, dim=1)
        return attn.q_norm(query), attn.k_norm(key), value

    def _bias(self, attn: Any) -> Tensor | None:
        """That of queries, keys and values, (3 heads d,)."""
        return attn.qkv.bias

    def class_attention(self, x: Tensor, number: int, places: Tensor | None = None) -> Tensor:
        """As `Adapter.class_attention`."""
        trunk, p = self.visual.trunk, self.prefix_tokens
        if trunk.attn_pool is not None:
            query, key, _ = self._pooling(trunk.norm(x)[:, self._skipped :])
            return attention_of(query, key)[:, p - self._skipped :]
        block, by_class_token = self.blocks[number], trunk.global_pool == CLASS_TOKEN
        query, key, _ = self._project(block.attn, self._normed(block, x), places, class_token_only=by_class_token)
        return attention_of(query if by_class_token else query[:, :, self._skipped :], key)[:, p:]

    @property
    def _skipped(self) -> int:
        """The prefix tokens that are not pooled."""
        return 0 if getattr(self.visual.trunk, "pool_include_prefix", False) else self.prefix_tokens

    def _pooling(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The learnt query, and keys and values of tokens: (C, n, D) -> (C, heads, 1, d), twice (C, heads, n, d)."""
        pool = self.visual.trunk.attn_pool
        query = by_head(pool.q(pool.latent).expand(x.shape[0], -1, -1), pool.head_dim)
        key, value = by_head(pool.kv(x), pool.head_dim).chunk(2, dim=1)
        return pool.q_norm(query), pool.k_norm(key), value

    def readout(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `Adapter.readout`."""
        trunk, exact = self.visual.trunk, self._exact
        counted = None if weights is None else weights[:, self._skipped :]
        if trunk.attn_pool is not None:
            pool = trunk.attn_pool
            query, key, value = self._pooling(trunk.norm(x)[:, self._skipped :])
            pooled = attend(query, key, value, counted).transpose(1, 2).flatten(2)[:, 0]  # (C, D)
            pooled = pool.proj_drop(pool.proj(pooled.to(exact)))
            pooled = pooled + pool.mlp(pool.norm(pooled))
        elif trunk.global_pool == MEAN:
            pooled = weighted_mean(trunk.norm(x[:, self._skipped :].to(exact)), counted)
        else:
            pooled = trunk.norm(x[:, 0].to(exact))
        return self.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled))))

    def embed_multiply_adds(self) -> int:
        """As `Adapter.embed_multiply_adds`."""
        stem = self.visual.trunk.patch_embed
        if type(stem) is PatchEmbed:
            return stem.proj.weight.numel() * self.num_tokens
        return _counted(stem, tuple(self.visual.image_size))

    def block_multiply_adds(self, n: int, last: bool = False) -> int:
        """As `Adapter.block_multiply_adds`."""
        d, inner = self.width, self.inner
        asking = 1 if last and not self.all_read else n
        gate = d * inner if self.blocks[0].attn.gate is not None else 0
        attention = 2 * d * inner * n + (2 * d * inner + gate) * asking + 2 * asking * n * inner
        return attention + self.mlp_multiply_adds(asking)

    def mlp_multiply_adds(self, n: int) -> int:
        """As `Adapter.mlp_multiply_adds`."""
        return linear_multiply_adds(self.blocks[0].mlp) * n

    def class_attention_multiply_adds(self, n: int) -> int:
        """As `Adapter.class_attention_multiply_adds`; keys, with the values beside them, are computed a second time."""
        pool, pooled = self.visual.trunk.attn_pool, n - self._skipped
        if pool is not None:
            return linear_multiply_adds(pool.q) + (linear_multiply_adds(pool.kv) + self.width) * pooled
        asking = 1 if self.visual.trunk.global_pool == CLASS_TOKEN else pooled
        projected = (2 * n + 1) if asking == 1 else 3 * n
        return projected * self.width * self.inner + asking * n * self.inner

    def readout_multiply_adds(self, n: int) -> int:
        """As `Adapter.readout_multiply_adds`."""
        trunk, total = (
            self.visual.trunk,
            linear_multiply_adds(self.visual.head) + linear_multiply_adds(self.visual.trunk.head),
        )
        if trunk.attn_pool is None:
            return total
        pool, pooled = trunk.attn_pool, n - self._skipped
        attention = linear_multiply_adds(pool.q) + (linear_multiply_adds(pool.kv) + 2 * self.width) * pooled
        return total + attention + linear_multiply_adds(pool.proj) + linear_multiply_adds(pool.mlp)

    @classmethod
    def _replaced(cls, visual: Any) -> Iterator[str | None]:
        """What stands between the modules and their weights, as of `fidelity.refusal`, module by module."""
        trunk = visual.trunk
        yield fidelity.refusal(visual, "its image tower", (TimmModel,))
        yield fidelity.refusal(trunk, "the trunk of its image tower", (cls.trunk,))
        yield fidelity.refusal(trunk.blocks, "the blocks of its image tower")
        if trunk.attn_pool is not None:
            yield fidelity.refusal(trunk.attn_pool, "its attention pooling", (AttentionPoolLatent,))
            if trunk.attn_pool.latent_len != 1 or trunk.attn_pool.pos_embed is not None:
                yield "its attention pooling has several queries or positions of its own"
            if trunk.attn_pool.mlp is None:
                yield "its attention pooling has no MLP"
        for number, block in enumerate(trunk.blocks):
            yield fidelity.refusal(block, f"its block {number}", cls.known_blocks)
            where = f"the attention of its block {number}"
            yield fidelity.refusal(block.attn, where, cls.known_attention)
            if block.attn.qkv is not None:  # read by its weights, which the other form is not
                yield fidelity.refusal(block.attn.qkv, f"the input projection in {where}", (nn.Linear,))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


_COUNTED: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _counted(stem: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of an image in a stem of convolutions, by PyTorch's counter, where nothing is computed."""
    if stem not in _COUNTED:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(stem).to("meta")(torch.empty(1, 3, *size, device="meta", dtype=next(stem.parameters()).dtype))
        _COUNTED[stem] = counter.get_total_flops() // 2
    return _COUNTED[stem]
