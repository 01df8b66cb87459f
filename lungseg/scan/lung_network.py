"""Lungs by the network R231 of the package `lungmask`, where it and its weights are installed. Nothing is downloaded.

Hofmanninger et al., European Radiology Experimental 2020 (10.1186/s41747-020-00173-2): trained on diverse routine
scans, it keeps effusions, tumours and consolidation inside, which thresholds lose.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lungseg.errors import InputError, ResourceError
from lungseg.scan.lung_masks import MaskedLungs, lungs_from_labels
from lungseg.scan.lungs import LungField
from lungseg.scan.volume import Volume

PACKAGE, MODEL = "lungmask", "R231"
CONVENTION = "lungmask"
"""How the model labels the lungs."""
INSTALL = "pip install 'lungseg[lungmask]'"
FETCH = 'python -c "from lungmask import LMInferer; LMInferer()"'
"""Makes the package download its weights; to be run where there is a network."""


@dataclass(frozen=True)
class LungNetwork:
    """The installed package and the file of its weights."""

    weights: Path
    identity: str
    """Version, model and the first 12 digits of the SHA-256 of the weights: what the result depends on."""


def find_lung_network() -> LungNetwork:
    """The package `lungmask` and its weights on this machine.

    Raises
    ------
    ResourceError
        If one of them is missing, with the command that installs it.
    """
    module = _imported()
    import torch

    name = Path(module.MODEL_URLS[MODEL][0]).name
    weights = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not weights.is_file():
        raise ResourceError(
            f"--lung-mask lungmask: the weights {name} are not on this machine, and nothing is downloaded at run time. "
            f"Where there is a network run: {FETCH} ; elsewhere copy that file to {weights.parent}"
        )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return LungNetwork(weights, f"{importlib.metadata.version(PACKAGE)} {MODEL} {digest}")


def lungs_from_network(scan: Volume, network: LungNetwork, *, force_cpu: bool = False) -> MaskedLungs:
    """Left and right lung of a scan by the network, checked like the mask of a file.

    Parameters
    ----------
    scan : Volume
        CT in HU.
    network : LungNetwork
        From :func:`find_lung_network`.
    force_cpu : bool
        Do not use a GPU that is there.

    Returns
    -------
    MaskedLungs
        If the network sees no lung the labels are all 0 and the only warning starts with "no lung".

    Raises
    ------
    ResourceError
        If the weights cannot be loaded.
    InputError
        If what it finds is not on the right sides, or no lung by its density.
    """
    # The axes are those it wants of an array: slices, chest to back, right to left (its README).
    labels = np.asarray(_inferer(network.weights, force_cpu).apply(scan.array))
    if labels.shape != scan.array.shape:
        raise InputError(f"lungmask gave a mask of shape {labels.shape} for a scan of shape {scan.array.shape}")
    labels = np.ascontiguousarray(labels, dtype=np.uint8)
    if not labels.any():
        empty = LungField(labels=labels, volume_ml=0.0, mean_hu=float("nan"), warnings=("no lung found by lungmask",))
        return MaskedLungs(empty, CONVENTION)
    return lungs_from_labels(labels, scan, labels=CONVENTION)


@functools.lru_cache(maxsize=1)
def _inferer(weights: Path, force_cpu: bool) -> Any:
    """The network, loaded once per process."""
    module = _imported()
    try:
        return module.LMInferer(modelname=MODEL, modelpath=str(weights), force_cpu=force_cpu, tqdm_disable=True)
    except Exception as error:  # torch has many for a damaged file; some advise to load it unsafely
        raise ResourceError(
            f"lungmask cannot load its weights {weights.name} ({type(error).__name__}): the file is damaged. Delete it "
            f"and run where there is a network: {FETCH}"
        ) from error


def _imported() -> ModuleType:
    """The package's module of inference, without its messages on standard output and its filter of warnings."""
    with warnings.catch_warnings():
        try:
            module = importlib.import_module(f"{PACKAGE}.mask")
        except ImportError as error:
            raise ResourceError(
                f"--lung-mask lungmask: the package is not installed ({error}). Run: {INSTALL} ; or give masks as files"
            ) from error
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    return module
