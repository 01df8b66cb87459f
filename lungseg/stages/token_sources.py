"""Where the tokens of each method of ``lungseg cluster`` come from: a model, the radiomic teacher, or the HU alone.

A source gives the tokens of a volume in parts, so that those of a fine lattice are never all held. Methods that say a
token's tissue at once give shares of the tissues as tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.cluster import RADIOMICS_METHODS, STUDENT_METHODS, VOXEL_METHODS, ClusterConfig
from lungseg.config.fields import to_dict
from lungseg.diffusion.checkpoint import Student, load_student
from lungseg.errors import MismatchError
from lungseg.radiomics.dense import dense_descriptors, site_corners
from lungseg.radiomics.descriptor import Standardisation
from lungseg.scan.volume import Triple
from lungseg.segmentation.baselines import threshold_labels, tissue_shares
from lungseg.segmentation.density import (
    SMOOTHING_SIGMA_VOXELS,
    TokenStatistics,
    healthy_mode_hu,
    smooth_hu,
    token_statistics,
)
from lungseg.segmentation.encoding import encode_passes, lattice_cell
from lungseg.segmentation.evidence import cell_evidence
from lungseg.segmentation.lattice import Region, token_mask_fraction
from lungseg.segmentation.naming import name_tokens
from lungseg.stages.attention_tokens import attention_shares
from lungseg.store.atomic import canonical_json
from lungseg.store.cases import Store
from lungseg.store.patches import mask_fractions
from lungseg.store.reader import Artefact

log = logging.getLogger(__name__)

VOXEL_PLANES = 16
"""Planes of voxels given at once by the methods that look at every voxel: bounds the memory."""

RULES_VERSION = 5
"""Of ``TokenSource.rule_shares``: samples and posteriors of another version are not gone on with."""

_STUDENT_SETTINGS = ("timesteps", "combine", "encoding", "overlap", "window_sigma", "min_window_lung")
_ATTENTION_SETTINGS = (
    "timesteps", "overlap", "window_sigma", "min_window_lung", "attention_anchors", "attention_threshold",
)  # fmt: skip
_NAMING_SETTINGS = ("naming_window", "naming_sigma_mm")


@dataclass(frozen=True)
class TokenPart:
    """Tokens of some sites of the lattice of one volume."""

    sites: Region
    """Which sites they are (slices may have steps)."""
    features: np.ndarray
    """float (C, z, y, x)."""
    usable: np.ndarray
    """bool (z, y, x): sites that have a token, and whose cell holds any lung."""


@dataclass(frozen=True)
class Scan:
    """What a source looks at: nothing but the scan, its lungs and its grid."""

    image: np.ndarray
    """int16 (Z, Y, X), HU."""
    mask: np.ndarray
    """bool (Z, Y, X), lung."""
    spacing_mm: Triple
    lung_median_hu: float

    @classmethod
    def of(cls, volume: Artefact) -> Scan:
        """The scan of a case's ``volume.h5``."""
        z, y, x = volume.provenance["grid"]["spacing_mm"]
        median = float(volume.provenance["lung_median_hu"])
        return cls(volume.read("image"), volume.read("mask") > 0, (z, y, x), median)


