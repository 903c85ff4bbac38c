"""The dataset card of a folder of results: what its rows are, for people, and for the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FILE = "README.md"
# Beside the tables, where `datasets` looks for what the card tells it on the hub, and no other reader looks: without it
# `datasets` lists a folder 65 times to guess what is in it, 1.3 s of a processor for 1,281 tables.
CONFIGS_FILE = ".huggingface.yaml"
CONFIGS = """\
configs:
- config_name: default
  data_files: "*.parquet"
"""

_WHAT = {  # title, and what a row is
    "search": ("Golden rankings of patch tokens", "an image: in which order its patches can leave the model"),
    "evaluation": ("What pruning costs a CLIP model", "an image, pruned by one method at one keep rate"),
    "embedding": ("Image embeddings", "an image and its embedding"),
}

_CARD = """\
---
# license: yours to name, and to look up: images and weights have theirs
{configs}tags:
- patchrank
- clip
---

# {title}

A row is {row}. The model is {model}; made by [patchrank](https://arxiv.org/abs/2409.14607) {version}{shards}.

| column | |
|---|---|
{columns}

Every Parquet file has the rows of one shard. How it was made:

```json
{settings}
```
"""


def render(kind: str, settings: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The card in Markdown, with the YAML that the hub reads.

    Args:
        kind: of the folder.
        settings: as for `patchrank.store.folder.Folder.prepare`.
        columns: what each means.
    """
    title, row = _WHAT[kind]
    about = settings.get("about", {})
    name, pretrained = about.get("model") or "not named", about.get("pretrained")
    told = {name: value for name, value in settings.items() if name != "about"}
    shards = ", ".join(f"`{spec}`" for spec in about.get("shards") or ())
    return _CARD.format(
        configs=CONFIGS,
        title=title,
        row=row,
        model=f"`{name}`" + (f" with the weights `{pretrained}`" if pretrained else ""),
        version=about.get("patchrank", ""),
        shards=f" from {shards}" if shards else "",
        columns="\n".join(f"| `{name}` | {meaning} |" for name, meaning in columns.items()),
        settings=json.dumps(told, indent=1),
    )
