"""The only code of patchrank that knows Ray."""
