"""Evidence of each tissue everywhere in the lung, from its HU alone: no model, no fit, no labels.

What spoils plain statistics of small windows is taken out before anything is counted (FEASIBILITY, failure modes 2
and 3): bodies of dense lung with the partial-volume shell around them, vessels of the hila and fat, the rim of the lung
mask, and thin dense structures (vessels, airway walls, septa), which are counted by themselves. The rest is parenchyma:
its density and its low attenuation share, against the scan's healthy lung at that height above the couch, say healthy,
ground glass or emphysema; much thin dense structure says fibrosis, unless it is round and lies in healthy lung.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg import tissue as cut
from lungseg.errors import InputError
from lungseg.scan.volume import Triple
from lungseg.segmentation.anatomy import lung_anatomy
from lungseg.segmentation.density import healthy_mode_hu, healthy_profile_hu, local_sd, smooth_hu
from lungseg.segmentation.fat import fat
from lungseg.segmentation.hila import hilar_vessels
from lungseg.segmentation.lattice import bounding_region, lattice_shape
from lungseg.segmentation.tubes import tubeness
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

SMOOTHING_MM = 0.6
"""Smoothing before voxels are counted (METHOD 1.6: one voxel of 0.6 mm)."""
QUIET_NOISE_HU = 40.0
"""Noisier scans are smoothed more before low attenuation is counted, down to this noise (METHOD 6, 7.13).
Phantom-informed (validation phantoms 312 and 314: 25 loses emphysema, none invents it in healthy lung)."""
DENSITY_SIGMA_MM, SHARE_SIGMA_MM, BROAD_SIGMA_MM = 2.5, 4.0, 6.0
"""Gaussian windows of density and low attenuation, of thin structures and texture, and of the surroundings. 2.5 mm
weighs about 9 mm of lung, 4 mm about 14 mm (one to two secondary lobules). Phantom-informed: for low attenuation both
widths score alike, and the narrower one calls less of a severely emphysematous real lung emphysema."""
HEALTHY_WEIGHT = 0.1
"""Healthy lung that is added to what is counted for ground glass, in windows full of plain parenchyma: where partial
volume is nearly all there is (recesses, angles, rinds between vessels) it makes no ground glass. Phantom-informed (0.05
to 0.2 are alike on validation phantoms 300-305, 311, 313)."""
FINE_CELL = 2
"""Edge of the cells, in voxels, that evidence is counted in; coarser lattices take their mean. 1 gains nothing."""
MARGIN_VOXELS = 3
"""Around the lung: what lies outside is seen by the opening at the rim."""
CORE_SIGMA_MM = 30.0
"""Window of the emphysema that the edge of emphysema is held against: about 100 mm of lung, a lobe. Our choice (20 mm
is alike on validation phantoms and calls 1 % more of a severely emphysematous real lung emphysema)."""
BUNDLE_SIGMA_MM = 8.0
"""Window in which bundles of vessels are looked for that touch fibrosis: about 28 mm of lung, as wide as a bundle.
Phantom-informed (6 mm gives the same)."""
MINIMUM_WEIGHT = 1e-6
"""Weight of the window below which nothing is known: float32 rounding."""


@dataclass(frozen=True)
class DenseStatistics:
    """What is counted around the cells of a lattice that hold lung; every array has shape (N,), float32."""

    index: np.ndarray
    """int32, shape (N, 3): cells (z, y, x)."""
    body_share: np.ndarray
    """0 to 1: lung voxels of the cell that belong to a dense body, but for vessels of the hila and fat: the lung around
    these says what they lie in."""
    raised_share: np.ndarray
    """0 to 1: parenchyma denser than halfway from the scan's healthy lung there to ground glass, of it
    and a tenth of a window of healthy lung besides."""
    low_share: np.ndarray
    """0 to 1: low attenuation area of the parenchyma: at or below -950 HU, and 60 HU below healthy lung there (or at or
    below -970 HU)."""
    thin_share: np.ndarray
    """0 to 1: thin dense structures, of all that is no dense body."""
    texture_hu: np.ndarray
    """HU: local standard deviation (5 mm) beyond the noise of the scan."""
    broad_mean_hu: np.ndarray
    """HU: mean of the surroundings but for dense bodies."""
    parenchyma_share: np.ndarray
    """0 to 1: lung voxels of the cell that are neither body nor thin structure."""
    plain_share: np.ndarray
    """0 to 1: lung voxels of the cell that are such parenchyma, and as dense as the scan's healthy lung."""
    thin_here: np.ndarray
    """0 to 1: the same for thin dense structure, each voxel with its weight."""
    round_here: np.ndarray
    """-1 to 1: the same sum with the tubeness (`tubes.py`) of each voxel as a factor."""
    healthy_mode_hu: float
    """HU: the scan's healthy mode."""
    healthy_texture_hu: float
    """HU: median texture where the lung looks healthy; NaN if it does nowhere."""
    healthy_thin_share: float
    """0 to 1: mean share of thin structures there; NaN if nowhere."""
    noise_hu: float
    """HU: the noise that was taken off the texture."""
    lattice: tuple[int, int, int]
    """Shape of the lattice."""
    cell_mm: Triple
    """Edges of a cell (z, y, x)."""

    def __len__(self) -> int:
        return len(self.index)


