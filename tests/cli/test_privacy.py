"""RELIABILITY 4, point 5: what identifies a patient reaches no artefact and no output of a command that went well.

A canary stands in every tag, text field, file, folder, archive and member name that could name a patient. What a
command writes (artefacts, standard output, tables, JSON) is searched for it byte by byte, unpacked where it is packed.
The one place that may name a file is standard error about a scan that cannot be read.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.report.dicom_measurements import measured_regions
from lungseg.report.quantify import quantify
from lungseg.report.quantity_tables import CaseQuantities
from lungseg.scan.dicom import find_series, read_series, write_dicom_series
from lungseg.scan.dicom_seg_write import write_segmentation
from lungseg.scan.dicom_sr_write import write_measurements
from lungseg.scan.volume import Geometry, Volume
from lungseg.store.cases import Store, read_id_map

CANARY = "Zebrafink"
BIRD_DATE, BIRD_TIME, BIRD_NUMBER = "19010203", "042317.271828", "7654321"
UID_ROOT = f"1.2.826.0.1.3680043.{BIRD_NUMBER}"
CANARIES = (CANARY, CANARY.lower(), CANARY.upper(), BIRD_DATE, "1901-02-03", BIRD_TIME, BIRD_NUMBER)
TEXT_VR = ("PN", "LO", "SH", "ST", "LT", "UT", "UC", "AE")
ALLOWED = (0x00080070, 0x00181210)
"""Manufacturer and ConvolutionKernel: on the allow-list of what a store keeps."""
TINY = """
[preprocess]
patch-size = [8, 16, 16]
patch-stride = [8, 8, 8]

[extract-radiomics]
samples-per-case = 40
standardisation-windows = [8]

[train-ddpm]
base-width = 8
patch-size = [8, 16, 16]
total-images = 8
batch-size = 4
tokens-per-patch = 4

