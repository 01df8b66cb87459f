"""Vessels of the hila: as dense as consolidation, and too wide for what tells small vessels from it.

They enter the lung from the mediastinum, grow thinner on their way and branch. So what is dense must be the thicker to
count as consolidation the nearer it lies to the space between the lungs; and what begins at the middle of that space,
is no wider than a pulmonary artery, and runs out into round thin branches all over its surface, is no consolidation.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Triple

WORK_MM = 2.0
"""Everything is measured on every so many millimetres: the radii below are wider."""
GAP_MM = 15.0
"""Least distance of the lungs from each other: in narrower gaps lies no vessel that enters a lung."""
ROOT_RADIUS_MM, TAPER = 7.0, 0.4
"""Largest radius of a vessel where it enters the lung (the interlobar artery is up to 16 mm wide), and how much less it
is for each mm further in: at 10 mm it is that of a segmental artery, 3 mm. Phantom-informed."""
RADII_MM = (7.0, 6.0, 5.0, 4.0, 3.0)
"""Radii that are tried."""
CORNER_MM = 1.5
"""This near to a ball that fits into it, dense lung belongs to the body of the ball: its corners. Phantom-informed
(of what is taken most was true consolidation without it; 4 mm keep more of that, and more vessels)."""
WIDEST_RADIUS_MM = 9.5
"""A root of vessels is no wider anywhere: the right interlobar artery is up to 16 mm wide, in pulmonary hypertension
more."""
ROOT_DISTANCE_MM, CENTRE_MM = 4.0, 60.0
"""A root comes this near to the part of the mediastinum that lies within 60 mm of the plane between the lungs, where
the hila are; further out lies the diaphragm. Our choice."""
BRANCHES_MM = (2.0, 6.0)
"""Branches are looked for in the lung this far from a root: nearer, its own edge bends what is seen of them."""
BRANCHES_SHARE, BRANCHES_TUBENESS = 0.13, 0.12
"""Share of thin dense structure there, and its mean tubeness (`tubes.py`). Around consolidation wider than 1 cm they
are 0.01 to 0.12, or septa, which are flat (below 0.1). Phantom-informed (validation phantoms 300-305, 311-313, 315, 320
and 321, and the hila of two real scans): in all of them it takes 5 ml of true consolidation."""
WAIST = 0.5
"""The plane between two lungs holds less than this share of what the fullest plane of the smaller lung holds."""


def hilar_vessels(
    body: np.ndarray, thin: np.ndarray, form: np.ndarray, lung: np.ndarray, *, spacing_mm: Triple
) -> np.ndarray:
    """Dense voxels near the mediastinum that are vessels by their width at that place, or by their branches.

    Parameters
    ----------
    body : bool array, shape (Z, Y, X)
        Dense lung, wider than small vessels.
    thin : bool array, shape (Z, Y, X)
        Thin dense structures: small vessels, airway walls, septa.
    form : float array, shape (Z, Y, X)
        Their :func:`~lungseg.segmentation.tubes.tubeness`.
    lung : bool array, shape (Z, Y, X)
        Both lungs.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    bool array, shape (Z, Y, X)
        Part of ``body``; empty if there are not two lungs with something between them.

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    FEASIBILITY failure modes 2 and 3 (vessels become consolidation); the rules are ours.
    """
    if not body.shape == thin.shape == form.shape == lung.shape:
        raise InputError(
            f"bodies of shape {body.shape}, structures {thin.shape} and {form.shape}, and lung of shape {lung.shape} "
            "are not on one grid"
        )
    step = [max(1, round(WORK_MM / s)) for s in spacing_mm]
    pick = tuple(slice(k // 2, None, k) for k in step)
    coarse_mm = (step[0] * spacing_mm[0], step[1] * spacing_mm[1], step[2] * spacing_mm[2])
    none = np.zeros_like(body)
    if not body[pick].any():  # also of a volume too small to pick from
        return none
    mediastinum, centre = _mediastinum(lung[pick], coarse_mm[2])
    if not mediastinum.any():
        return none
    result = body & _on_grid(_narrow(body[pick], mediastinum, coarse_mm), step, body.shape)
    near = _within(centre, ROOT_DISTANCE_MM + max(coarse_mm) / 2.0, coarse_mm)
    near = _on_grid(near, step, body.shape)
    return result | _roots(body & ~result, thin, form, lung & ~body, near, spacing_mm)


def _narrow(dense: np.ndarray, mediastinum: np.ndarray, spacing_mm: Triple) -> np.ndarray:
    """Dense voxels that no ball fits around which is as wide as a vessel at that distance from the mediastinum."""
    from scipy.ndimage import distance_transform_edt

    from_mediastinum = distance_transform_edt(~mediastinum, spacing_mm)
    depth = distance_transform_edt(dense, spacing_mm)
    vessel = np.zeros_like(dense)
    for radius in RADII_MM:
        near = dense & (from_mediastinum <= (ROOT_RADIUS_MM - radius) / TAPER + max(spacing_mm))
        core = depth >= radius
        vessel |= near & ~_within(core, radius + CORNER_MM, spacing_mm)
    return vessel


def _roots(
    body: np.ndarray, thin: np.ndarray, form: np.ndarray, aerated: np.ndarray, near: np.ndarray, spacing_mm: Triple
) -> np.ndarray:
    """Pieces of ``body`` that reach into ``near``, are no wider than a vessel, and branch into the lung around."""
    from scipy.ndimage import distance_transform_edt, find_objects, label

    result = np.zeros_like(body)
    pieces, _ = label(body, structure=np.ones((3, 3, 3)))
    beginning = set(np.unique(pieces[body & near]).tolist())
    least, most = BRANCHES_MM
    margin = [int(np.ceil(most / s)) + 1 for s in spacing_mm]
    for number, box in enumerate(find_objects(pieces), start=1):
        if number not in beginning:
            continue
        # Air all around the box, or a piece that fills it would have no depth.
        place = tuple(slice(max(part.start - m, 0), part.stop + m) for part, m in zip(box, margin, strict=True))
        piece = pieces[place] == number
        if distance_transform_edt(np.pad(piece, 1), spacing_mm).max() > WIDEST_RADIUS_MM:
            continue
        away = distance_transform_edt(~piece, spacing_mm)
        around = aerated[place] & (away > least) & (away <= most)
        branches = around & thin[place]
        count = np.count_nonzero(branches)
        if 0 < count >= BRANCHES_SHARE * np.count_nonzero(around):
            result[place] |= piece & (form[place][branches].mean() >= BRANCHES_TUBENESS)
    return result


def _within(region: np.ndarray, distance_mm: float, spacing_mm: Triple) -> np.ndarray:
    """Voxels at most so far from a region, its own among them."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(~region, spacing_mm) <= distance_mm if region.any() else region


