"""Speed of the radiomic descriptor against pyradiomics in the same run: CPU time a patch, one thread.

Run: ``python tests/benchmarks/radiomics_speed.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lungseg.radiomics.descriptor import compute_descriptors
from lungseg.radiomics.pyradiomics import compute_descriptors_pyradiomics


def cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print one Markdown table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| window | patches | lungseg ms/patch | pyradiomics backend ms/patch | ratio |\n|---|---|---|---|---|")
    for edge, count in ((8, 1024), (16, 256), (32, 64)):
        patches = -800 + 80 * torch.randn((count, edge, edge, edge), generator=generator)
        masks = torch.ones_like(patches, dtype=torch.bool)
        median = torch.full((count,), -800.0)
        few = slice(0, 16)
        ours = cpu_seconds(lambda: compute_descriptors(patches, masks, lung_median_hu=median), 5) / count  # noqa: B023
        theirs = (
            cpu_seconds(
                lambda: compute_descriptors_pyradiomics(patches[few], masks[few], lung_median_hu=median[few]),  # noqa: B023
                3,
            )
            / 16
        )
        print(f"| {edge}^3 | {count} | {1e3 * ours:.2f} | {1e3 * theirs:.1f} | {theirs / ours:.0f} x |")


if __name__ == "__main__":
    main()
