"""What ``lungseg evaluate`` compares: methods, cases, and the files of each; nothing is read here but names."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lungseg.config.cluster import ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.errors import InputError, StoreError, UsageError
from lungseg.scan.discovery import DICOM_SUFFIXES
from lungseg.scan.label_images import DEFAULT_MAP, label_files, label_stem
from lungseg.scan.label_maps import LabelMap, label_map
from lungseg.store.cases import Store, read_id_map
from lungseg.tissue import CLASS_NAMES, EVALUATION_VIEWS, LABEL_CONVENTIONS, LungLabel, class_name

log = logging.getLogger(__name__)

MAX_LISTED = 5
LABEL_MAP, REFERENCE_LABEL_MAP = "--label-map", "--reference-label-map"
NNUNET_CHANNEL = "_0000"
"""Ending of the first channel of a scan in the folders of nnU-Net."""
View = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Method:
    """Where predictions come from: one clustering of a store, or a folder of label maps."""

    name: str
    """In tables: of the clustering, else of the folder."""
    store: Store | None
    clustering: str
    folder: Path | None
    mapping: LabelMap | None
    """What the ids of its files mean; None: lungseg's, or the codes of a DICOM-SEG."""


@dataclass(frozen=True)
class Pair:
    """One case: its reference and the prediction of each method; any of them may be missing."""

    case_id: str
    patient_id: str
    reference: Path | None
    """Label map file; None: the store's own reference, or none at all."""
    reference_store: Store | None
    """Store whose own reference of this case counts."""
    predictions: tuple[Path | None, ...]
    """File of each method, in their order; None for a store's method, or if there is none."""
    image: Path | None = None
    """CT of the case, for pictures."""

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to compare with, readable or not."""
        return self.reference is not None or self.reference_store is not None


@dataclass(frozen=True)
class ScoringPlan:
    """Everything that is going to be scored."""

    methods: tuple[Method, ...]
    pairs: tuple[Pair, ...]
    view: View
    """Classes that the reference can tell."""
    reference_map: LabelMap | None
    notes: tuple[str, ...]
    """What a reader of the tables must know about it."""


def make_plan(
    predictions: Sequence[Store | Path],
    config: EvaluateConfig,
    *,
    reference: Path | None,
    id_map: Path | None,
    patients: Path | None,
    images: Path | None,
) -> ScoringPlan:
    """Methods, cases and files from what was given.

    Raises
    ------
    InputError
        If there is no reference at all, or none that fits a prediction; if a store lacks a clustering.
    UsageError
        If options do not go together.
    """
    methods = _methods(predictions, config)
    stores = [method.store for method in methods if method.store is not None]
    if reference is None and not stores:
        raise InputError(f"{predictions[0]} is a folder of label maps: give --reference DIR")
    reference_map = label_map(config.reference_label_map) if config.reference_label_map else None
    if reference is None and reference_map is not None:
        raise UsageError("--reference-label-map is for the files of --reference DIR; a store knows its own ids")
    aliases = _aliases(id_map)
    references = _by_case(reference, aliases) if reference is not None else {}
    folders = [_by_case(method.folder, aliases) if method.folder else {} for method in methods]
    if reference is not None and reference.is_file():  # two files are a pair, whatever their names
        folders = [
            dict.fromkeys(references, method.folder) if method.folder and method.folder.is_file() else files
            for method, files in zip(methods, folders, strict=True)
        ]
    view: View = EVALUATION_VIEWS[config.view]
    for method, files in zip(methods, folders, strict=True):
        _require_told(_targets(method.mapping, files), view, f"label maps of {method.name}", LABEL_MAP)
    told = _targets(reference_map, references)
    _require_told(told, view, "references", REFERENCE_LABEL_MAP)
    view, view_notes = _restricted(view, told)
    view_notes = (*_meanings(config.view, view, methods, reference_map), *view_notes)
    for method, files in zip(methods, folders, strict=True):
        known = _targets(method.mapping, files)
        blind = [name for name, ids in view.items() if method.folder and not known & set(map(int, ids))]
        if blind:
            text = f"The label map of {method.name} cannot tell {', '.join(blind)}: scored as missed."
            view_notes = (*view_notes, text)
    if stores:
        pairs, notes = _pairs_of_stores(methods, references, folders, reference)
        if patients is not None:
            raise UsageError("--patients is for folders of label maps: a store knows its patients")
    else:
        assert reference is not None
        pairs = _pairs_of_folders(methods, references, folders, reference)
        pairs, notes = _with_patients(pairs, patients)
    if not stores:
        notes = (*notes, "The lung's bounding box of the penalty is that of all labels of the reference.")
    if images is not None:
        pairs = _with_images(pairs, images, aliases)
    return ScoringPlan(methods, tuple(pairs), view, reference_map, (*view_notes, *notes))


# ---------------------------------------------------------------- methods


def _methods(predictions: Sequence[Store | Path], config: EvaluateConfig) -> tuple[Method, ...]:
    """One method for each clustering of each store and each folder."""
    places = [place if isinstance(place, Store) else _opened(Path(place)) for place in predictions]
    if not places:
        raise UsageError("give a patch store, or one or more folders of label maps")
    folders = [place for place in places if isinstance(place, Path)]
    stores = [place for place in places if isinstance(place, Store)]
    if not stores and config.names and len(config.names) != len(folders):
        raise UsageError(f"--names gives {len(config.names)} names for {len(folders)} folders")
    maps = _label_maps(config, folders, stores)
    clusterings = (config.names if stores else ()) or (ClusterConfig().run_name,)
    names = iter(_unique_names(folders) if stores or not config.names else list(config.names))
    methods: list[Method] = []
    for place in places:
        if isinstance(place, Store):
            for clustering in clusterings:
                _require_clustering(place, clustering)
                name = clustering if len(stores) == 1 else f"{place.path.resolve().name}/{clustering}"
                methods.append(Method(name, place, clustering, None, None))
        else:
            methods.append(Method(next(names), None, "", place, maps[folders.index(place)]))
    twice = [name for name, count in Counter(method.name for method in methods).items() if count > 1]
    if twice:
        raise UsageError(f"two methods would both be called {', '.join(twice)}: rename a folder, or give --names")
    return tuple(methods)


def _opened(path: Path) -> Store | Path:
    return Store(path) if (path / "store.json").is_file() else path


def _label_maps(config: EvaluateConfig, folders: Sequence[Path], stores: Sequence[Store]) -> list[LabelMap | None]:
    """Label map of each folder."""
    if not config.label_map:
        return [None] * len(folders)
    if not folders:
        raise UsageError("--label-map is for folders of label maps; the label maps of a store are lungseg's own")
    if len(config.label_map) not in (1, len(folders)):
        raise UsageError(f"--label-map gives {len(config.label_map)} label maps for {len(folders)} folders")
    maps: list[LabelMap | None] = [label_map(text) for text in config.label_map]
    return maps * len(folders) if len(maps) == 1 else maps


def _unique_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with those of the folders above where two are alike."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("one folder of predictions is given twice")


def _require_clustering(store: Store, clustering: str) -> None:
    """Refuse a name that no case of the store has labels of."""
    case_ids = store.require_cases()
    if any(store.case_file(case_id, "labels", clustering).exists() for case_id in case_ids):
        return
    found = sorted(
        {path.name.split(".")[1] for c in case_ids for path in store.case_file(c, "volume").parent.glob("labels.*.h5")}
    )
    there = f"there is {', '.join(found)}: give --names" if found else "run lungseg cluster and lungseg refine first"
    raise InputError(f"store {store.path} has no label maps of '{clustering}'; {there}")


def _targets(mapping: LabelMap | None, files: Mapping[str, Path]) -> frozenset[int]:
    """Classes that label maps can tell; all of them where segments or files say themselves what they are."""
    if mapping is None and any(path.is_dir() or path.name.lower().endswith(DICOM_SUFFIXES) for path in files.values()):
        return frozenset(CLASS_NAMES.values())
    return (mapping or DEFAULT_MAP).targets


def _require_told(told: frozenset[int], view: View, whose: str, option: str) -> None:
    """Refuse label maps that know no class of the view."""
    if not told & {int(i) for ids in view.values() for i in ids}:
        raise UsageError(
            f"the {whose} know none of {', '.join(view)}: choose another --view, or say what their ids mean with "
            f"{option} FILE or one of {', '.join(LABEL_CONVENTIONS)}"
        )


def _restricted(view: View, told: frozenset[int]) -> tuple[View, tuple[str, ...]]:
    """Classes of the view that the references can tell, and what is left out."""
    kept = {name: ids for name, ids in view.items() if told & set(map(int, ids))}
    notes = []
    if len(kept) < len(view):
        untold = ", ".join(name for name in view if name not in kept)
        notes.append(f"Not scored, for the label map of the references cannot tell them: {untold}.")
    for name, ids in kept.items():
        parts = [class_name(i) for i in ids if int(i) in told]
        if len(parts) < len(ids) and not set(ids) & set(LungLabel):  # one of left, right and whole lung is enough
            notes.append(f"Of {name} the label map of the references can tell {', '.join(parts)} only.")
    return kept, tuple(notes)


def _meanings(view_name: str, view: View, methods: Sequence[Method], reference_map: LabelMap | None) -> tuple[str, ...]:
    """What classes and ids mean, where it is not what a reader of lungseg's own tables expects."""
    notes = []
    if view_name != EvaluateConfig().view:
        classes = (f"{name} = {' + '.join(map(class_name, ids))}" for name, ids in view.items())
        notes.append(f"Classes of view {view_name}: {'; '.join(classes)}.")
    maps = (("the references", reference_map), *((method.name, method.mapping) for method in methods))
    read = [f"{side}: {mapping.name}" for side, mapping in maps if mapping is not None]
    if read:
        notes.append(f"Label maps: {'; '.join(read)}; what each id means stands in summary.json.")
    return tuple(notes)


