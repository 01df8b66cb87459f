"""Pictures that stages leave beside their results, and where a report finds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lungseg.report.page import Picture
from lungseg.tissue import Tissue

log = logging.getLogger(__name__)

EMBEDDING, SAMPLES = "embedding.png", "samples.png"
WORST_PAIRS = "worst.html"
"""Page of the worst class-case pairs, as `evaluate` writes it."""
CAPTIONS = {
    "boxplot": (
        "Evaluation: agreement with the reference.",
        "Each point is a class of a scan; the line is the median. DSC is best at 1, HD95 at 0.",
    ),
    "embedding": (
        "Clustering: what was clustered.",
        "Each point is a token. Where colours of names lie apart and follow HU, names are well founded; where one name "
        "covers unlike HU, look at its components in clusters.json.",
    ),
    "curves": (
        "Training: losses and collapse.",
        "Held-out losses that rise mean overfitting; an effective rank or a cosine beyond its dotted line means that "
        "the embeddings collapse.",
    ),
    "samples": (
        "Synthesis: drawn beside real patches.",
        "Texture and Hounsfield units should be alike; equal drawn patches would mean that the model repeats itself.",
    ),
}
"""Title and what to look for, by the stem of the file."""
PREVIEW = (
    "Training: patches that the network draws after {images:,} images.",
    "Noise here is a network not yet trained.",
)
MAX_PICTURE_BYTES = 2 * 2**20
"""Larger pictures of other stages are left out of the page."""
MAX_PAGE_BYTES = 64 * 2**20
"""A larger page of worst pairs is not copied."""


def stage_pictures(folders: Sequence[tuple[str, Path]]) -> list[Picture]:
    """Pictures that stages left in these folders, in the order of the folders.

    Parameters
    ----------
    folders : sequence of (title, path)
        The title stands before the name of a picture that is not known. Folders that are not there are passed over.

    Returns
    -------
    list of Picture
        With the last of ``previews/`` of a training run; each picture once, those above ``MAX_PICTURE_BYTES`` left out.
    """
    found: dict[Path, Picture] = {}
    for title, folder in folders:
        files = sorted(folder.glob("*.png")) + sorted((folder / "previews").glob("[0-9]*.png"))[-1:]
        for path in files:
            if path.resolve() in found or path.stat().st_size > MAX_PICTURE_BYTES:
                continue
            name = path.stem
            heading, explained = CAPTIONS.get(name, (f"{title}: {name.replace('_', ' ').replace('-', ' ')}.", ""))
            if name.isdecimal():
                heading, explained, name = PREVIEW[0].format(images=int(name)), PREVIEW[1], "training-preview"
            if name not in (*CAPTIONS, "training-preview"):
                name = "picture"
            # folders may hold pictures of one name: numbered in the order of the page
            address = f"pictures/{len(found) + 1}-{name}.png"
            found[path.resolve()] = Picture(heading, path.read_bytes(), explained, address)
    return list(found.values())


def drawn(make: Callable[[], bytes], what: str) -> bytes | None:
    """The picture that ``make`` draws; None, with a warning, where matplotlib is missing (a node of a cluster)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.warning("%s is not drawn, as matplotlib is not installed", what)
        return None
    return make()


def embedding_picture(
    tokens: np.ndarray, posterior: np.ndarray, density_hu: np.ndarray, tissues: Sequence[Tissue]
) -> dict[str, bytes]:
    """``embedding.png`` of the tokens a fit was made of, for its folder.

    Parameters
    ----------
    tokens : float array, shape (N, C)
        As they were clustered. ``MAX_POINTS`` of them are drawn, at random but always the same.
    posterior : float array, shape (N, K)
    density_hu : float array, shape (N,)
        Median HU of each.
    tissues : sequence of K Tissue
        Name of each component.

    Returns
    -------
    dict of file name to PNG
        Empty where matplotlib is missing, or with fewer than two tokens.
    """
    from lungseg.report.embedding_map import MAX_POINTS, embedding_map_png

    # drawn from all, so that no case lies over the others
    chosen = np.random.Generator(np.random.Philox(0)).permutation(len(tokens))[:MAX_POINTS]
    if len(chosen) < 2:
        return {}
    shown = tokens[chosen], posterior[chosen], density_hu[chosen]
    picture = drawn(lambda: embedding_map_png(*shown, tissues), EMBEDDING)
    return {} if picture is None else {EMBEDDING: picture}
