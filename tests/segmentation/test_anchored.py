"""HU-anchored mixture: closed forms, tissues by construction, absent tissues vanish."""

from __future__ import annotations

import numpy as np
import pytest
from anchored_fixture import chosen, make_statistics, make_tokens
from scipy.stats import multivariate_normal, norm

import lungseg.segmentation.reduction as reduction_module
from lungseg.errors import MismatchError
from lungseg.segmentation.anchored import AnchoredFit, fit_anchored
from lungseg.segmentation.hu_anchors import Anchors, hu_features, literature_anchors
from lungseg.tissue import MIXTURE_TISSUES, Tissue

EVEN = dict.fromkeys(MIXTURE_TISSUES, 600)


def _tissues(fit, tokens, statistics):
    return np.asarray(fit.tissues)[fit.posterior(tokens, statistics).argmax(axis=1)]


def test_one_component_a_tissue_with_flat_priors_is_the_closed_form():
    tokens, statistics, owner = make_tokens({Tissue.HEALTHY: 500, Tissue.CONSOLIDATION: 300}, dim=4)
    full = literature_anchors((Tissue.HEALTHY, Tissue.CONSOLIDATION))
    pair = [0, full.tissues.index(Tissue.CONSOLIDATION)]
    anchors = Anchors(tuple(full.tissues[i] for i in pair), full.centre[pair], full.spread[pair])
    fit = fit_anchored(
        tokens, statistics, anchors=anchors, anchor_strength=0.0, token_weight=1.0, sparse=False, pca_components=None,
        regularisation=1e-6,
    )  # fmt: skip
    features, points = hu_features(statistics), fit.reduction.apply(tokens)
    prior = points.var(axis=0).mean() * 2 ** (-2 / 4)  # of 4 + 2 pseudo-tokens: Fraley & Raftery
    for k, tissue in enumerate(fit.tissues):
        mine = owner == tissue
        assert fit.weights[k] == pytest.approx(mine.mean(), abs=1e-6)
        np.testing.assert_allclose(fit.means[k], points[mine].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(fit.hu_means[k], features[mine].mean(axis=0), atol=1e-6)
        rounding = 1e-3 * anchors.spread[k]
        np.testing.assert_allclose(fit.hu_sds[k], np.maximum(features[mine].std(axis=0), rounding), rtol=1e-5)
        covariance = (np.cov(points[mine].T, bias=True) * mine.sum() + 6 * prior * np.eye(4)) / (mine.sum() + 6)
        precision = fit.precision_cholesky[k] @ fit.precision_cholesky[k].T
        np.testing.assert_allclose(precision, np.linalg.inv(covariance), rtol=1e-4, atol=1e-5)
    assert fit.converged


def test_the_anchor_is_so_many_tokens_more():
    tokens, statistics, _ = make_tokens({Tissue.GGO: 400}, dim=3)
    centre, spread = np.array([[-500.0, 10.0, 0.5, 0.1]]), np.array([[30.0, 20.0, 0.4, 0.2]])
    anchors = Anchors((Tissue.GGO,), centre, spread)
    fit = fit_anchored(tokens, statistics, anchors=anchors, anchor_strength=0.5)
    features = hu_features(statistics)
    expected = (400 * features.mean(axis=0) + 200 * centre[0]) / 600
    np.testing.assert_allclose(fit.hu_means[0], expected, rtol=1e-9)
    squares = ((features - expected) ** 2).sum(axis=0) + 200 * (spread[0] ** 2 + (centre[0] - expected) ** 2)
    np.testing.assert_allclose(fit.hu_sds[0], np.sqrt(squares / 600), rtol=1e-9)


def test_the_posterior_is_the_product_of_both_likelihoods():
    tokens, statistics, _ = make_tokens(dict.fromkeys(MIXTURE_TISSUES, 100))
    fit = fit_anchored(tokens, statistics)
    points, features = fit.reduction.apply(tokens[:40]), hu_features(chosen(statistics, slice(0, 40)))
    assert fit.token_weight == pytest.approx(np.sqrt(4 / 6))
    joint = np.empty((40, fit.num_components))
    for k in range(fit.num_components):
        covariance = np.linalg.inv(fit.precision_cholesky[k] @ fit.precision_cholesky[k].T)
        density = multivariate_normal(fit.means[k], covariance).logpdf(points)
        joint[:, k] = np.log(fit.weights[k]) + fit.token_weight * density
        joint[:, k] += norm(fit.hu_means[k], fit.hu_sds[k]).logpdf(features).sum(axis=1)
    expected = np.exp(joint - joint.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fit.posterior(tokens[:40], chosen(statistics, slice(0, 40))), expected, atol=1e-6)


def test_every_tissue_is_found_under_its_own_name():
    tokens, statistics, owner = make_tokens(EVEN, vessels=0.1)
    fit = fit_anchored(tokens, statistics)
    assert set(fit.tissues) == set(MIXTURE_TISSUES)
    assert fit.converged
    assert np.mean(_tissues(fit, tokens, statistics) == owner) > 0.97


def test_tokens_decide_where_hu_cannot():
    # HU half way between ground glass and fibrosis: only the tokens know, once the clear ones have taught them
    tokens, statistics, owner = make_tokens({Tissue.GGO: 500, Tissue.FIBROSIS: 500}, seed=2)
    fit = fit_anchored(tokens, statistics)
    between = make_statistics(np.full(1000, -510.0), np.full(1000, 60.0), np.full(1000, 120.0), np.zeros(1000))
    assert np.mean(_tissues(fit, tokens, between) == owner) > 0.95


def test_a_healthy_cohort_comes_out_healthy():
    tokens, statistics, _ = make_tokens({Tissue.HEALTHY: 4000}, vessels=0.15)
    fit = fit_anchored(tokens, statistics)
    assert np.mean(_tissues(fit, tokens, statistics) != Tissue.HEALTHY) < 0.02
    assert set(fit.tissues) <= {Tissue.HEALTHY, Tissue.FIBROSIS, Tissue.GGO}  # emphysema, consolidation: vanished


def test_absent_tissues_vanish_and_rare_ones_stay():
    tokens, statistics, owner = make_tokens({Tissue.HEALTHY: 4000, Tissue.CONSOLIDATION: 80})
    fit = fit_anchored(tokens, statistics)
    assert set(fit.tissues) == {Tissue.HEALTHY, Tissue.CONSOLIDATION}
    assert np.mean(_tissues(fit, tokens, statistics)[owner == Tissue.CONSOLIDATION] == Tissue.CONSOLIDATION) > 0.95


def test_the_log_posterior_never_falls_while_all_components_live():
    tokens, statistics, _ = make_tokens(EVEN)
    history = [
        fit_anchored(
            tokens, statistics, sparse=False, max_iterations=n, tolerance=0.0, regularisation=1e-9
        ).mean_objective
        for n in range(1, 12)
    ]
    assert (np.diff(history) > -1e-9).all()
    assert not fit_anchored(tokens, statistics, max_iterations=2).converged


def test_same_tokens_same_fit_and_batches_do_not_matter(monkeypatch):
    tokens, statistics, _ = make_tokens(EVEN, seed=4)
    first, second = (fit_anchored(tokens, statistics).to_arrays() for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    monkeypatch.setattr(reduction_module, "BATCH_TOKENS", 77)
    third = fit_anchored(tokens, statistics)
    np.testing.assert_allclose(third.hu_means, first["hu_means"], rtol=1e-6)


def test_arrays_round_trip_exactly_and_order_can_change():
    tokens, statistics, _ = make_tokens(EVEN, seed=5)
    fit = fit_anchored(tokens, statistics)
    arrays = fit.to_arrays()
    back = AnchoredFit.from_arrays(arrays)
    np.testing.assert_array_equal(back.posterior(tokens, statistics), fit.posterior(tokens, statistics))
    assert (back.tissues, back.converged, back.num_tokens) == (fit.tissues, fit.converged, len(tokens))
    order = list(reversed(range(fit.num_components)))
    turned = fit.reorder(order)
    assert turned.tissues == fit.tissues[::-1]
    np.testing.assert_allclose(
        turned.posterior(tokens, statistics), fit.posterior(tokens, statistics)[:, order], atol=1e-6
    )
    with pytest.raises(MismatchError, match="hu_sds"):
        AnchoredFit.from_arrays({name: value for name, value in arrays.items() if name != "hu_sds"})
    with pytest.raises(MismatchError, match="damaged"):
        AnchoredFit.from_arrays(arrays | {"weights": arrays["weights"][:2]})
    with pytest.raises(MismatchError, match="not an order"):
        fit.reorder([0, 0])


def test_faulty_input_is_refused():
    tokens, statistics, _ = make_tokens(EVEN)
    fit = fit_anchored(tokens, statistics)
    with pytest.raises(MismatchError, match="needs the HU statistics"):
        fit.posterior(tokens)
    with pytest.raises(MismatchError, match="3000 HU statistics do not belong to 10 tokens"):
        fit.posterior(tokens[:10], statistics)
    with pytest.raises(MismatchError, match="6 features"):
        fit.posterior(tokens[:, :4], statistics)
    with pytest.raises(MismatchError, match="10 tokens cannot be fitted"):
        fit_anchored(tokens[:10], chosen(statistics, slice(0, 10)))
