"""Bundles: all that `patchrank.prune` needs for one model, to keep, to send and to share on the Hugging Face hub.

bundle = Bundle.from_training(model, "predictor", "tokens")
bundle.save_pretrained("my-bundle")                     # or bundle.push_to_hub("me/my-bundle")
patchrank.prune(clip, "my-bundle", keep=0.6)

A folder holds model.safetensors, config.json and a model card, README.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.model import classes
from patchrank.model.classes import CLASSES_FILE
from patchrank.model.kinds import adapt
from patchrank.model.loading import Model, dtype_name, open_clip_name, tower_digest
from patchrank.model.tower import Tower
from patchrank.model.transformers_model import PREFIX as HF
from patchrank.model.transformers_model import path_of
from patchrank.pruning import predictor, prompts
from patchrank.pruning.predictor import Predictor, PredictorConfig
from patchrank.pruning.prompts import TokensConfig, VisualTokens
from patchrank.store import storage
from patchrank.store.unfetched import stand_in

FORMAT = "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_CARD = """---
{{ card_data }}
---

# {{ title }}

A patchrank bundle: it makes the image tower of `{{ model }}` faster by dropping the patch tokens that
do not matter for an image, before block {{ cut }} of {{ blocks }}.

```python
{{ use }}
```

| | |
|---|---|
| base model | `{{ model }}`{{ pretrained }}, weights {{ weights }} |
| patch tokens | {{ grid }} |
| learnable tokens | {{ tokens }} |
| made for keep rate | {{ keep }} |
| golden rankings of | search {{ search }} |

