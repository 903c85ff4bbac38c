"""Make the embedded default: train the small CLIP on Fashion-MNIST, measure it, write it and the sample shards.

    python -m patchrank.assets.make_assets            # train, measure, write: 38 minutes of processor time
    python -m patchrank.assets.make_assets --check    # only measure the model that stands in the project
    python -m patchrank.assets.make_assets --kind siglip    # the SigLIP-type model, and no shards: 2 minutes

Nothing is written unless the model, reloaded from its files, reaches a zero-shot top-1 of `MIN_ACCURACY` on the test
images.
The same seed, processor and version of torch give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from patchrank import assets
from patchrank.assets.siglip_tower import vit_patchrank_siglip
from patchrank.errors import UserError, run

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    # 28 px in patches of 2: 14 x 14 = 196 tokens, as many as ViT-B/16 has at 224 px
    "vision_cfg": dict(image_size=28, patch_size=2, width=64, head_width=64, layers=4, mlp_ratio=2.0, pool_type="tok"),
    # 32 positions: learnable prompts put 16 tokens in front of the class name
    "text_cfg": dict(context_length=32, vocab_size=49408, width=32, heads=1, layers=2),
}
# Pooled by attention and trained with a sigmoid for each pair, as SigLIP is, with its temperature and bias.
SIGLIP_CFG: dict[str, Any] = {
    **MODEL_CFG,
    "vision_cfg": dict(image_size=28, timm_model_name=vit_patchrank_siglip.__name__, timm_pool="map", timm_proj="none"),
    "init_logit_scale": math.log(10),
    "init_logit_bias": -10,
}
# mean and standard deviation of Fashion-MNIST's training pixels
PREPROCESS_CFG = dict(mean=[0.2860] * 3, std=[0.3530] * 3, interpolation="bicubic", resize_mode="shortest")
NAMES = [  # by label; the first is the class name, the others are heard in training only
    ("t-shirt", "tee shirt", "top"),
    ("trouser", "trousers", "pair of trousers"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown", "frock"),
    ("coat", "jacket", "overcoat"),
    ("sandal", "sandals", "strappy shoe"),
    ("shirt", "blouse", "button-up shirt"),
    ("sneaker", "sneakers", "trainer"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "ankle boots", "boot"),
]
BARE_TEMPLATES = ["{}", "a {}", "the {}"]
PICTURE_TEMPLATES = ["a picture of a {}.", "a picture of the {}.", "an image of a {}.", "a greyscale photo of a {}."]
FASHION_TEMPLATES = ["a product photo of a {}.", "a {}, a piece of clothing.", "a {}, a fashion item."]
OWN_TEMPLATES = BARE_TEMPLATES + PICTURE_TEMPLATES + FASHION_TEMPLATES
TEMPLATES = [*open_clip.OPENAI_IMAGENET_TEMPLATES, *(template.format for template in OWN_TEMPLATES)]
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
MIN_ACCURACY = {"clip": 0.85, "siglip": 0.80}
SAMPLES_PER_SHARD = 250


@dataclass(frozen=True)
class Kind:
    """A model and how it is trained: the first `images` of the training images, `epochs` times.

    The number of threads is fixed, because the order of sums depends on it.
    """

    folder: str
    config: dict[str, Any]
    loss: type[nn.Module]
    images: int
    epochs: int
    batch_size: int
    learning_rate: float
    threads: int


KINDS = {
    "clip": Kind("model", MODEL_CFG, ClipLoss, 60_000, 6, 128, 2e-3, 2),
    # Goes on from the other's blocks and text tower, so that little is left to learn.
    "siglip": Kind("siglip", SIGLIP_CFG, SigLipLoss, 19_200, 1, 64, 1e-3, 1),
}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images (n x 28 x 28, uint8) and labels (n, uint8) of `split`, "train" or "t10k", from gzipped IDX files.

    Raises UserError if a file is missing or is not a gzipped IDX file.
    """

    def read(name: str) -> np.ndarray:
        path = folder / name
        try:
            raw = gzip.decompress(path.read_bytes())
            ndim = int(np.frombuffer(raw, np.uint8, 4)[3])  # magic number: 0, 0, type, number of dimensions
            shape = np.frombuffer(raw, ">i4", ndim, offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
        except FileNotFoundError:
            hint = "install the Debian package dataset-fashion-mnist or give the folder of its files with --data"
            raise UserError(f"{path}: not found; {hint}") from None
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path}: not a gzipped IDX file ({error}); fetch it again") from None

    return read(f"{split}-images-idx3-ubyte.gz"), read(f"{split}-labels-idx1-ubyte.gz")


