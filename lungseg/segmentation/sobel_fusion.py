"""Sobel-Diffusion Fusion: contours moved to edges that image and label map agree on, and the clean-up after it.

The published text fixes only the product of the two gradients; the rule that turns it into labels is ours (METHOD
1.6). Everything runs inside the lung's bounding box, one class at a time, in float32.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.density import masked_gaussian
from lungseg.segmentation.lattice import Region, bounding_region, lattice_shape, upsample_posterior
from lungseg.tissue import MIXTURE_TISSUES, OUTSIDE

LABEL_SIGMA_VOXELS = 2.0
"""Smoothing of the label map: a token is 8 voxels wide, 2 sigma are half a token (METHOD 1.1 (7))."""
IMAGE_SIGMA_VOXELS = 1.0
"""Smoothing of the scan before its gradient, against noise (METHOD 1.1 (7))."""
BAND_LEVEL = 0.1
"""Label gradient, relative to its maximum, above which a contour may move (METHOD 1.6)."""
EDGE_FLOOR = 0.05
"""A band without a fused edge above this keeps the smoothed posterior (METHOD 1.6)."""
PLEURA_VOXELS = 2
"""The image gradient this close to the lung's border is the pleura, not a lesion (METHOD 1.6)."""
GRADIENT_PERCENTILE = 99.0
"""The image gradient is divided by this percentile of itself (METHOD 1.6)."""
MARKER_REACH_VOXELS = 1.0
"""An orphan's marker: voxels whose depth is within this of its greatest depth (METHOD 1.6)."""
MINIMUM_COMPONENT_ML = 0.05
"""Smaller 26-connected components are not reported (METHOD 1.6 Cleanup)."""
CONNECTED_26 = np.ones((3, 3, 3), dtype=bool)
MINIMUM_LABEL_GRADIENT = 1e-6
"""A gradient below this is rounding: the label map has no contour."""
MINIMUM_IMAGE_GRADIENT_HU = 1.0
"""Per voxel, after smoothing: below it everywhere a scan is flat and has no edges. Any real scan is above."""
SOBEL_GAIN = 32.0
"""Response of the 3-D Sobel kernel to a gradient of 1 per voxel."""


def sobel_diffusion_fusion(
    posterior: np.ndarray,
    volume_hu: np.ndarray,
    mask: np.ndarray,
    *,
    token_size: int = 1,
    label_sigma: float = LABEL_SIGMA_VOXELS,
    image_sigma: float = IMAGE_SIGMA_VOXELS,
    band: float = BAND_LEVEL,
    edge_floor: float = EDGE_FLOOR,
) -> np.ndarray:
    """Label map whose contours lie on edges of the scan near those of the posterior.

    With the labels L (argmax of the posterior), ``E = max_k g_I * g_k`` of the normalised gradients of the smoothed
    scan and of each smoothed label. Where some g_k exceeds ``band`` the labels are found anew by a watershed on E,
    started from the labels outside that band; a piece of a label that lies wholly in the band starts from its core
    (the voxels as deep as its deepest, but for one voxel: all of it, if it is at most four voxels thin), so that no
    small lesion is lost to the smoothing. Parts of the band without an edge keep the argmax of the smoothed
    posterior, cores apart.

    Both smoothings run inside the lung only (normalised convolution): the chest wall is no edge, and the lung's border
    is no contour.

    Parameters
    ----------
    posterior : float array, shape (5, z, y, x)
        Per tissue, in the order of ``MIXTURE_TISSUES``, on the token lattice (every token filled, see
        ``lattice.fill_uncovered``) or, with ``token_size`` 1, on the voxels.
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung.
    token_size : int
        Cell size of the lattice in voxels.
    label_sigma, image_sigma : float
        Standard deviations of the smoothing of labels and scan, in voxels.
    band, edge_floor : float
        Relative label gradient where contours may move; fused edge below which they do not.

    Returns
    -------
    uint8 array, shape (Z, Y, X)
        ``Tissue`` ids in the lung, 0 outside. All 0 if the mask is empty.

    Raises
    ------
    InputError
        If mask and volume differ in shape.
    MismatchError
        If the posterior does not fit the volume, or is missing or not finite somewhere in the lung.

    Source
    ------
    METHOD 1.1 (7), 1.6.
    """
    check_posterior(posterior, mask, token_size)
    if volume_hu.shape != mask.shape:
        raise InputError(f"volume of shape {volume_hu.shape} and mask of shape {mask.shape} are not on one grid")
    result = np.zeros(mask.shape, dtype=np.uint8)
    if not mask.any():
        return result
    region = bounding_region(mask, margin=int(np.ceil(4 * max(label_sigma, image_sigma))))
    lung = mask[region]
    labels, smoothed = _argmax_labels(posterior, mask, region, token_size, label_sigma)
    edge, label_gradient = _fused_edge(labels, volume_hu[region], lung, label_sigma, image_sigma)
    moving = (label_gradient > band) & lung
    del label_gradient
    if moving.any():
        labels = _relabel_band(labels, smoothed, edge, moving, lung, edge_floor)
    ids = np.asarray([OUTSIDE, *MIXTURE_TISSUES], dtype=np.uint8)
    result[region] = ids[labels]
    return result