# ---------------------------------------------------------------- cases


def _aliases(id_map: Path | None) -> dict[str, str]:
    """Case id of each source name; names that two sources share tell nothing."""
    if id_map is None:
        return {}
    rows = read_id_map(Path(id_map))
    stems = [label_stem(Path(row["source"])) for row in rows]
    return {stem: row["case_id"] for stem, row in zip(stems, rows, strict=True) if stems.count(stem) == 1}


def _by_case(folder: Path, aliases: Mapping[str, str]) -> dict[str, Path]:
    """Label maps of a folder by case id.

    Raises
    ------
    InputError
        If two files belong to one case: one named like it, and one like its source.
    """
    found: dict[str, Path] = {}
    for stem, path in label_files(folder).items():
        case_id = aliases.get(stem, stem)
        if case_id in found:
            raise InputError(f"{folder}: {found[case_id].name} and {path.name} both belong to case {case_id}; keep one")
        found[case_id] = path
    return found


def _pairs_of_stores(
    methods: Sequence[Method],
    references: Mapping[str, Path],
    folders: Sequence[Mapping[str, Path]],
    reference: Path | None,
) -> tuple[list[Pair], tuple[str, ...]]:
    """Cases of the stores with their references: of the folder, else (without one) the store's own.

    A store need not be annotated throughout: without a folder, cases that have no reference are only told. A folder of
    references is expected to hold all of them.
    """
    stores: list[Store] = []
    for method in methods:
        if method.store is not None and method.store not in stores:
            stores.append(method.store)
    home: dict[str, Store] = {}
    for store in stores:
        for case_id in store.require_cases():
            home.setdefault(case_id, store)
    pairs, unscored = [], []
    for case_id, store in home.items():
        own = reference is None and store.case_file(case_id, "reference").exists()
        if case_id not in references and not own:
            unscored.append(case_id)
            if reference is None:
                continue
        files = tuple(files.get(case_id) for files in folders)
        pairs.append(Pair(case_id, _patient(store, case_id), references.get(case_id), store if own else None, files))
    if len(unscored) == len(home):
        where = f"in {reference}" if reference else "in the store"
        raise InputError(
            f"no reference {where} belongs to a case of {stores[0].path}: name them <case_id>.nii.gz "
            f"(cases: {', '.join(list(home)[:MAX_LISTED])} ...), or give --id-map"
        )
    # file names of strangers may hold patients' names: they get numbers, and only -v tells which is which
    for number, (case_id, path) in enumerate(((c, p) for c, p in references.items() if c not in home), start=1):
        name = f"reference-{number:04d}"
        log.debug("evaluate: %s is %s", name, path)
        pairs.append(Pair(name, name, path, None, tuple(files.get(case_id) for files in folders)))
    strangers = [(i, p) for i, files in enumerate(folders) for c, p in files.items() if c not in {*home, *references}]
    for number, (index, path) in enumerate(strangers, start=1):
        name = f"prediction-{number:04d}"
        log.debug("evaluate: %s is %s", name, path)
        files = tuple(path if index == i else None for i in range(len(folders)))
        pairs.append(Pair(name, name, None, None, files))
    if not unscored or reference is not None:
        return pairs, ()
    more = " ..." if len(unscored) > MAX_LISTED else ""
    cases = "1 case of the store has" if len(unscored) == 1 else f"{len(unscored)} cases of the store have"
    return pairs, (f"Missing reference: {cases} none and {'is' if len(unscored) == 1 else 'are'} not scored: "
                   f"{', '.join(unscored[:MAX_LISTED])}{more}.",)  # fmt: skip