@dataclass(frozen=True)
class TokenSource:
    """The tokens of one method, and what they depend on. Workers get it as it is and load the model themselves."""

    config: ClusterConfig
    cell: int
    """Voxels along the edge of a cell of the lattice."""
    device: str = "cpu"
    model: Path | None = None
    standardisation: Standardisation | None = None
    """Of radiomic tokens; None where the recipe scales them itself."""
    model_fingerprint: str = ""

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.config.method

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what tokens depend on besides the volume."""
        found = {"model": self.model_fingerprint} if self.model else {}
        if self.standardisation is not None:
            text = canonical_json(self.standardisation.to_dict())
            found["standardisation"] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def settings(self, *, naming: bool = False) -> dict[str, Any]:
        """Settings the tokens depend on; with ``naming`` those of their HU statistics too."""
        return token_settings(self.config, naming=naming)

    def parts(self, scan: Scan) -> Iterator[TokenPart]:
        """Tokens of a volume, part by part."""
        if self.method in VOXEL_METHODS:
            yield from _voxel_parts(scan, self.method)
        elif self.method == "rules":
            yield self._named_part(scan)
        elif self.method == "attention":
            assert self.model is not None
            student = cached_student(self.model, self.device)
            votes = self._named_part(scan).features
            shares, usable = attention_shares(scan.image, scan.mask, votes, student, self.config)
            yield TokenPart(_everywhere(usable), shares, usable)
        elif self.model is None:
            yield self._radiomic_part(scan)
        else:
            yield from self._student_parts(scan)

    def _student_parts(self, scan: Scan) -> Iterator[TokenPart]:
        assert self.model is not None
        student = cached_student(self.model, self.device)
        if self.method.startswith("diffusion-only"):
            student = _untaught(student)
        beside = self._radiomic_part(scan) if self.method in RADIOMICS_METHODS else None
        for part in encode_passes(scan.image, scan.mask, student, self.config):
            features, usable = part.features, part.usable
            if beside is not None:
                features = np.concatenate([features, beside.features[:, *part.sites]])
                usable = usable & beside.usable[part.sites]
            yield TokenPart(part.sites, features, usable)

    def _radiomic_part(self, scan: Scan) -> TokenPart:
        """Descriptors of the window around each site, standardised; all of the lattice."""
        import torch

        found = dense_descriptors(
            torch.from_numpy(scan.image).to(self.device),
            torch.from_numpy(scan.mask).to(self.device),
            lung_median_hu=scan.lung_median_hu,
            window=self.config.radiomics_window,
            stride=self.cell,
        )
        usable = torch.isfinite(found).all(-1).cpu().numpy() & (token_mask_fraction(scan.mask, self.cell) > 0)
        rows = found[torch.from_numpy(usable).to(found.device)]
        if self.standardisation is not None:
            rows = self.standardisation.apply(rows)
        features = np.zeros((found.shape[-1], *usable.shape), dtype=np.float32)
        features[:, usable] = rows.cpu().numpy().T
        return TokenPart(_everywhere(usable), features, usable)

    def _named_part(self, scan: Scan) -> TokenPart:
        """Shares of the tissues by the naming rules."""
        usable = token_mask_fraction(scan.mask, self.cell) > 0
        shares = self.rule_shares(scan, np.argwhere(usable))
        features = np.zeros((shares.shape[1], *usable.shape), dtype=np.float32)
        features[:, usable] = shares.T
        return TokenPart(_everywhere(usable), features, usable)

    def rule_shares(self, scan: Scan, index: np.ndarray) -> np.ndarray:
        """What the naming rules say of sites (N, 3): shares of the tissues, float32 (N, 5); all 0 if they say nothing.

        The one place where a scan meets the rules: method `rules`, and the votes that name components and attention
        segments. Raise ``RULES_VERSION`` when it changes.
        """
        if self.method in VOXEL_METHODS:
            # a voxel has no texture: its HU alone names it
            statistics, mode = self.statistics(scan, index)
            return tissue_shares(name_tokens(statistics, healthy_mode_hu=mode))
        return cell_evidence(scan.image, scan.mask, cell=self.cell, spacing_mm=scan.spacing_mm)[:, *index.T].T

    def statistics_of_lung(self, scan: Scan) -> tuple[np.ndarray, TokenStatistics, float]:
        """Sites (N, 3) whose cell holds lung, their HU statistics, and the scan's healthy mode."""
        index = np.argwhere(token_mask_fraction(scan.mask, self.cell) > 0)
        return index, *self.statistics(scan, index)

    def statistics(self, scan: Scan, index: np.ndarray) -> tuple[TokenStatistics, float]:
        """HU statistics around sites (N, 3), and the scan's healthy mode."""
        sigma = self.config.naming_sigma_mm / scan.spacing_mm[0]
        window = 1 if self.method in VOXEL_METHODS else self.config.naming_window
        found = token_statistics(
            scan.image, scan.mask, index, token_size=self.cell, window=window, spacing_mm=scan.spacing_mm,
            smoothing_voxels=sigma,
        )  # fmt: skip
        return found, healthy_mode_hu(smooth_hu(scan.image, scan.mask, sigma), scan.mask)

    def lung_share(self, mask: np.ndarray) -> np.ndarray:
        """Share of lung of what each token looks at first: its cell; for k-means on radiomics its window."""
        if self.method != "radiomics-kmeans":
            return token_mask_fraction(mask, self.cell)
        axes = site_corners(mask.shape, window=self.config.radiomics_window, stride=self.cell)
        grid = np.meshgrid(*[axis.numpy() for axis in axes], indexing="ij")
        size = (self.config.radiomics_window,) * 3
        corners = np.stack([axis.ravel() for axis in grid], axis=1) + size[0]  # windows begin outside the volume
        shares: np.ndarray = mask_fractions(np.pad(mask, size[0]), corners, size)
        return shares.reshape(grid[0].shape)

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of the blocks of a token that are to weigh alike; empty for a token of one block."""
        if self.model is None or self.method not in RADIOMICS_METHODS:
            return ()
        student = cached_student(self.model, self.device)
        own = _untaught(student) if self.method.startswith("diffusion-only") else student
        levels = len(self.config.timesteps) if self.config.combine == "concat" else 1
        assert self.standardisation is not None
        return own.embedding * levels, len(self.standardisation.feature_names)


def token_settings(config: ClusterConfig, *, naming: bool = False) -> dict[str, Any]:
    """Settings that the tokens of the method depend on; with ``naming`` those of their HU statistics too."""
    names = ["method", "min_token_lung", "seed"]
    if config.method in STUDENT_METHODS:
        names += _ATTENTION_SETTINGS if config.method == "attention" else _STUDENT_SETTINGS
    if config.method in RADIOMICS_METHODS:
        names.append("radiomics_window")
    if config.method not in (*VOXEL_METHODS, "attention"):
        names.append("token_stride")
    values = to_dict(config)
    rules = {}
    if naming or config.method in ("rules", "attention") or config.mixture == "anchored":
        names += _NAMING_SETTINGS
        rules = {"rules_version": RULES_VERSION}
    return {**{name: values[name] for name in names}, **rules}


def open_source(
    config: ClusterConfig, *, device: str, model: Path | None, standardisation: Standardisation | None
) -> TokenSource:
    """The token source of a configuration.

    Parameters
    ----------
    config : ClusterConfig
    device : str
        Where tensors live.
    model : path, optional
        Model file; needed by ``STUDENT_METHODS``, and looked at by no other.
    standardisation : Standardisation, optional
        Of windows of ``config.radiomics_window`` voxels, for radiomic tokens.

    Raises
    ------
    MismatchError
        If the standardisation is of other windows.
    """
    window = config.radiomics_window
    if standardisation is not None and standardisation.window != (window,) * 3:
        raise MismatchError(f"radiomic tokens of {window} voxels need a standardisation of such windows")
    if config.method not in STUDENT_METHODS:
        stride = 1 if config.method in VOXEL_METHODS else config.token_stride
        whole = window if config.method in RADIOMICS_METHODS else config.naming_window
        return TokenSource(config, stride or whole, device, standardisation=standardisation)
    assert model is not None, "checked by the stage"
    student = cached_student(model, device)
    stride = None if config.method == "attention" else config.token_stride
    return TokenSource(config, lattice_cell(student, stride), device, model, standardisation, student.fingerprint)


def check_model(store: Store, student: Student, timesteps: Sequence[int]) -> None:
    """Refuse a store of another spacing than the model's, and noise levels that its diffusion does not have.

    Raises
    ------
    MismatchError
        Saying which, and what to do.
    """
    spacing, trained = float(store.header["config"]["spacing_mm"]), float(student.card["spacing_mm"])
    if abs(spacing - trained) > 1e-6:
        raise MismatchError(
            f"the model was trained at {trained} mm, store {store.path} has {spacing} mm: "
            f"make the store with --spacing-mm {trained}"
        )
    beyond = [t for t in timesteps if t > student.schedule.num_steps]
    if beyond:
        raise MismatchError(f"--timesteps {beyond}: the model's diffusion has {student.schedule.num_steps} steps")


_STUDENTS: dict[tuple[Path, str, int], Student] = {}


def cached_student(path: Path, device: str) -> Student:
    """The model, loaded once per process and version of the file."""
    key = (path, device, path.stat().st_mtime_ns)
    if key not in _STUDENTS:
        _STUDENTS.clear()
        _STUDENTS[key] = load_student(path, device=device)
    return _STUDENTS[key]


def _untaught(student: Student) -> Student:
    """The same network, whose tokens are the activations of its bottleneck brought to unit length (METHOD 1.7)."""
    return dataclasses.replace(student, config=dataclasses.replace(student.config, distill="none"))


def _voxel_parts(scan: Scan, method: str) -> Iterator[TokenPart]:
    """Every lung voxel as a token: shares of the tissues by thresholds, or its smoothed HU."""
    labels = threshold_labels(scan.image, scan.mask) if method == "hu-thresholds" else None
    smoothed = None if labels is not None else smooth_hu(scan.image, scan.mask, SMOOTHING_SIGMA_VOXELS)
    for start in range(0, len(scan.mask), VOXEL_PLANES):
        planes = slice(start, min(start + VOXEL_PLANES, len(scan.mask)))
        usable = scan.mask[planes]
        if labels is not None:
            features = tissue_shares(labels[planes].reshape(-1)).T.reshape(-1, *usable.shape)
        else:
            assert smoothed is not None
            features = smoothed[None, planes]
        yield TokenPart((planes, *_everywhere(usable)[1:]), features, usable)


def _everywhere(usable: np.ndarray) -> Region:
    z, y, x = (slice(0, n) for n in usable.shape)
    return z, y, x
