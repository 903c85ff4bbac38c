"""transformers' vision transformers: CLIP, SigLIP, SigLIP2 on a fixed grid, DINOv2 with and without registers, ViT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from patchrank.model import fidelity
from patchrank.model.adapter import Adapter, linear_multiply_adds, normed
from patchrank.model.attention import attend, attention_of, by_head, weighted_mean
from patchrank.model.open_clip_vit import fuse_quick_gelu
from patchrank.model.transformers_content import as_open_clip, as_timm
from patchrank.model.transformers_tower import (
    CLASS_TOKEN,
    CLIP,
    FAMILIES,
    LEARNT_QUERY,
    MEAN,
    SIGLIP,
    SIGLIP2,
    VIT,
    ImageTower,
)

_ATTENTION = ("sdpa", "eager")  # one function, computed in two ways; others may be functions of their own
# Weights that are in no forward pass of an image, or only behind its embedding.
_BESIDE = ("vision.embeddings.mask_token", "vision.pooler.")


class TransformersViT(Adapter):
    """An `ImageTower` around a vision model. Projections are called, as peft tunes them; attention is computed."""

    module = ImageTower

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.family = FAMILIES[visual.family]
        vision = visual.vision
        self.blocks = vision.get_submodule(self.family.blocks)
        attention = getattr(self.blocks[0], self.family.attention)
        self.grid = visual.grid
        self.prefix_tokens = 0 if visual.pool != CLASS_TOKEN else 1 + getattr(vision.config, "num_register_tokens", 0)
        self.width = vision.config.hidden_size
        self.head_width = attention.head_dim
        self.inner = attention.q_proj.out_features  # of all heads together
        self.hidden = max(layer.out_features for layer in _linear(self.blocks[0].mlp))
        self.embed_dim = visual.output_dim
        self.depth = len(self.blocks)
        # Whether more than the class token is read of what the last block gives.
        self.all_read = visual.pool != CLASS_TOKEN or visual.own_output

    @classmethod
    def refusal(cls, visual: Any) -> str | None:
        """As `Adapter.refusal`."""
        kind = visual.config._attn_implementation
        if kind not in _ATTENTION:
            return f"its attention is computed by {kind!r}; load it with attn_implementation='sdpa' or 'eager'"
        if not hasattr(visual.vision, FAMILIES[visual.family].blocks.split(".")[0]):
            return "its vision model is not built as transformers 5.24 builds it; install that or a later one"
        if any(size % patch for size, patch in zip(visual.image_size, visual.patch_size, strict=True)):
            return "its images are no whole number of patches high and wide"
        return next(filter(None, _replaced(visual)), None)

    @property
    def dtype(self) -> torch.dtype:
        """As `Adapter.dtype`."""
        return self._norm(self.blocks[0], 0).weight.dtype

    @property
    def device(self) -> torch.device:
        """As `Adapter.device`."""
        return self._norm(self.blocks[0], 0).weight.device

    def structure(self) -> str:
        """As `Adapter.structure`."""
        visual, vision = self.visual, self.visual.vision
        norms = [module.eps for module in vision.modules() if isinstance(module, nn.LayerNorm)]
        return (
            f"{visual.family} heads {self.inner // self.head_width} grid {self.grid} patch {visual.patch_size} "
            f"activation {self.activation()} norms {norms} pool {visual.pool}"
        )

    def activation(self) -> str:
        """The class of the MLPs' activation."""
        mlp = self.blocks[0].mlp
        return type(getattr(mlp, "activation_fn", getattr(mlp, "act_fn", None))).__name__

    def content(self) -> tuple[dict[str, Tensor], str]:
        """As `Adapter.content`; as open_clip or timm would tell it, where they have the same model."""
        state = {key: value for key, value in self.visual.state_dict().items() if not key.startswith(_BESIDE)}
        told = state, self.structure()
        if self.visual.family == CLIP:
            told = as_open_clip(self)
        elif self.visual.family == SIGLIP and self.visual.pool == LEARNT_QUERY:
            told = as_timm(self)
        # What was tuned has weights that they do not know.
        return told if _size(told[0]) == _size(state) else (state, self.structure())

    def prepare(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """As `Adapter.prepare`."""
        for block in self.blocks:
            if hasattr(block.mlp, "activation_fn"):
                fuse_quick_gelu(block.mlp, "fc1", "fc2", "activation_fn")
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
        projection = [] if self.visual.projection is None else [self.visual.projection]
        if self.visual.pool == LEARNT_QUERY:
            head = self.visual.vision.head
            return [head.attention.out_proj, head.layernorm, head.mlp, *projection]
        return [self._last_norm, *projection]

    @property
    def _last_norm(self) -> Any:
        return getattr(self.visual.vision, self.family.last_norm)

    @property
    def _exact(self) -> torch.dtype:
        """The dtype of the readout."""
        return next(self._readout_modules()[0].parameters()).dtype

    def embed(self, images: Tensor) -> Tensor:
        """As `Adapter.embed`; of SigLIP2 also the patches that its own processor makes, (C, N, 3 P P)."""
        visual, vision = self.visual, self.visual.vision
        if visual.family == SIGLIP2:
            if not self._stored_positions:
                return vision.embeddings(**visual.inputs(images))
            # Which it would resize to what they are, by a product of matrices and a check that ONNX does not know.
            patches = vision.embeddings.patch_embedding(visual.inputs(images)["pixel_values"].to(self.dtype))
            return patches + vision.embeddings.position_embedding.weight.float().to(patches.dtype)
        x = vision.embeddings(images)
        return vision.pre_layrnorm(x) if visual.family == CLIP else x

    def own_embeddings(self, images: Tensor) -> Tensor:
        """As `Adapter.own_embeddings`."""
        return self.visual.embeddings(images)

    def own_block(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.own_block`."""
        return self.blocks[number](x, None)

    @property
    def recomputes(self) -> bool:
        """As `Adapter.recomputes`: `gradient_checkpointing_enable`, which counts in training alone."""
        return any(block.gradient_checkpointing and block.training for block in self.blocks)

    def _norm(self, block: Any, which: int) -> Any:
        return getattr(block, self.family.norms[which])

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
        query, key, value = self._project(block, x, class_token_only=last)
        attn = getattr(block, self.family.attention)
        attended = attend(query, key, value, gates, bias, _dropout(attn)).transpose(1, 2).flatten(2)
        attended = getattr(attn, self.family.out)(attended)  # (C, n or 1, D)
        return (x[:, :1] if last else x) + _added(block, attended, "layer_scale1"), key

    def _project(self, block: Any, x: Tensor, class_token_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (C, n, D) -> (C, heads, n or 1, d), and twice (C, heads, n, d)."""
        attn, normed = getattr(block, self.family.attention), self._norm(block, 0)(x)
        projected = attn.q_proj(normed[:, :1] if class_token_only else normed), attn.k_proj(normed), attn.v_proj(normed)
        query, key, value = (by_head(part, self.head_width) for part in projected)
        return query, key, value

    def mlp(self, x: Tensor, number: int) -> Tensor:
        """As `Adapter.mlp`."""
        block = self.blocks[number]
        return x + _added(block, block.mlp(self._norm(block, 1)(x)), "layer_scale2")

    def class_attention(self, x: Tensor, number: int, places: Tensor | None = None) -> Tensor:
        """As `Adapter.class_attention`."""
        if self.visual.pool == LEARNT_QUERY:
            query, key, _ = self._pooling(self._last_norm(x))
            return attention_of(query, key)
        by_class_token = self.visual.pool == CLASS_TOKEN
        query, key, _ = self._project(self.blocks[number], x, class_token_only=by_class_token)
        return attention_of(query, key)[:, self.prefix_tokens :]

    def _pooling(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The learnt query, and keys and values of tokens: (C, n, D) -> (C, heads, 1, d), twice (C, heads, n, d)."""
        head, width = self.visual.vision.head, self.width
        weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        asked = F.linear(head.probe[0], weight[:width], bias[:width]).expand(x.shape[0], -1, -1)  # (C, 1, D)
        both = F.linear(x, weight[width:], bias[width:])  # (C, n, 2 D)
        key, value = by_head(both, head.attention.head_dim).chunk(2, dim=1)
        return by_head(asked, head.attention.head_dim), key, value

    def readout(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `Adapter.readout`."""
        pooled = self._pooled(x, weights)
        return pooled if self.visual.projection is None else self.visual.projection(pooled)

    def _pooled(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """(C, n, D) -> (C, D), before the projection, in the readout's dtype."""
        exact = self._exact
        if self.visual.pool == LEARNT_QUERY:
            head = self.visual.vision.head
            query, key, value = self._pooling(self._last_norm(x))
            pooled = attend(query, key, value, weights, dropout=_dropout(head.attention))
            pooled = pooled.transpose(1, 2).flatten(2)[:, 0]  # (C, D)
            pooled = head.attention.out_proj(pooled.to(exact))
            return pooled + head.mlp(head.layernorm(pooled))
        if self.visual.pool == MEAN:
            return weighted_mean(self._last_norm(x.to(exact)), weights)
        return self._last_norm(x[:, 0].to(exact))

    def output(self, x: Tensor, weights: Tensor | None = None, learnable: int = 0) -> Any:
        """As `Adapter.output`: with `own_output` the tokens that are left, and what the vision model pools."""
        visual = self.visual
        if not visual.own_output:
            return self.readout(x, weights)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # CLIP's norm is of the class token alone; the others give normed tokens.
        tokens = x if visual.family == CLIP else self._last_norm(x.to(self._exact))
        pooled = self._pooled(x, weights) if visual.pool == LEARNT_QUERY or visual.family == CLIP else tokens[:, 0]
        if visual.family == VIT:
            pooled = None if visual.vision.pooler is None else visual.vision.pooler(tokens)
        p = self.prefix_tokens
        tokens = torch.cat([tokens[:, :p], tokens[:, p + learnable :]], dim=1) if learnable else tokens
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=None if visual.pool == MEAN else pooled
        )

    def final_norm(self, x: Tensor) -> Tensor:
        """As `Adapter.final_norm`."""
        return normed(self._last_norm, x)

    def embed_multiply_adds(self) -> int:
        """As `Adapter.embed_multiply_adds`."""
        embeddings = self.visual.vision.embeddings
        patches = embeddings.patch_embedding if hasattr(embeddings, "patch_embedding") else embeddings.patch_embeddings
        resized = 0 if self._stored_positions else self._resizing_multiply_adds()
        return sum(each.weight.numel() for each in _linear(patches, nn.Conv2d)) * self.num_tokens + resized

    @property
    def _stored_positions(self) -> bool:
        """Whether SigLIP2's positions are those of this very grid."""
        side = getattr(self.visual.vision.embeddings, "position_embedding_size", 0)
        return self.grid == (side, side)

    def _resizing_multiply_adds(self) -> int:
        """Of SigLIP2's positions, which it resizes by a product of matrices, whatever the grid."""
        if self.visual.family != SIGLIP2:
            return 0
        return self.num_tokens * self.visual.vision.embeddings.position_embedding.weight.numel()

    def block_multiply_adds(self, n: int, last: bool = False) -> int:
        """As `Adapter.block_multiply_adds`."""
        asking = 1 if last and not self.all_read else n
        attention = 2 * self.width * self.inner * (n + asking) + 2 * asking * n * self.inner
        return attention + self.mlp_multiply_adds(asking)

    def mlp_multiply_adds(self, n: int) -> int:
        """As `Adapter.mlp_multiply_adds`."""
        return linear_multiply_adds(self.blocks[0].mlp) * n

    def class_attention_multiply_adds(self, n: int) -> int:
        """As `Adapter.class_attention_multiply_adds`; values are computed beside the keys."""
        d = self.width
        if self.visual.pool == LEARNT_QUERY:
            return d * d + (2 * d * d + d) * n
        asking = 1 if self.visual.pool == CLASS_TOKEN else n
        return (2 * n + asking) * d * self.inner + asking * n * self.inner

    def readout_multiply_adds(self, n: int) -> int:
        """As `Adapter.readout_multiply_adds`."""
        projection = self.visual.projection
        return self._pooling_multiply_adds(n) + (0 if projection is None else linear_multiply_adds(projection))

    def output_multiply_adds(self, n: int) -> int:
        """As `Adapter.output_multiply_adds`."""
        if not self.visual.own_output:
            return self.readout_multiply_adds(n)
        return self._pooling_multiply_adds(n) + self._pooler_multiply_adds()

    def full_multiply_adds(self) -> int:
        """As `Adapter.full_multiply_adds`: with ViT's pooler, which no embedding needs, and with resized positions."""
        pooler = 0 if self.visual.own_output else self._pooler_multiply_adds()
        return super().full_multiply_adds() + pooler + (self._resizing_multiply_adds() if self._stored_positions else 0)

    def _pooler_multiply_adds(self) -> int:
        pooler = getattr(self.visual.vision, "pooler", None)
        return 0 if pooler is None else linear_multiply_adds(pooler)

    def _pooling_multiply_adds(self, n: int) -> int:
        if self.visual.pool != LEARNT_QUERY:
            return 0
        head, d = self.visual.vision.head, self.width
        return 2 * d * d + (2 * d * d + 2 * d) * n + linear_multiply_adds(head.mlp)


def _dropout(attn: Any) -> float:
    """The share of attention weights that are dropped: some while training, none afterwards."""
    share: float = attn.dropout if hasattr(attn, "dropout") else attn.attention_dropout
    return share if attn.training else 0.0


def _added(block: Any, x: Tensor, scale: str) -> Tensor:
    """What a half of a block adds to its input: by the block's layer scale, dropout and stochastic depth, if any."""
    for name in (scale, "dropout", "drop_path"):
        part = getattr(block, name, None)
        x = x if part is None else part(x)
    return x


def _size(state: dict[str, Tensor]) -> int:
    """The numbers in a state dict."""
    return sum(value.numel() for value in state.values())


def _linear(module: nn.Module, *kinds: type) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, *kinds))]


def _replaced(visual: Any) -> Iterator[str | None]:
    """What stands between the modules and their weights, as of `fidelity.refusal`, module by module."""
    vision, family = visual.vision, FAMILIES[visual.family]
    known = family.known(visual.family.removeprefix(family.prefix))
    pruned = getattr(type(vision), "base", None) in known  # then it is of a class of ours, which calls the adapter
    yield fidelity.refusal(vision, "its image tower", (*known, type(vision)) if pruned else known)
    if visual.family == SIGLIP2:  # of which the parts are called
        yield fidelity.refusal(vision.embeddings, "what embeds its patches", family.known("VisionEmbeddings"))
    if hasattr(vision, "encoder"):
        yield fidelity.refusal(vision.encoder, "its encoder", family.known("Encoder"))
    if visual.pool == LEARNT_QUERY:
        head = vision.head
        yield fidelity.refusal(head, "its pooling head", family.known("MultiheadAttentionPoolingHead"))
        yield fidelity.refusal(head.attention, "the attention of its pooling head", (nn.MultiheadAttention,))
        where = "the output projection of its pooling head"
        yield fidelity.refusal(head.attention.out_proj, where, (nn.Linear, NonDynamicallyQuantizableLinear))
    for number, block in enumerate(vision.get_submodule(family.blocks)):
        yield fidelity.refusal(block, f"its block {number}", family.known(family.layer))
        where = f"the attention of its block {number}"
        yield fidelity.refusal(getattr(block, family.attention), where, family.known("Attention"))
