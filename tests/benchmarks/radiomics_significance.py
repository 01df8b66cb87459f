"""Which family of the descriptor tells which tissues apart: AUC of each pair on phantoms not learnt from.

Run: ``python tests/benchmarks/radiomics_significance.py``. Eight phantoms (seeds 700 to 707, used nowhere else),
windows of 16 voxels at every site of a lattice of 8, of which one tissue fills three quarters. For each family and
pair of tissues a logistic regression is learnt from seven phantoms and scored on the eighth; the mean of the eight AUC
is given. This uses labels, and says what the teacher knows, not what an unsupervised method finds.
"""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import torch
from scipy import ndimage
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lungseg.radiomics.dense import dense_descriptors
from lungseg.radiomics.descriptor import FAMILIES, Standardisation
from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

SEEDS = range(700, 708)
SPEC = PhantomSpec((150.0, 190.0, 240.0), (1.25, 1.25, 1.25), "severe", DISEASES)
WINDOW, STRIDE = 16, 8
MIN_SHARE, MIN_LUNG = 0.75, 0.5
"""Of one tissue in the lung of a window, and of lung in a window."""
MOST_WINDOWS, FEWEST_WINDOWS = 300, 5
"""Of one tissue in one phantom."""
COLUMNS = {**FAMILIES, "all": slice(0, 34)}


def shares(flags: np.ndarray) -> np.ndarray:
    """Share of ``flags`` in the window around each site of the lattice."""
    pad = (WINDOW - STRIDE) // 2
    padded = np.pad(flags.astype(np.float32), [(pad, pad + (-n) % STRIDE) for n in flags.shape])
    means = ndimage.uniform_filter(padded, WINDOW, mode="constant", origin=-(WINDOW // 2))
    sites = tuple(slice(0, STRIDE * -(-n // STRIDE), STRIDE) for n in flags.shape)
    return means[sites]


def windows_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors (N, 34) and tissues (N,) of the windows of one phantom that one tissue fills."""
    phantom = make_phantom(SPEC, seed=seed)
    lung = phantom.lungs > 0
    median = float(np.median(phantom.volume_hu[lung]))
    features = dense_descriptors(
        torch.from_numpy(phantom.volume_hu), torch.from_numpy(lung), lung_median_hu=median, window=WINDOW, stride=STRIDE
    ).numpy()
    lung_share = shares(lung)
    rng = np.random.default_rng(seed)
    rows, tissues = [], []
    for tissue in MIXTURE_TISSUES:
        share = shares(lung & (phantom.labels == tissue))
        sites = np.argwhere((lung_share >= MIN_LUNG) & (share >= MIN_SHARE * lung_share))
        sites = rng.permutation(sites)[:MOST_WINDOWS]
        rows.append(features[tuple(sites.T)])
        tissues += [tissue] * len(sites)
    return np.concatenate(rows), np.array(tissues)


def pair_auc(data: list[tuple[np.ndarray, np.ndarray]], pair: tuple[Tissue, Tissue], columns: slice) -> list[float]:
    """AUC on each phantom of a classifier of two tissues learnt from the others."""
    found = []
    for held_out, (features, tissues) in enumerate(data):
        test = np.isin(tissues, pair)
        if min(np.count_nonzero(tissues == tissue) for tissue in pair) < FEWEST_WINDOWS:
            continue
        others = [item for index, item in enumerate(data) if index != held_out]
        train_x, train_y = (np.concatenate(parts) for parts in zip(*others, strict=True))
        train = np.isin(train_y, pair)
        scale = Standardisation.fit(torch.from_numpy(train_x[train]), window=(WINDOW,) * 3)
        learn, score = (scale.apply(torch.from_numpy(x)).numpy()[:, columns] for x in (train_x[train], features[test]))
        model = LogisticRegression(max_iter=2000, C=10.0, class_weight="balanced").fit(learn, train_y[train] == pair[1])
        found.append(float(roc_auc_score(tissues[test] == pair[1], model.decision_function(score))))
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", ConvergenceWarning)
    data = [windows_of(seed) for seed in SEEDS]
    counts = {t: sum(int(np.count_nonzero(tissues == t)) for _, tissues in data) for t in MIXTURE_TISSUES}
    print(f"Windows: {', '.join(f'{TISSUES[t].name} {n}' for t, n in counts.items())}\n")
    print("| pair | phantoms | first-order 4 | GLCM 14 | LBP 8 | Gabor 8 | all 34 |\n|---|---|---|---|---|---|---|")
    for pair in itertools.combinations(MIXTURE_TISSUES, 2):
        results = [pair_auc(data, pair, columns) for columns in COLUMNS.values()]
        cells = " | ".join(f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "–" for values in results)
        print(f"| {TISSUES[pair[0]].name} – {TISSUES[pair[1]].name} | {len(results[0])} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
