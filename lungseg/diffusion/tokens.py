"""Tokens: what the student says about each small cube of lung, at chosen noise levels.

x_t is drawn in closed form from q(x_t | x_0); no reverse chain and no decoder is run (METHOD 1.5, 7.1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.unet import MIDDLE

EMBEDDING = "embedding"
"""Name of the student head's output among the blocks of the network."""
PLANES_KEPT = 256
"""Noise planes kept in memory, at least: more than the depth of any patch, so that overlapping windows do not draw
them twice."""


class NoiseField:
    """Standard normal noise as a function of (seed, t, voxel position): the same in every window that sees a voxel."""

    def __init__(self, seed: int, plane_shape: tuple[int, int], *, origin: Sequence[int] = (0, 0, 0)) -> None:
        """``origin``: voxel (z, y, x) from which corners count, for a volume that was widened at its beginning.

        Beyond the planes, and before the first one, the noise is reflected as the volume is.
        """
        self._seed = seed
        self._origin = tuple(int(o) for o in origin)
        self._kept = PLANES_KEPT
        self._shape = plane_shape
        self._planes: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def keep(self, depth: int) -> None:
        """Keep as many planes as the deepest box has that will be asked for: boxes beside each other share them."""
        self._kept = max(self._kept, depth)

    def _plane(self, t: int, z: int) -> np.ndarray:
        key = (t, z)
        if key not in self._planes:
            rng = np.random.Generator(np.random.Philox(key=[self._seed, t * 2**32 + z]))
            self._planes[key] = rng.standard_normal(self._shape, dtype=np.float32)
            if len(self._planes) > self._kept:
                self._planes.popitem(last=False)
        return self._planes[key]

    def box(self, t: int, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Noise of a box: float32, shape ``size`` (d, h, w), at voxel ``corner`` (z, y, x) of the padded volume."""
        z, y, x = (int(c) + o for c, o in zip(corner, self._origin, strict=True))
        d, h, w = size
        planes = [self._plane(t, abs(z + k)) for k in range(d)]
        (height, width), within = self._shape, y >= 0 and x >= 0
        if within and y + h <= height and x + w <= width:
            return np.stack([plane[y : y + h, x : x + w] for plane in planes])
        rows, columns = reflected(y, h, height), reflected(x, w, width)
        return np.stack([plane[np.ix_(rows, columns)] for plane in planes])


def reflected(start: int, count: int, length: int) -> np.ndarray:
    """Indices into an axis of ``length`` for ``count`` positions from ``start``, reflected at both ends; int (count,).

    As ``numpy.pad`` with mode "reflect" does: the ends are not repeated.
    """
    if length == 1:
        return np.zeros(count, dtype=np.intp)
    period = 2 * (length - 1)
    position = np.arange(start, start + count) % period
    return np.minimum(position, period - position)


@torch.no_grad()
def encode_windows(
    student: Student,
    windows_hu: np.ndarray,
    masks: np.ndarray,
    corners: np.ndarray,
    noise: NoiseField,
    *,
    timesteps: Sequence[int],
    combine: str = "concat",
) -> np.ndarray:
    """Token descriptors of a batch of windows.

    Parameters
    ----------
    windows_hu : int16 array, shape (N, D, H, W)
        HU; D, H, W multiples of the token size.
    masks : bool array, same shape
        Lung.
    corners : int array, shape (N, 3)
        Corner of each window in the padded volume: places the noise.
    timesteps : sequence of int
        Noise levels; 0 is the clean scan with time input 0.
    combine : str
        `concat`: (384 channels for three levels), each block of unit length; `average`: mean, renormalised.

    Returns
    -------
    float32 array, shape (N, C, D/p, H/p, W/p)
    """
    blocks = [
        embed(student, student.unet.encode(*network_input(student, windows_hu, masks, corners, noise, t)))
        for t in timesteps
    ]
    return combine_levels(blocks, combine).cpu().numpy()


@torch.no_grad()
def token_activations(
    student: Student,
    windows_hu: np.ndarray,
    masks: np.ndarray,
    corners: np.ndarray,
    noise: NoiseField,
    *,
    timestep: int,
    blocks: Sequence[str],
) -> dict[str, np.ndarray]:
    """Features of the tokens of a batch of windows in any blocks of the network, at one noise level.

    Nothing deeper than the deepest block asked is computed. Other parameters as for :func:`encode_windows`.

    Parameters
    ----------
    blocks : sequence of str
        Names of ``UNetSpec.block_names``, or `embedding`: what the head makes of the middle.

    Returns
    -------
    dict of float32 arrays, shape (N, C, D/p, H/p, W/p)
        By block. Maps finer than a token are averaged over its cell.

    Raises
    ------
    UsageError
        For an unknown block.
    """
    inputs = network_input(student, windows_hu, masks, corners, noise, timestep)
    found = student.unet.activations(*inputs, [MIDDLE if name == EMBEDDING else name for name in blocks])
    result = {}
    for name in blocks:
        if name == EMBEDDING:
            features = embed(student, found[MIDDLE])
        else:
            cells = student.unet.spec.token_size // student.unet.spec.voxels_per_cell(name)
            features = torch.nn.functional.avg_pool3d(found[name].float(), cells) if cells > 1 else found[name].float()
        result[name] = features.contiguous().cpu().numpy()
    return result


def network_input(
    student: Student, boxes_hu: np.ndarray, masks: np.ndarray, corners: np.ndarray, noise: NoiseField, timestep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net is given of boxes (N, D, H, W) of a volume at one noise level: input (N, 2, D, H, W), times (N,).

    Raises
    ------
    MismatchError
        From the window, if it must be told the volume's range first (``Student.for_volume``).
    """
    device = next(student.unet.parameters()).device
    x_t = student.window.normalise(torch.from_numpy(boxes_hu).to(device))
    times = torch.full((len(x_t),), int(timestep), device=device)
    if timestep > 0:
        eps = np.stack([noise.box(int(timestep), corner, boxes_hu.shape[1:]) for corner in corners])
        x_t = student.schedule.q_sample(x_t, times, torch.from_numpy(eps).to(device))
    mask = torch.from_numpy(masks).to(device, torch.float32)
    return torch.stack([x_t, mask], dim=1), times


def embed(student: Student, bottleneck: torch.Tensor) -> torch.Tensor:
    """Unit vectors float32 (N, E, *S) the student makes of a bottleneck (N, C, *S)."""
    tokens = bottleneck.float().movedim(1, -1)
    return student.embed(tokens.flatten(0, -2)).view(*tokens.shape[:-1], -1).movedim(-1, 1)


def combine_levels(blocks: Sequence[torch.Tensor], combine: str) -> torch.Tensor:
    """Descriptors (N, C, ...) of several noise levels: `concat` side by side, `average` their normalised mean."""
    if combine == "concat":
        return torch.cat(list(blocks), dim=1)
    return torch.nn.functional.normalize(torch.stack(list(blocks)).mean(0), dim=1)
