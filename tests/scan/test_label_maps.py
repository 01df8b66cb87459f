"""Label maps: every format says the same, every id must be known, no name is guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lungseg.errors import InputError, UsageError
from lungseg.scan.label_maps import label_map, read_label_map, to_classes
from lungseg.tissue import (
    CLASS_NAMES,
    EVALUATION_VIEWS,
    LABEL_CONVENTIONS,
    OUTSIDE,
    UNCLASSIFIED,
    LungLabel,
    Tissue,
    class_name,
)

WANTED = {1: Tissue.GGO, 2: Tissue.CONSOLIDATION, 3: OUTSIDE, 4: Tissue.FIBROSIS, 5: Tissue.FIBROSIS}
FILES = {
    "id_to_name.json": '{"1": "GGO", "2": "consolidation", "3": null, "4": "reticulation", "5": "Honeycombing"}',
    "dataset.json": (
        '{"labels": {"background": 0, "ground-glass": 1, "consolidation": 2, "none": 3, "fibrosis": [4, 5]},'
        ' "file_ending": ".nii.gz"}'
    ),
    "name_to_id.toml": 'ggo = 1\nconsolidation = 2\nnone = 3\nfibrosis = [4, 5]\n',
    "table.csv": "id,name\n1,ggo\n2,consolidation\n3,\n4,fibrosis\n5,fibrosis\n",
    "table.tsv": "Label\tName\n1\tground glass\n2\tConsolidation\n3\tnone\n4\tFibrosis\n5\tfibrosis\n",
    "slicer.ctbl": (
        "# Color table\n0 Background 0 0 0 0\n1 Ground_glass 128 174 128 255\n2 consolidation 241 214 145 255\n"
        "3 none 1 1 1 255\n4 fibrosis 1 2 3 255\n5 fibrosis 1 2 3 255\n"
    ),
    "itksnap.txt": (
        '# ITK-SnAP Label Description File\n    0     0    0    0        0  0  0    "Clear Label"\n'
        '    1   255    0    0        1  1  1    "ground glass opacity"\n    2     0  255    0        1  1  1    '
        '"consolidation"\n    3 1 2 3 0.5 1 1 "none"\n    4 1 2 3 1 1 1 "fibrosis"\n    5 1 2 3 1 1 1 "fibrosis"\n'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    mapping = read_label_map(tmp_path / name)
    assert {label: mapping.class_of(label) for label in WANTED} == WANTED
    assert mapping.class_of(0) == OUTSIDE
    assert mapping.class_of(6) is None
    assert name not in str(mapping.to_dict())  # file names may hold patients'


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", '{"1": "lesion"}', "'lesion' is none of our classes"),
        ("a.json", '{"1": "ggo", "fibrosis": 1}', "id 1 is given two classes"),
        ("a.json", '{"0": "healthy"}', "0 is outside"),
        ("a.json", '{"ignore": 3, "ggo": 1}', "'ignore' is none of our classes"),
        ("a.json", '{"ggo": true}', "needs an id"),
        ("a.json", '["ggo"]', "not understood"),
        ("a.json", '{"1": ', "not understood"),
        ("a.toml", "ggo = 70000", "ids are 1 to 65535"),
        ("a.csv", "number,text\n1,ggo\n", "columns id and name are needed"),
        ("a.txt", "1 ggo\n", "not understood.*line '1 ggo'"),
        ("a.csv", "id,name\n1,none\n", "no id is mapped to a class"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=match):
        label_map(str(tmp_path / name))


def test_unknown_names_list_the_built_in_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a file nor one of lungseg, .*medseg.*totalsegmentator"):
        label_map("nnunet")


def test_built_in_conventions_use_known_classes_only() -> None:
    known = set(CLASS_NAMES.values())
    for name, convention in LABEL_CONVENTIONS.items():
        assert set(map(int, convention.classes.values())) <= known, name
        assert convention.source
    assert {int(i) for view in EVALUATION_VIEWS.values() for ids in view.values() for i in ids} <= known
    assert [class_name(i) for i in (0, 255, 3, 101)] == ["none", "unclassified", "ggo", "lung left"]


@pytest.mark.parametrize(
    ("name", "label", "wanted"),
    [
        ("cip", 4 * 256 + 9, Tissue.EMPHYSEMA),  # emphysematous, left upper third
        ("cip", 5 * 256 + 2, Tissue.GGO),
        ("cip", 37 * 256 + 14, Tissue.FIBROSIS),  # honeycombing
        ("cip", 2, OUTSIDE),  # right lung, no type: not annotated
        ("cip", 2 * 256 + 58, OUTSIDE),  # airway
        ("cip", 86 * 256 + 2, None),  # nodule
        ("cip-lungs", 2, LungLabel.RIGHT),
        ("cip-lungs", 3 * 256 + 9, LungLabel.LEFT),  # vessel in the left upper third
        ("cip-lungs", 512, OUTSIDE),
        ("medseg", 3, OUTSIDE),
        ("lungmask", 1, LungLabel.RIGHT),
        ("lungmask-lobes", 2, LungLabel.LEFT),
        ("totalsegmentator", 13, LungLabel.RIGHT),
        ("totalsegmentator", 5, OUTSIDE),  # liver
        ("totalsegmentator", 118, None),
        ("lungseg", 255, UNCLASSIFIED),
        ("lungseg", 101, None),
    ],
)
def test_ids_of_other_tools(name: str, label: int, wanted: int | None) -> None:
    assert label_map(name).class_of(label) == wanted


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_become_classes(dtype: type) -> None:
    labels = np.array([[[0, 1, 2]], [[3, 1, 0]]], dtype)
    out = to_classes(labels, label_map("medseg"), name="x", option="--label-map")
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, [[[0, 3, 5]], [[0, 3, 0]]])


def test_row_34_foreign_ids_are_listed_with_voxels_and_fix() -> None:
    labels = np.zeros((2, 3, 4), np.uint16)
    labels[0, 0, :3], labels[1, 1, 1] = 9, 700
    match = r"the prediction holds .*'medseg' does not know: 9 \(3 voxels\), 700 \(1 voxels\).*--label-map FILE"
    with pytest.raises(InputError, match=match):
        to_classes(labels, label_map("medseg"), name="the prediction", option="--label-map")
