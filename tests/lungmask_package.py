"""A stand-in for the package `lungmask` with the interface of its version 0.2.22: thresholds in place of a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lungseg.scan import lung_network

VERSION = "0.2.22"
WEIGHTS = "unet_r231-d5d2fc3d.pth"
_MASK = '''
import logging
import sys
import warnings

import numpy as np
from scipy import ndimage

warnings.filterwarnings("ignore", category=UserWarning)
logger = logging.getLogger("lungmask")
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler(sys.stdout))
MODEL_URLS = {"R231": ("https://example.invalid/unet_r231-d5d2fc3d.pth", 3)}


class LMInferer:
    def __init__(self, modelname="R231", modelpath=None, fillmodel=None, fillmodel_path=None, force_cpu=False,
                 batch_size=20, volume_postprocessing=True, tqdm_disable=False):
        assert modelpath is not None, "would download"
        if open(modelpath, "rb").read(7) != b"weights":
            raise RuntimeError("PytorchStreamReader failed")
        logger.info("No GPU found, using CPU instead")

    def apply(self, image):
        """1 right, 2 left: the air within the middle of the slices, by its side."""
        air = image < -500
        pieces, _ = ndimage.label(air)
        outside = np.unique(pieces[:, [0, -1]])
        lung = air & ~np.isin(pieces, outside)
        right = np.arange(image.shape[2]) < image.shape[2] / 2
        return np.where(lung, np.where(right, 1, 2), 0).astype(np.uint8)
'''


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, weights: bytes | None = b"weights of a test") -> None:
    """Make `import lungmask` find the stand-in, with weights in torch's cache unless they are None."""
    for name in ("lungmask", "lungmask.mask"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is imported now is forgotten after the test
        del sys.modules[name]
    lung_network._inferer.cache_clear()
    (folder / "lungmask").mkdir(parents=True)
    (folder / "lungmask" / "__init__.py").write_text("from .mask import LMInferer\n", encoding="utf-8")
    (folder / "lungmask" / "mask.py").write_text(_MASK, encoding="utf-8")
    (folder / f"lungmask-{VERSION}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: lungmask\nVersion: {VERSION}\n"
    (folder / f"lungmask-{VERSION}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    hub = folder / "hub"
    (hub / "checkpoints").mkdir(parents=True)
    if weights is not None:
        (hub / "checkpoints" / WEIGHTS).write_bytes(weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
