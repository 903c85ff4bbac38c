"""Which images are held out: never trained on, and those that an evaluation can be limited to."""

from __future__ import annotations

import hashlib


def is_held_out(key: str, share: float) -> bool:
    """Whether the image of this key is held out; the same for every corpus, rank and run.

    Args:
        share: of all images that are held out, 0 to 1.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) < share * 2**64
