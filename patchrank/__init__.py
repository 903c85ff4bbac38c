"""patchrank: golden rankings of the patch tokens of CLIP image towers."""

__version__ = "0.1.0"