{{ figures }}
"""


class Bundle(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="patchrank",
    tags=["clip", "token-pruning", "open_clip"],
    paper_url="https://arxiv.org/abs/2409.14607",
    model_card_template=_CARD,
):
    """A predictor and, if there are any, learnable tokens, and what they are for; all of it JSON but the weights.

    Args:
        model: `name` and `pretrained` as open_clip knows it, `weights`, digests of its image tower by dtype, `cut`,
            `grid`, `blocks`; for one of transformers, `use`, as of `TransformersModel`.
        predictor_config: of a `PredictorConfig`.
        tokens_config: of a `TokensConfig`, or None.
        keep: the keep rate that it was made for.
        search: fingerprint of the search whose rankings the predictor learnt.
        class_names: where learnable text tokens made class embeddings of their own, the names of the K classes.
        embed_dim: E of those.
        figures: of an evaluation: dicts with the fields of `patchrank.evaluation.record.Figure`, and, where they are
            known, "neighbours", the share of nearest neighbours that pruned queries find, and "index", a sentence.
        format: of the bundle's files.

    Attributes:
        classes: (K, E) class embeddings that belong to the tokens, normalised; None where the model's own do.
    """

    def __init__(
        self,
        model: dict[str, Any],
        predictor_config: dict[str, Any],
        tokens_config: dict[str, Any] | None = None,
        keep: float = 0.6,
        search: str | None = None,
        class_names: list[str] | None = None,
        embed_dim: int | None = None,
        figures: list[dict[str, Any]] | None = None,
        format: str = FORMAT,
    ) -> None:
        super().__init__()
        if format != FORMAT:
            raise UserError(f"this bundle has format {format}, and this version of patchrank reads {FORMAT}")
        self.model = model
        self.keep = keep
        self.search = search
        self.figures = figures or []
        self.class_names = class_names
        self.predictor = Predictor(PredictorConfig.read(predictor_config))
        self.tokens = None if tokens_config is None else VisualTokens(TokensConfig(**tokens_config))
        own = class_names is not None and embed_dim is not None
        self.register_buffer("classes", torch.zeros(len(class_names or ()), embed_dim or 0) if own else None)
        self.requires_grad_(False).eval()

    classes: Tensor | None

    @property
    def cut(self) -> int:
        """The block before which tokens leave."""
        return self.model["cut"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the images that it is for."""
        rows, columns = self.model["grid"]
        return rows, columns

    @classmethod
    def from_training(cls, model: Model, predictor_folder: str, tokens_folder: str | None = None) -> Bundle:
        """What jobs/train_predictor.py and jobs/train_tokens.py left.

        Args:
            model: that they were trained for.
            predictor_folder, tokens_folder: local, s3:// or gs://. Where tokens were trained together with a predictor,
                it is that of the tokens' folder.

        Raises:
            UserError: nothing there, or trained for another model.
        """
        learnt, record = predictor.load(predictor_folder, None, model.weights)
        about = record["model"]
        tower = Tower(model.visual, about["cut"], name=model.name)
        tokens = names = own = None
        if tokens_folder is not None:
            tokens, record = prompts.load(tokens_folder, tower, model.weights)
            if "helps" in record:
                learnt, _ = predictor.load(tokens_folder, tower, model.weights)
            if record.get("classes"):
                names = record["class_names"]
                own = classes.load(storage.join(tokens_folder, CLASSES_FILE), record["classes"], names)
                if own is None:
                    raise UserError(f"{tokens_folder}: its {CLASSES_FILE} is missing or of other tokens; train again")
        visual = model.visual
        bundle = cls(
            model={
                "name": _public(open_clip_name(about["name"], about["pretrained"])),
                "pretrained": None if about["pretrained"] is None else os.path.basename(about["pretrained"]),
                "weights": {dtype_name(dtype): tower_digest(visual, dtype) for dtype in _DTYPES},
                "cut": about["cut"],
                "grid": list(tower.grid),
                "blocks": tower.adapter.depth,
                **({"use": model.clip.use} if model.name.startswith(HF) else {}),
            },
            predictor_config=asdict(learnt.config),
            tokens_config=None if tokens is None or tokens.config.nothing else asdict(tokens.config),
            keep=record["keep"],
            search=record.get("search"),
            class_names=names,
            embed_dim=None if own is None else own.embeddings.shape[1],
        )
        bundle.predictor.load_state_dict(learnt.state_dict())
        if bundle.tokens is not None and tokens is not None:
            bundle.tokens.load_state_dict(tokens.state_dict())
        if own is not None:
            bundle.classes = own.embeddings.clone()
        return bundle

    @classmethod
    def open(cls, name: str) -> Bundle:
        """The bundle of a folder, or of an id on the hub.

        Raises:
            UserError: no bundle there, a damaged one, or one of another version.
        """
        name = os.path.expanduser(name)
        if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") != 1):
            raise UserError(f"{name}: no such folder")
        if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
            remedy = ""
            if os.path.exists(os.path.join(name, f"{predictor.NAME}.json")):
                remedy = ": it is what training left; make a bundle of it with Bundle.from_training or jobs/evaluate.py"
            raise UserError(f"{name}: holds no bundle (config.json){remedy}")
        try:
            with contextlib.redirect_stdout(None):  # the mixin prints what it reads
                return cls.from_pretrained(name, strict=True)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
            for file in ("config.json", SAFETENSORS_SINGLE_FILE):
                with contextlib.suppress(OSError), open(os.path.join(name, file), "rb") as there:
                    if reason := stand_in(there.read(512), binary=file == SAFETENSORS_SINGLE_FILE):
                        raise UserError(f"{os.path.join(name, file)}: {reason}") from None
            trouble = "not a bundle, or a damaged one:" if os.path.isdir(name) else "no such folder, and the hub says:"
            raise UserError(f"{name}: {trouble} {storage.one_line(error)[:200]}") from None

    def check(self, visual: Any) -> None:
        """Refuse an image tower that this bundle is not for; `visual` may be in another precision than it was made in.

        Raises:
            UserError: names the model that it is for.
        """
        dtype = adapt(visual).dtype
        there = self.model["weights"].get(dtype_name(dtype))
        if there is None:
            raise UserError(
                f"a model in {dtype_name(dtype)} cannot be told from others: prune it first, then convert it"
            )
        found = tower_digest(visual, dtype)
        if there != found:
            tag = f" ({self.model['pretrained']})" if self.model["pretrained"] else ""
            raise UserError(
                f"this bundle is for {self.model['name']}{tag}, image tower {there}, and this model's is {found}: "
                "load that one, or train for this one"
            )

    def with_figures(self, figures: Sequence[Mapping[str, Any]]) -> Bundle:
        """The same bundle with other evaluation figures."""
        config = dict(self._hub_mixin_config) if isinstance(self._hub_mixin_config, dict) else {}
        bundle = type(self)(**config | {"figures": [dict(row) for row in figures]})
        bundle.load_state_dict(self.state_dict())
        return bundle

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card; the mixin asks for it."""
        model = self.model
        grid = model["grid"]
        tokens = "none"
        if self.tokens is not None:
            config = self.tokens.config
            where = "at the input" if config.place == "input" else f"before block {model['cut']}"
            tokens = f"{config.count}, {where}" + (", and shifts" if config.shifted else "")
            tokens += f"; {config.merged:.0%} of the patches merge after it" if config.merged else ""
        tag = model["pretrained"]
        # That with learnable tokens comes last.
        index = [row["index"] for row in self.figures if row.get("index") and row["keep"] == self.keep][-1:]
        values = {
            "title": f"{model['name']}, pruned",
            "model": model["name"],
            "use": _use(model, "path/to/this/folder", self.keep),
            "pretrained": f" ({tag})" if tag else "",
            "weights": model["weights"]["float32"],
            "cut": model["cut"],
            "blocks": model["blocks"],
            "grid": f"{grid[0]} x {grid[1]}",
            "tokens": tokens,
            "keep": f"{self.keep:g}",
            "search": self.search or "unknown",
            "figures": "\n\n".join([_table(self.figures), *index]),
        }
        return super().generate_model_card(*args, **values | kwargs)

    @classmethod
    def _load_as_pickle(cls, *_: Any, **__: Any) -> Any:
        """The mixin would read pytorch_model.bin where there is no model.safetensors; nothing here reads pickles."""
        raise UserError("holds no model.safetensors")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights whole or not at all; the mixin writes the config, without which this is no bundle, after.

        An old card of ours gives way, for its figures are those of another bundle.
        """
        card = save_directory / "README.md"
        if card.exists() and "library_name: patchrank" in card.read_text(errors="replace"):
            card.unlink()
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        storage.write_atomic(str(save_directory / SAFETENSORS_SINGLE_FILE), save(weights, {"format": "pt"}))


