"""Does distillation help? Students trained with and without it on equally many images, and a linear probe of each.

Run: ``python tests/benchmarks/distillation.py FOLDER [--images 4800] [--seeds 3]``. One process, one thread; killed and
run again it goes on where it was. ``--table`` prints what is there so far. Prints Markdown for RESULTS.md.

The students are those of preset `tiny` and never see a label. Labels are used by the probe alone: a logistic regression
on the tokens of the training phantoms, scored on phantoms of other seeds. All probes see the same tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from lungseg.config.ablations import ablation_config
from lungseg.config.cluster import ClusterConfig
from lungseg.config.execution import Execution
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.phantom import PhantomConfig
from lungseg.config.presets import make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import Student, load_student
from lungseg.diffusion.training_images import HELD_OUT_FIRST, TrainingImages
from lungseg.radiomics.dense import dense_descriptors
from lungseg.radiomics.descriptor import Standardisation
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.segmentation.encoding import encode_lung
from lungseg.segmentation.lattice import token_mask_fraction
from lungseg.segmentation.mixture import effective_rank
from lungseg.stages.extract_radiomics import extract_radiomics, load_standardisation
from lungseg.stages.phantom import phantom
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.atomic import read_json, write_json
from lungseg.store.cases import Store
from lungseg.store.patches import PatchSource
from lungseg.tissue import OUTSIDE, TISSUES, Tissue

PRESET = "tiny"
COHORTS = {"training": (62000, 8), "held-out": (62100, 4)}
"""First seed and number of the phantoms: full size, every severity equally often."""
ROWS = {
    "no-distillation": "diffusion alone",
    "6-sobel": "whole method: tokens, InfoNCE and regression",
    "patch-level": "one vector a patch is taught, and regression",
    "regression-only": "tokens, regression alone",
    "infonce-only": "tokens, InfoNCE alone",
}
"""Rows of ``lungseg.config.ablations``; of the whole method's row only the training counts here."""
WINDOWS = (8, 16)
"""Edges, in voxels, of the radiomics set beside the tokens."""
TRAINED_TOKENS, SCORED_TOKENS = 400, 1000
"""Tokens of each tissue and phantom the probe learns from and is scored on, at most."""
MIN_LUNG = 0.5
"""Share of lung in a token (METHOD 1.5 step 3)."""
HELD_OUT_PATCHES, HELD_OUT_BATCH = 128, 16
PROBE_ITERATIONS = 3000
QUIET = Execution(quiet=True)
TISSUE_IDS = (Tissue.HEALTHY, Tissue.EMPHYSEMA, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION)


@dataclass(frozen=True)
class Sites:
    """The tokens of one phantom that probes see: where they lie, their tissue, and the radiomics around them."""

    case_id: str
    index: np.ndarray
    """int (M, 3) on the lattice."""
    tissue: np.ndarray
    """uint8 (M,)."""
    radiomics: Mapping[int, np.ndarray]
    """Standardised descriptors float32 (M, 34), by window."""


def cohort(folder: Path, name: str) -> Store:
    """The phantoms of one part as a patch store; made once."""
    first, number = COHORTS[name]
    config = make_config(PhantomConfig, preset=PRESET, num=number, seed=first, severity="mixed", format="store")
    phantom(folder / name, config, execution=QUIET).require_complete()
    return Store(folder / name)


def token_tissue(store: Store, case_id: str, lung: np.ndarray, cell: int) -> np.ndarray:
    """Tissue that fills more than half of the lung of each token, 0 where none does; uint8 on the lattice."""
    with store.open(case_id, "reference") as reference, store.open(case_id, "volume") as volume:
        grids = [Geometry.from_dict(artefact.provenance["grid"]) for artefact in (reference, volume)]
        labels = resample_onto(reference.read("labels"), *grids, kind="mask", fill=OUTSIDE)
    share = token_mask_fraction(lung, cell)
    tissue = np.zeros(share.shape, dtype=np.uint8)
    for number in TISSUE_IDS:
        tissue[token_mask_fraction(lung & (labels == number), cell) > 0.5 * share] = number
    tissue[share < MIN_LUNG] = OUTSIDE
    return tissue


