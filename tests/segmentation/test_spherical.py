"""Von Mises-Fisher mixture: scipy and closed forms as oracles, samples of known parameters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import iv
from scipy.stats import vonmises_fisher

from lungseg.errors import MismatchError
from lungseg.segmentation.spherical import SphericalFit, concentration_of, fit_spherical, log_normaliser


def _axis(dim, k):
    return np.eye(dim)[k]


def _sample(counts, kappas, *, dim=8, seed=0):
    """Unit vectors of several clusters along the axes, and the cluster of each."""
    parts = [
        vonmises_fisher(_axis(dim, k), kappa, seed=seed + k).rvs(count)
        for k, (count, kappa) in enumerate(zip(counts, kappas, strict=True))
    ]
    return np.concatenate(parts).astype(np.float32), np.repeat(np.arange(len(counts)), counts)


def test_one_component_is_the_closed_form():
    tokens, _ = _sample([500], [20.0])
    fit = fit_spherical(tokens, num_components=1, restarts=1, seed=0)
    mean = tokens.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(mean)
    np.testing.assert_allclose(fit.directions[0, 0], mean / length, atol=1e-6)
    assert fit.concentrations[0, 0] == pytest.approx(length * (8 - length**2) / (1 - length**2), rel=1e-5)
    assert fit.weights.tolist() == [1.0]
    assert (fit.posterior(tokens) == 1).all()
    assert fit.converged


def test_the_density_is_scipys():
    tokens, _ = _sample([300, 200], [15.0, 60.0])
    fit = fit_spherical(tokens, num_components=2, restarts=2, seed=0)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    joint = np.stack(
        [
            np.log(weight) + vonmises_fisher(direction[0], kappa[0]).logpdf(unit)
            for weight, direction, kappa in zip(fit.weights, fit.directions, fit.concentrations, strict=True)
        ],
        axis=1,
    )
    np.testing.assert_allclose(fit.log_likelihood(tokens), np.logaddexp(*joint.T), atol=1e-4)
    expected = np.exp(joint - np.logaddexp(*joint.T)[:, None])
    np.testing.assert_allclose(fit.posterior(tokens), expected, atol=1e-5)
    assert fit.mean_log_likelihood == pytest.approx(fit.log_likelihood(tokens).mean(), abs=1e-9)


@pytest.mark.parametrize(("dim", "kappa"), [(3, 0.5), (8, 1e-3), (8, 40.0), (128, 1.0), (128, 700.0), (2, 3.0)])
def test_the_normaliser_is_that_of_the_bessel_function(dim, kappa):
    order = dim / 2 - 1
    expected = order * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - np.log(iv(order, kappa))
    assert log_normaliser(np.array(kappa), dim) == pytest.approx(expected, rel=1e-9)


def test_the_normaliser_stays_finite_where_the_bessel_function_underflows_or_overflows():
    kappa = np.array([0.0, 1e-9, 1e-3, 1.0, 1e2, 1e4, 1e6])
    for dim in (128, 512):
        found = log_normaliser(kappa, dim)
        assert np.isfinite(found).all()
        assert (np.diff(found[1:3]) < 1e-6).all()  # flat near zero: the area of the sphere
        assert found[0] == pytest.approx(found[1], rel=1e-9)
    # 512 dimensions and kappa 1 underflow: against the series of the Bessel function, whose first terms are enough
    from scipy.special import gammaln

    order, half = 255.0, 0.5
    log_bessel = order * np.log(half) - gammaln(order + 1) + np.log1p(half**2 / (order + 1))
    expected = order * 0.0 - 256 * np.log(2 * np.pi) - log_bessel
    assert log_normaliser(np.array(1.0), 512) == pytest.approx(expected, rel=1e-7)


def test_known_parameters_are_found():
    tokens, labels = _sample([3000, 2000, 1000], [30.0, 60.0, 15.0])
    fit = fit_spherical(tokens, num_components=3, restarts=3, seed=1)
    order = fit.directions[:, 0, :3].argmax(axis=0)
    fit = fit.reorder(order.tolist())
    np.testing.assert_allclose(fit.weights, [1 / 2, 1 / 3, 1 / 6], atol=0.01)
    # kappa is approximated (some per cent in 8 dimensions): what the true mean length would give
    kappa = np.array([30.0, 60.0, 15.0])
    length = iv(4, kappa) / iv(3, kappa)
    approximated = concentration_of(length, 8)
    np.testing.assert_allclose(approximated, kappa, rtol=0.06)
    information = 1 - length**2 - 7 * length / kappa  # Fisher's, of kappa, in one sample
    deviation = 1 / np.sqrt(np.array([3000, 2000, 1000]) * information)
    assert (np.abs(fit.concentrations[:, 0] - approximated) < 3 * deviation).all()
    assert (np.einsum("kd,kd->k", fit.directions[:, 0], np.eye(8)[:3]) > 0.999).all()
    assert np.mean(fit.posterior(tokens).argmax(axis=1) == labels) > 0.98


def test_blocks_are_independent_given_the_component():
    first, _ = _sample([800, 800], [40.0, 40.0], dim=5, seed=0)
    second, _ = _sample([800, 800], [10.0, 90.0], dim=5, seed=7)
    joined = np.concatenate([first, second], axis=1)
    fit = fit_spherical(joined, num_components=2, blocks=2, restarts=2, seed=0)
    order = [int(fit.directions[:, 0, 0].argmax()), int(fit.directions[:, 0, 1].argmax())]
    fit = fit.reorder(order)
    np.testing.assert_allclose(fit.concentrations, [[40.0, 10.0], [40.0, 90.0]], rtol=0.12)
    density = np.log(fit.weights) + sum(
        np.stack([vonmises_fisher(fit.directions[k, b], fit.concentrations[k, b]).logpdf(unit) for k in (0, 1)], axis=1)
        for b, unit in enumerate(part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second))
    )
    np.testing.assert_allclose(fit.log_likelihood(joined), np.logaddexp(*density.T), atol=1e-3)


def test_held_out_likelihood_finds_the_number_of_clusters():
    tokens, _ = _sample([600] * 4, [25.0] * 4)
    held_out, _ = _sample([300] * 4, [25.0] * 4, seed=50)
    scores = {
        k: fit_spherical(tokens, num_components=k, restarts=4, seed=0).log_likelihood(held_out).mean()
        for k in (1, 2, 4, 24)
    }
    assert max(scores, key=lambda k: scores[k]) == 4


def test_same_seed_same_fit_and_arrays_round_trip():
    tokens, _ = _sample([300, 300], [20.0, 20.0])
    one, two = (fit_spherical(tokens, num_components=3, seed=9) for _ in range(2))
    arrays = one.to_arrays()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, two.to_arrays()[name], err_msg=name)
    back = SphericalFit.from_arrays(arrays)
    np.testing.assert_array_equal(back.posterior(tokens), one.posterior(tokens))
    assert (back.seed, back.num_tokens, back.converged) == (9, 600, one.converged)
    with pytest.raises(MismatchError, match="weights missing"):
        SphericalFit.from_arrays({name: value for name, value in arrays.items() if name != "weights"})
    with pytest.raises(MismatchError, match="damaged"):
        SphericalFit.from_arrays(arrays | {"weights": arrays["weights"][:2]})


def test_faulty_tokens_are_refused_with_counts():
    tokens, _ = _sample([300, 300], [20.0, 20.0])
    with pytest.raises(MismatchError, match="at least 1000 are needed"):
        fit_spherical(tokens, num_components=200, seed=0)
    with pytest.raises(MismatchError, match="8 channels are not 3 blocks"):
        fit_spherical(tokens, num_components=2, blocks=3, seed=0)
    longer = tokens.copy()
    longer[:5] *= 2
    with pytest.raises(MismatchError, match="5 of 600 tokens are not 1 unit vectors"):
        fit_spherical(longer, num_components=2, seed=0)
    fit = fit_spherical(tokens, num_components=2, restarts=1, seed=0)
    with pytest.raises(MismatchError, match="8 features"):
        fit.posterior(tokens[:, :4])
    assert fit.posterior(tokens[:0]).shape == (0, 2)


def test_directions_that_agree_have_a_finite_concentration():
    assert np.isfinite(concentration_of(np.array([0.0, 0.5, 1.0]), 16)).all()
    tokens = np.tile(_axis(6, 2).astype(np.float32), (50, 1))
    tokens[:25] = _axis(6, 4)
    fit = fit_spherical(tokens, num_components=2, seed=0)
    assert (fit.posterior(tokens).max(axis=1) > 0.999).all()
