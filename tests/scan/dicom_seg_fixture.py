"""DICOM Segmentations written element by element, as PS3.3 A.51 describes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lungseg.scan.orientation import LPS_TO_SPL
from lungseg.scan.volume import Geometry

BINARY_CLASS, LABELMAP_CLASS = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"


def item(**values: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def make_seg(
    labels: np.ndarray,
    geometry: Geometry,
    *,
    kind: str = "BINARY",
    codes: dict[int, tuple[str, str]] | None = None,
    omit_empty: bool = True,
    spacing_between: bool = True,
    reverse: bool = False,
    overlap: Sequence[tuple[int, np.ndarray]] = (),
) -> FileDataset:
    """Segmentation of a label map (ids are segment numbers); ``overlap`` adds masks of segments to the frames."""
    numbers = sorted({int(n) for n in np.unique(labels)} - {0} | {n for n, _ in overlap})
    masks = [(n, labels == n) for n in numbers] + list(overlap)
    frames: list[tuple[int, int, np.ndarray]] = []
    order = range(len(labels))[::-1] if reverse else range(len(labels))
    for k in order:
        if kind == "LABELMAP":
            if labels[k].any() or not omit_empty:
                frames.append((k, 0, labels[k]))
            continue
        frames += [(k, n, mask[k]) for n, mask in masks if mask[k].any() or not omit_empty]
    cosines = LPS_TO_SPL.T @ np.asarray(geometry.direction)  # columns: slice, row, column axes in (L, P, S)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = BINARY_CLASS if kind != "LABELMAP" else LABELMAP_CLASS
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["seg"])
    seg = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    seg.SOPClassUID, seg.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    seg.Modality, seg.SegmentationType = "SEG", kind
    seg.SegmentSequence = [
        item(
            SegmentNumber=n,
            SegmentLabel=f"segment {n}",
            SegmentedPropertyTypeCodeSequence=[
                item(CodingSchemeDesignator=scheme, CodeValue=value, CodeMeaning="meaning")
                for scheme, value in ([codes[n]] if codes and n in codes else [])
            ],
        )
        for n in numbers
    ]
    measures = item(PixelSpacing=[geometry.spacing_mm[1], geometry.spacing_mm[2]])
    if spacing_between:
        measures.SpacingBetweenSlices = geometry.spacing_mm[0]
    plane = item(ImageOrientationPatient=[*cosines[:, 2].tolist(), *cosines[:, 1].tolist()])
    seg.SharedFunctionalGroupsSequence = [item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[plane])]
    groups = []
    for k, number, _ in frames:
        position = LPS_TO_SPL.T @ geometry.to_world((k, 0, 0))
        own = item(PlanePositionSequence=[item(ImagePositionPatient=[float(f"{v:.6f}") for v in position])])
        if kind != "LABELMAP":
            own.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]
        groups.append(own)
    seg.PerFrameFunctionalGroupsSequence = groups
    seg.NumberOfFrames, seg.Rows, seg.Columns = len(frames), labels.shape[1], labels.shape[2]
    seg.SamplesPerPixel, seg.PhotometricInterpretation, seg.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 1 if kind == "BINARY" else 8
    seg.BitsAllocated, seg.BitsStored, seg.HighBit = bits, bits, bits - 1
    stack = np.stack([pixels for _, _, pixels in frames]).astype(np.uint8)
    data = np.packbits(stack, bitorder="little").tobytes() if bits == 1 else stack.tobytes()
    seg.PixelData = data + b"\0" * (len(data) % 2)
    return seg


def write_seg(path: Path, seg: FileDataset) -> Path:
    seg.save_as(path, enforce_file_format=True)
    return path
