"""The image tower of the embedded SigLIP-type model. open_clip's configurations name timm's architectures alone, so its
own has a name in timm's registry: that of the function below, which is there once this file was imported.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


@register_model
def vit_patchrank_siglip(global_pool: Any = "map", num_classes: int = 0, **_: Any) -> VisionTransformer:
    """Pooled by attention as timm's `vit_base_patch16_siglip_224`, with blocks of the shape of the embedded CLIP's.

    Images of 28 px, patches of 2. Other settings that timm hands on are not looked at.
    """
    return VisionTransformer(
        img_size=28,
        patch_size=2,
        embed_dim=64,
        depth=4,
        num_heads=1,
        mlp_ratio=2.0,
        pre_norm=True,
        class_token=False,
        global_pool=global_pool,
        num_classes=num_classes,
    )
