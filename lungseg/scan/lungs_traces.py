"""Traces of air in dense lung: what tells consolidation, ground glass and honeycombs from heart, liver and muscle.

A part of a lung that the threshold cut off still holds bronchograms or aerated rests. They count where air can only
be lung: within the hull of the lung, between lung and ribs, at the back above the costal margin, and beside the lung;
not in stomach and bowel below it, in the oesophagus, or in folds of skin.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_closing import HalfGrid, dilate
from lungseg.scan.lungs_grid import CoarseScan
from lungseg.scan.lungs_rays import Rays, Wall
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

TRACE_HU = -180.0
"""Denser than this is no trace of air: it may be fat (-120 to -60 HU) and noise."""
AERATED_HU = -230.0
"""Outside the hull only traces as clear as this count."""
RIM_MM, RIM_SLICES = 2.5, 0.75
"""Traces nearer to aerated lung, or along z nearer than this share of a slice, may be partial volume of its surface."""
AIRWAY_MM = 9.0
"""Traces nearer to the airway may be its wall."""
HULL_MM = 50.0
"""Traces count within the lung closed by a ball of this radius; stomach and bowel lie below domes that it enters."""
GAS_HU, GAS_ML = -930.0, 0.3
"""A piece of air that reaches this HU and volume is gas: stomach, bowel, oesophagus, a large bronchus."""
MIDLINE_MM, SPINE_MM = 25.0, 15.0
"""Outside the hull, traces nearer to the middle of the chest are oesophagus or bronchi (at the back: spine)."""
REACH_MM = 25.0
"""How far beside the lung a trace outside the hull may lie."""
BASE_BAND_MM = 40.0
"""At the back, traces count this far from the ribs, also where no aerated lung is left."""
COSTAL_REACH_MM = 60.0
"""How far beyond the outermost lung on its ray a trace may lie, within the ribs."""
SKIN_MM = 8.0
"""Traces nearer to the surface of the body are folds of skin."""


class Traces:
    """Voxels of a coarse scan that hold air but are no lung yet, and where they mean lung."""

    def __init__(self, sides: np.ndarray, scan: CoarseScan, half: HalfGrid, rays: Rays) -> None:
        self._sides, self._scan, self._half, self._rays = sides, scan, half, rays
        skin = dilate(scan.outside, SKIN_MM, scan.spacing_mm)
        self._traces = _not_lung(sides, scan) & ~skin & ~_gas(sides, scan)

    def of(self, lung: np.ndarray, side: int, wall: Wall) -> np.ndarray:
        """Traces that belong to the lung of a side as far as it is known (``lung``), bool (Z, Y, X)."""
        rays, scan = self._rays, self._scan
        lateral = rays.lateral_mm(side)
        ribs = np.where(np.isfinite(wall.ribs), wall.ribs, 0.0)
        beside = rays.between(wall.reach, np.minimum(wall.reach + COSTAL_REACH_MM, ribs))
        beside |= rays.between(wall.ribs - BASE_BAND_MM, ribs) & rays.is_behind & (lateral > SPINE_MM)
        if (self._sides == LUNG_LEFT).any() and (self._sides == LUNG_RIGHT).any():
            close_by = self._half.dilate(lung, REACH_MM)
            beside |= close_by & (lateral > MIDLINE_MM) & ~below(lung)
        region = self._half.close(lung, HULL_MM) | (beside & (scan.smooth < AERATED_HU))
        mine: np.ndarray = self._traces & region & ~lung
        return mine


def below(lung: np.ndarray) -> np.ndarray:
    """Voxels with lung in them or somewhere above them."""
    result: np.ndarray = np.logical_or.accumulate(lung[::-1], axis=0)[::-1]
    return result


def _not_lung(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Voxels that hold air but are neither lung nor the blurred surface of lung or airway."""
    z_mm, y_mm, x_mm = scan.spacing_mm
    flat = RIM_MM / max(RIM_MM, RIM_SLICES * scan.slice_mm)
    rim = dilate(sides > 0, RIM_MM, (z_mm * flat, y_mm, x_mm)) | dilate(scan.airway, AIRWAY_MM, scan.spacing_mm)
    traces: np.ndarray = (scan.smooth < TRACE_HU) & ~rim
    return traces


def _gas(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Pieces of air that are (or hold) pure gas: bowel, stomach, oesophagus, large bronchi."""
    pieces, count = ndimage.label(scan.inside_air & (sides == 0))
    if not count:
        return scan.inside_air & False
    lowest = np.asarray(ndimage.minimum(scan.smooth, pieces, range(count + 1)))
    is_gas = (lowest < GAS_HU) & (np.bincount(pieces.ravel()) * float(np.prod(scan.adult_mm)) / 1000.0 > GAS_ML)
    is_gas[0] = False
    gas: np.ndarray = ndimage.binary_dilation(is_gas[pieces], iterations=2)  # with its partial volume
    return gas
