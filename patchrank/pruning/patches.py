"""Features of the patches that are left, put back where they were in the image."""

from __future__ import annotations

from torch import Tensor

from patchrank.errors import UserError
from patchrank.tokens import nearest

FILLS = ("zeros", "nearest")


def on_grid(features: Tensor, ids: Tensor, grid: tuple[int, int], fill: str = "zeros") -> Tensor:
    """A map of features, as code for dense prediction takes it, of the patches that are left.

    Args:
        features: (B, n, D), any dtype.
        ids: (B, n) int64, which patches they are of: token ids in 0 .. N-1, each at most once.
        grid: rows and columns of patches in the whole image.
        fill: what patches that have left get: "zeros", or the features of the "nearest" patch that is there, by the
            distance between their middles; of several, the one with the lowest token id.

    Returns:
        (B, D, rows, columns). A gradient flows to the features. `.flatten(2).transpose(1, 2)` makes a sequence of it.

    Raises:
        UserError: another fill, or shapes that do not go together.
    """
    if fill not in FILLS:
        raise UserError(f"fill {fill}: must be one of {', '.join(FILLS)}")
    (rows, columns), width = grid, features.shape[-1]
    if features.shape[:-1] != ids.shape or ids.shape[1] > rows * columns:
        raise UserError(
            f"features {tuple(features.shape)} and ids {tuple(ids.shape)} do not go together on a grid of {rows} x "
            f"{columns}; prefix tokens, such as the class token, have no place there"
        )
    if fill == "zeros":
        empty = features.new_zeros(ids.shape[0], rows * columns, width)
        whole = empty.scatter(1, ids[..., None].expand(-1, -1, width), features)  # (B, N, D)
    else:
        source = nearest(ids, grid)
        whole = features.gather(1, source[..., None].expand(-1, -1, width))  # (B, N, D)
    return whole.transpose(1, 2).unflatten(2, (rows, columns))
