"""Python imports this at its start where tests/held is on PYTHONPATH: readers of tars wait where a test wants them to.

A file in the folder $HELD, named as the key of a sample, holds everyone who comes to that sample until it is removed;
those who wait leave KEY.PID there. See `Hold` in shared_ray.py.
"""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

_following = tarfile.TarFile.next


def _held(self: tarfile.TarFile) -> tarfile.TarInfo | None:
    member = _following(self)
    if member is not None:
        key = Path(os.environ["HELD"], member.name.partition(".")[0])
        while key.exists():
            Path(f"{key}.{os.getpid()}").touch()
            time.sleep(0.02)
    return member


if "HELD" in os.environ:
    tarfile.TarFile.next = _held  # type: ignore[method-assign]
