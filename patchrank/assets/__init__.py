"""The embedded default: a small CLIP and sample shards of Fashion-MNIST, so that every job runs without a download.

README.md beside this file says how they were made; `make_assets.py` makes them again.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL = f"local-dir:{_HERE / 'model'}"  # a model name for open_clip.create_model and open_clip.get_tokenizer
SIGLIP = f"local-dir:{_HERE / 'siglip'}"  # the same of the SigLIP-type model, once siglip_tower.py was imported
EMBEDDED = {"embedded": MODEL, "embedded-siglip": SIGLIP}  # by the names that jobs take
TRAIN_SHARDS = [str(_HERE / "shards" / f"train-{i:06d}.tar.gz") for i in range(4)]  # 250 samples each
TEST_SHARDS = [str(_HERE / "shards" / f"test-{i:06d}.tar.gz") for i in range(2)]  # 250 samples each
CLASSNAMES = _HERE / "shards" / "classnames.json"  # class names by label