[cluster]
components = 4
pca = 3
restarts = 1
tokens-per-case = 200
"""


# ---------------------------------------------------------------- scans full of canaries


def chest() -> Volume:
    grid = Geometry((20, 40, 40), (5.0, 4.0, 4.0))  # small: finding lungs takes the time of its millimetres
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape], indexing="ij")
    hu = np.where(y**2 / 0.8 + x**2 < 0.9, 40.0, -1000.0)
    for side in (-0.42, 0.42):
        hu[(z / 0.8) ** 2 + (y / 0.6) ** 2 + ((x - side) / 0.32) ** 2 < 1] = -850
    hu = np.rint(hu + np.random.default_rng(0).normal(0, 15, hu.shape)).clip(-1024, 3000).astype(np.int16)
    return Volume(hu, grid)


def personal_tags() -> Dataset:
    """Every text, date, time and age that the dictionary knows, set to a canary; private and nested ones too."""
    ds = Dataset()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if not 0x00080000 <= tag < 0x40100000 or tag in ALLOWED or not keyword:
            continue
        if vr in TEXT_VR:
            ds.add_new(tag, vr, CANARY)
        elif vr in ("DA", "TM", "DT", "AS"):
            ds.add_new(tag, vr, {"DA": BIRD_DATE, "TM": BIRD_TIME, "DT": BIRD_DATE + BIRD_TIME, "AS": "119Y"}[vr])
    for keyword in ("PatientWeight", "PatientSize"):
        setattr(ds, keyword, BIRD_NUMBER)
    nested = Dataset()
    nested.PatientName, nested.ReferencedSOPInstanceUID, nested.CodeMeaning = CANARY, UID_ROOT + ".9", CANARY
    ds.ReferencedStudySequence = ds.RequestAttributesSequence = ds.OtherPatientIDsSequence = [nested]
    block = ds.private_block(0x0029, CANARY, create=True)
    block.add_new(0x01, "LO", CANARY)
    block.add_new(0x02, "OB", CANARY.encode() + b"\0")
    ds.FrameOfReferenceUID = UID_ROOT + ".4"
    return ds


def write_study(folder: Path, *, study: int = 1, skip: tuple[int, ...] = ()) -> Path:
    """The chest as a series whose names and tags are canaries."""
    tags = personal_tags()
    for k, path in enumerate(write_dicom_series(folder, chest(), patient_id=CANARY, series_seed="s", compress=False)):
        dataset = pydicom.dcmread(path)
        path.unlink()
        if k in skip:
            continue
        dataset.update(tags)
        dataset.PatientID = f"{CANARY}-{study}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{UID_ROOT}.{study}", f"{UID_ROOT}.{study}.1"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID_ROOT}.{study}.1.{k}"
        dataset.file_meta.SourceApplicationEntityTitle = CANARY
        dataset.file_meta.PrivateInformationCreatorUID = UID_ROOT
        dataset.file_meta.PrivateInformation = CANARY.encode() + b"\0"
        dataset.preamble = (CANARY.encode() * 15)[:128]
        dataset.save_as(folder / f"{CANARY}^Anna {BIRD_DATE} {k:02d}")
    return folder


def write_nifti(path: Path) -> Path:
    """A gzip NIfTI with canaries in every text field of its header, its extension and its gzip name."""
    volume = chest()
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    plain = path.with_suffix(".plain.nii")
    sitk.WriteImage(image, str(plain))
    raw = bytearray(plain.read_bytes())
    plain.unlink()
    for offset, size in (
        (4, 10),
        (14, 18),
        (148, 80),
        (228, 24),
        (328, 16),
    ):  # data_type, db_name, descrip, aux, intent
        raw[offset : offset + size] = (CANARY.encode() * 9)[: size - 1].ljust(size, b"\0")
    extension = CANARY.encode() * 10
    extension = struct.pack("<2i", 8 + len(extension) + 6, 6) + extension.ljust(len(extension) + 6, b"\0")
    struct.pack_into("<f", raw, 108, 352 + len(extension))
    header = bytes(raw[:348]) + b"\1\0\0\0" + extension
    with path.open("wb") as stream, gzip.GzipFile(CANARY, "wb", fileobj=stream, mtime=0) as packed:
        packed.write(header + bytes(raw[352:]))
    return path


def write_itk(path: Path) -> Path:
    """An NRRD or MHA with canaries as keys, values and comments."""
    volume = chest()
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    sitk.WriteImage(image, str(path))
    data = path.read_bytes()
    if path.suffix == ".nrrd":
        first, rest = data.split(b"\n", 1)
        text = f"# {CANARY}\ncontent: {CANARY}\n{CANARY}:={CANARY}\n".encode()
        path.write_bytes(first + b"\n" + text + rest)
    else:
        text = f"Comment = {CANARY}\nName = {CANARY}\nID = {BIRD_NUMBER}\n{CANARY} = {CANARY}\n".encode()
        first, rest = data.split(b"\n", 1)
        path.write_bytes(first + b"\n" + text + rest)
    return path


def write_zip(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = CANARY.encode()
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{CANARY} Anna/{BIRD_DATE}/{file.name}")
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good series below a folder named after the patient."""
    root = tmp_path_factory.mktemp("good") / f"{CANARY} Anna"
    write_study(root / f"dicom {BIRD_DATE}")
    return root


