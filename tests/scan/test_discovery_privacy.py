"""RELIABILITY 4.5: `Source.hide` takes every name of a scan out of a text and leaves our own words as they are."""

from __future__ import annotations

import re
import string
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import dicom, nifti

from lungseg.errors import InputError
from lungseg.scan.privacy import hide_names, replace_path
from lungseg.scan.sources import Source, find_sources

CANARY = "Zebrafink"
MESSAGES = (
    "series 4f825cbec2 with 30 slices not used: sharper kernel (B70f against B30f)",
    "missing slices: 1 between 12.50 and 17.50 mm (spacing 2.5 mm). Copy the complete series",
    "only 4 slices covering 10.0 mm; at least 6 slices and 20 mm are needed",
    "the lung is cut by the field of view; a localizer (scout) or a single reformatted image, not a scan: leave it out",
    "no readable DICOM image among the 17 files looked at. Give the folder of a CT series, or a .nii.gz file",
)


def awkward(path: Path) -> Source:
    return find_sources([path])[0]


@pytest.mark.parametrize(
    "name", ["dicom", "CT", "series", "scan", "slices", "1", "30", "a", "DICOM", "p1", "image.nii.gz", "file", "2.5"]
)
def test_ordinary_names_leave_messages_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / name
    source = Source(folder / name, mentioned=(folder / "1.dcm", folder / f"{name}.dcm"))
    for message in MESSAGES:
        assert source.hide(message) == message
    assert source.hide(f"{folder / name}: damaged") == "this scan: damaged"
    assert source.hide(f"{folder / name}/other.dcm: damaged") == "this scan: damaged"
    assert source.hide(f"{folder}/other/volume.h5: damaged") == "a folder/other/volume.h5: damaged"


def test_folders_named_like_tools_leave_messages_of_masks_alone() -> None:
    message = (
        "lobes missing: the mask holds 4 of 5 lobes; trachea included: 9 ml of trachea and main bronchi count as lung; "
        "as lungmask reads it; its labels fit totalsegmentator, binary and cip"
    )
    for name in ("lobes", "lungmask", "TotalSegmentator", "binary", "cip", "trachea", "lungmask-lobes"):
        source = Source(Path("scan.nii.gz"), lung_mask=Path("masks") / name / f"{name}.nii.gz")
        assert source.hide(message) == message


def test_a_path_is_replaced_as_a_whole_only() -> None:
    text = "st/cases/c1/volume.h5: damaged; take the nearest voxels, or delete st."
    assert replace_path(text, Path("st"), "store") == (
        "store/cases/c1/volume.h5: damaged; take the nearest voxels, or delete store."
    )
    assert replace_path("/data/st: gone", Path("/data/st"), "store") == "store: gone"
    assert replace_path("/data/st-2: gone", Path("/data/st"), "store") == "/data/st-2: gone"


COMPONENT = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs", "Cn")), max_size=12
)
QUOTES = (str, repr, ascii, lambda text: f"'{text}'", lambda text: f"({text})", lambda text: f"{text}: damaged")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_canary_in_any_component_never_survives(data: st.DataObject) -> None:
    """In the given path, folders, files, archive, members, other series; as a path, as a name, quoted or not."""
    parts = [data.draw(COMPONENT) for _ in range(5)]
    at = data.draw(st.integers(0, 4))
    parts[at] = data.draw(st.sampled_from(["{}", "x{}", "{} x", "{}_1", "-{}", "{}.dcm", "{}.nii.gz", "1{}2"])).format(
        CANARY
    )
    parts = [part if part.strip(". ") else "plain" for part in parts]
    path = Path("/", *parts) if data.draw(st.booleans()) else Path(*parts)
    places = {path: "this scan", path.parent / "other.dcm": "file 2"}
    named = data.draw(st.sampled_from([str(path), str(path.absolute()), str(path.parent), path.name, parts[at]]))
    text = f"case 3: {data.draw(st.sampled_from(QUOTES))(named)}, see {path.parent / 'new.dcm'}"
    assert CANARY not in hide_names(text, places)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    names=st.lists(st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=8), max_size=6),
    message=st.sampled_from(MESSAGES),
)
def test_words_of_messages_are_kept_unless_they_are_a_name(names: list[str], message: str) -> None:
    places = {Path("/", *[name for name in names if name.strip(".")], "file"): "this scan"}
    hidden = hide_names(message, places)
    if not any(len(name) > 2 and name.strip("._-") and stem(name) in message.lower() for name in names):
        assert hidden == message


