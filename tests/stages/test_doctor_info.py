"""doctor and info: what is here, what is missing, how it was made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lungmask_package import VERSION, WEIGHTS, install
from rich.console import Console
from tiny_store import SHAPE, make_store

from lungseg.config.cluster import ClusterConfig
from lungseg.config.fields import to_dict
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import save_model
from lungseg.errors import InputError, StoreError
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.cohort import StageResult
from lungseg.stages.doctor import doctor
from lungseg.stages.info import info
from lungseg.store.atomic import write_json
from lungseg.store.schema import make_provenance, write_artefact


def printed(result: StageResult) -> str:
    console = Console(width=200, markup=False, file=io.StringIO(), record=True)
    for table in result.tables:
        console.print(table)
    return console.export_text()


def rows(result: StageResult) -> dict[str, tuple[str, str]]:
    columns = [list(column.cells) for column in result.tables[0].columns]
    return {str(name): (str(found), str(remark)) for name, found, remark in zip(*columns, strict=True)}


def test_doctor_lists_packages_and_machine() -> None:
    result = doctor()
    found = rows(result)
    assert result.exit_code == 0
    assert found["torch"][0] == torch.__version__
    assert found["numpy"][0] == np.__version__
    for part in ("CPU cores", "memory", "free disk here"):
        assert found[part][0]
    assert float(found["memory"][0].split()[0]) > 0.1


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = rows(doctor())
    assert found["SimpleITK"] == ("missing", "")
    assert found["pyradiomics-cuda"][0] == "missing"
    assert "pip install 'lungseg[pyradiomics]'" in found["pyradiomics-cuda"][1]
    assert found["lungmask"] == ("missing", "for preprocess --lung-mask lungmask: pip install 'lungseg[lungmask]'")
    assert "spreading cases" in found["distributed"][1]
    assert "this torch is a CPU build" in found["CUDA"][1]
    assert "lungseg[cluster]" in printed(doctor())


def test_doctor_says_what_lungmask_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "whole", monkeypatch)
    assert rows(doctor())["lungmask"] == (VERSION, "")
    install(tmp_path / "bare", monkeypatch, weights=None)
    found, remark = rows(doctor())["lungmask"]
    assert found == VERSION
    assert f"the weights {WEIGHTS} are not on this machine" in remark


def test_doctor_lists_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="Big GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    found = rows(doctor())
    assert found["cuda:0"][0] == found["cuda:1"][0] == "Big GPU, 80 GiB"
    assert "CUDA" not in found


def test_doctor_says_why_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "no driver or device was found" in rows(doctor())["CUDA"][1]


def test_row_38_doctor_verifies_a_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=2)
    result = doctor(store.path)
    assert (result.exit_code, result.notes) == (0, ("2 of 2 files of 2 cases are sound",))
    bad = store.case_file("case-1", "volume")
    bad.write_bytes(bad.read_bytes()[:4000])
    result = doctor(store.path)
    assert result.exit_code == 8
    (failed,) = (o for o in result.outcomes if o.status == "failed")
    assert failed.case_id == "cases/case-1/volume.h5"
    assert failed.message.endswith(". delete it and run its stage again")
    assert result.notes == ("1 of 2 files of 2 cases are sound",)
    store.case_file("case-0", "volume").write_bytes(b"")
    assert doctor(store.path).exit_code == 6
    with pytest.raises(StoreError, match="is not a patch store"):
        doctor(tmp_path)


def values(path: Path) -> dict[str, Any]:
    result = info(path)
    text = printed(result)
    assert path.name in text
    return {"title": str(result.tables[0].title), **result.values}


def test_info_of_a_store_and_its_files(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=2)
    store.fit_dir("gmm").mkdir(parents=True)
    labels = {"labels": np.zeros((2, 2, 2), np.uint8), "confidence": np.zeros((2, 2, 2), np.uint8)}
    path = store.case_file("case-0", "labels", "gmm")
    write_artefact(path, "labels", labels, provenance=make_provenance("refine", {"fusion": "sobel"}))
    found = values(store.path)
    assert found["title"] == "cohort: patch store"
    assert found["cases"] == "2"
    assert found["holds"] == "made for a test"
    assert found["volume.h5"] == "2 cases"
    assert found["labels.gmm.h5"] == "1 cases"
    assert found["fit"] == "gmm"
    assert json.loads(found["settings"])["spacing_mm"] == 1.5
    assert store.salt not in printed(info(store.path)).replace("salt", "", 0) or store.salt == "salt"
    found = values(path)
    assert found["title"] == "labels.gmm.h5: labels of a case"
    assert found["labels"] == "2 x 2 x 2"
    assert found["stage"] == "refine"
    assert len(found["fingerprint"]) == 64
    found = values(store.case_file("case-1", "volume"))
    assert found["image"] == " x ".join(map(str, SHAPE))


def test_info_never_shows_the_salt(tmp_path: Path) -> None:
    from lungseg.store.cases import Store

    store = Store.create(tmp_path / "s", config={"salt": "very secret", "a": 1}, salt="very secret", provenance="x")
    assert "very secret" not in printed(info(store.path))


def test_info_of_a_fit(tmp_path: Path) -> None:
    component = {"component": 0, "tissue": "ggo", "weight": 0.25, "rule": "median HU"}
    write_json(
        tmp_path / "clusters.json",
        {"components": [component], "provenance": make_provenance("cluster", to_dict(ClusterConfig()))},
    )
    found = values(tmp_path)
    assert found["title"].endswith("fitted clustering")
    assert found["component 0"] == "ggo, 25.0 % of tokens: median HU"


def test_info_of_a_training_run(tmp_path: Path) -> None:
    header = {
        "format": "lungseg-run",
        "config": {"total_images": 100},
        "inputs": {"a": "1", "b": "2"},
        "environment": {},
    }
    write_json(tmp_path / "config.json", header)
    found = values(tmp_path)
    assert found["state"].startswith("unfinished")
    assert found["cases"] == "2"
    lines = [{"images": 10, "total": 2.0}, {"images": 20, "total": 1.5, "contrast": None, "diffusion": 0.25}]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "model.safetensors").touch()
    found = values(tmp_path)
    assert found["state"] == "complete"
    assert found["images"] == "20 of 100"
    assert found["last losses"] == "total 1.5, diffusion 0.25"


def test_info_of_a_model_and_a_bundle(tmp_path: Path) -> None:
    card = {"spacing_mm": 1.5, "num_cases": 3, "training_volumes": {"a": "secret mark"}, "standardisation": None}
    weights = {"unet.a": torch.zeros(3, 4), "head.b": torch.zeros(5)}
    save_model(tmp_path / "m.safetensors", weights, config=TrainConfig(), card=card)
    found = values(tmp_path / "m.safetensors")
    assert found["title"] == "m.safetensors: model"
    assert found["parameters"] == "17"
    assert found["num_cases"] == "3"
    assert "training_volumes" not in found
    assert json.loads(found["settings"]) == to_dict(TrainConfig())
    save_model(
        tmp_path / "b.safetensors", weights, config=TrainConfig(), card=card,
        extra_tensors={"fit.means": torch.zeros(100)}, extra={"components": [1, 2]},
    )  # fmt: skip
    found = values(tmp_path / "b.safetensors")
    assert found["title"] == "b.safetensors: model with fit"
    assert (found["parameters"], found["fit"]) == ("17", "2 named components")


def test_info_of_scans(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).normal(-850, 60, (9, 10, 11))
    hu[:, :5] += 890
    grid = Geometry(hu.shape, (2.5, 2.2, 2.0))
    write_image(tmp_path / "a.nii.gz", np.rint(hu).astype(np.int16), grid)
    (tmp_path / "b.nii.gz").write_bytes(b"garbage")
    found = values(tmp_path / "a.nii.gz")
    assert found["title"] == "a.nii.gz: scan"
    assert found["scan 1"] == "9 x 10 x 11 voxels (z,y,x)"
    assert found["spacing"] == "2.5 x 2.2 x 2 mm"
    assert found["HU"] == f"{max(int(np.rint(hu).min()), -1024)} to {int(np.rint(hu).max())}"
    found = values(tmp_path)  # a bad one does not stop the others
    assert found["scan 1"] == "9 x 10 x 11 voxels (z,y,x)"
    assert found["scan 2"].startswith("cannot be used: ")


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("none", None, "no such file or folder"),
        ("thesis.txt", "text", "no readable DICOM image"),
        ("thesis.h5", "x", "not a file of a patch store"),
        ("folder/config.json", "{}", "not that of a training run"),
        ("folder/config.json", "[]", "not that of a training run"),
        ("folder/readme", "x", "no readable DICOM image"),
    ],
)
def test_info_of_something_else(tmp_path: Path, name: str, content: str | None, phrase: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InputError, match=phrase) as caught:
        info(path.parent if name.startswith("folder") else path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["volume.h5", "model.safetensors"])
def test_row_38_info_of_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89HDF garbage")
    with pytest.raises(StoreError) as caught:
        info(tmp_path / name)
    assert caught.value.exit_code == 6
