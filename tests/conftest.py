"""Options and fixtures shared by all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be every process that a test sends it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.addoption("--kills", type=int, default=5, help="how often the test of killed trainings kills (25: in full)")
    parser.addoption("--shared-data", type=Path, default=default, help="folder of real CT used by some tests")


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """Folder with real, de-identified CT; tests that need it skip where it is absent."""
    folder: Path = request.config.getoption("--shared-data")
    if not folder.is_dir():
        pytest.skip(f"real CT data not found at {folder} (give --shared-data DIR)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
