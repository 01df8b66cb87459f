"""Effective rank, the floor under it, and the alarm that goes off once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lungseg.config import TrainConfig, make_config
from lungseg.diffusion.collapse import (
    ALARM_AFTER,
    CollapseMonitor,
    rank_penalty,
)
from lungseg.segmentation.reduction import effective_rank


def _rank(z: torch.Tensor) -> float:
    return effective_rank(z.detach().double().numpy())


def _spread(rows: int, directions: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, directions, generator=generator)).Q
    return F.normalize(torch.randn(rows, directions, generator=generator) @ basis.T, dim=1)


def test_penalty_is_the_shortfall_of_the_rank():
    for directions in (2, 3, 6):
        # isotropic directions have equal variances
        expected = math.log(12 / directions)
        assert rank_penalty(_spread(2000, directions), floor=12).item() == pytest.approx(expected, abs=0.02)
    assert rank_penalty(_spread(2000, 20), floor=12).item() == 0
    assert rank_penalty(_spread(8, 8), floor=12).item() < math.log(4.001)  # the floor is half of 8 rows
    same = rank_penalty(F.normalize(torch.ones(50, 8), dim=1), floor=12)
    assert same.item() == pytest.approx(math.log(12))
    alone = torch.ones(2, 4, requires_grad=True)
    rank_penalty(alone, floor=12).backward()  # too few rows: 0, and still part of the graph
    assert alone.grad is not None
    assert not alone.grad.any()


@pytest.mark.parametrize("rows", [10, 200])
def test_penalty_never_asks_for_more_than_the_effective_rank(rows):
    """The participation ratio is a lower bound of the rank that is logged, whatever the spectrum."""
    for seed in range(5):
        scale = torch.logspace(0, -seed, 32)
        z = F.normalize(_spread(rows, 32, seed=seed) * scale, dim=1)
        ratio = rows / 2 / math.exp(rank_penalty(z, floor=1e6).item())  # the floor is half the rows here
        assert ratio <= _rank(z) * 1.001


def test_descent_on_the_penalty_spreads_vectors_off_their_line():
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(64, 1, generator=generator)
    w = torch.cat([torch.ones(64, 1), along, 0.05 * torch.randn(64, 30, generator=generator)], 1).requires_grad_()
    before = _rank(F.normalize(w, dim=1))
    for _ in range(300):
        (gradient,) = torch.autograd.grad(rank_penalty(F.normalize(w, dim=1), floor=12), w)
        w = (w - 0.5 * gradient).detach().requires_grad_()
    assert before < 3
    assert _rank(F.normalize(w, dim=1)) >= 11.5


def _line(rank=20.0, student=0.1, teacher=0.1):
    return {"images": 500, "effective_rank": rank, "student_cosine": student, "teacher_cosine": teacher}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (_line(rank=1.4), "effective rank of the student 1.4"),
        (_line(student=0.97), "mean cosine of the student's embeddings 0.97"),
        (_line(teacher=0.95), "mean cosine of the teacher's embeddings 0.95"),
    ],
)
def test_monitor_fires_once_and_again_after_recovery(bad, named):
    monitor = CollapseMonitor(first_image=100)
    assert all(monitor.look(_line()) == "" for _ in range(5))
    said = [monitor.look(bad) for _ in range(ALARM_AFTER + 4)]
    assert [bool(text) for text in said] == [i == ALARM_AFTER - 1 for i in range(len(said))]
    assert named in said[ALARM_AFTER - 1]
    assert "--collapse-weight" in said[ALARM_AFTER - 1]
    monitor.look(_line())
    assert [bool(monitor.look(bad)) for _ in range(ALARM_AFTER)] == [False] * (ALARM_AFTER - 1) + [True]


def test_monitor_passes_lines_without_distillation():
    monitor = CollapseMonitor(first_image=100)
    for _ in range(2 * ALARM_AFTER):
        assert monitor.look({"images": 500, "diffusion": 0.2}) == ""
        assert monitor.look({"images": 500, "effective_rank": None, "student_cosine": None}) == ""


def test_monitor_gives_the_student_time():
    config = make_config(TrainConfig, total_images=1000, distill_full=0.2)
    monitor = CollapseMonitor.of_run(config)
    early = [monitor.look({**_line(rank=1.1), "images": images}) for images in range(0, 300, 20)]
    late = [monitor.look({**_line(rank=1.1), "images": images}) for images in range(300, 400, 20)]
    assert not any(early)
    assert [bool(text) for text in late] == [i == ALARM_AFTER - 1 for i in range(len(late))]
