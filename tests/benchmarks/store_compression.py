"""Compression and chunk shape of the patch store: ratio, write and random-read speed against no compression.

Run: ``python tests/benchmarks/store_compression.py [SCAN ...]`` (default: one digital phantom of full resolution).
Every figure is CPU time of one process; ratios are against the uncompressed file of the same run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom

CHUNKS = ((1, 128, 128), (8, 32, 32), (16, 32, 32), (32, 32, 32), (32, 64, 64), (64, 64, 64))
FILTERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("none", {}),
    ("lzf + shuffle", {"compression": "lzf", "shuffle": True}),
    ("gzip 1 + shuffle", {"compression": "gzip", "compression_opts": 1, "shuffle": True}),
    ("gzip 4", {"compression": "gzip", "compression_opts": 4}),
    ("gzip 4 + shuffle", {"compression": "gzip", "compression_opts": 4, "shuffle": True}),
    ("gzip 9 + shuffle", {"compression": "gzip", "compression_opts": 9, "shuffle": True}),
)
PATCH = (32, 96, 96)
READS = 60


def volumes(paths: list[str]) -> list[tuple[str, np.ndarray]]:
    """Name and int16 HU of the scans to try."""
    if not paths:
        spec = PhantomSpec(
            extent_mm=(240.0, 240.0, 300.0), spacing_mm=(1.0, 0.8, 0.8), severity="moderate", diseases=DISEASES
        )
        return [("digital phantom", make_phantom(spec, seed=900).volume_hu)]
    from lungseg.scan.sources import find_sources

    return [(Path(path).name, source.read().array) for path in paths for source in find_sources([Path(path)])]


def measure(array: np.ndarray, chunks: tuple[int, ...], options: dict[str, object]) -> tuple[float, float, float]:
    """Compressed bytes, CPU seconds to write, CPU seconds for READS random patches."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        begin = time.process_time()
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=array, chunks=chunks, fletcher32=True, **options)
        written = time.process_time() - begin
        size = path.stat().st_size
        corners = [
            [int(rng.integers(max(n - p, 0) + 1)) for n, p in zip(array.shape, PATCH, strict=True)]
            for _ in range(READS)
        ]
        begin = time.process_time()
        with h5py.File(path, "r") as file:
            for z, y, x in corners:
                file["image"][z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]]
        return size, written, time.process_time() - begin


def main() -> None:
    """Print one Markdown table per volume."""
    for name, array in volumes(sys.argv[1:]):
        mib, patch_mib = array.nbytes / 2**20, READS * 2 * np.prod(PATCH) / 2**20
        print(f"\n{name}: {array.shape}, {mib:.0f} MiB; random patches of {PATCH}\n")
        print(
            "| chunk | filter | ratio | write MiB/s | patch read MiB/s | read time vs none |\n|---|---|---|---|---|---|"
        )
        for chunks in CHUNKS:
            base = None
            for label, options in FILTERS:
                if label != "gzip 4 + shuffle" and label != "none" and chunks != (16, 32, 32):
                    continue  # the filters are compared at one chunk shape, the shapes at one filter
                size, written, read = measure(array, chunks, options)
                base = base or read
                print(
                    f"| {'x'.join(map(str, chunks))} | {label} | {array.nbytes / size:.2f} | {mib / written:.0f} | "
                    f"{patch_mib / read:.0f} | {read / base:.1f} |"
                )


if __name__ == "__main__":
    main()