def check_posterior(posterior: np.ndarray, mask: np.ndarray, token_size: int) -> None:
    """Raise unless a posterior has the five tissues on the lattice of a bool mask."""
    expected = (len(MIXTURE_TISSUES), *lattice_shape(mask.shape, token_size))
    if posterior.shape != expected:
        raise MismatchError(
            f"posterior of shape {posterior.shape}; expected {expected} for a lung mask of {mask.shape} voxels and "
            f"tokens of {token_size}"
        )
    if mask.dtype != np.bool_:
        raise InputError(f"the lung mask must be bool, not {mask.dtype}")


def posterior_labels(posterior: np.ndarray, mask: np.ndarray, *, token_size: int = 1) -> np.ndarray:
    """Most probable tissue of each lung voxel: the label map without refinement.

    Parameters, result and errors as ``sobel_diffusion_fusion``; a tie goes to the first of ``MIXTURE_TISSUES``.
    """
    check_posterior(posterior, mask, token_size)
    result = np.zeros(mask.shape, dtype=np.uint8)
    if mask.any():
        region = bounding_region(mask)
        labels, _ = _argmax_labels(posterior, mask, region, token_size, None)
        result[region] = np.asarray([OUTSIDE, *MIXTURE_TISSUES], dtype=np.uint8)[labels]
    return result


