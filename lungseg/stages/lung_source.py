"""Where the lungs of each case come from: our own lung field, a mask given for it, or the network of `lungmask`.

Masks belong to scans by the rule of references: file stem = case id, else = name of the scan's file or folder. A scan
without its mask fails; it never falls back to another source of lungs.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import InputError, UsageError
from lungseg.scan.discovery import IMAGE_SUFFIXES, image_stem
from lungseg.scan.lung_mask_labels import AUTO
from lungseg.scan.lung_masks import MaskedLungs, lungs_from_mask, read_lung_mask
from lungseg.scan.lung_network import PACKAGE, LungNetwork, find_lung_network, lungs_from_network
from lungseg.scan.lungs import LungField
from lungseg.scan.sources import Search, Source, locations, voxel_digest
from lungseg.scan.volume import Volume
from lungseg.store.cases import hashed_id

log = logging.getLogger(__name__)

OWN, MASK, NETWORK = "lungseg", "mask", PACKAGE
"""Methods, as the provenance names them."""
MAX_LISTED = 5


@dataclass(frozen=True)
class LungSource:
    """What ``--lung-mask`` asks for."""

    method: str = OWN
    labels: str = AUTO
    """How the labels of masks are to be read."""
    resample: bool = False
    """Whether masks may lie on other grids than their scans."""
    place: Path | None = None
    """The file or folder given."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Masks of a folder by their stem."""
    network: LungNetwork | None = None
    force_cpu: bool = False

    def without_masks(self, found: Search) -> Search:
        """What was found by searching, without the masks themselves, which may lie below the given scans.

        Raises
        ------
        InputError
            If nothing is left.
        """
        if self.place is None:
            return found
        masks = {path.resolve() for path in (self.files.values() if self.files else (self.place,))}
        kept = tuple(s for s in found.sources if s.series is not None or s.path.resolve() not in masks)
        if not kept:
            raise InputError(f"nothing but the masks of --lung-mask {self.place} was found where scans should be")
        return replace(found, sources=kept)

    def match(self, sources: Sequence[Source]) -> list[Source]:
        """Sources with the masks that their ids or names tell; the ids of others are known once they were read.

        Raises
        ------
        InputError
            If one file is given for several scans.
        """
        if self.place is None:
            return list(sources)
        if not self.files:
            if len(sources) > 1:
                raise InputError(
                    f"--lung-mask {self.place} is the mask of one scan, but {len(sources)} scans were found. Give a "
                    "folder of masks named <case_id> or like the scans"
                )
            return [replace(source, lung_mask=self.place) for source in sources]
        ids = {source.case_id for source in sources if source.case_id}
        names = [image_stem(place) for place in locations(sources)]
        matched = []
        for source, name in zip(sources, names, strict=True):
            # two scans of one name cannot be told apart by a mask of that name: their case ids still can
            by_name = self.files.get(name) if names.count(name) == 1 and name not in ids else None
            matched.append(replace(source, lung_mask=self.files.get(source.case_id) or by_name or self.place))
        if all(source.case_id for source in sources):
            unused = len(set(self.files.values()) - {source.lung_mask for source in matched})
            if unused:
                log.info("preprocess: %d files of --lung-mask belong to none of these scans", unused)
        return matched

    def of_case(self, source: Source, salt: str) -> CaseLungs:
        """The lungs of a source whose case id is known; reads its mask.

        Raises
        ------
        InputError
            If there is no mask for it, or it cannot be read (names the file).
        """
        if self.method != MASK:
            return CaseLungs(self)
        path = self.files.get(source.case_id) or source.lung_mask
        if path is None or (self.files and path == self.place):
            raise InputError(
                f"no lung mask for this scan: the folder of --lung-mask holds neither {source.case_id}.nii.gz nor a "
                "file named like the scan. Add it, or leave the scan out; lungs of another origin are not mixed in"
            )
        mask = read_lung_mask(path)
        return CaseLungs(self, mask, hashed_id(salt, voxel_digest(mask)))


