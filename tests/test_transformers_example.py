"""The example for transformers, as a user runs it."""

from __future__ import annotations

import transformers_models
from here import run_here
from PIL import Image


def test_prune_in_transformers(tmp_path):
    transformers_models.save_clip(tmp_path / "model")
    photos = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in photos:
        Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    given = [*photos, "--labels", "cat", "dog", "--model", tmp_path / "model"]
    done = run_here("examples/prune_in_transformers.py", *given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith(f"{photos[0]}: ") and " before " in lines[0]
    assert lines[2] == "15 patches are left; a map of features: (2, 32, 5, 5)"
    bad = run_here("examples/prune_in_transformers.py", tmp_path / "nope.png", *given[2:])
    assert bad.returncode == 2 and "nope.png" in bad.stderr and len(bad.stderr.strip().splitlines()) == 1