def stem(name: str) -> str:
    return re.sub(r"\.[a-z0-9]{1,8}$", "", name)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(["folder", "file", "archive", "member folder", "member", "image", "given", "patient"]))
def test_problems_and_others_of_real_scans_hide_their_names(
    where: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A damaged slice, a second series and a damaged image: whatever their messages name."""
    tmp_path = tmp_path_factory.mktemp("hide")

    def name(place: str, other: str) -> str:
        return f"{CANARY}^Heinz {other}" if where == place else other

    folder = dicom(tmp_path / name("given", "in") / name("folder", "f") / "1", study="x", series="1",
                   patient=CANARY if where == "patient" else "p")  # fmt: skip
    second = dicom(folder.parent / "2", study="x", series="2", kernel="B70f",
                   patient=CANARY if where == "patient" else "p")  # fmt: skip
    for number, file in enumerate(sorted(second.iterdir())):
        file = file.rename(second / f"{name('file', 'IM')}{number}")
    file.write_bytes(file.read_bytes()[:200])
    if where.startswith(("archive", "member")):
        with zipfile.ZipFile(tmp_path / "in" / f"{name('archive', 'z')}.zip", "w") as packed:
            for part in (folder, second):
                for number, file in enumerate(sorted(part.iterdir())):
                    inside = f"{name('member folder', 'd')}/{part.name}/{name('member', 'IM')}{number}"
                    packed.write(file, inside)
                    file.unlink()
    image = nifti(tmp_path / name("given", "in") / f"{name('image', 'i')}.nii.gz")
    image.write_bytes(image.read_bytes()[:60])
    broken, study = find_sources([tmp_path / name("given", "in")])
    assert study.problem == ""
    assert len(study.others) == 1
    assert "in the same folder is" in study.others[0]
    with pytest.raises(InputError) as caught:
        broken.read()
    texts = [*study.others, broken.hide(str(caught.value))]
    texts += [study.hide(candidate.reason) for candidate in study.candidates]
    texts += [study.hide(repr(study)), broken.hide(repr(broken))]
    for text in texts:
        assert CANARY not in text
        assert str(tmp_path) not in text
    assert "truncated or damaged" in texts[1]


def test_a_second_path_with_the_same_beginning_is_gone_too() -> None:
    source = Source(Path("/data/Meier"))
    assert source.hide("/data/Meier Heinz") == "this scan Heinz"  # no name of this scan
    assert source.hide("/data/Meierling/1.dcm") == "a folder/Meierling/1.dcm"  # nor is this
    deeper = Source(Path("/data/Anna/in/Meier"))
    assert deeper.hide("/data/Anna/store/cases/c1/volume.h5 in use") == "a folder/store/cases/c1/volume.h5 in use"
    assert source.hide("/data/Meier/sub/1.dcm: damaged, in /data/Meier.") == "this scan: damaged, in this scan."
    assert source.hide("\\\\server\\x") == "\\\\server\\x"


@pytest.mark.parametrize("name", ["recons", "missin", "Truncate", "folder", "spacin", "series"])
def test_names_inside_our_own_words_leave_them_whole(name: str) -> None:
    message = "a single reconstruction, truncated: missing slices (spacing 2.5 mm) in the series; give the folder"
    assert hide_names(message, {Path("/in") / name / "x.dcm": "file 1"}) == message


def test_a_name_inside_another_word_is_gone_all_the_same() -> None:
    assert hide_names("see Meierhans_2 and meMeierhans", {Path("/in/Meierhans/1"): "file 1"}) == (
        "see a folder_2 and mea folder"
    )
