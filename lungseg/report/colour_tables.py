"""Names and colours of the label maps, as viewers read them: NIfTI holds neither."""

from __future__ import annotations

from collections.abc import Iterator

from lungseg.tissue import TISSUES, UNCLASSIFIED, UNCLASSIFIED_COLOUR

OPAQUE = 255


def slicer_colour_table() -> str:
    """Text of a colour table (.ctbl) of 3D Slicer: index, name without spaces, red, green, blue, opacity.

    Source
    ------
    Slicer developer guide, Colors: discrete colour lookup table.
    """
    lines = ["# Color table file tissues.ctbl", f"# {len(TISSUES) + 2} values", "0 Background 0 0 0 0"]
    for label, title, (red, green, blue) in _entries():
        lines.append(f"{label} {title.replace(' ', '_')} {red} {green} {blue} {OPAQUE}")
    return "\n".join(lines) + "\n"


def itksnap_labels() -> str:
    """Text of a label description file of ITK-SNAP: index, colour, opacity (0 to 1), shown, in the mesh, name.

    Source
    ------
    The header that ITK-SNAP writes into such files.
    """
    rule = "#" * 48
    lines = [
        rule,
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        rule,
        _snap_line(0, (0, 0, 0), visible=False, title="Clear Label"),
    ]
    lines += [_snap_line(label, colour, visible=True, title=title) for label, title, colour in _entries()]
    return "\n".join(lines) + "\n"


def _snap_line(label: int, colour: tuple[int, int, int], *, visible: bool, title: str) -> str:
    red, green, blue = colour
    shown = int(visible)
    return f'{label:5d} {red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}    "{title}"'


def _entries() -> Iterator[tuple[int, str, tuple[int, int, int]]]:
    """Label id, title and sRGB colour of every label of a map but 0."""
    for tissue, info in TISSUES.items():
        yield int(tissue), info.title, info.colour
    yield UNCLASSIFIED, "Unclassified lung", UNCLASSIFIED_COLOUR