def remove_small_components(
    labels: np.ndarray,
    posterior: np.ndarray | None,
    *,
    voxel_ml: float,
    minimum_ml: float = MINIMUM_COMPONENT_ML,
    token_size: int = 1,
) -> np.ndarray:
    """Labels in which each 26-connected component below a volume joins its surroundings.

    A small component takes the label that most of its neighbouring voxels have (counted once per pair of
    neighbours); a tie goes to the tied class with the higher mean posterior in the component, then to the lower id. No
    lung voxel becomes 0. The largest component of each connected piece of lung always stays: an island of lung
    below the minimum keeps its label, for there is nothing to join.

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        0 outside the lung; every other value is a class of its own.
    posterior : float array, shape (5, z, y, x), or None
        Per ``MIXTURE_TISSUES``, on the lattice of ``token_size``; only breaks ties.
    voxel_ml : float
        Volume of one voxel.
    minimum_ml : float
        Components of this volume or more stay.
    token_size : int
        Cell size of the posterior's lattice in voxels.

    Returns
    -------
    uint8 array, shape (Z, Y, X)
        A new array.

    Source
    ------
    METHOD 1.6 Cleanup.
    """
    result = labels.copy()
    lung = labels != OUTSIDE
    if not lung.any() or minimum_ml <= 0:
        return result
    if posterior is not None:
        check_posterior(posterior, lung, token_size)
    region = bounding_region(lung)
    view = result[region]
    component, sizes = _components(view)
    small = sizes * voxel_ml < minimum_ml
    small[_largest_of_each_island(view, component, sizes)] = False
    if not small[1:].any():
        return result
    small[0] = False
    coordinates = np.argwhere(small[component])
    owner = component[tuple(coordinates.T)].astype(np.int64)
    values = np.unique(view[lung[region]])
    origin = np.asarray([part.start for part in region])
    chance = _mean_posterior(posterior, values, (coordinates + origin) // token_size, owner, len(sizes))
    while small.any():
        # Only neighbours that stay may be joined; those behind them are resolved in the next turn.
        contacts = _contacts(view, values, component, small, coordinates, owner)
        joined = np.flatnonzero(small & (contacts.sum(axis=1) > 0))
        # A posterior is at most 1: half of it can break a tie of whole numbers, and no more.
        best = (contacts[joined] + 0.5 * chance[joined] * (contacts[joined] > 0)).argmax(axis=1)
        target = np.zeros(len(sizes), dtype=np.uint8)
        target[joined] = values[best]
        small[joined] = False
        done = target[owner] > 0
        view[tuple(coordinates[done].T)] = target[owner[done]]
        coordinates, owner = coordinates[~done], owner[~done]
    return result


def _argmax_labels(
    posterior: np.ndarray, mask: np.ndarray, region: Region, token_size: int, sigma: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Class number (1 to 5, 0 outside) of the highest posterior and of the highest smoothed one, in the region."""
    from scipy.ndimage import gaussian_filter

    lung = mask[region]
    top = np.zeros(lung.shape, dtype=np.float32)
    labels = np.zeros(lung.shape, dtype=np.uint8)
    top_smooth, smoothed = (top.copy(), labels.copy()) if sigma is not None else (top, labels)
    for k in range(len(MIXTURE_TISSUES)):
        values = upsample_posterior(posterior[k : k + 1], mask.shape, token_size, region=region)[0]
        values[~lung] = 0.0
        if not np.isfinite(values).all():
            raise MismatchError("the posterior is not finite everywhere in the lung")
        higher = values > top
        labels[higher] = k + 1
        np.maximum(top, values, out=top)
        if sigma is not None and values.any():
            values = gaussian_filter(values, sigma, mode="constant")
            higher = (values > top_smooth) & lung
            smoothed[higher] = k + 1
            np.maximum(top_smooth, values, out=top_smooth)
    missing = int(np.count_nonzero(lung & (labels == 0)))
    if missing:
        raise MismatchError(
            f"{missing} lung voxels have no posterior: fill the tokens without one first (lattice.fill_uncovered)"
        )
    return labels, smoothed


def _fused_edge(
    labels: np.ndarray, volume_hu: np.ndarray, lung: np.ndarray, label_sigma: float, image_sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """E = max_k g_I g_k and max_k g_k, float32."""
    image_gradient = _image_gradient(volume_hu, lung, image_sigma)
    largest = np.zeros(lung.shape, dtype=np.float32)
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=1)[1:]) + 1
    for k in present if len(present) > 1 else ():
        gradient = _gradient_magnitude(masked_gaussian(labels == k, lung, label_sigma))
        gradient *= lung
        top = float(gradient.max())
        if top > MINIMUM_LABEL_GRADIENT:
            np.maximum(largest, gradient / np.float32(top), out=largest)
    # g_I is the same for every class, so that the maximum of the products is the product with the maximum.
    return image_gradient * largest, largest


def _image_gradient(volume_hu: np.ndarray, lung: np.ndarray, sigma: float) -> np.ndarray:
    """Normalised Sobel magnitude of the smoothed scan, zero outside the eroded lung."""
    from scipy.ndimage import binary_erosion, sobel

    # The array's end is no pleura, hence border_value; elsewhere the region has a margin.
    inner = binary_erosion(lung, iterations=PLEURA_VOXELS, border_value=1)
    if not inner.any():
        return np.zeros(lung.shape, dtype=np.float32)
    smooth = masked_gaussian(volume_hu, lung, sigma)
    total = np.zeros_like(smooth)
    for axis in range(3):
        total += np.square(sobel(smooth, axis=axis))
    magnitude = np.where(inner, np.sqrt(total), np.float32(0.0))
    values = magnitude[inner]
    # In a scan without noise the edges may be fewer than 1 % of the lung: then the strongest is the scale.
    for scale in (float(np.percentile(values, GRADIENT_PERCENTILE)), float(values.max())):
        if scale > MINIMUM_IMAGE_GRADIENT_HU * SOBEL_GAIN:
            return magnitude / np.float32(scale)
    return np.zeros(lung.shape, dtype=np.float32)


def _gradient_magnitude(values: np.ndarray) -> np.ndarray:
    """Length of the central-difference gradient."""
    total = np.zeros_like(values)
    for axis in range(3):
        if values.shape[axis] > 1:
            total += np.square(np.gradient(values, axis=axis))
    return np.sqrt(total, out=total)


def _relabel_band(
    labels: np.ndarray, smoothed: np.ndarray, edge: np.ndarray, moving: np.ndarray, lung: np.ndarray, floor: float
) -> np.ndarray:
    """Class numbers with those of the band found anew."""
    from scipy.ndimage import binary_dilation, label, maximum
    from skimage.segmentation import watershed

    markers = np.where(lung & ~moving, labels, 0).astype(np.int32)
    _mark_orphans(labels, moving, markers)
    bands, number = label(moving, structure=CONNECTED_26)
    has_edge = np.zeros(number + 1, dtype=bool)
    has_edge[1:] = np.atleast_1d(maximum(edge, bands, index=np.arange(1, number + 1))) >= floor
    flooded = has_edge[bands]
    del bands
    result = labels.copy()
    flat = moving & ~flooded
    result[flat] = smoothed[flat]
    if flooded.any():
        # Markers far from the band would only fill the queue.
        near = binary_dilation(flooded, structure=CONNECTED_26) & lung
        basins = watershed(edge, markers=np.where(near, markers, 0), mask=near)
        # A voxel no marker reaches (cut off from all of them by the mask) keeps its smoothed label.
        result[flooded] = np.where(basins[flooded] > 0, basins[flooded], smoothed[flooded])
    kept = moving & (markers > 0)
    result[kept] = markers[kept]
    return result


def _mark_orphans(labels: np.ndarray, moving: np.ndarray, markers: np.ndarray) -> None:
    """Give each component of a label that lies wholly in the band a marker at its core (in place)."""
    from scipy.ndimage import distance_transform_edt, find_objects, label

    for k in np.unique(labels[labels > 0]):
        components, number = label(labels == k, structure=CONNECTED_26)
        anchored = np.zeros(number + 1, dtype=bool)
        anchored[components[~moving]] = True
        anchored[0] = True
        for index, box in enumerate(find_objects(components), start=1):
            if anchored[index]:
                continue
            piece = components[box] == index
            if min(piece.shape) <= 4:
                core = piece  # its depth is 2 voxels at most, within one voxel of every part
            else:
                depth = distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1, 1:-1]
                core = piece & (depth >= depth.max() - MARKER_REACH_VOXELS)
            markers[box][core] = k


def _components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """26-connected components over all labels, numbered from 1, and their sizes (index 0: outside)."""
    from scipy.ndimage import label

    numbers = np.zeros(labels.shape, dtype=np.int32)
    total = 0
    for value in np.unique(labels[labels != OUTSIDE]):
        part, count = label(labels == value, structure=CONNECTED_26)
        hit = part > 0
        numbers[hit] = part[hit] + total
        total += count
    return numbers, np.bincount(numbers.ravel(), minlength=total + 1)


def _largest_of_each_island(labels: np.ndarray, component: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Number of the largest component of each connected piece of lung."""
    from scipy.ndimage import label

    islands, count = label(labels != OUTSIDE, structure=CONNECTED_26)
    island_of = np.zeros(len(sizes), dtype=np.int64)
    island_of[component.ravel()] = islands.ravel()
    order = np.argsort(sizes[1:], kind="stable") + 1
    largest = np.zeros(count + 1, dtype=np.int64)
    largest[island_of[order]] = order  # the last assignment wins: the largest
    return largest[1:]


def _contacts(
    labels: np.ndarray,
    values: np.ndarray,
    component: np.ndarray,
    small: np.ndarray,
    coordinates: np.ndarray,
    owner: np.ndarray,
) -> np.ndarray:
    """Neighbouring pairs of each component's voxels with voxels that stay, float64 (components, labels)."""
    column = np.zeros(256, dtype=np.intp)
    column[values] = np.arange(len(values))
    counts = np.zeros(len(small) * len(values))
    shape = np.asarray(labels.shape)
    for offset in np.argwhere(CONNECTED_26) - 1:
        neighbour = coordinates + offset
        within = ((neighbour >= 0) & (neighbour < shape)).all(axis=1)
        index = tuple(neighbour[within].T)
        stays = (labels[index] != OUTSIDE) & ~small[component[index]]
        pair = owner[within][stays] * len(values) + column[labels[index][stays]]
        counts += np.bincount(pair, minlength=counts.size)
    return counts.reshape(len(small), len(values))


def _mean_posterior(
    posterior: np.ndarray | None, values: np.ndarray, tokens: np.ndarray, owner: np.ndarray, num_components: int
) -> np.ndarray:
    """Mean posterior of each label in each component, float64 (components, labels); 0 where there is none."""
    result = np.zeros((num_components, len(values)))
    if posterior is None:
        return result
    voxels = np.maximum(np.bincount(owner, minlength=num_components), 1)
    for column, value in enumerate(values):
        if value in MIXTURE_TISSUES:
            chance = posterior[MIXTURE_TISSUES.index(value)][tuple(tokens.T)].astype(np.float64)
            result[:, column] = np.bincount(owner, weights=chance, minlength=num_components) / voxels
    return result
