"""The DeepSpeed configuration of a training: a JSON file that a user can edit, and what follows from flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchrank.errors import UserError
from patchrank.store import storage

DEFAULT = Path(__file__).with_name("deepspeed.json")
AUTO = "auto"  # stands in the file for what a flag, or the machine, decides


def read(path: str | None) -> dict[str, Any]:
    """The configuration in a file, or the default where None.

    Raises:
        UserError: it cannot be read, is no JSON object, or names no optimizer.
    """
    try:
        config = json.loads(storage.read_bytes(path or str(DEFAULT)))
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {storage.one_line(error)}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {path}: not JSON: {storage.one_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("optimizer"), dict):
        raise UserError(
            f'--deepspeed {path}: must be a JSON object with an "optimizer"; {DEFAULT} is one to start from'
        )
    return config


def fill(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every "auto" replaced.

    Args:
        config: from `read`.
        values: what stands for "auto", by key; keys that the file has not are left out.

    Raises:
        UserError: an "auto" for which there is no value.
    """

    def filled(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: filled(name, inner) for name, inner in value.items()}
        if value != AUTO:
            return value
        if key not in values:
            raise UserError(f'--deepspeed: "{key}" cannot be "auto"; that is for {", ".join(values)}')
        return values[key]

    return {key: filled(key, value) for key, value in config.items()}
