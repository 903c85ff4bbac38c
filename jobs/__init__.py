"""The jobs: parse, call, print. `python jobs/NAME.py`, or the command `patchrank NAME`."""
