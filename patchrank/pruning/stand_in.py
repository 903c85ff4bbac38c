"""What takes the place of a model's image tower: the base of all pruned towers."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from torch import nn

Schedule = dict[int, int]
"""How many patch tokens go on, by the number of the block before which the others leave."""


class StandIn(nn.Module):
    """A pruned image tower, which stands in for `model.visual`.

    Args:
        visual: the tower; its modules are used as they are, none is copied or changed.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.original = visual
        # What open_clip and its users ask an image tower for: image_size, preprocess_cfg, output_dim and the like.
        for name, value in vars(visual).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    @property
    def idle(self) -> bool:
        """Whether it does as the original tower does."""
        raise NotImplementedError

    def multiply_adds(self) -> int:
        """Exact multiply-adds of an image, what tells or matches tokens included; norms and activations are not."""
        raise NotImplementedError