@pytest.fixture(scope="module")
def bad_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Series and files that are refused, each for another reason."""
    root = tmp_path_factory.mktemp("bad") / f"{CANARY} Berta"
    write_study(root / f"{CANARY}-gap", study=2, skip=(7,))
    cut = write_study(root / f"{CANARY}-cut", study=3)
    victim = sorted(cut.iterdir())[5]
    victim.write_bytes(victim.read_bytes()[:-3000])
    (root / f"{CANARY}-wrong.nii.gz").write_bytes(b"no image of " + CANARY.encode())
    (root / f"{CANARY}-cut.nrrd").write_bytes(write_itk(root / "whole.nrrd").read_bytes()[:5000])
    (root / "whole.nrrd").unlink()
    (root / f"{CANARY}.zip").write_bytes(b"PK\3\4" + b"damaged " + CANARY.encode() * 40)
    return root


# ---------------------------------------------------------------- what is searched, and how


def unpacked(path: Path) -> Iterator[bytes]:
    """The bytes of a file, as they are and unpacked."""
    raw = path.read_bytes()
    yield raw
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    elif raw[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at < len(raw):
            (length,) = struct.unpack_from(">I", raw, at)
            kind, data = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
            if kind in (b"zTXt", b"iTXt", b"iCCP") and b"\x78" in data:
                yield zlib.decompressobj().decompress(data[data.index(b"\x78") :])
            at += 12 + length
    elif h5py.is_hdf5(path):
        found: list[bytes] = []

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            found.append(name.encode())
            found.extend(f"{key}={value!r}".encode() for key, value in item.attrs.items())
            if isinstance(item, h5py.Dataset) and (item.dtype.kind in "SOU" or item.dtype == np.uint8):
                found.append(item[()].tobytes() if item.dtype.kind != "O" else repr(item[()]).encode())

        with h5py.File(path) as file:
            visit("/", file)
            file.visititems(visit)
        yield b"\n".join(found)
    elif path.suffix == ".html":
        for data in re.findall(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", raw):
            yield base64.b64decode(data)
    elif zipfile.is_zipfile(path):  # a training checkpoint
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name.encode() + archive.read(name)


def assert_clean_text(text: str, *, what: str) -> None:
    for canary in CANARIES:
        at = text.find(canary)
        assert at < 0, f"{what}: ...{text[max(0, at - 120) : at + 80]}..."


def assert_clean_files(*roots: Path) -> int:
    """No canary in any file or name below the roots; how many files were looked at."""
    count = 0
    for root in roots:
        for path in (p for p in (root, *root.rglob("*")) if p.is_file()):
            count += 1
            assert_clean_text(str(path.relative_to(root.parent)), what="a file name")
            for data in unpacked(path):
                for canary in CANARIES:
                    assert canary.encode() not in data, f"{canary} in {path}"
                    assert canary.encode("utf-16-le") not in data, f"{canary} (UTF-16) in {path}"
    return count


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def preprocess(*arguments: object, code: int = 0) -> Any:
    return call("preprocess", *arguments, "--spacing-mm", "4", "--patch-size", "8,8,8", code=code)


# ---------------------------------------------------------------- the tests


def test_the_search_finds_what_it_must(tmp_path: Path) -> None:
    """Each kind of artefact with a canary in its most hidden place."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        text = f'{{"from": "{CANARY}"}}'.encode()
        file.create_dataset("json", data=np.frombuffer(text, np.uint8), chunks=(len(text),), compression="gzip")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_group("deep/er").attrs["source"] = CANARY
    text = b"Comment\0\0" + zlib.compress(CANARY.encode())
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + b"\0\0\0\0"
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(b"\0" * 148 + CANARY.encode()))
    (tmp_path / "e.csv").write_text(f"case,{BIRD_DATE}\n", encoding="utf-8")
    picture = base64.b64encode(b"\xff\xd8\xff\xfe" + CANARY.encode()).decode()
    (tmp_path / "f.html").write_text(f'<img src="data:image/jpeg;base64,{picture}">', encoding="utf-8")
    for path in tmp_path.iterdir():
        with pytest.raises(AssertionError):
            assert_clean_files(path)


def test_canaries_reach_no_artefact_and_no_output(scans: Path, tmp_path: Path) -> None:
    store, ids = tmp_path / "cohort", tmp_path / "ids.csv"
    results = [preprocess(scans, "-o", store, "--id-map", ids, "-v")]
    case_id = Store(store).case_ids()[0]
    results += [preprocess(scans, "-o", store, "--id-map", ids)]  # again: complete already
    results += [call("info", store), call("doctor", store), call("info", Store(store).case_file(case_id, "volume"))]
    results += [call("doctor")]
    for result in results:
        assert_clean_text(result.stdout, what="standard output")
        assert_clean_text(result.stderr, what="standard error")
    assert assert_clean_files(store) >= 2
    assert len(case_id) == 12
    (row,) = read_id_map(ids)  # the only link back, private and outside the store
    assert row["case_id"] == case_id
    assert CANARY in row["source"]
    assert stat.S_IMODE(ids.stat().st_mode) == 0o600


def test_names_and_text_fields_of_image_files_reach_nothing(tmp_path: Path) -> None:
    folder = tmp_path / CANARY
    folder.mkdir()
    write_nifti(folder / f"{CANARY}.nii.gz")
    write_itk(folder / f"{CANARY} {BIRD_DATE}.nrrd")
    write_itk(folder / f"{CANARY}.mha")
    manifest = tmp_path / f"{CANARY}.csv"
    rows = [f"{path},case-{i},p-{i}" for i, path in enumerate(sorted(folder.iterdir()))]
    manifest.write_text("\n".join(["path,case_id,patient_id", *rows]) + "\n", encoding="utf-8")
    result = preprocess("--manifest", manifest, "-o", tmp_path / "cohort", "-v")
    assert_clean_text(result.stdout + result.stderr, what="output")
    assert assert_clean_files(tmp_path / "cohort") >= 4


