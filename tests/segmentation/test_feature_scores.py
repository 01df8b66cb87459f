"""Scores of features without labels, against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.segmentation.feature_scores import between_share, score_features

OPTIONS = {"clusters": 3, "pca": 8, "max_silhouette": 500, "seed": 0}


def _groups(spread: float, *, count: int = 300, dims: int = 6):
    """Three groups of tokens at the corners of a simplex, and the group of each."""
    rng = np.random.default_rng(0)
    group = np.arange(count) % 3
    features = np.eye(dims)[group] + spread * rng.standard_normal((count, dims))
    return features, group


def test_groups_of_one_density_each_are_told_apart():
    features, group = _groups(0.02)
    rng = np.random.default_rng(1)
    hu = np.array([-850.0, -600.0, -100.0])[group] + rng.normal(0, 1, len(group))
    # whitening would blow the noise up to the size of the groups: two components hold them
    scores = score_features(features, hu, np.full(len(group), 60.0), **{**OPTIONS, "pca": 2})
    assert scores.silhouette > 0.9
    assert scores.hu_separability > 0.999
    assert scores.texture_separability == 0.0
    assert 1.9 < scores.effective_rank < 2.5


def test_noise_has_no_groups_and_full_rank():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2_000, 8))
    scores = score_features(features, rng.normal(-800, 100, 2_000), rng.random(2_000), **OPTIONS)
    assert scores.silhouette < 0.2
    assert scores.hu_separability < 0.02
    assert scores.effective_rank > 7.5


def test_collapsed_features_score_nothing():
    features = np.ones((100, 4))
    scores = score_features(features, np.arange(100.0), np.arange(100.0), **OPTIONS)
    assert np.isnan(scores.silhouette)
    assert scores.hu_separability == 0.0
    assert scores.effective_rank == 0.0


def test_scores_are_a_function_of_the_seed():
    features, group = _groups(0.5)
    first, second = (score_features(features, group, group, **OPTIONS) for _ in range(2))
    assert first == second


def test_between_share_by_hand():
    # groups (0, 2) and (4, 6): total 20 about 3, between 2 * 4 + 2 * 4
    assert between_share(np.array([0.0, 2.0, 4.0, 6.0]), np.array([0, 0, 1, 1])) == pytest.approx(16 / 20)
    assert between_share(np.ones(3), np.array([0, 1, 2])) == 0.0


def test_too_few_tokens():
    with pytest.raises(InputError, match="too few for 3 clusters"):
        score_features(np.ones((3, 2)), np.ones(3), np.ones(3), **OPTIONS)
