"""Effective rank, the floor under it, and the alarm that goes off once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lungseg.diffusion.collapse import (
    ALARM_AFTER,
    CollapseMonitor,
    effective_rank,
    mean_pairwise_cosine,
    rank_penalty,
)


def _spread(rows: int, directions: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, directions, generator=generator)).Q
    return F.normalize(torch.randn(rows, directions, generator=generator) @ basis.T, dim=1)


@pytest.mark.parametrize("directions", [1, 2, 5, 16])
def test_effective_rank_counts_directions(directions):
    assert effective_rank(_spread(4000, directions)) == pytest.approx(directions, rel=0.02)
    assert effective_rank(torch.eye(8).repeat(3, 1)) == pytest.approx(8)
    assert math.isnan(effective_rank(torch.ones(1, 4)))


def test_vectors_that_point_one_way_have_rank_one_whatever_their_noise():
    z = F.normalize(torch.eye(1, 32) + 0.01 * torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert effective_rank(z) < 1.1
    assert mean_pairwise_cosine(z) > 0.99


def test_penalty_is_the_shortfall_of_the_rank():
    for directions in (1, 3, 6):
        # for isotropic directions the mean squared cosine is 1 / directions
        expected = math.log(12 / directions)
        assert rank_penalty(_spread(2000, directions), floor=12).item() == pytest.approx(expected, abs=0.05)
    assert rank_penalty(_spread(2000, 20), floor=12).item() == 0
    assert rank_penalty(_spread(8, 8), floor=12).item() < math.log(4.001)  # the floor is half of 8 rows
    alone = torch.ones(2, 4, requires_grad=True)
    rank_penalty(alone, floor=12).backward()  # too few rows: 0, and still part of the graph
    assert alone.grad is not None
    assert not alone.grad.any()


def test_descent_on_the_penalty_spreads_collapsed_vectors():
    generator = torch.Generator().manual_seed(0)
    w = torch.cat([torch.ones(64, 1), 0.05 * torch.randn(64, 31, generator=generator)], 1).requires_grad_()
    before = effective_rank(F.normalize(w, dim=1))
    for _ in range(200):
        (gradient,) = torch.autograd.grad(rank_penalty(F.normalize(w, dim=1), floor=12), w)
        w = (w - 0.5 * gradient).detach().requires_grad_()
    assert before < 2
    assert effective_rank(F.normalize(w, dim=1)) >= 11.5


def _line(rank=20.0, student=0.1, teacher=0.1):
    return {"effective_rank": rank, "student_cosine": student, "teacher_cosine": teacher}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (_line(rank=2.0), "effective rank of the student 2.0"),
        (_line(student=0.97), "mean cosine of the student's embeddings 0.97"),
        (_line(teacher=0.95), "mean cosine of the teacher's embeddings 0.95"),
    ],
)
def test_monitor_fires_once_and_again_after_recovery(bad, named):
    monitor = CollapseMonitor()
    assert all(monitor.look(_line()) == "" for _ in range(5))
    said = [monitor.look(bad) for _ in range(ALARM_AFTER + 4)]
    assert [bool(text) for text in said] == [i == ALARM_AFTER - 1 for i in range(len(said))]
    assert named in said[ALARM_AFTER - 1]
    assert "--collapse-weight" in said[ALARM_AFTER - 1]
    monitor.look(_line())
    assert [bool(monitor.look(bad)) for _ in range(ALARM_AFTER)] == [False] * (ALARM_AFTER - 1) + [True]


def test_monitor_passes_lines_without_distillation():
    monitor = CollapseMonitor()
    for _ in range(2 * ALARM_AFTER):
        assert monitor.look({"diffusion": 0.2}) == ""
        assert monitor.look({"effective_rank": None, "student_cosine": None}) == ""