def dense_statistics(
    volume_hu: np.ndarray,
    mask: np.ndarray,
    *,
    cell: int,
    spacing_mm: Triple,
    smoothing_mm: float = SMOOTHING_MM,
) -> DenseStatistics:
    """Statistics of the lung around every cell of a lattice, robust to vessels, edges and the pleura.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung.
    cell : int
        Edge of a cell in voxels; site (i, j, k) stands for the voxels that begin at ``cell * (i, j, k)``.
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    smoothing_mm : float
        Sigma of the smoothing before voxels are counted.

    Returns
    -------
    DenseStatistics
        Of the cells with lung, in C order; empty if the mask is.

    Raises
    ------
    InputError
        If the shapes differ or the mask is not bool.

    Source
    ------
    METHOD 1.6; FEASIBILITY failure modes 2, 3, 5, 8.
    """
    if volume_hu.shape != mask.shape or mask.dtype != np.bool_:
        raise InputError(f"volume of shape {volume_hu.shape} and mask of shape {mask.shape}, {mask.dtype} do not fit")
    lattice = lattice_shape(mask.shape, cell)
    cell_mm = (cell * spacing_mm[0], cell * spacing_mm[1], cell * spacing_mm[2])
    if not mask.any():
        return _nothing(lattice, cell_mm)
    region = _aligned(bounding_region(mask, margin=MARGIN_VOXELS), cell)
    hu, lung = volume_hu[region], mask[region]
    smoothed = smooth_hu(hu, lung, [smoothing_mm / s for s in spacing_mm])
    mode = healthy_mode_hu(smoothed, lung)
    body, thin, weight, rind_weight = lung_anatomy(smoothed, lung, spacing_mm=spacing_mm)
    pool = _Pool(lung, cell, spacing_mm)
    round_here = pool.cells(tubeness(hu, lung, thin, spacing_mm=spacing_mm) * weight)
    normal = fat(smoothed, body, lung, spacing_mm=spacing_mm) | hilar_vessels(body, lung, spacing_mm=spacing_mm)
    free = lung & ~body & (weight == 1.0)
    healthy = healthy_profile_hu(smoothed, free & ~thin, mode, spacing_mm)[:, None]
    raised_above = (healthy + np.float32(_prototype(Tissue.GGO))) / np.float32(2.0)
    hole_below = np.clip(healthy - np.float32(cut.EMPHYSEMA_BELOW_HEALTHY_MODE_HU), cut.LAA_LOWEST_HU, cut.LAA950_HU)
    texture, noise = _texture(hu, smoothed, lung & ~body, free & ~thin, spacing_mm)
    parenchyma = np.where(thin, np.float32(0.0), weight)
    quiet = smoothed
    if noise > QUIET_NOISE_HU:
        # The SD of white noise falls with sigma to the power of 3/2.
        sigma_mm = smoothing_mm * (noise / QUIET_NOISE_HU) ** (2.0 / 3.0)
        quiet = smooth_hu(hu, lung, [sigma_mm / s for s in spacing_mm])
    columns = {
        "body_share": pool.cells(body & ~normal),
        "raised_share": pool.mean(smoothed > raised_above, parenchyma, DENSITY_SIGMA_MM, others=HEALTHY_WEIGHT),
        "low_share": pool.mean(quiet <= hole_below, parenchyma, DENSITY_SIGMA_MM),
        "thin_share": pool.mean(thin, rind_weight, SHARE_SIGMA_MM),
        "texture_hu": pool.mean(texture, rind_weight, SHARE_SIGMA_MM),
        "broad_mean_hu": pool.mean(smoothed - np.float32(mode), rind_weight, BROAD_SIGMA_MM) + np.float32(mode),
        "parenchyma_share": pool.cells(lung & ~body & ~thin),
        "plain_share": pool.cells(lung & ~body & ~thin & (np.abs(smoothed - healthy) < cut.PLAIN_BAND_HU)),
        "thin_here": pool.cells(thin * weight),
        "round_here": round_here,
    }
    plain = (columns["raised_share"] < 0.5) & (columns["low_share"] < cut.LAA950_EMPHYSEMA_SHARE)
    plain &= columns["body_share"] < 0.5
    own = float(np.median(columns["texture_hu"][plain])) if plain.any() else float("nan")
    own_thin = float(np.mean(columns["thin_share"][plain])) if plain.any() else float("nan")
    origin = np.asarray([part.start // cell for part in region])
    return DenseStatistics(
        (pool.index + origin).astype(np.int32),
        **columns,
        healthy_mode_hu=mode,
        healthy_texture_hu=own,
        healthy_thin_share=own_thin,
        noise_hu=noise,
        lattice=lattice,
        cell_mm=cell_mm,
    )


def tissue_probabilities(stats: DenseStatistics) -> np.ndarray:
    """Probability of each tissue at each cell: rules with soft cut points, none of them fitted to labels.

    1. Consolidation: the cell lies in a dense body.
    2. Else emphysema: the low attenuation share of the parenchyma around is at least 10 %, and three tenths of the mean
       share of the emphysema within a lobe's width: a window that reaches into severe emphysema holds holes of it.
    3. Else fibrosis: thin dense structure is above 15 % or twice that of the scan's own healthy lung, texture above
       120 HU or twice that of the healthy lung (the lower of both counts), and the surroundings denser than healthy.
    4. Else ground glass: more than half of the parenchyma is denser than halfway between the scan's healthy lung at
       that height and the prototype of ground glass (of a full window 55 %, by what is added to it); else healthy.

    The surroundings of rule 3 are held against the healthy mode of the whole scan.

    Each rule is a logistic step around its cut point, as wide as the statistic's standard error there.

    Parameters
    ----------
    stats : DenseStatistics
        Of one scan.

    Returns
    -------
    float32 array, shape (N, 5)
        In the order of ``MIXTURE_TISSUES``; rows sum to 1.

    Source
    ------
    METHOD 1.6, 6 (cut points, see ``lungseg.tissue``); the steps are ours.
    """
    texture_cut = np.nanmin([cut.FIBROSIS_LOCAL_SD_HU, cut.FIBROSIS_TO_HEALTHY_TEXTURE * stats.healthy_texture_hu])
    thin_cut = np.nanmin([cut.FIBROSIS_THIN_SHARE, cut.FIBROSIS_TO_HEALTHY_THIN * stats.healthy_thin_share])
    # A scan that shows no thin structure at all in healthy lung has nothing to compare with.
    thin_cut = max(float(thin_cut), cut.LEAST_THIN_SHARE)
    raised_above = (stats.healthy_mode_hu + _prototype(Tissue.GGO)) / 2.0
    dense = _step(stats.body_share, 0.5, cut.BODY_SHARE_ERROR)
    holes_cut = np.maximum(cut.LAA950_EMPHYSEMA_SHARE, cut.EMPHYSEMA_EDGE_TO_CORE * _core_share(stats))
    emphysema = _step(stats.low_share, holes_cut, cut.LAA950_SHARE_ERROR * holes_cut / cut.LAA950_EMPHYSEMA_SHARE)
    # All three must hold: the weakest decides, so that a sure two cannot make up for a missing third.
    fibrosis = np.minimum.reduce([
        _step(stats.thin_share, thin_cut, thin_cut * cut.THIN_SHARE_ERROR),
        _step(stats.texture_hu, texture_cut, cut.TEXTURE_ERROR_HU),
        _step(stats.broad_mean_hu, raised_above, cut.BROAD_MEAN_ERROR_HU),
    ])  # fmt: skip
    raised = _step(stats.raised_share, 0.5, cut.RAISED_SHARE_ERROR)
    rest = 1.0 - dense
    result = np.zeros((len(stats), 5), dtype=np.float32)
    result[:, 4] = dense
    result[:, 1] = rest * emphysema
    rest = rest * (1.0 - emphysema)
    result[:, 3] = rest * fibrosis
    rest = rest * (1.0 - fibrosis)
    result[:, 2] = rest * raised
    result[:, 0] = rest * (1.0 - raised)
    return result


def without_bundles(stats: DenseStatistics, probabilities: np.ndarray) -> np.ndarray:
    """The probabilities with no fibrosis in bundles of vessels and airways, which are as thin and as dense.

    Two signs must meet, and are multiplied: healthy lung lies between the structures (what lies between the septa of
    fibrosis is abnormal too), and they are round rather than flat. They are looked for in whole connected pieces of
    cells whose likeliest tissue is fibrosis, and then around each cell that is left, for bundles that touch true
    fibrosis. Either becomes healthy. One sign is not enough: sharp kernels darken what lies between septa down to
    healthy lung, and thick slices make septa round.

    Parameters
    ----------
    stats : DenseStatistics
        Of one scan.
    probabilities : float array, shape (N, 5)
        From :func:`tissue_probabilities`.

    Returns
    -------
    float32 array, shape (N, 5)
        Rows sum to 1.

    Source
    ------
    FEASIBILITY failure mode 2; the rule is ours.
    """
    from scipy.ndimage import label

    fibrosis, place = MIXTURE_TISSUES.index(Tissue.FIBROSIS), tuple(stats.index.T)
    left = probabilities.argmax(axis=1) == fibrosis
    taken = np.zeros_like(left)

    def in_piece(values: np.ndarray) -> np.ndarray:
        return np.bincount(piece, weights=values)[piece]

    def around(values: np.ndarray) -> np.ndarray:
        return _around(stats, values, BUNDLE_SIGMA_MM)

    piece = label(_on_lattice(stats, left) > 0, structure=np.ones((3, 3, 3)))[0][place]
    for gather in (in_piece, around):
        plain, parenchyma, round_, thin = (
            gather(values * left)
            for values in (stats.plain_share, stats.parenchyma_share, stats.round_here, stats.thin_here)
        )
        share, form = plain / np.maximum(parenchyma, MINIMUM_WEIGHT), round_ / np.maximum(thin, MINIMUM_WEIGHT)
        bundle = share * form >= cut.BUNDLE_PLAIN_BY_TUBENESS
        taken |= left & bundle
        left &= ~bundle
    result = probabilities.astype(np.float32)
    result[taken, MIXTURE_TISSUES.index(Tissue.HEALTHY)] += result[taken, fibrosis]
    result[taken, fibrosis] = 0.0
    return result


def evidence_posterior(stats: DenseStatistics, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, 5) on their lattice: float32 (5, z, y, x), and which cells are covered (bool)."""
    posterior = np.zeros((probabilities.shape[1], *stats.lattice), dtype=np.float32)
    covered = np.zeros(stats.lattice, dtype=bool)
    place = tuple(stats.index.T)
    posterior[(slice(None), *place)] = probabilities.T
    covered[place] = True
    return posterior, covered


def cell_evidence(volume_hu: np.ndarray, mask: np.ndarray, *, cell: int, spacing_mm: Triple) -> np.ndarray:
    """Probability of each tissue in the cells of a lattice of any width: the mean over fine cells in them.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung.
    cell : int
        Edge of a cell in voxels.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    float32 array, shape (5, z, y, x)
        In the order of ``MIXTURE_TISSUES``; sums to 1 where a cell holds lung, 0 elsewhere.

    Raises
    ------
    InputError
        As :func:`dense_statistics`.
    """
    fine = next(width for width in range(min(FINE_CELL, cell), 0, -1) if cell % width == 0)
    statistics = dense_statistics(volume_hu, mask, cell=fine, spacing_mm=spacing_mm)
    probabilities = without_bundles(statistics, tissue_probabilities(statistics))
    posterior, covered = evidence_posterior(statistics, probabilities)
    factor, lattice = cell // fine, lattice_shape(volume_hu.shape, cell)
    padding = [(0, n * factor - size) for n, size in zip(lattice, covered.shape, strict=True)]
    blocks = np.ravel([(n, factor) for n in lattice])
    shares = np.pad(posterior, [(0, 0), *padding]).reshape(-1, *blocks).sum(axis=(2, 4, 6), dtype=np.float32)
    counts = np.pad(covered, padding).reshape(*blocks).sum(axis=(1, 3, 5), dtype=np.float32)
    return shares / np.maximum(counts, np.float32(1.0))


def _nothing(lattice: tuple[int, int, int], cell_mm: Triple) -> DenseStatistics:
    """Of a volume without lung."""
    none, unknown = np.zeros(0, dtype=np.float32), float("nan")
    index = np.zeros((0, 3), dtype=np.int32)
    columns = (none,) * 10
    return DenseStatistics(index, *columns, unknown, unknown, unknown, unknown, lattice, cell_mm)


def _texture(
    hu: np.ndarray, smoothed: np.ndarray, lung: np.ndarray, parenchyma: np.ndarray, spacing_mm: Triple
) -> tuple[np.ndarray, float]:
    """Local SD beyond the noise of the scan, and that noise: the 10th percentile of it in aerated parenchyma."""
    from lungseg.segmentation.density import NOISE_PERCENTILE

    deviation = local_sd(hu, lung, spacing_mm)
    aerated = deviation[parenchyma & (smoothed <= cut.HEALTHY_MEDIAN_HU)]
    noise = float(np.percentile(aerated, NOISE_PERCENTILE)) if aerated.size else 0.0
    return np.sqrt(np.maximum(np.square(deviation) - np.float32(noise) ** 2, 0.0)), noise


class _Pool:
    """Means over cells, and over Gaussian windows around them, of lung voxels."""

    def __init__(self, lung: np.ndarray, cell: int, spacing_mm: Triple) -> None:
        self.cell, self.spacing_mm = cell, spacing_mm
        self.lung = self._block(lung)
        self.inside = self.lung > 0
        self.index = np.argwhere(self.inside)

    def cells(self, values: np.ndarray) -> np.ndarray:
        """Mean over the lung of each cell; zero outside the lung on input."""
        return self._block(values)[self.inside] / self.lung[self.inside]

    def mean(self, values: np.ndarray, weight: np.ndarray, sigma_mm: float, *, others: float = 0.0) -> np.ndarray:
        """Weighted mean in a Gaussian window around each cell; 0 where nothing has weight.

        ``others``: weight of values of 0 that are counted besides, in windows full of weight 1.
        """
        total = self._window(values * weight, sigma_mm)
        share = self._window(weight, sigma_mm) + np.float32(others)
        return np.where(share > MINIMUM_WEIGHT, total / np.maximum(share, MINIMUM_WEIGHT), np.float32(0.0))

    def _window(self, values: np.ndarray, sigma_mm: float) -> np.ndarray:
        from scipy.ndimage import gaussian_filter

        sigma = [sigma_mm / (s * self.cell) for s in self.spacing_mm]
        return gaussian_filter(self._block(values), sigma, mode="constant", truncate=3.0)[self.inside]

    def _block(self, values: np.ndarray) -> np.ndarray:
        """Mean of each cell, those of a cut cell over its whole; float32."""
        c = self.cell
        shape = lattice_shape(values.shape, c)
        padding = [(0, n * c - size) for n, size in zip(shape, values.shape, strict=True)]
        full = np.pad(values, padding) if any(after for _, after in padding) else values
        z, y, x = shape
        return full.reshape(z, c, y, c, x, c).mean(axis=(1, 3, 5), dtype=np.float32)


def _aligned(region: tuple[slice, ...], cell: int) -> tuple[slice, ...]:
    """A region that begins on the lattice."""
    return tuple(slice(part.start // cell * cell, part.stop) for part in region)


def _on_lattice(stats: DenseStatistics, values: np.ndarray) -> np.ndarray:
    """Values of the cells on their lattice, 0 elsewhere; float32."""
    grid = np.zeros(stats.lattice, dtype=np.float32)
    grid[tuple(stats.index.T)] = values
    return grid


def _around(stats: DenseStatistics, values: np.ndarray, sigma_mm: float) -> np.ndarray:
    """Sum of the cells' values in a Gaussian window around each cell."""
    from scipy.ndimage import gaussian_filter

    sigma = [sigma_mm / size for size in stats.cell_mm]
    smooth: np.ndarray = gaussian_filter(_on_lattice(stats, values), sigma, mode="constant", truncate=3.0)
    return smooth[tuple(stats.index.T)]


def _core_share(stats: DenseStatistics) -> np.ndarray:
    """Mean low attenuation share of the emphysema around each cell; 0 where there is none."""
    core = stats.low_share >= cut.LAA950_EMPHYSEMA_SHARE
    share, cells = (_around(stats, values, CORE_SIGMA_MM) for values in (stats.low_share * core, core))
    return np.where(cells > MINIMUM_WEIGHT, share / np.maximum(cells, MINIMUM_WEIGHT), np.float32(0.0))


def _step(values: np.ndarray, middle: float | np.ndarray, error: float | np.ndarray) -> np.ndarray:
    """Logistic with the slope of a normal distribution of standard deviation ``error``."""
    from scipy.special import expit

    return expit((values - middle) * (np.pi / np.sqrt(3.0) / error))


def _prototype(tissue: Tissue) -> float:
    value = TISSUES[tissue].prototype_hu
    assert value is not None
    return value