def write_shards(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, shards: int, seed: int) -> None:
    """Write `folder`/SPLIT-00000I.tar.gz: SAMPLES_PER_SHARD samples each, drawn evenly over the classes, shuffled.

    A sample is KEY.png and KEY.cls, KEY = SPLIT-INDEX with the image's index in `images` (n x height x width, uint8).
    The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    per_class = shards * SAMPLES_PER_SHARD // len(NAMES)
    chosen = rng.permutation(np.concatenate([order[labels[order] == c][:per_class] for c in range(len(NAMES))]))
    for i, indices in enumerate(np.split(chosen, shards)):
        path = folder / f"{split}-{i:06d}.tar.gz"
        # TarWriter's own compression would put the time of day into the gzip header
        with gzip.GzipFile(path, "wb", mtime=0) as stream, wds.TarWriter(stream, compress=False, mtime=0) as writer:
            for j in indices:
                writer.write({"__key__": f"{split}-{j:05d}", "png": images[j], "cls": labels[j]})


def caption_tokens(tokenizer: open_clip.SimpleTokenizer) -> Tensor:
    """Return the tokenised captions of every class, shape = [classes, captions, context_length], int64."""

    def captions(names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            singles = [template(name) for template in TEMPLATES]
            yield from singles
            # two captions in a row, so that the later positions are trained too
            yield from (f"{a} {b}" for a, b in pairwise(singles))

    return torch.stack([tokenizer(list(captions(names))) for names in NAMES])


def normalize(images: Tensor) -> Tensor:
    """Do to images of the model's size (n x 28 x 28, uint8) what open_clip's transform does; return float32."""
    x = images.unsqueeze(1).float() / 255  # shape = [n, 1, 28, 28]
    mean, std = (torch.tensor(PREPROCESS_CFG[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std  # shape = [n, 3, 28, 28]


def augment(images: Tensor) -> Tensor:
    """Shift each image (n x 28 x 28, uint8) by up to 2 pixels both ways and mirror every other one, at random."""
    n, size, _ = images.shape
    padded = nn.functional.pad(images, (2, 2, 2, 2))  # zero is the background
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # shape = [n, 5, 5, 28, 28]
    shifted = windows[torch.arange(n), torch.randint(5, (n,)), torch.randint(5, (n,))]  # shape = [n, 28, 28]
    return torch.where(torch.rand(n, 1, 1) < 0.5, shifted.flip(-1), shifted)


def train(kind: Kind, images: Tensor, labels: Tensor, tokens: Tensor, epochs: int, seed: int) -> open_clip.CLIP:
    """Train a model on pairs of an image (n x 28 x 28, uint8) and a random caption of its class; log the progress."""
    torch.manual_seed(seed)
    images, size, loss_of = images[: kind.images], kind.batch_size, kind.loss()
    # No patch dropout, though it would halve the time: it makes a model that hardly misses the tokens it loses, and
    # rankings are of interest where tokens matter.
    model = open_clip.CLIP(**kind.config).train()
    if kind.config is SIGLIP_CFG:
        go_on_from(model, open_clip.create_model(assets.MODEL))
    else:
        # A word that no caption has gets no gradient, so its row stays as it starts. At zero it adds no noise to a
        # prompt, and the table, most of the file, compresses to nearly nothing.
        nn.init.zeros_(model.token_embedding.weight)

    steps = len(images) // size
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm-up, then cosine
        optimizer, kind.learning_rate, total_steps=epochs * steps, pct_start=0.05, cycle_momentum=False
    )
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: steps * size].view(steps, size)
        for step, batch in enumerate(order, 1):
            texts = tokens[labels[batch], torch.randint(tokens.shape[1], (size,))]
            loss = loss_of(*model(normalize(augment(images[batch])), texts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
            if step % 100 == 0 or step == steps:
                done = epoch * steps + step
                rate = done * size / (time.perf_counter() - start)
                left = (epochs * steps - done) * size / rate / 60
                progress = f"epoch {epoch + 1}/{epochs}  step {step}/{steps}  loss {loss.item():.3f}"
                print(f"{progress}  {rate:.0f} images/s  {left:.1f} min left", flush=True)
    return model.eval()


# The names in timm's tower of what open_clip's has; the class token and the projection have none.
TIMM_NAMES = {
    "conv1": "patch_embed.proj",
    "positional_embedding": "pos_embed",
    "ln_pre": "norm_pre",
    "transformer.resblocks": "blocks",
    "ln_1": "norm1",
    "in_proj_": "qkv.",
    "out_proj": "proj",
    "ln_2": "norm2",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "ln_post": "norm",
}


def go_on_from(model: open_clip.CLIP, clip: open_clip.CLIP) -> None:
    """Give a model with timm's image tower the weights of a CLIP with open_clip's, where it has the same."""
    for key, value in clip.state_dict().items():
        if not key.startswith("visual."):
            if key != "logit_scale":
                model.get_parameter(key).data.copy_(value)
            continue
        for theirs, ours in TIMM_NAMES.items():
            key = key.replace(theirs, ours)
        if key not in ("visual.class_embedding", "visual.proj"):
            value = value[None, 1:] if key == "visual.pos_embed" else value  # (1, N, D), without the class token's
            model.get_parameter(key.replace("visual.", "visual.trunk.")).data.copy_(value)


@torch.inference_mode()
def zero_shot(model_name: str, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """Print and return the zero-shot top-1 with the prompt "a photo of a {}." and with CLIP's ImageNet templates.

    Everything goes the way a user's images go: open_clip loads the model, its preprocessing takes PIL images.
    """
    model = open_clip.create_model(model_name).eval()
    tokenizer = open_clip.get_tokenizer(model_name)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    batches = torch.arange(len(images)).split(500)
    embeddings = torch.cat(  # shape = [images, 64]
        [model.encode_image(torch.stack([preprocess(Image.fromarray(images[i])) for i in b])) for b in batches]
    )
    accuracies = []
    prompts = {'"a photo of a {}."': ["a photo of a {}."], "ImageNet templates": open_clip.OPENAI_IMAGENET_TEMPLATES}
    for description, templates in prompts.items():
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, [names[0] for names in NAMES], templates)
        predictions = (embeddings @ classifier).argmax(dim=1).numpy()  # shape = [images]
        accuracies.append(float((predictions == labels).mean()))
        print(f"zero-shot top-1 on {len(images)} images, {description}: {accuracies[-1]:.2%}")
    return accuracies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--kind", choices=KINDS, default="clip", help="which of the models (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(assets.__file__).parent, help="gets the model, and shards/")
    parser.add_argument("--epochs", type=int, help="passes over the training images (6; siglip 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="only measure the model that stands in the project")
    args = parser.parse_args()
    kind, least = KINDS[args.kind], MIN_ACCURACY[args.kind]
    epochs = kind.epochs if args.epochs is None else args.epochs
    if epochs < 1:
        parser.error("--epochs must be at least 1")
    torch.set_num_threads(kind.threads)
    test = read_split(args.data, "t10k")
    if args.check:
        standing = f"local-dir:{Path(assets.__file__).parent / kind.folder}"
        return 0 if min(zero_shot(standing, *test)) >= least else 1
    images, labels = read_split(args.data, "train")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as staging:  # what stands in --out is replaced at the very end
        model_dir, shards_dir = Path(staging, kind.folder), Path(staging, "shards")
        model_dir.mkdir()
        shards_dir.mkdir()
        if args.kind == "clip":
            write_shards(shards_dir, "train", images, labels, len(assets.TRAIN_SHARDS), args.seed)
            write_shards(shards_dir, "test", *test, len(assets.TEST_SHARDS), args.seed)
            (shards_dir / "classnames.json").write_text(json.dumps([names[0] for names in NAMES]) + "\n")
        config = {"model_cfg": kind.config, "preprocess_cfg": PREPROCESS_CFG}
        (model_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokens = caption_tokens(open_clip.get_tokenizer(f"local-dir:{model_dir}"))
        model = train(kind, torch.tensor(images), torch.tensor(labels).long(), tokens, epochs, args.seed)
        weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        # not save_file: its files can be read by their owner only, and installed ones are read by all
        (model_dir / "open_clip_model.safetensors").write_bytes(save(weights))
        if min(zero_shot(f"local-dir:{model_dir}", *test)) < least:
            print(f"below {least:.0%}: nothing written; train for more --epochs")
            return 1
        for path in (*model_dir.iterdir(), *shards_dir.iterdir()):
            target = args.out / path.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    print(f"written: {args.out / kind.folder}" + (f", {args.out / 'shards'}" if args.kind == "clip" else ""))
    return 0


if __name__ == "__main__":
    run(main)
