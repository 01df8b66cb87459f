"""Baselines: thresholds at their cuts, k-means against scikit-learn, clusterings without a fit."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lungseg.errors import MismatchError
from lungseg.segmentation.baselines import KMeansFit, fit_kmeans, threshold_labels, tissue_shares
from lungseg.segmentation.clustering import TissueVotes
from lungseg.tissue import Tissue


def test_thresholds_are_inclusive_as_the_literature_has_them() -> None:
    hu = np.array([-1000, -950, -949, -700, -699, -500, -499, -301, -300, 40], dtype=np.int16)
    volume = np.broadcast_to(hu[:, None, None], (10, 3, 3)).copy()
    # blocks of three planes, so that the median filter changes nothing in their middles
    volume = np.repeat(volume, 3, axis=0)
    labels = threshold_labels(volume, np.ones(volume.shape, dtype=bool))[1::3, 1, 1]
    e, h, g, f, c = Tissue.EMPHYSEMA, Tissue.HEALTHY, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION
    assert labels.tolist() == [e, e, h, h, g, g, f, f, c, c]


def test_thresholds_see_the_median_and_label_lung_only() -> None:
    volume = np.full((6, 6, 6), -850, dtype=np.int16)
    volume[3, 3, 3] = 200  # one noisy voxel
    mask = np.zeros(volume.shape, dtype=bool)
    mask[1:5, 1:5, 1:5] = True
    labels = threshold_labels(volume, mask)
    assert (labels[mask] == Tissue.HEALTHY).all()
    assert not labels[~mask].any()
    assert not threshold_labels(volume, np.zeros_like(mask)).any()


def tokens() -> np.ndarray:
    """Three groups in six channels of very different scale."""
    rng = np.random.default_rng(2)
    centres = rng.normal(0, 5, (3, 6))
    return ((centres[rng.integers(0, 3, 600)] + rng.normal(0, 1, (600, 6))) * [1, 10, 100, 1, 1, 0.1]).astype(
        np.float32
    )


def test_kmeans_is_scikit_learns_recipe() -> None:
    """StandardScaler, PCA, KMeans in one affine map and centres: the same labels."""
    found = fit_kmeans(tokens(), num_components=3, pca_components=4, restarts=5, seed=3)
    model = make_pipeline(StandardScaler(), PCA(4), KMeans(3, n_init=5, random_state=3)).fit(tokens())
    mine, theirs = found.posterior(tokens()).argmax(1), model.predict(tokens())
    pairs = {(int(a), int(b)) for a, b in zip(mine, theirs, strict=True)}
    assert len(pairs) == 3
    assert found.inertia * 600 == pytest.approx(model[-1].inertia_, rel=1e-6)
    assert found.weights.sum() == pytest.approx(1.0)


def test_kmeans_is_saved_and_reordered_exactly() -> None:
    found = fit_kmeans(tokens(), num_components=3, pca_components=None, standardise=False, restarts=2, seed=1)
    again = fit_kmeans(tokens(), num_components=3, pca_components=None, standardise=False, restarts=2, seed=1)
    back = KMeansFit.from_arrays(found.to_arrays())
    for other in (again, back):
        assert all(np.array_equal(a, other.to_arrays()[name]) for name, a in found.to_arrays().items())
    turned = found.reorder([2, 0, 1])
    np.testing.assert_array_equal(turned.posterior(tokens()), found.posterior(tokens())[:, [2, 0, 1]])
    arrays = found.to_arrays()
    with pytest.raises(MismatchError, match="centres missing"):
        KMeansFit.from_arrays({name: a for name, a in arrays.items() if name != "centres"})
    with pytest.raises(MismatchError, match="damaged k-means"):
        KMeansFit.from_arrays({**arrays, "weights": arrays["weights"][:2]})


def test_kmeans_refuses_what_it_cannot_use() -> None:
    with pytest.raises(MismatchError, match="4 tokens cannot be fitted with 3 centres: at least 15"):
        fit_kmeans(tokens()[:4], num_components=3, seed=0)
    found = fit_kmeans(tokens(), num_components=3, seed=0, restarts=1)
    with pytest.raises(MismatchError, match="k-means of 6 features"):
        found.posterior(tokens()[:, :5])
    bad = tokens()
    bad[7, 2] = np.nan
    with pytest.raises(MismatchError, match="not finite"):
        found.posterior(bad)


def test_votes_are_their_own_posterior() -> None:
    votes = TissueVotes()
    names = np.array([1, 2, 5, 255], dtype=np.uint8)
    shares = tissue_shares(names)
    assert shares[:3].argmax(1).tolist() == [0, 1, 4]
    posterior = votes.posterior(np.vstack([shares, [[1, 0, 0, 0, 3]]]))
    np.testing.assert_allclose(posterior[3], 0.2)  # unclassified: nothing is known
    np.testing.assert_allclose(posterior[4], [0.25, 0, 0, 0, 0.75])
    assert TissueVotes.from_arrays(votes.to_arrays()) == votes
    assert votes.reorder(range(5)) is votes
    with pytest.raises(MismatchError, match="keep their order"):
        votes.reorder([1, 0, 2, 3, 4])
    with pytest.raises(MismatchError, match="not shares of 5 tissues"):
        votes.posterior(shares[:, :4])
    with pytest.raises(MismatchError, match="not a saved clustering by rules"):
        TissueVotes.from_arrays({"tissues": np.array([99])})
