"""What runs on a GPU node: every stage after preprocess, with no reader of scans installed.

Run as ``python gpu_node.py FOLDER``; the test of the architecture does so in a fresh process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

BLOCKED = ("SimpleITK", "pydicom", "radiomics", "pyradiomics")
ROOMS = ("diffusion", "radiomics", "segmentation", "store", "config", "evaluation", "report")
MODULES = ("scan.phantom", "scan.lungs", "scan.resample", "scan.volume", "stages.extract_radiomics",
           "stages.phantom", "stages.train_ddpm", "stages.synthesize", "stages.cluster", "stages.refine")  # fmt: skip


class Missing(MetaPathFinder):
    """Makes some packages absent."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named '{name}' (blocked)", name=name)
        return None


def import_rooms() -> None:
    """Every module of the rooms a GPU node needs."""
    import lungseg

    root = Path(str(lungseg.__file__)).parent
    names = [f"{room}.{file.stem}" for room in ROOMS for file in (root / room).glob("*.py") if file.stem != "__init__"]
    for name in (*names, *MODULES):
        importlib.import_module(f"lungseg.{name}")


def run_stages(folder: Path) -> None:
    """From a store to label maps and synthetic patches."""
    from tiny_store import PATCH, make_store

    from lungseg import cluster, extract_radiomics, refine, synthesize, train_ddpm
    from lungseg.config import ClusterConfig, Execution, RadiomicsConfig, RefineConfig, SynthesizeConfig, TrainConfig
    from lungseg.config.presets import make_config
    from lungseg.store.cases import Store
    from lungseg.store.verify import verify_store

    execution = Execution(quiet=True, device="cpu")
    store = make_store(folder / "cohort")
    radiomics = make_config(
        RadiomicsConfig, preset="tiny", window=8, stride=8, samples_per_case=40, standardisation_windows=(8,)
    )
    extract_radiomics(store, radiomics, execution=execution).require_complete()
    training = make_config(
        TrainConfig, preset="tiny", total_images=24, batch_size=4, patch_size=PATCH, base_width=8, timesteps=20
    )
    done = train_ddpm(store, folder / "run", training, execution=execution)
    assert done.values["images"] == 24
    clustering = make_config(
        ClusterConfig, preset="tiny", timesteps=(0, 5), components=3, pca=4, restarts=1, tokens_per_case=200
    )
    cluster(store, folder / "run", clustering, execution=execution).require_complete()
    refine(store, make_config(RefineConfig, preset="tiny"), execution=execution).require_complete()
    drawn = synthesize(folder / "run", folder / "synthetic", SynthesizeConfig(num=2, steps=3), execution=execution)
    assert len(drawn.outcomes) == 2
    for made in (store, Store(folder / "synthetic")):
        assert [finding for finding in verify_store(made) if finding.problem] == []
    for case_id in store.case_ids():
        with store.open(case_id, "volume") as volume, store.open(case_id, "labels", "diffseglung") as labels:
            shown = labels.read("labels")
            assert shown.shape == volume.shape("image")
            assert ((shown > 0) == (volume.read("mask") > 0)).all()


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing())
    import_rooms()
    if len(sys.argv) > 1:
        run_stages(Path(sys.argv[1]))
    loaded = sorted({name.split(".")[0] for name in sys.modules} & set(BLOCKED))
    print("loaded:", loaded)
