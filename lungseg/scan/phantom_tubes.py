"""Branching tubes of the digital phantom: vessel trees that fill a lung, and drawing of tubes with soft edges.

Points are (z, y, x) in mm from the outer corner of voxel (0, 0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MURRAY_EXPONENT = 2.7
"""Parent radius^n = sum of child radius^n; pulmonary arteries lie between area- and flow-preserving (2 and 3)."""
STEP_MM = 9.0
"""Length of the straight pieces of a branch; every joint may become a branching point."""
MAX_STEPS = 24
NUM_STEMS = 10
"""Branches laid first, about one for each segment of a lung (8 to 10 a side)."""
STRAIGHTNESS = 0.35
"""Weight of the way back to the root when a branch chooses where to join."""
BOW = 0.05
"""How far the middle of a branch lies off its chord, against its length."""


@dataclass(frozen=True)
class Grid:
    """A voxel grid to draw on."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Tubes:
    """Straight tapering-free pieces; together they make a tree."""

    start_mm: np.ndarray
    """Shape (N, 3)."""
    stop_mm: np.ndarray
    """Shape (N, 3)."""
    radius_mm: np.ndarray
    """Shape (N,)."""


def grow_tree(root_mm: np.ndarray, targets_mm: np.ndarray, *, leaf_mm: float, rng: np.random.Generator) -> Tubes:
    """Tree of tubes from ``root_mm`` to every target: first a few stems to far targets, then the others, near first.

    Each target is joined to the node that makes the way back to the root short, so that few thick stems feed many
    thin branches; radii follow Murray's law from leaves of ``leaf_mm``. No target gives no tube.
    """
    capacity = 1 + len(targets_mm) * MAX_STEPS
    nodes = np.empty((capacity, 3))
    parent = np.full(capacity, -1, dtype=np.int64)
    path = np.zeros(capacity)
    nodes[0] = root_mm
    count = 1
    for target in targets_mm[_order(root_mm, targets_mm)]:
        gap = np.linalg.norm(nodes[:count] - target, axis=1)
        # A purely nearest node meanders; counting a part of the way to the root keeps stems straight.
        joint = int(np.argmin(gap + STRAIGHTNESS * path[:count]))
        length = float(gap[joint])
        steps = int(np.clip(np.ceil(length / STEP_MM), 1, MAX_STEPS))
        bow = rng.normal(scale=BOW * length, size=3)
        previous = joint
        for step in range(1, steps + 1):
            share = step / steps
            nodes[count] = nodes[joint] + (target - nodes[joint]) * share + bow * np.sin(np.pi * share)
            parent[count] = previous
            path[count] = path[previous] + length / steps
            previous = count
            count += 1
        nodes[previous] = target
    return _tubes_of(nodes[:count], parent[:count], leaf_mm)


def _order(root_mm: np.ndarray, targets_mm: np.ndarray) -> np.ndarray:
    """Indices of targets: ``NUM_STEMS`` far ones in different directions, then all others by distance."""
    distance = np.linalg.norm(targets_mm - root_mm, axis=1)
    rest = np.argsort(distance, kind="stable")
    if len(targets_mm) <= 4 * NUM_STEMS:
        return rest
    direction = (targets_mm - root_mm) / np.maximum(distance, 1e-6)[:, None]
    far = np.flatnonzero(distance > np.quantile(distance, 0.6))
    stems = [int(far[0])]
    while len(stems) < NUM_STEMS:
        closest = (direction[far] @ direction[stems].T).max(axis=1)
        stems.append(int(far[np.argmin(closest)]))
    return np.concatenate([stems, rest[~np.isin(rest, stems)]])


def _tubes_of(nodes: np.ndarray, parent: np.ndarray, leaf_mm: float) -> Tubes:
    """One tube per node but the root; children come after their parent, so one backward pass sums the flow."""
    flow = np.zeros(len(nodes))
    for node in range(len(nodes) - 1, 0, -1):
        flow[node] = max(flow[node], 1.0)
        flow[parent[node]] += flow[node]
    radius = leaf_mm * flow[1:] ** (1.0 / MURRAY_EXPONENT)
    return Tubes(nodes[parent[1:]], nodes[1:], radius)


def companions(tubes: Tubes, *, min_radius_mm: float, ratio: float, angle: float) -> Tubes:
    """Bronchi beside arteries: tubes thicker than ``min_radius_mm`` moved sideways by the sum of both radii."""
    keep = tubes.radius_mm > min_radius_mm
    radius = tubes.radius_mm[keep]
    side = np.array([0.3, np.cos(angle), np.sin(angle)])
    shift = (side / np.linalg.norm(side)) * ((1.0 + ratio) * radius + 0.8)[:, None]
    return Tubes(tubes.start_mm[keep] + shift, tubes.stop_mm[keep] + shift, ratio * radius)


def draw_tubes(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], tubes: Tubes) -> np.ndarray:
    """Share of every voxel inside the tubes.

    Returns
    -------
    float32 array of ``shape`` in 0...1; tubes thinner than a voxel leave a proportionally weak trace.
    """
    canvas = np.zeros(shape, dtype=np.float32)
    spacing = np.asarray(spacing_mm)
    blur = float(spacing.mean())
    limit = np.asarray(shape)
    for start, stop, radius in zip(tubes.start_mm, tubes.stop_mm, tubes.radius_mm, strict=True):
        reach = radius + blur
        low = np.clip(np.floor((np.minimum(start, stop) - reach) / spacing).astype(int), 0, limit)
        high = np.clip(np.ceil((np.maximum(start, stop) + reach) / spacing).astype(int), 0, limit)
        if np.any(high <= low):
            continue
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        distance = segment_distance(start, stop, low, high, spacing)
        share = np.clip((radius - distance) / blur + 0.5, 0.0, 1.0) * min(1.0, 2.0 * radius / blur)
        np.maximum(canvas[box], share, out=canvas[box])
    return canvas


def unite_tube(
    field: np.ndarray, grid: Grid, start_mm: np.ndarray, stop_mm: np.ndarray, radius_mm: float, *, reach_mm: float = 2.0
) -> None:
    """Unite a signed distance (positive inside) with one tube, in place, up to ``reach_mm`` outside the tube."""
    spacing, limit = np.asarray(grid.spacing_mm), np.asarray(grid.shape)
    reach = radius_mm + reach_mm
    low = np.clip(np.floor((np.minimum(start_mm, stop_mm) - reach) / spacing).astype(int), 0, limit)
    high = np.clip(np.ceil((np.maximum(start_mm, stop_mm) + reach) / spacing).astype(int), 0, limit)
    if np.all(high > low):
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        distance = radius_mm - segment_distance(start_mm, stop_mm, low, high, spacing)
        np.maximum(field[box], distance, out=field[box])


def segment_distance(
    start: np.ndarray, stop: np.ndarray, low: np.ndarray, high: np.ndarray, spacing: np.ndarray
) -> np.ndarray:
    """Distance in mm of the voxel centres of the box ``[low, high)`` from the segment between two points."""
    z, y, x = (
        ((np.arange(a, b) + 0.5) * s - origin).astype(np.float32)
        for a, b, s, origin in zip(low, high, spacing, start, strict=True)
    )
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    direction = (stop - start).astype(np.float32)
    length2 = max(float(direction @ direction), 1e-9)
    along = np.clip((z * direction[0] + y * direction[1] + x * direction[2]) / np.float32(length2), 0.0, 1.0)
    squared = (z - along * direction[0]) ** 2 + (y - along * direction[1]) ** 2 + (x - along * direction[2]) ** 2
    distance: np.ndarray = np.sqrt(squared)
    return distance
