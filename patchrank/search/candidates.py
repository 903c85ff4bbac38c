"""Candidates: what is left of an image when some tokens have gone, embedded in chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchrank.model.tower import Tower

# As `Tower.suffix`: tokens, kept and image -> (c, E).
Read = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Value = Callable[[Tensor, Tensor], Tensor]  # embeddings and rows of the batch, (c, E), (c,) -> (c, ...)
CACHE_BYTES = 4 << 20  # that the widest activation of a chunk may take on a CPU


class Candidates:
    """Embeds candidates of a batch of images.

    Args:
        tower: the image tower, cut where the tokens leave.
        block: r, the side of the sliding blocks, in tokens.
        chunk: candidates a forward pass, `default_chunk` where None; halved, for good, whenever memory runs out.

    Attributes:
        read: what is computed of candidates: their embeddings by default.
    """

    read: Read

    def __init__(self, tower: Tower, block: int = 1, chunk: int | None = None) -> None:
        self.tower = tower
        self.read = tower.suffix
        self.block = block
        self.chunk = chunk or default_chunk(tower)
        self.derived = max(1, self.chunk // (tower.adapter.depth - tower.cut))  # images `derive` takes at a time
        cover = block_cover(tower.grid, block)  # (P, N)
        self.cover = cover.to(tower.device)
        rest = (~cover).nonzero()[:, 1].view(len(cover), tower.num_tokens - block**2)
        self.rest = rest.to(tower.device)  # (P, N - r * r), the ids off each block

    def embed(
        self,
        tokens: Tensor,
        image: Tensor,
        kept: Tensor | None = None,
        value: Value = lambda embeddings, image: embeddings,
    ) -> Tensor:
        """Embeddings of candidates, or what is read from them.

        Args:
            tokens: (B, p + N, D) from `Tower.prefix`.
            image: (C,), the row of `tokens` of each candidate.
            kept: (C, n) token ids, or None for whole images.
            value: (c, E), (c,) -> (c, ...), what is read from a chunk of embeddings: class probabilities of all
                candidates at once would be large.
        """
        parts, start = [], 0
        while start < len(image):
            rows = slice(start, start + self.chunk)
            try:
                embeddings = self.read(tokens, None if kept is None else kept[rows], image[rows])
                parts.append(value(embeddings, image[rows]))
            except RuntimeError as error:
                if not _out_of_memory(error) or self.chunk == 1:
                    raise
                self.chunk //= 2
                continue
            start += self.chunk
        return torch.cat(parts)

    def derive(self, tokens: Tensor, ids: Tensor, gates: Tensor, value: Value) -> tuple[Tensor, Tensor]:
        """Embeddings through gates, and how what is read from them changes with each: a pass forward, and one back.

        Args:
            tokens: (B, p + N, D) from `Tower.prefix`.
            ids: (B, n), the tokens that are there.
            gates: (B, n), how much of each as a key, as of `Tower.suffix`.
            value: (b, E), (b,) -> (b,), as for `embed`, with a gradient.

        Returns:
            (B, E), and the derivatives, (B, n) in the gates' dtype.
        """
        parts, start = [], 0
        while start < len(ids):
            rows = slice(start, start + self.derived)
            try:
                parts.append(self._derive(tokens[rows], ids[rows], gates[rows], start, value))
            except RuntimeError as error:
                if not _out_of_memory(error) or self.derived == 1:
                    raise
                self.derived //= 2
                continue
            start += self.derived
        embeddings, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
        return embeddings, slopes

    def _derive(self, tokens: Tensor, ids: Tensor, gates: Tensor, start: int, value: Value) -> tuple[Tensor, Tensor]:
        """`derive` of the images of a chunk, which are those from `start` on in the batch."""
        image = torch.arange(start, start + len(ids), device=tokens.device)
        with torch.enable_grad():
            gates = gates.detach().requires_grad_()
            embeddings = self.tower.suffix(tokens, ids, gates=gates)  # (b, E)
            (slopes,) = torch.autograd.grad(value(embeddings, image).sum(), gates)
        return embeddings.detach(), slopes

    def measure(
        self, tokens: Tensor, alive: Tensor, wanted: Tensor, value: Value, shared: bool = False
    ) -> tuple[Tensor, int]:
        """What candidates tell about tokens: the mean over the blocks that cover a token, less what has already left.

        Args:
            tokens: (B, p + N, D).
            alive: (B, A), ids of the tokens that have not left, ascending.
            wanted: (B, M), ids of the tokens to measure, all alive.
            value: (c, E), (c,) -> (c, q), as for `embed`: what a candidate tells about the tokens it is without.
            shared: whether these tokens have equal shares of it (what adds up, such as a change of the embedding),
                or each has all of it (such as a score).

        Returns:
            (B, M, q), and how many candidates that took.
        """
        # The shapes of the first two are known beforehand, so nothing waits for the device. The third does wait.
        if self.block == 1:
            found = self.embed_each(tokens, without_each(alive, wanted), value)  # (B, M, q)
            return found, found.shape[0] * found.shape[1]
        if alive.shape[1] == self.tower.num_tokens:
            return self._measure_whole_blocks(tokens, wanted, value, shared)
        return self._measure_rest_of_blocks(tokens, alive, wanted, value, shared)

    def embed_each(self, tokens: Tensor, kept: Tensor, value: Value) -> Tensor:
        """`embed` for as many candidates of every image: (B, M, n) token ids -> (B, M, ...)."""
        batch, count = kept.shape[:2]
        image = torch.arange(batch, device=tokens.device).repeat_interleave(count)  # (B * M,)
        return self.embed(tokens, image, kept.flatten(0, 1), value).unflatten(0, (batch, -1))

    def _measure_whole_blocks(self, tokens: Tensor, wanted: Tensor, value: Value, shared: bool) -> tuple[Tensor, int]:
        """`measure` while all tokens are there."""
        found = self.embed_each(tokens, self.rest.expand(len(tokens), -1, -1), value)  # (B, P, q)
        cover = self.cover.double()
        mean = ((cover / cover.sum(dim=0)).T @ found.double()).to(found.dtype)  # (B, N, q)
        mean = mean / self.block**2 if shared else mean
        return mean.gather(1, _like(wanted, mean)), found.shape[0] * found.shape[1]

    def _measure_rest_of_blocks(
        self, tokens: Tensor, alive: Tensor, wanted: Tensor, value: Value, shared: bool
    ) -> tuple[Tensor, int]:
        """`measure` for blocks some of whose tokens have left: they lose tokens unevenly, and go sorted by length."""
        there, needed = (
            torch.zeros(len(tokens), self.tower.num_tokens, dtype=torch.bool, device=tokens.device).scatter_(
                1, ids, True
            )
            for ids in (alive, wanted)
        )  # both (B, N)
        useful = (needed[:, None] & self.cover).any(dim=-1)  # (B, P)
        image, block = useful.nonzero(as_tuple=True)  # both (C,)
        stays = there[image] & ~self.cover[block]  # (C, N)
        sizes = stays.sum(dim=1)  # (C,)
        values = None
        for size in sizes.unique().tolist():
            same = (sizes == size).nonzero()[:, 0]  # (c,)
            kept = stays[same].nonzero()[:, 1].view(len(same), size)  # (c, size), ascending token ids
            found = self.embed(tokens, image[same], kept, value)  # (c, q)
            found = found / (alive.shape[1] - size) if shared else found
            values = found.new_empty(len(image), found.shape[1]) if values is None else values  # (C, q)
            values[same] = found
        assert values is not None  # some token is wanted, and some block covers it
        by_block = values.new_zeros(*useful.shape, values.shape[1], dtype=torch.float64)  # (B, P, q)
        by_block[image, block] = values.double()
        covered = self.cover.double()
        # Blocks off `useful` cover no wanted token; tokens that no useful block covers are not read.
        total, count = covered.T @ by_block, useful.double() @ covered  # (B, N, q), (B, N)
        mean = (total / count[..., None]).to(values.dtype)
        return mean.gather(1, _like(wanted, mean)), len(image)


def without_each(alive: Tensor, leaving: Tensor) -> Tensor:
    """The tokens left when one more leaves: (B, A) ascending ids, (B, M) ids among them -> (B, M, A - 1)."""
    place = (alive[:, None, :] < leaving[:, :, None]).sum(dim=-1)  # (B, M), of the leaving token among those alive
    index = torch.arange(alive.shape[1] - 1, device=alive.device).expand(*place.shape, -1)  # (B, M, A - 1)
    index = index + (index >= place[..., None])
    return alive[:, None].expand(-1, place.shape[1], -1).gather(2, index)


def without(alive: Tensor, leaving: Tensor) -> Tensor:
    """The tokens left when several leave: (B, A) ascending ids, (B, k) ids among them -> (B, A - k)."""
    goes = (alive[:, :, None] == leaving[:, None, :]).any(dim=-1)  # (B, A)
    order = goes.to(torch.uint8).sort(dim=1, stable=True).indices  # those that stay first, in their order
    return alive.gather(1, order[:, : alive.shape[1] - leaving.shape[1]])


def default_chunk(tower: Tower) -> int:
    """Candidates a forward pass: many on a GPU; on a CPU few enough that a block's activations stay in its cache."""
    if tower.device.type != "cpu":
        return 512
    candidate = tower.num_tokens * tower.adapter.hidden * tower.dtype.itemsize  # bytes of the widest activation
    return max(4, min(64, CACHE_BYTES // candidate))


def block_cover(grid: tuple[int, int], block: int) -> Tensor:
    """Which tokens each r x r block covers, sliding over the patch grid with stride 1.

    Returns:
        (P, N) bool, P = (rows - r + 1) * (columns - r + 1). Tokens at the border are covered by fewer blocks.
    """
    rows, columns = grid
    token = torch.arange(rows * columns).view(rows, columns)
    ids = token.unfold(0, block, 1).unfold(1, block, 1).flatten(2).flatten(0, 1)  # (P, r * r)
    return torch.zeros(len(ids), rows * columns, dtype=torch.bool).scatter_(1, ids, True)


def _like(ids: Tensor, values: Tensor) -> Tensor:
    """(B, M) token ids as an index into (B, N, q) values."""
    return ids[..., None].expand(-1, -1, values.shape[2])


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has its own exception; the CPU's allocator raises a plain RuntimeError that only its text tells apart."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