def _use(about: Mapping[str, Any], source: str, keep: float) -> str:
    """The lines of Python that use a bundle for a model, as of `Bundle`."""
    name, tag = about["name"], about["pretrained"]
    pruned = f'patchrank.prune(model, "{source}", keep={keep:g})'
    if name.startswith(HF):
        path, use = name.removeprefix(HF), about["use"]
        return "\n".join(
            [
                "import patchrank, transformers\n",
                f'model = transformers.{use["loader"]}.from_pretrained("{path}").eval()',
                f'processor = transformers.AutoImageProcessor.from_pretrained("{path}")',
                pruned,
                'inputs = processor(images=image, return_tensors="pt")',
                f"outputs = {use['call']}(**inputs)",
            ]
        )
    model = f'"{name}"' + (f', pretrained="{tag}"' if tag else "")
    return "\n".join(
        [
            "import open_clip, patchrank\n",
            f"model, _, preprocess = open_clip.create_model_and_transforms({model})",
            pruned,
            "embeddings = model.encode_image(preprocess(image)[None])",
        ]
    )


def _public(name: str) -> str:
    """A model's name without the folders of a path, which say where it lay on one machine."""
    kind, _, path = name.partition(":")
    local = kind == "local-dir" or (name.startswith(HF) and (os.path.isdir(path_of(name)) or path.count("/") != 1))
    return f"{kind}:{os.path.basename(path.rstrip('/'))}" if local else name


def _table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Evaluation figures as a table in Markdown."""
    if not figures:
        return "No evaluation figures were kept."
    lines = [
        "| method | keep rate | images | top-1, % | cosine | neighbours kept, % | multiply-adds, G |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures:
        top1 = "" if row.get("top1") is None else f"{100 * row['top1']:.1f}"
        cost = "" if row.get("multiply_adds") is None else f"{row['multiply_adds'] / 1e9:.2f}"
        near = row.get("neighbours")
        kept = "" if near is None else f"{100 * near:.1f}"
        cells = (row["method"], f"{row['keep']:g}", row["images"], top1, f"{row['cosine']:.4f}", kept, cost)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
