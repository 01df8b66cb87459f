"""Three small volumes and the statistics of their windows, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusion_fixture import window_statistics, write_volume

from lungseg.radiomics.descriptor import Standardisation


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of three volumes; never to be changed by a test."""
    folder = tmp_path_factory.mktemp("volumes")
    return [write_volume(folder / f"case-{i}" / "volume.h5", seed=i) for i in range(3)]


@pytest.fixture(scope="session")
def statistics(volumes: list[Path]) -> tuple[Standardisation, ...]:
    """Standardisation of windows of 8^3 voxels."""
    return (window_statistics(volumes, 8),)
