"""Gaussian mixture: scikit-learn and closed forms as oracles, faults of RELIABILITY row 73."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

import lungseg.segmentation.reduction as reduction_module
from lungseg.errors import MismatchError
from lungseg.segmentation.mixture import MixtureFit, fit_mixture
from lungseg.segmentation.reduction import effective_rank


def _clusters(seed=0, n=400, dim=6):
    rng = np.random.default_rng(seed)
    centres = 6.0 * rng.standard_normal((4, dim))
    mixing = rng.standard_normal((dim, dim)) / 2
    labels = rng.integers(0, 4, n)
    return (centres[labels] + rng.standard_normal((n, dim)) @ mixing).astype(np.float32), labels


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_posterior_and_likelihood_equal_scikit_learn(covariance):
    tokens, _ = _clusters()
    fit = fit_mixture(
        tokens, num_components=5, pca_components=4, restarts=2, covariance=covariance, regularisation=1e-2, seed=3
    )
    reduced = fit.reduce(tokens)
    oracle = GaussianMixture(5, covariance_type="full")
    oracle.weights_, oracle.means_ = fit.weights, fit.means
    oracle.precisions_cholesky_ = fit.precision_cholesky
    np.testing.assert_allclose(fit.posterior(tokens), oracle.predict_proba(reduced), atol=1e-5)
    np.testing.assert_allclose(fit.log_likelihood(tokens), oracle.score_samples(reduced), rtol=1e-9)
    assert fit.mean_log_likelihood == pytest.approx(fit.log_likelihood(tokens).mean(), abs=1e-2)


def test_whitened_reduction_equals_scikit_learn_pca():
    tokens, _ = _clusters(1)
    fit = fit_mixture(tokens, num_components=2, pca_components=3, restarts=1, seed=0)
    pca = PCA(3, whiten=True).fit(tokens.astype(np.float64))
    ours, theirs = fit.reduce(tokens), pca.transform(tokens.astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-6)
    assert fit.explained_variance_share == pytest.approx(pca.explained_variance_ratio_.sum())


def test_one_component_is_the_closed_form():
    tokens, _ = _clusters(2)
    fit = fit_mixture(tokens, num_components=1, pca_components=None, regularisation=1e-3, restarts=1, seed=0)
    covariance = np.cov(tokens.astype(np.float64).T, bias=True) + 1e-3 * np.eye(6)
    np.testing.assert_allclose(fit.means[0] + fit.offset, tokens.mean(axis=0), atol=1e-5)
    precision = fit.precision_cholesky[0] @ fit.precision_cholesky[0].T
    np.testing.assert_allclose(precision, np.linalg.inv(covariance), rtol=1e-4, atol=1e-6)
    assert (fit.posterior(tokens) == 1).all()


def test_separated_clusters_are_found():
    tokens, labels = _clusters(3, n=800)
    fit = fit_mixture(tokens, num_components=4, pca_components=None, restarts=5, seed=0)
    found = fit.posterior(tokens).argmax(axis=1)
    table = np.zeros((4, 4), dtype=int)
    np.add.at(table, (labels, found), 1)
    assert table.max(axis=1).sum() >= 0.98 * len(tokens)
    assert fit.converged


def test_same_seed_same_fit_and_batches_do_not_matter(monkeypatch):
    tokens, _ = _clusters(4)
    first = fit_mixture(tokens, num_components=6, pca_components=4, standardise=True, seed=11)
    posterior = first.posterior(tokens)
    second = fit_mixture(tokens, num_components=6, pca_components=4, standardise=True, seed=11)
    for name, value in first.to_arrays().items():
        np.testing.assert_array_equal(value, second.to_arrays()[name], err_msg=name)
    monkeypatch.setattr(reduction_module, "BATCH_TOKENS", 37)
    np.testing.assert_allclose(first.posterior(tokens), posterior, atol=1e-6)
    chunked = fit_mixture(tokens, num_components=6, pca_components=4, standardise=True, seed=11)
    np.testing.assert_allclose(chunked.means, first.means, atol=1e-6)
    assert first.posterior(tokens[:0]).shape == (0, 6)


def test_standardisation_makes_scale_irrelevant():
    tokens, _ = _clusters(5)
    scaled = tokens * np.array([1, 100, 1e-2, 5, 1, 7], dtype=np.float32)
    options = {"num_components": 3, "pca_components": 4, "standardise": True, "seed": 1}
    np.testing.assert_allclose(
        fit_mixture(tokens, **options).posterior(tokens), fit_mixture(scaled, **options).posterior(scaled), atol=1e-3
    )


def test_constant_columns_are_dropped_and_listed():
    tokens, _ = _clusters(6)
    tokens = np.insert(tokens, [0, 3], np.float32(0.1), axis=1)
    fit = fit_mixture(tokens, num_components=3, pca_components=16, restarts=1, seed=0)
    assert fit.dropped_columns == (0, 4)
    assert fit.means.shape == (3, 6)  # never more directions than the tokens have
    plain = fit_mixture(np.delete(tokens, [0, 4], axis=1), num_components=3, restarts=1, seed=0)
    np.testing.assert_array_equal(fit.means, plain.means)


def test_rank_deficient_tokens_are_not_whitened_beyond_their_rank():
    rng = np.random.default_rng(0)
    tokens = (rng.standard_normal((300, 3)) @ rng.standard_normal((3, 40))).astype(np.float32)
    fit = fit_mixture(tokens, num_components=2, restarts=1, seed=0)
    assert fit.means.shape == (2, 3)


def test_faulty_tokens_are_refused_with_counts():
    tokens, _ = _clusters(7)
    with pytest.raises(MismatchError, match="400 tokens cannot be fitted with 100 components"):
        fit_mixture(tokens, num_components=100, seed=0)
    broken = tokens.copy()
    broken[[3, 9], 1] = np.nan
    with pytest.raises(MismatchError, match="2 of 400 tokens"):
        fit_mixture(broken, num_components=3, seed=0)
    with pytest.raises(MismatchError, match="all 6 features are constant"):
        fit_mixture(np.ones((400, 6), dtype=np.float32), num_components=3, seed=0)
    with pytest.raises(MismatchError, match="only 3 different tokens for 5 components"):
        fit_mixture(np.tile(tokens[:3], (50, 1)), num_components=5, seed=0)
    with pytest.raises(MismatchError, match="array"):
        fit_mixture(tokens[0], num_components=1, seed=0)
    fit = fit_mixture(tokens, num_components=3, restarts=1, seed=0)
    with pytest.raises(MismatchError, match="400 tokens hold values"):
        fit.posterior(broken)
    with pytest.raises(MismatchError, match="6 features"):
        fit.posterior(tokens[:, :5])


def test_breakdown_of_em_names_the_remedy():
    tokens = np.repeat(np.arange(8, dtype=np.float32), 10)[:, None] * np.float32(1e3)
    with pytest.raises(MismatchError, match="raise the regularisation"):
        fit_mixture(tokens, num_components=8, pca_components=None, regularisation=0.0, restarts=3, seed=0)


def test_reorder_permutes_the_posterior():
    tokens, _ = _clusters(8)
    fit = fit_mixture(tokens, num_components=4, restarts=1, seed=0)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(fit.reorder(order).posterior(tokens), fit.posterior(tokens)[:, order])
    with pytest.raises(MismatchError, match="not an order"):
        fit.reorder([0, 0, 1, 2])


def test_arrays_round_trip_exactly():
    tokens, _ = _clusters(9)
    fit = fit_mixture(tokens, num_components=4, restarts=1, seed=5)
    arrays = fit.to_arrays()
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in arrays.values())
    back = MixtureFit.from_arrays(arrays)
    np.testing.assert_array_equal(back.posterior(tokens), fit.posterior(tokens))
    assert (back.seed, back.num_tokens, back.converged) == (5, 400, fit.converged)
    assert back.dropped_columns == fit.dropped_columns
    with pytest.raises(MismatchError, match="weights missing"):
        MixtureFit.from_arrays({name: value for name, value in arrays.items() if name != "weights"})
    with pytest.raises(MismatchError, match="damaged"):
        MixtureFit.from_arrays(arrays | {"weights": arrays["weights"][:2]})


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    assert effective_rank(rng.standard_normal((20_000, 5))) == pytest.approx(5.0, abs=0.01)
    line = rng.standard_normal((100, 1)) * np.ones((1, 7))
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(np.ones((10, 3))) == 0.0
    assert effective_rank(np.ones((1, 3))) == 0.0