def _patient(store: Store, case_id: str) -> str:
    """Patient of a case; the case itself if its volume cannot be read (its scoring then fails and says why)."""
    try:
        with store.open(case_id, "volume") as volume:
            return str(volume.provenance["patient_id"])
    except StoreError:
        return case_id


def _pairs_of_folders(
    methods: Sequence[Method],
    references: Mapping[str, Path],
    folders: Sequence[Mapping[str, Path]],
    reference: Path,
) -> list[Pair]:
    """All cases that have a reference or a prediction; each is its own patient so far."""
    for method, files in zip(methods, folders, strict=True):
        if not set(files) & set(references):
            some = f"{method.folder}: {_few(files)}; {reference}: {_few(references)}"
            raise InputError(f"no label map of {method.folder} is named like one of {reference} ({some})")
    names = dict.fromkeys((*references, *(name for files in folders for name in files)))
    return [Pair(name, name, references.get(name), None, tuple(files.get(name) for files in folders)) for name in names]


def _few(files: Mapping[str, Path]) -> str:
    return ", ".join(list(files)[:2]) + (" ..." if len(files) > 2 else "") if files else "none"


def _with_patients(pairs: Sequence[Pair], table: Path | None) -> tuple[list[Pair], tuple[str, ...]]:
    """Pairs with the patients of a CSV file."""
    if table is None:
        return list(pairs), (
            "No patients were given (--patients CSV): each case counts as a patient of its own, and intervals are too "
            "narrow if patients have several.",
        )
    patients = read_patients(table)
    missing = [pair.case_id for pair in pairs if pair.case_id not in patients]
    if missing:
        raise InputError(f"{table}: no patient is given for cases {', '.join(missing[:MAX_LISTED])}")
    return [replace(pair, patient_id=patients[pair.case_id]) for pair in pairs], ()