def write_lung_mask(path: Path, *, sides: bool = True) -> Path:
    """The lungs of the chest: 1 left and 2 right, or the wrong way round."""
    image = sitk.ReadImage(str(write_itk(path)))
    hu = sitk.GetArrayFromImage(image)
    lung = (hu < -600) & (hu > -950)
    left = np.arange(hu.shape[2]) >= hu.shape[2] / 2
    labels = np.where(lung, np.where(left == sides, 1, 2), 0).astype(np.uint8)
    mask = sitk.GetImageFromArray(labels)
    mask.CopyInformation(image)
    sitk.WriteImage(mask, str(path))
    return path


def test_names_of_lung_masks_reach_nothing(tmp_path: Path) -> None:
    scan = write_nifti(tmp_path / f"{CANARY}.nii.gz")
    (tmp_path / f"{CANARY} masks").mkdir()
    mask = write_lung_mask(tmp_path / f"{CANARY} masks" / f"{CANARY}.nrrd")
    for number, given in enumerate((mask, mask.parent)):
        result = preprocess(scan, "-o", tmp_path / f"cohort-{number}", "--lung-mask", given, "-v")
        assert_clean_text(result.stdout + result.stderr, what="output")
        assert assert_clean_files(tmp_path / f"cohort-{number}") >= 2
    write_lung_mask(mask, sides=False)
    result = preprocess(scan, "-o", tmp_path / "cohort-2", "--lung-mask", mask, "--lung-mask-labels", "lungseg", code=3)
    assert_clean_text(result.stdout + result.stderr, what="output")  # it fits no lung: the case id tells which one
    mask.write_bytes(b"no image")
    result = preprocess(scan, "-o", tmp_path / "cohort-3", "--lung-mask", mask.parent, code=3)
    assert_clean_text(result.stdout, what="standard output")
    assert CANARY in result.stderr  # the user must know which file is damaged


def test_names_of_archives_and_members_reach_nothing(scans: Path, tmp_path: Path) -> None:
    (tmp_path / CANARY).mkdir()
    archive = write_zip(tmp_path / CANARY / f"{CANARY}.zip", next(scans.iterdir()))
    result = preprocess(archive, "-o", tmp_path / "cohort", "-v")
    assert_clean_text(result.stdout + result.stderr, what="output")
    assert assert_clean_files(tmp_path / "cohort") >= 2