def find_sites(store: Store, standardised: Mapping[int, Standardisation], *, cell: int, most: int) -> Iterator[Sites]:
    """Sites of every phantom, the same for all students; kept in ``sites/`` beside the store."""
    for number, case_id in enumerate(store.case_ids()):
        path = store.path.parent / "sites" / f"{case_id}.npz"
        if not path.exists():
            with store.open(case_id, "volume") as volume:
                image, lung = volume.read("image"), volume.read("mask") > 0
                median = volume.provenance["lung_median_hu"]
            tissue = token_tissue(store, case_id, lung, cell)
            rng = np.random.default_rng(number)
            kept = [rng.permutation(np.argwhere(tissue == label))[:most] for label in TISSUE_IDS]
            index = np.concatenate(kept)
            found = {"index": index, "tissue": tissue[tuple(index.T)]}
            for window, standardisation in standardised.items():
                dense = dense_descriptors(
                    torch.from_numpy(image), torch.from_numpy(lung), lung_median_hu=median, window=window, stride=cell
                )
                found[f"radiomics{window}"] = standardisation.apply(dense[tuple(torch.from_numpy(index.T))]).numpy()
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **found)
        with np.load(path, allow_pickle=False) as found:
            radiomics = {window: found[f"radiomics{window}"] for window in standardised}
            yield Sites(case_id, found["index"], found["tissue"], radiomics)


class Bare(Student):
    """A student whose tokens are the bottleneck as it is, so that a lung is encoded once."""

    @property
    def embedding(self) -> int:
        """Channels of the bottleneck."""
        return self.unet.spec.token_channels

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """No head."""
        return tokens.float()


