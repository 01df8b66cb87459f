"""``lungseg doctor``: what this installation has and lacks, or whether a store is sound."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from lungseg import __version__
from lungseg.config.execution import Execution
from lungseg.errors import LungsegError, ResourceError
from lungseg.models import starter_path
from lungseg.scan.lung_network import PACKAGE, find_lung_network
from lungseg.stages.cohort import DONE, FAILED, CaseOutcome, StageResult
from lungseg.store.cases import Store
from lungseg.store.verify import verify_store

_PACKAGES = (
    "torch", "numpy", "scipy", "scikit-learn", "scikit-image", "h5py", "SimpleITK", "pydicom", "typer", "rich", "tqdm",
    "safetensors", "matplotlib", "pillow", "joblib",
)  # fmt: skip
_OPTIONAL = (
    (
        "radiomics",
        "pyradiomics-cuda",
        "extract-radiomics --backend pyradiomics",
        "pip install 'lungseg[pyradiomics]' (needs a C++ compiler)",
    ),
    (PACKAGE, "lungmask", "preprocess --lung-mask lungmask", "pip install 'lungseg[lungmask]'"),
    ("highdicom", "highdicom", "refine --dicom-seg", "pip install 'lungseg[dicomseg]'"),
    ("tensorboard", "tensorboard", "train-ddpm --tensorboard", "pip install 'lungseg[tensorboard]'"),
    ("distributed", "distributed", "spreading cases over a cluster with dask", "pip install 'lungseg[cluster]'"),
)


def doctor(store: Path | None = None, *, execution: Execution = Execution()) -> StageResult:
    """Report versions, devices, memory, disk and missing optional parts; or verify every file of ``store``.

    Returns
    -------
    StageResult
        With a store: one outcome per file; damaged files give exit code 6 (all files) or 8 (some).
    """
    return _verify(Path(store)) if store else _installation()


def _verify(path: Path) -> StageResult:
    store = Store(path)
    outcomes = []
    for finding in verify_store(store):
        name = str(finding.path.relative_to(path))
        if finding.problem:
            outcomes.append(CaseOutcome(name, FAILED, f"{finding.problem}. {finding.fix}", 6))
        else:
            outcomes.append(CaseOutcome(name, DONE))
    sound = sum(outcome.status == DONE for outcome in outcomes)
    notes = (f"{sound} of {len(outcomes)} files of {len(store.case_ids())} cases are sound",)
    return StageResult("doctor", path, tuple(outcomes), notes=notes)


def _installation() -> StageResult:
    from rich.table import Table

    table = Table(title=f"lungseg {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for column in ("part", "found", "remark"):
        table.add_column(column, overflow="fold")
    for name in _PACKAGES:
        table.add_row(name, _version(name), "")
    for module, name, use, fix in _OPTIONAL:
        present = importlib.util.find_spec(module) is not None
        remark = _remark(module) if present else f"for {use}: {fix}"
        table.add_row(name, _version(name) if present else "missing", remark)
    table.add_row("starter model", *_starter())
    for row in _machine():
        table.add_row(*row)
    return StageResult("doctor", Path(), tables=(table,))


def _remark(module: str) -> str:
    """What a part that is there still lacks."""
    if module != PACKAGE:
        return ""
    try:
        find_lung_network()
    except ResourceError as error:
        return str(error)
    return ""


def _starter() -> tuple[str, str]:
    """What is found of the shipped model, and what it is for."""
    path = starter_path()
    if not path.is_file():
        return "missing", "lungseg run needs --model FILE or --train"
    from lungseg.diffusion.checkpoint import read_model_file

    try:
        metadata, _ = read_model_file(path)
    except LungsegError as error:
        return "damaged", str(error)
    card = metadata["card"]
    fit = "with its fit" if metadata["extra"] else "without a fit: run fits on the scans given"
    found = f"{path.stat().st_size / 1e6:.1f} MB, {card['images']} images, {card['spacing_mm']:g} mm"
    return found, f"{fit}; {card.get('limits', 'limits not stated')}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _machine() -> list[tuple[str, str, str]]:
    import torch

    rows = []
    count = torch.cuda.device_count()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        rows.append((f"cuda:{number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", ""))
    if not count:
        built = torch.version.cuda is not None
        remark = "no driver or device was found" if built else "this torch is a CPU build; see pytorch.org for CUDA"
        rows.append(("CUDA", "none", f"{remark}; --preset tiny trains on the CPU"))
    rows.append(("CPU cores", str(os.cpu_count()), "--jobs sets how many cases run at once"))
    rows.append(("memory", f"{_memory_gib():.1f} GiB", ""))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(("free disk here", f"{free:.1f} GiB", "a 512x512x300 scan takes about 0.15 GiB in a store"))
    return rows


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
