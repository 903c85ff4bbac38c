"""What is asked of a folder of embeddings, an image or a text, as the model that made it embeds that."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from patchrank.data.images import decode
from patchrank.errors import UserError
from patchrank.model import loading
from patchrank.model.loading import Model
from patchrank.model.tower import Tower
from patchrank.pruning.embedder import Embedder, Pruning
from patchrank.pruning.methods import UNPRUNED
from patchrank.store import storage
from patchrank.store.embeddings import Embeddings


def image_vector(corpus: Embeddings, file: str) -> np.ndarray:
    """The embedding of an image file, (E,) float32, pruned as those of the corpus are.

    Raises:
        UserError: the file or the model cannot be had.
    """
    try:
        image = decode(storage.read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"--image {file}: {storage.one_line(error)}") from None
    model, settings = _model(corpus), corpus.settings
    method, keep = settings["method"], settings["keep"]
    how = settings["about"].get("bundle") if method != UNPRUNED else None
    pruning = Pruning.of(how, None if how is None else keep, model.visual)
    if pruning.bundle is not None and loading.digest(pruning.bundle.state_dict()) != settings["bundle"]:
        raise UserError(f"{how}: is not the bundle that {corpus.folder} was embedded with")
    dtype = loading.resolve_dtype(settings["model"]["dtype"], gpu=False)
    embedder = Embedder(Tower(model.visual, settings["model"]["cut"], dtype, name=model.name), pruning)
    return embedder(model.preprocess()(image)[None])[0].numpy()


@torch.inference_mode()
def text_vector(corpus: Embeddings, text: str) -> np.ndarray:
    """The embedding of a text, (E,) float32.

    Raises:
        UserError: the model cannot be had, or has no text tower.
    """
    model = _model(corpus)
    if not model.has_text:
        raise UserError(f"--text: {model.name} was given as an image tower alone, which embeds no text")
    return F.normalize(model.clip.encode_text(model.tokenizer()([text])).float(), dim=-1)[0].numpy()


def _model(corpus: Embeddings) -> Model:
    """The model that made the embeddings. Raises UserError where another has its name by now."""
    about = corpus.settings["about"]
    model = loading.load(about["model"], about["pretrained"])
    if model.weights != corpus.settings["model"]["weights"]:
        raise UserError(f"{about['model']}: has other weights than those that {corpus.folder} was embedded with")
    return model