@torch.no_grad()
def tokens_at(
    student: Student, store: Store, sites: Sequence[Sites], config: ClusterConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and unit vectors of the bottleneck at each phantom's sites, float32 (M, C), all noise levels abreast."""
    bare = Bare(**{field.name: getattr(student, field.name) for field in dataclasses.fields(student)})
    embedded, bottleneck = [], []
    for own in sites:
        with store.open(own.case_id, "volume") as volume:
            features, _ = encode_lung(volume.read("image"), volume.read("mask") > 0, bare, config)
        levels = torch.from_numpy(np.ascontiguousarray(features[:, *own.index.T].T)).split(bare.embedding, dim=1)
        embedded.append(torch.cat([student.embed(level) for level in levels], dim=1).numpy())
        bottleneck.append(torch.cat([F.normalize(level, dim=1) for level in levels], dim=1).numpy())
    return embedded, bottleneck


def probe(parts: Mapping[str, Sequence[np.ndarray]], sites: Mapping[str, Sequence[Sites]]) -> dict[str, float]:
    """Balanced accuracy on the held-out phantoms, and the recall of each tissue, of features by part of the cohort."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # penalty 1 on standardised features: sklearn's default, not tuned for any row
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=PROBE_ITERATIONS))
    labels = {name: np.concatenate([own.tissue for own in sites[name]]) for name in COHORTS}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(np.concatenate(parts["training"]), labels["training"])
    said = model.predict(np.concatenate(parts["held-out"]))
    recall = recall_score(labels["held-out"], said, labels=list(map(int, TISSUE_IDS)), average=None)
    by_tissue = {TISSUES[tissue].name: float(r) for tissue, r in zip(TISSUE_IDS, recall, strict=True)}
    return {"balanced": float(recall.mean()), **by_tissue}


def radiomics_of(sites: Sequence[Sites], windows: Sequence[int]) -> list[np.ndarray]:
    """Descriptors of some windows side by side, for each phantom."""
    return [np.concatenate([own.radiomics[window] for window in windows], axis=1) for own in sites]


@torch.no_grad()
def held_out_loss(student: Student, store: Store) -> float:
    """L1 of the predicted noise on fixed patches of the held-out phantoms with fixed noise, every level as likely."""
    config = dataclasses.replace(student.config, seed=0, distill="none", low_noise_share=0.0, flips=False)
    volumes = [store.case_file(case_id, "volume") for case_id in store.case_ids()]
    source = PatchSource(volumes, size=config.patch_size, halo=0, seed=0, flips=False, cache_bytes=2**30)
    images = TrainingImages(source, config, augment=False)
    losses = []
    for start in range(0, HELD_OUT_PATCHES, HELD_OUT_BATCH):
        batch = default_collate([images[HELD_OUT_FIRST + start + i] for i in range(HELD_OUT_BATCH)])
        x_0 = student.window.normalise(batch["volume_hu"])
        x_t = student.schedule.q_sample(x_0, batch["t"], batch["eps"])
        said = student.unet(torch.stack([x_t, batch["mask"].float()], dim=1), batch["t"])[0][:, 0]
        target = student.schedule.target(x_0, batch["eps"], batch["t"], config.prediction)
        losses += (said - target).abs().flatten(1).mean(1).tolist()
    return statistics.fmean(losses)


def score(run: Path, stores: Mapping[str, Store], sites: Mapping[str, Sequence[Sites]]) -> dict[str, Any]:
    """All figures of one student."""
    student = load_student(run / "model.safetensors")
    config = make_config(ClusterConfig, preset=PRESET, encoding="slabs")
    encoded = {name: tokens_at(student, stores[name], sites[name], config) for name in COHORTS}
    tokens, bottleneck = ({name: both[i] for name, both in encoded.items()} for i in (0, 1))
    joined = {
        name: [
            np.concatenate(pair, axis=1) for pair in zip(tokens[name], radiomics_of(sites[name], WINDOWS), strict=True)
        ]
        for name in COHORTS
    }
    clean = np.concatenate(tokens["held-out"])[:, : student.embedding]  # the first level: the clean scan
    return {
        "tokens": probe(tokens, sites),
        "bottleneck": probe(bottleneck, sites),
        "tokens+radiomics": probe(joined, sites),
        "rank": effective_rank(clean.astype(np.float64)),
        "loss": held_out_loss(student, stores["held-out"]),
        "images": student.card["images"],
    }


def train_and_score(
    folder: Path, stores: Mapping[str, Store], sites: Mapping[str, Sequence[Sites]], *, images: int, seeds: int
) -> None:
    """Every row with one seed, then with the next."""
    for seed in range(seeds):
        for row in ROWS:
            path = scores_file(folder, row, seed, images)
            if path.exists():
                continue
            config = ablation_config(TrainConfig, row, preset=PRESET, seed=seed, total_images=images)
            run, began = path.with_suffix(""), time.perf_counter()
            train_ddpm(stores["training"], run, config, execution=QUIET)
            trained = time.perf_counter()
            write_json(path, score(run, stores, sites))
            print(f"{run.name}: {trained - began:.0f} s and {time.perf_counter() - trained:.0f} s", flush=True)


def scores_file(folder: Path, row: str, seed: int, images: int) -> Path:
    """Where the figures of one student are kept."""
    return folder / "runs" / f"{row}-{images}-{seed}.json"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(folder: Path, sites: Mapping[str, Sequence[Sites]], *, images: int, seeds: int) -> Iterator[str]:
    """Lines of Markdown."""
    held_out = np.concatenate([own.tissue for own in sites["held-out"]])
    yield f"{images} images a student; {len(held_out)} tokens scored, balanced accuracy in percent."
    yield ""
    yield "| row | seeds | tokens | bottleneck | tokens and radiomics | effective rank | held-out loss |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    recalls = {}
    for row, words in ROWS.items():
        paths = [scores_file(folder, row, seed, images) for seed in range(seeds)]
        found = [read_json(path) for path in paths if path.exists()]
        if not found:
            continue
        probes = [
            spread([100 * one[key]["balanced"] for one in found], 1)
            for key in ("tokens", "bottleneck", "tokens+radiomics")
        ]
        rank, loss = spread([one["rank"] for one in found], 1), spread([one["loss"] for one in found], 4)
        yield f"| {words} | {len(found)} | {' | '.join(probes)} | {rank} | {loss} |"
        recalls[words] = {
            TISSUES[t].name: statistics.median(one["tokens"][TISSUES[t].name] for one in found) for t in TISSUE_IDS
        }
    for windows in ((8,), (16,), WINDOWS):
        found = probe({name: radiomics_of(sites[name], windows) for name in COHORTS}, sites)
        words = f"the 34 radiomics of {' and '.join(f'{w}³' for w in windows)} themselves"
        yield f"| {words} | – | {100 * found['balanced']:.1f} | – | – | – | – |"
        recalls[words] = {TISSUES[t].name: found[TISSUES[t].name] for t in TISSUE_IDS}
    yield ""
    yield f"| recall of (median over seeds) | {' | '.join(TISSUES[t].name for t in TISSUE_IDS)} |"
    yield f"|---|{'---:|' * len(TISSUE_IDS)}"
    for words, values in recalls.items():
        yield f"| {words} | {' | '.join(f'{100 * value:.1f}' for value in values.values())} |"


def main() -> None:
    """Make the cohort, train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--images", type=int, default=make_config(TrainConfig, preset=PRESET).total_images)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stores = {name: cohort(given.folder, name) for name in COHORTS}
    described = extract_radiomics(stores["training"], make_config(RadiomicsConfig, preset=PRESET), execution=QUIET)
    described.require_complete()
    standardised = {window: load_standardisation(stores["training"], (window,) * 3) for window in WINDOWS}
    cell = make_config(TrainConfig, preset=PRESET).token_size
    most = {"training": TRAINED_TOKENS, "held-out": SCORED_TOKENS}
    sites = {name: list(find_sites(stores[name], standardised, cell=cell, most=most[name])) for name in COHORTS}
    if not given.table:
        train_and_score(given.folder, stores, sites, images=given.images, seeds=given.seeds)
    print("\n".join(table(given.folder, sites, images=given.images, seeds=given.seeds)))


if __name__ == "__main__":
    main()