def _with_images(pairs: Sequence[Pair], folder: Path, aliases: Mapping[str, str]) -> list[Pair]:
    """Pairs with the CT files of a folder, named like the references or as nnU-Net names channel 0.

    Raises
    ------
    InputError
        If no file belongs to any case.
    """
    files = {stem.removesuffix(NNUNET_CHANNEL): path for stem, path in _by_case(folder, aliases).items()}
    if not any(pair.case_id in files for pair in pairs):
        raise InputError(f"no scan of {folder} is named like a case ({_few(files)})")
    return [replace(pair, image=files.get(pair.case_id)) for pair in pairs]


def read_patients(path: Path) -> dict[str, str]:
    """Patient of each case, from a CSV file with columns ``case`` and ``patient`` (or ``case_id``, ``patient_id``).

    Raises
    ------
    InputError
        If the file cannot be read, lacks a column, or gives a case twice or without a patient.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = {name.strip().lower().removesuffix("_id"): name for name in reader.fieldnames or ()}
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table of patients: {error}") from error
    if not {"case", "patient"} <= set(columns):
        raise InputError(f"{path}: columns case and patient are needed; there are {', '.join(columns) or 'none'}")
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case_id, patient = ((row[columns[key]] or "").strip() for key in ("case", "patient"))
        if not case_id or not patient:
            raise InputError(f"{path}: line {number} lacks a case or a patient")
        if found.setdefault(case_id, patient) != patient:
            raise InputError(f"{path}: case {case_id} is given two patients")
    return found