def _on_grid(coarse: np.ndarray, step: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """A mask of the coarse grid on the full one: the voxel in the middle of a block was looked at for all of it."""
    for axis, k in enumerate(step):
        coarse = coarse.repeat(k, axis=axis)
    result = np.zeros(shape, dtype=bool)
    part = tuple(slice(0, min(a, b)) for a, b in zip(coarse.shape, shape, strict=True))  # the last block may be cut
    result[part] = coarse[part]
    return result


def _mediastinum(lung: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """What lies between two lungs in the same row (along x), and the middle of it; nothing if there is one lung."""
    from scipy.ndimage import binary_opening

    result = np.zeros_like(lung)
    plane = _midplane(lung)
    if plane is None:
        return result, result
    beyond_first = np.maximum.accumulate(np.where(np.arange(lung.shape[2]) < plane, lung, False), axis=2)
    second = np.where(np.arange(lung.shape[2]) >= plane, lung, False)
    before_second = np.maximum.accumulate(second[:, :, ::-1], axis=2)[:, :, ::-1]
    run = np.ones((1, 1, max(1, round(GAP_MM / spacing_mm))), dtype=bool)
    result = binary_opening(beyond_first & before_second & ~lung, run)
    return result, result & (np.abs(np.arange(lung.shape[2]) - plane) * spacing_mm <= CENTRE_MM)


def _midplane(lung: np.ndarray) -> int | None:
    """The sagittal plane with the least lung that has much more on both sides; None if one lung is all there is.

    Lungs that touch in front of the heart are told apart too, which connected components would not do.
    """
    area = lung.sum(axis=(0, 1))
    least = np.minimum(np.maximum.accumulate(area), np.maximum.accumulate(area[::-1])[::-1])
    depth = least - area / WAIST
    deepest = np.flatnonzero(depth == depth.max())
    plane = int(deepest[len(deepest) // 2])  # many planes hold no lung at all
    return plane if depth[plane] > 0 else None
