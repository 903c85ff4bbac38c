"""An image tower cut before block L: what comes before runs once an image, what comes after once a candidate.

tower = Tower(model.visual, cut=3)
tokens = tower.prefix(images)              # the full sequence, class embedding first
tower.suffix(tokens)                       # = model.encode_image(images)
tower.suffix(tokens, kept)                 # the embedding when only the tokens `kept` go on
tower.suffix(tokens, gates=gates)          # ... when there is only so much of each as a key, with a gradient
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.model.adapter import NOTHING, Adapter, Along
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
        recompute: whether `suffix` keeps for a gradient what goes into each block alone, and runs the blocks again
            backwards: less memory for a forward pass more.

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
        adapter = adapt(visual, name)
        blocks = adapter.depth
        cut = default_cut(blocks) if cut is None else cut
        if not 0 <= cut < blocks:
            raise UserError(f"{name} has {blocks} blocks: the cut must be 0 to {blocks - 1}, not {cut}")
        self.cut = cut
        self.recompute = False
        self.dtype = dtype
        self.visual = copy.deepcopy(visual).eval().requires_grad_(False)
        self._kind = type(adapter)
        self.adapter.prepare(dtype, device)
        self.grid = adapter.grid
        self._backward: list[int] | None = None  # what `derivative_multiply_adds` has counted

    def train(self, mode: bool = True) -> Tower:
        """As of any module, but the image tower stays in eval mode, without dropout: it is frozen."""
        super().train(mode)
        self.visual.eval()
        return self

    @property
    def adapter(self) -> Adapter:
        """What is known of the tower. Made anew, as a replica (DataParallel's) is given a tower of its own."""
        return self._kind(self.visual)

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
        self,
        tokens: Tensor,
        kept: Tensor | None = None,
        image: Tensor | None = None,
        gates: Tensor | None = None,
        along: Along = NOTHING,
    ) -> Tensor:
        """Embeddings of images of which only some tokens go past the cut.

        Args:
            tokens: (B, p + N + b, D) from `prefix`; the b tokens after the patches always stay.
            kept: (C, n) int64 token ids in 0 .. N-1; all tokens where None.
            image: (C,) int64, the row of `tokens` that each row of `kept` belongs to; row c where None (then C = B).
            gates: (C, n) float, how much there is of each patch that goes on, as `Adapter.through` has it; a gradient
                flows to them. All of it where None.
            along: as of `Adapter.through`.

        Returns:
            (C, E) float32 (float64 for a float64 tower), not normalised, as `encode_image` gives them.
        """
        adapter = self.adapter
        x, places = self._left(adapter, tokens, kept, image)
        if gates is not None:
            gates = F.pad(gates, (adapter.prefix_tokens, tokens.shape[1] - adapter.length), value=1.0)  # (C, p + n + b)
        x, gates, _ = adapter.through(x, self.cut, None, gates, self.recompute, along, places)
        return adapter.readout(x, gates)  # (C, E)

    def patches(
        self, tokens: Tensor, kept: Tensor | None = None, image: Tensor | None = None, gates: Tensor | None = None
    ) -> Tensor:
        """Final features of the patches that go past the cut, after the last norm.

        Args:
            tokens, kept, image, gates: as for `suffix`, without tokens behind the patches.

        Returns:
            (C, n, D), in the order of `kept`.
        """
        adapter = self.adapter
        adapter.all_read = True
        x, places = self._left(adapter, tokens, kept, image)
        gates = None if gates is None else F.pad(gates, (adapter.prefix_tokens, 0), value=1.0)  # (C, p + n)
        x, _, _ = adapter.through(x, self.cut, None, gates, self.recompute, places=places)
        return adapter.final_norm(x[:, adapter.prefix_tokens :])

    def _left(
        self, adapter: Adapter, tokens: Tensor, kept: Tensor | None, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What goes past the cut, (C, p + n + b, D), and places, as of `Adapter.through`; arguments as of `suffix`."""
        p, length = adapter.prefix_tokens, adapter.length
        if kept is None:
            x, places = tokens if image is None else tokens[image], None  # (C, p + N + b, D)
        else:
            rows = torch.arange(kept.shape[0], device=kept.device) if image is None else image
            first = torch.arange(p, device=kept.device).expand(len(kept), -1)  # (C, p)
            extra = torch.arange(length, tokens.shape[1], device=kept.device).expand(len(kept), -1)  # (C, b)
            positions = torch.cat([first, kept + p, extra], dim=1)  # (C, p + n + b)
            x = tokens[rows[:, None], positions]  # (C, p + n + b, D)
            places = adapter.in_order(tokens.shape[1], x.device)[0, positions] if adapter.rotary else None
        return x, places

    def prefix_multiply_adds(self) -> int:
        """Exact multiply-adds of `prefix` for an image; norms and activations not counted."""
        return self.adapter.embed_multiply_adds() + self.cut * self.adapter.block_multiply_adds(self.length)

    def suffix_multiply_adds(self, kept: int) -> int:
        """Exact multiply-adds of `suffix` for a candidate of `kept` patch tokens; norms and activations not counted."""
        n, blocks = self.adapter.prefix_tokens + kept, self.adapter.depth - self.cut - 1
        last = self.adapter.block_multiply_adds(n, last=True) + self.adapter.readout_multiply_adds(n)
        return blocks * self.adapter.block_multiply_adds(n) + last

    def derivative_multiply_adds(self, kept: int) -> int:
        """Exact multiply-adds of going back once through `suffix` to the gates of a candidate of `kept` patch tokens.

        Counted by PyTorch, on tensors without contents, of the very operations that autograd runs: for three numbers
        of tokens, as it is a quadratic of them.
        """
        if self._backward is None:
            self._backward = [self._count_backward(n) for n in (1, 2, 3)]
        one, two, three = self._backward
        # Newton's form; the second differences are whole numbers.
        return one + (kept - 1) * (two - one) + (kept - 1) * (kept - 2) // 2 * (three - 2 * two + one)

    def _count_backward(self, kept: int) -> int:
        with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            tokens = torch.empty(1, self.length, self.width, dtype=self.dtype, device=self.device)
            gates = torch.ones(1, kept, device=self.device, requires_grad=True)
            ids = torch.arange(kept, device=self.device)[None]
            embedding = self.suffix(tokens, ids, gates=gates)  # (1, E)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(embedding.sum(), gates)
        return counter.get_total_flops() // 2

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of whole images, (B, 3, H, W) -> (B, E): the unpruned model."""
        return self.suffix(self.prefix(images))
