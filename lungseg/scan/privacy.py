"""Messages without names: paths and patient ids in a text become neutral words. RELIABILITY 4.5."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

MIN_LETTERS = 3
"""Shorter names are taken out of paths, but not where they stand alone: 'p1' or 'a' says nothing about a person."""
MIN_DIGITS = 5
"""Numbers of fewer digits stand in our own messages (slices, millimetres, Hounsfield units)."""
LONG_NAME = 6
"""From this length on a name is taken out of the middle of words too."""
_WORDS = """
    abdomen about above aerated absent accepted acquisition again against air air-filled all and another archive
    archives are array assume axes axial axis bad been below beside between binary body bone brain bronchi but
    bytes can cannot case cases chest choose chosen cip clinical clipped cohort cohorts column columns compressed
    compression convert copied copy coronal corrected coverage covering covers damaged data dataset dcm declared
    declares decoded decompress degrees denied desktop dicom dicomdir different digits disk documents does download
    downloads each empty enhanced errno error estimate exam expiration export exported exports fewer field file
    files filled first folder folders for frame frames from gantry gap gaps geometry give given grid gz has head
    header headers hold holds home hospital hrct image images img input inspiration instead interpolated
    interpolation into invalid its jpeg kept kernel label labels lack lacks large least left lies line list listed
    lists lobe lobes localizer location looked lung lungmask lungmask-lobes lungs lungseg made main manifest mask masks
    matrix media member mha mhd millimetres missing mnt modality more most multi-frame name names nan narrow needed
    needs neither nifti nii none not note nrrd number numbers oblique old once one only open opened opt option
    options orientation orientations origin original other others out output outside padding page part parts patch
    patches path patient patients permission pixel pixels position positions problem process processed raw read
    readable reader reason reasons reconstruction reference repaired report resampled rescale research results
    right root rows run sagittal same sample samples scan scanner scans scout secondary see series shape sharp
    sharper side sides single size sizes skipped slab slice slices slope small soft softer source space spaced
    spacing src stack stage standard start status store stored studies study such supported syntax table tables tag
    tags temp temporary test tests than that the their them thick thicker thin thinner this thorax tilt tmp too
    totalsegmentator trachea train training transfer truncated twice type uneven unevenly unexpected units unknown
    unpack unpacked unreadable upper use used user users val value values var volume volumes voxel voxels was were
    which whole with within without words work written zip
"""
ORDINARY_WORDS = frozenset(_WORDS.split())
"""Words of our own messages and everyday names of folders: as the name of a file they say nothing about a person."""


_ONLY = r"(?!\w|[.-]\w)"
"""Another path may begin in the same way."""
_WITH_REST = rf"(?:[/\\][^\s:;,'\")]*|{_ONLY})"
"""A file in that folder that is not known by name goes with it."""


def hide_names(text: str, places: Mapping[Path, str], words: Mapping[str, str] | None = None) -> str:
    """``text`` without the given paths, their folders and their names.

    Parameters
    ----------
    text : str
    places : mapping of Path to str
        Files and folders, and what each is to be called instead. Folders above them are called 'a folder'.
    words : mapping of str to str, optional
        Further texts to replace, such as a patient id; under the same rules as a name.

    Returns
    -------
    str
        Every such path is gone as a whole, with whatever follows it below the same folder; of other paths (a store
        beside the scans) the folders in common are gone and the rest is kept. A name on its own (with
        or without its suffix) is gone too, unless it is an ordinary word, has fewer than three letters or fewer
        than five digits and nothing else. Names of six characters and more are also found inside other words.
    """
    paths: dict[str, str] = {}
    names: dict[str, str] = {}
    folders: dict[Path, set[Path]] = {}
    """Folder as given -> the same, absolute, and with links followed."""
    for place, called in places.items():
        folder = place.parent
        if folder not in folders:
            folders[folder] = {folder, folder.absolute(), folder.resolve()}
        is_link = place.is_symlink()
        if not is_link and _is_plain(place.name) and _stem(place.name) not in text:
            continue  # most of the thousands of slices
        forms = {form / place.name for form in folders[folder]}
        if is_link:
            forms.add(place.resolve())
        for form in forms:
            _add_path(paths, str(form), called)
            _add_name(names, form.name, called)
    above: dict[str, str] = {}
    for folder in {one for same in folders.values() for form in same for one in (form, *form.parents)}:
        inside = not paths.keys().isdisjoint(str(one) for one in folder.parents)
        _add_path(paths if inside else above, str(folder), "a folder")
        _add_name(names, folder.name, "a folder")
    for word, called in (words or {}).items():
        _add_name(names, word, called)
    text = _replaced(text, paths, _WITH_REST)
    text = _replaced(text, above, _ONLY)
    return _replaced(text, names)


def replace_path(text: str, path: Path, called: str) -> str:
    """``text`` with a path as a whole replaced; a short one, such as `st`, is left alone inside other words."""
    return re.sub(rf"(?<![\w./\\-]){re.escape(str(path))}(?![\w-])", lambda _: called, text)


def _add_path(paths: dict[str, str], path: str, called: str) -> None:
    if len(Path(path).parts) > 1:  # '/', '.' and single words: the rules for names
        for form in _forms(path):
            paths.setdefault(form, called)  # what was given goes before the folder of something else


def _add_name(names: dict[str, str], name: str, called: str) -> None:
    for candidate in {name, _stem(name)}:
        if _tells(candidate):
            for form in _forms(candidate):
                names.setdefault(form, called)


def _stem(name: str) -> str:
    return re.sub(r"(?i)(\.nii\.gz|\.[a-z0-9]{1,8})$", "", name)


def _is_plain(name: str) -> bool:
    """Whether there is one way only to write a name."""
    return name.isascii() and name.isprintable() and not set(name) & {"'", '"', "\\"}


def _tells(name: str) -> bool:
    """Whether a name may say something about a person."""
    plain = name.strip(" ._-")
    if re.fullmatch(r"[\d .,_-]+", plain):
        return sum(c.isdigit() for c in plain) >= MIN_DIGITS
    return len(plain) >= MIN_LETTERS and plain.lower() not in ORDINARY_WORDS and any(c.isalnum() for c in plain)


def _forms(name: str) -> set[str]:
    """How one name may be written: composed or decomposed accents, and as Python quotes it in errors."""
    if _is_plain(name):
        return {name}
    plain = {name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)}
    quoted = {repr(form)[1:-1] for form in plain} | {ascii(form)[1:-1] for form in plain}
    return plain | quoted | {form.encode("utf-8", "backslashreplace").decode() for form in plain}


def _replaced(text: str, found: Mapping[str, str], end: str = "") -> str:
    """All of ``found`` at once, the longest first, so that no replacement is replaced again; ``end`` ends a path."""
    present = sorted((name for name in found if name in text), key=lambda name: (-len(name), name))
    if not present:
        return text
    pattern = "|".join(f"({re.escape(name) + end if end else _name_pattern(name)})" for name in present)

    def neutral(match: re.Match[str]) -> str:
        word = _word_around(text, match) if not end else ""
        is_ours = len(word) > len(match[0]) and word.lower() in ORDINARY_WORDS
        return match[0] if is_ours else found[present[(match.lastindex or 1) - 1]]

    return re.sub(pattern, neutral, text)


def _word_around(text: str, match: re.Match[str]) -> str:
    """The word that a name was found in: 'recons' in 'reconstruction' is no name."""
    start, end = match.span()
    while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    return text[start:end]


def _name_pattern(name: str) -> str:
    exact = re.escape(name)
    return exact if len(name) >= LONG_NAME else rf"(?<!\w){exact}(?!\w)"