@dataclass(frozen=True)
class CaseLungs:
    """The lungs of one case, not looked for yet."""

    source: LungSource = LungSource()
    mask: Volume | None = None
    digest: str = ""
    """Fingerprint of the mask."""

    @property
    def settings(self) -> dict[str, Any]:
        """Among the settings of a case, compared with what is there; nothing for our own lungs."""
        if self.source.method == OWN:
            return {}
        labels = {"lung_mask_labels": self.source.labels} if self.mask else {}
        return {"lungs": self.source.method, **labels}

    @property
    def inputs(self) -> dict[str, str]:
        """Among the inputs of a case."""
        if self.mask:
            return {"lung_mask": self.digest}
        return {PACKAGE: self.source.network.identity} if self.source.network else {}

    def find(self, volume: Volume) -> MaskedLungs | None:
        """Left and right lung of the scan; None: our own lung field is asked for.

        Raises
        ------
        InputError
            If the mask does not fit the scan, see :func:`lungs_from_mask`.
        """
        if self.mask:
            return lungs_from_mask(self.mask, volume, labels=self.source.labels, allow_resample=self.source.resample)
        if self.source.network:
            return lungs_from_network(volume, self.source.network, force_cpu=self.source.force_cpu)
        return None

    def facts(self, lungs: LungField, convention: str) -> dict[str, Any]:
        """What the provenance says of where the lungs came from."""
        facts: dict[str, Any] = {"method": self.source.method, **self.inputs}
        if convention:
            facts["convention"] = convention
        return {**facts, "mean_hu": None if math.isnan(lungs.mean_hu) else round(lungs.mean_hu, 2)}


def choose_lungs(
    lung_mask: Path | str | None,
    config: PreprocessConfig,
    *,
    scans: Sequence[Path] = (),
    force_cpu: bool = False,
) -> LungSource:
    """What ``--lung-mask`` asks for, checked before any work.

    Parameters
    ----------
    lung_mask : path, `lungmask` or None
        A mask, a folder of masks, or the word for the network; None: our own lung field. A folder of that name is
        written ``./lungmask``.
    config : PreprocessConfig
        ``lung_mask_labels`` and ``resample_masks`` count.
    scans : paths
        Given to be searched, without a manifest: the folder of the masks may lie below one of them, but not be one.

    Raises
    ------
    InputError
        If there is no such file or folder, or no mask in it, or masks and scans share a folder.
    ResourceError
        If `lungmask` or its weights are not installed.
    UsageError
        If it is said how to read masks, but there are none.
    """
    if lung_mask is None or str(lung_mask) == PACKAGE:
        if config.lung_mask_labels != AUTO:
            raise UsageError("--lung-mask-labels says how to read mask files: give them with --lung-mask")
        if lung_mask is None:
            return LungSource()
        return LungSource(NETWORK, network=find_lung_network(), force_cpu=force_cpu)
    place = Path(lung_mask)
    asked = LungSource(MASK, labels=config.lung_mask_labels, resample=config.resample_masks, place=place)
    if place.is_file():
        if not place.name.lower().endswith(IMAGE_SUFFIXES):
            raise InputError(f"--lung-mask {place}: unknown format; give one of {', '.join(IMAGE_SUFFIXES)}")
        return asked
    if not place.is_dir():
        raise InputError(
            f"--lung-mask {place}: no such file or folder. Give a mask, a folder of masks named <case_id> or like the "
            f"scans, or the word {PACKAGE}"
        )
    if place.resolve() in {(path.parent if path.is_file() else path).resolve() for path in scans}:
        raise InputError(f"--lung-mask {place}: masks and scans lie in one folder; put the masks into one of their own")
    masks = [path for path in sorted(place.iterdir()) if path.name.lower().endswith(IMAGE_SUFFIXES)]
    if not masks:
        raise InputError(f"--lung-mask {place}: the folder holds no mask ({', '.join(IMAGE_SUFFIXES)})")
    repeated = [stem for stem, count in Counter(image_stem(path) for path in masks).items() if count > 1]
    if repeated:
        listed = ", ".join(repeated[:MAX_LISTED])
        raise InputError(f"--lung-mask {place}: several files are called {listed}; keep one of each")
    return replace(asked, files={image_stem(path): path for path in masks})
