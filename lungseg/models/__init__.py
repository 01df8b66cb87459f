"""The starter model shipped with the package: what ``lungseg run`` takes where no model is given."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

STARTER = "starter"
"""What ``--model`` calls it."""
STARTER_FILE = "starter.safetensors"


def starter_path() -> Path:
    """Where the shipped model lies; an installation may lack it."""
    return Path(str(files(__name__).joinpath(STARTER_FILE)))
