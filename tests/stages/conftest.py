"""The small cohort and one undisturbed run of all stages, made once per test process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pipeline_fixture import make_phantoms, run_stages


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of two small phantoms."""
    return make_phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="session")
def finished(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with store, run, bundle, results, scores and synthetic store; never to be changed by a test."""
    return run_stages(manifest, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    target = tmp_path / "copy"
    shutil.copytree(finished, target)
    return target