@pytest.mark.parametrize("mode", [("--list",), ("--check",), ("--list", "--json"), ("--check", "--json")])
def test_listings_and_verdicts_name_nobody(scans: Path, bad_scans: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    manifest = tmp_path / f"{CANARY}.csv"
    rows = [f"{path},case-{i}" for i, path in enumerate((next(scans.iterdir()), *sorted(bad_scans.iterdir())))]
    manifest.write_text("\n".join(["path,case_id", *rows]) + "\n", encoding="utf-8")
    result = preprocess(*(("--manifest", manifest) if "--json" in mode else (scans, bad_scans)), *mode, code=8)
    assert_clean_text(result.stdout, what="standard output")
    if "--json" in mode:
        assert json.loads(result.stdout)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("mode", [("--list",), ("--list", "--json"), ("--check", "--json")])
def test_listings_of_good_scans_name_nobody_on_standard_error(scans: Path, mode: tuple[str, ...]) -> None:
    result = preprocess(scans, *mode)
    assert_clean_text(result.stdout + result.stderr, what="output")


def test_refused_scans_are_named_on_standard_error_only(scans: Path, bad_scans: Path, tmp_path: Path) -> None:
    store = tmp_path / "cohort"
    result = preprocess(scans, bad_scans, "-o", store, code=8)
    assert_clean_text(result.stdout, what="standard output")
    assert "Traceback" not in result.stderr
    assert_clean_files(store)
    only = bad_scans / f"{CANARY}-wrong.nii.gz"
    result = preprocess(only, "-o", tmp_path / "none", code=3)
    assert_clean_text(result.stdout, what="standard output")
    assert CANARY in result.stderr  # the user must know which one


@pytest.mark.slow
def test_canaries_reach_nothing_that_the_whole_pipeline_makes(scans: Path, tmp_path: Path) -> None:
    (tmp_path / CANARY).mkdir()
    settings = tmp_path / CANARY / f"{CANARY}.toml"
    settings.write_text(TINY, encoding="utf-8")
    second = write_nifti(tmp_path / CANARY / f"{CANARY}.nii.gz")
    reference = sitk.ReadImage(str(second))
    reference = sitk.Cast((reference < -600) & (reference > -950), sitk.sitkUInt8)
    reference_path = tmp_path / CANARY / f"{CANARY}-labels.nii.gz"
    sitk.WriteImage(reference, str(reference_path))
    manifest = tmp_path / CANARY / f"{CANARY}.csv"
    rows = ["path,case_id,patient_id,split,reference", f"{next(scans.iterdir())},case-1,p-1,train,",
            f"{second},case-2,p-2,test,{reference_path}"]  # fmt: skip
    manifest.write_text("\n".join(rows) + "\n", encoding="utf-8")
    out, ids = tmp_path / "out", tmp_path / "ids.csv"
    results = [
        call("run", "-o", out, "--train", "--preset", "tiny", "--manifest", manifest, "--config", settings,
             "--id-map", ids, "-v"),
        call("refine", out / "store", "--export", tmp_path / "export", "--overwrite", "-v"),
        call("evaluate", out / "store", "-o", tmp_path / "scores"),
        call("synthesize", out / "model", "-o", tmp_path / "synthetic", "--num", "2", "--steps", "2",
             "--real", out / "store"),
        call("report", out, "-o", tmp_path / "report", "--num-slices", "4", "--width-px", "96", "-v",
             "--scores", tmp_path / "scores", "--pictures", tmp_path / "synthetic"),
        call("info", out / "store"), call("info", out / "bundle.safetensors"), call("doctor", out / "store"),
    ]  # fmt: skip
    for result in results:
        assert_clean_text(result.stdout, what="standard output")
        assert_clean_text(result.stderr, what="standard error")
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".h5", ".json", ".jsonl", ".safetensors", ".pt", ".png", ".csv", ".gz", ".md", ".html"} <= suffixes
    made = [tmp_path / name for name in ("export", "scores", "synthetic", "report")]
    assert assert_clean_files(out, *made) > 25
    exported = (tmp_path / "export" / "case-2.nii.gz").read_bytes()
    header = gzip.decompress(exported)[:348]
    assert not header[148:252].strip(b"\0")  # descrip and aux_file stay blank
    assert not header[4:32].strip(b"\0")


def test_dicom_objects_carry_of_the_patient_what_the_standard_asks_for_and_no_more(
    scans: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Type 1 and 2 of the patient and study, so that an archive files it with its images; asked for by --dicom-seg."""
    pytest.importorskip("highdicom", reason="extra 'dicomseg' is not installed")
    (series,) = find_series(next(scans.iterdir())).series
    volume = read_series(series)
    labels = np.where(volume.array < -700, 1, 0).astype(np.uint8)
    path = tmp_path / "case-1.seg.dcm"
    write_segmentation(
        path, labels, volume.geometry, series, series.files,
        stored_axes=volume.stored_axes, stored_flips=volume.stored_flips,
    )  # fmt: skip
    report = tmp_path / "case-1.sr.dcm"
    rows = quantify(labels, labels > 0, volume.array, spacing_mm=volume.geometry.spacing_mm)
    write_measurements(report, measured_regions(CaseQuantities(tuple(rows))), path)
    of_patient_and_study = {
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
        "StudyID", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator",
    }  # fmt: skip
    # UIDs of what it refers to; that of the series is a content item of the report
    of_images = {"ReferencedSOPInstanceUID", "SeriesInstanceUID", "UID"}
    seen = set()
    read = [pydicom.dcmread(file) for file in (path, report)]
    for element in (element for found in read for element in (*found.file_meta, *found.iterall())):
        text = f"{element.value!r}" if element.VR != "SQ" else ""
        if any(canary in text for canary in CANARIES):
            seen.add(element.keyword)
    assert seen <= of_patient_and_study | of_images, seen
    assert {"PatientName", "PatientID", "StudyInstanceUID"} <= seen
    assert CANARY.encode() not in path.read_bytes()[:128]  # the preamble
    for warning in recwarn:
        assert_clean_text(str(warning.message), what="a warning")


@pytest.mark.slow
def test_ids_depend_on_the_salt_alone(scans: Path, tmp_path: Path) -> None:
    names = []
    for number, salt in enumerate(("one", "one", "two")):
        store = tmp_path / f"store-{number}"
        preprocess(scans, "-o", store, "--salt", salt, "-q")
        names.append(Store(store).case_ids())
    assert names[0] == names[1] != names[2]
