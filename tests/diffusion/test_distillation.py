"""The contrast against a slow implementation of METHOD 1.1 (3), its warm-up, its statistics and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lungseg.diffusion.distillation import (
    HIDDEN_TEACHER,
    DescriptorQueue,
    StudentHead,
    TeacherHead,
    contrastive_loss,
    descriptor_similarity,
    soft_positives,
    warmup_weight,
)
from lungseg.diffusion.gather import gather_rows

MODES = pytest.mark.parametrize("contrast", ["grey-zone", "threshold", "diagonal"])


def _unit(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def _problem(rows=7, columns=11, seed=0):
    """Anchors own columns 3, 4, ...; similarities on both sides of both thresholds; two invalid columns."""
    generator = torch.Generator().manual_seed(seed + 100)
    similarity = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 1.6 - 0.6
    own = torch.arange(rows) + 3
    similarity[0, 3] = -0.5  # the own pair is positive whatever its similarity
    valid = torch.ones(columns, dtype=torch.bool)
    valid[[1, 5]] = False  # 5 is the own column of anchor 2
    return _unit(rows, 6, seed), _unit(columns, 6, seed + 1), similarity, own, valid


def _slow_loss(z_student, z_teacher, similarity, own, valid, temperature, contrast, positive, negative):
    """METHOD 1.1 (3) in sums over lists; also the mean number of positives."""
    losses, counts = [], []
    for i, z in enumerate(z_student.tolist()):
        if not valid[own[i]]:
            continue
        positives, everyone = [], []
        for j, r in enumerate(z_teacher.tolist()):
            if not valid[j]:
                continue
            s = similarity[i, j].item()
            logit = sum(a * b for a, b in zip(z, r, strict=True)) / temperature
            if j == own[i] or (contrast != "diagonal" and s > positive):
                positives.append(logit)
                everyone.append(logit)
            elif contrast != "grey-zone" or s < negative:
                everyone.append(logit)
        total = sum(math.exp(logit) for logit in everyone)
        losses.append(-sum(math.log(math.exp(logit) / total) for logit in positives) / len(positives))
        counts.append(len(positives))
    return sum(losses) / len(losses), sum(counts) / len(counts)


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_definition(contrast, seed):
    problem = _problem(seed=seed)
    result = contrastive_loss(*problem, temperature=0.07, contrast=contrast, positive=0.7, negative=0.5)
    loss, positives = _slow_loss(*problem, 0.07, contrast, 0.7, 0.5)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.mean_positives.item() == pytest.approx(positives)


def test_pairs_in_the_grey_zone_change_nothing():
    z_student, z_teacher, similarity, own, valid = _problem()
    similarity = torch.full_like(similarity, 0.2)
    similarity[1, 7] = 0.6
    moved = z_teacher.clone()
    moved[7] = -moved[7]

    def anchor_loss(teacher, contrast):
        only = torch.zeros_like(valid)
        only[[4, 7, 8]] = True  # 4 is its own
        own_1, s_1 = own[1:2], similarity[1:2]
        result = contrastive_loss(z_student[1:2], teacher, s_1, own_1, only, temperature=0.07, contrast=contrast)
        return result.loss.item()

    assert anchor_loss(z_teacher, "grey-zone") == anchor_loss(moved, "grey-zone")
    assert anchor_loss(z_teacher, "threshold") != anchor_loss(moved, "threshold")


@pytest.mark.parametrize(("similarity", "in_sum"), [(0.7, False), (0.700001, True), (0.5, False), (0.499999, True)])
def test_both_thresholds_are_exclusive(similarity, in_sum):
    z_student, z_teacher = _unit(1, 4, 0), _unit(2, 4, 1)
    s = torch.tensor([[1.0, similarity]], dtype=torch.float64)
    own, valid = torch.tensor([0]), torch.tensor([True, True])
    loss = contrastive_loss(z_student, z_teacher, s, own, valid, temperature=0.07).loss
    assert (loss.item() != 0) == in_sum  # alone with its own pair, an anchor has loss 0


@MODES
def test_own_pair_is_always_positive(contrast):
    z_student, z_teacher, similarity, own, valid = _problem()
    lowest = torch.full_like(similarity, -1)
    result = contrastive_loss(z_student, z_teacher, lowest, own, valid, temperature=0.07, contrast=contrast)
    assert result.mean_positives.item() == 1
    anchors = valid[own]
    logits = (z_student @ z_teacher.T / 0.07)[anchors][:, valid]
    column = torch.tensor([valid[:o].sum() for o in own[anchors]])
    assert result.loss.item() == pytest.approx(F.cross_entropy(logits, column).item(), rel=1e-5)


def test_diagonal_is_cross_entropy():
    z_student, z_teacher = _unit(9, 16, 0), _unit(9, 16, 1)
    own, valid = torch.arange(9), torch.ones(9, dtype=torch.bool)
    result = contrastive_loss(z_student, z_teacher, torch.ones(9, 9), own, valid, temperature=0.07, contrast="diagonal")
    oracle = F.cross_entropy(z_student @ z_teacher.T / 0.07, own)
    assert result.loss.item() == pytest.approx(oracle.item(), rel=1e-5)


@MODES
def test_invalid_rows_change_nothing(contrast):
    z_student, z_teacher, similarity, own, valid = _problem()
    spoiled_teacher, spoiled_similarity = z_teacher.clone(), similarity.clone()
    spoiled_teacher[~valid] = 1e3
    spoiled_similarity[:, ~valid] = 1
    spoiled_student = z_student.clone()
    spoiled_student[~valid[own]] = -1e3
    before = contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.07, contrast=contrast)
    after = contrastive_loss(
        spoiled_student, spoiled_teacher, spoiled_similarity, own, valid, temperature=0.07, contrast=contrast
    )
    assert vars(after) == vars(before)


@MODES
def test_batch_without_a_valid_anchor_has_no_loss_and_no_gradient(contrast):
    z_student, z_teacher, similarity, own, valid = _problem()
    z_student.requires_grad_()
    z_teacher.requires_grad_()
    result = contrastive_loss(
        z_student, z_teacher, similarity, own, torch.zeros_like(valid), temperature=0.07, contrast=contrast
    )
    result.loss.backward()
    assert [value.item() for value in vars(result).values()] == [0, 0, 0, 0]
    assert z_student.grad.abs().sum() == 0
    assert z_teacher.grad.abs().sum() == 0


@MODES
def test_gradient_reaches_the_student_and_equals_finite_differences(contrast):
    z_student, z_teacher, similarity, own, valid = _problem()
    z_student.requires_grad_()
    contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.5, contrast=contrast).loss.backward()
    step, direction = 1e-4, _unit(7, 6, 9)

    def slow(z):
        return _slow_loss(z, z_teacher, similarity, own, valid, 0.5, contrast, 0.7, 0.5)[0]

    with torch.no_grad():
        slope = (slow(z_student + step * direction) - slow(z_student - step * direction)) / (2 * step)
    assert (z_student.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3)
    assert z_student.grad[2].abs().sum() == 0  # its own descriptor is invalid
    others = torch.arange(7) != 2
    assert (z_student.grad[others].abs().sum(1) > 0).all()


def test_cosine_statistics_equal_brute_force():
    z_student, z_teacher, similarity, own, valid = _problem()
    result = contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.07)
    for value, rows in ((result.student_cosine, z_student[valid[own]]), (result.teacher_cosine, z_teacher[valid])):
        pairs = [rows[i] @ rows[j] for i in range(len(rows)) for j in range(len(rows)) if i != j]
        assert value.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_cosine_of_collapsed_and_of_single_tokens():
    one = _unit(1, 4, 0)
    own, valid = torch.zeros(5, dtype=torch.long), torch.tensor([True])
    collapsed = contrastive_loss(one.expand(5, 4), one, torch.ones(5, 1), own, valid, temperature=0.07)
    assert collapsed.student_cosine.item() == pytest.approx(1)
    assert collapsed.teacher_cosine.item() == 0


def test_mixed_precision_does_not_touch_the_contrast():
    z_student, z_teacher, similarity, own, valid = (
        x.float() if x.is_floating_point() else x for x in _problem(rows=60, columns=80)
    )
    r = torch.randn(60, 34, generator=torch.Generator().manual_seed(0))
    plain = contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.07).loss
    cosines = descriptor_similarity(r, r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.07).loss
        assert torch.equal(descriptor_similarity(r, r), cosines)
    assert mixed.item() == plain.item()


def test_descriptor_similarity_equals_cosine_and_forgives_nan():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 34, generator=generator), torch.randn(5, 34, generator=generator)
    expected = F.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(descriptor_similarity(a, b), expected)
    a[1] = torch.nan
    expected[1] = 0
    torch.testing.assert_close(descriptor_similarity(a, b), expected)


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0), (4000, 0), (5000, 0), (5500, 0.125), (6000, 0.25), (6999, 0.49975), (7000, 0.5), (30_000, 0.5)],
)
def test_warm_up_at_the_published_steps(step, weight):
    value = warmup_weight(step / 30_000, start=5000 / 30_000, full=7000 / 30_000, weight=0.5)
    assert value == pytest.approx(weight, abs=1e-12)


def test_warm_up_may_be_a_jump():
    assert warmup_weight(0.19, start=0.2, full=0.2, weight=0.5) == 0
    assert warmup_weight(0.2, start=0.2, full=0.2, weight=0.5) == 0.5
    assert warmup_weight(0.0, start=0.0, full=0.0, weight=0.5) == 0.5


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_heads_give_unit_vectors_and_descriptors(norm):
    student, teacher = StudentHead(12, 8, 34, norm), TeacherHead(34, 8, norm)
    generator = torch.Generator().manual_seed(0)
    z, r = student(torch.randn(5, 12, generator=generator))
    assert (z.shape, r.shape) == ((5, 8), (5, 34))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(teacher(torch.randn(5, 34, generator=generator)).norm(dim=1), torch.ones(5))
    hidden = 34 * HIDDEN_TEACHER + HIDDEN_TEACHER + 2 * HIDDEN_TEACHER + HIDDEN_TEACHER * 8 + 8
    assert sum(p.numel() for p in teacher.parameters()) == hidden
    assert sum(p.numel() for p in student.parameters()) == 12 * 12 + 2 * 12 + 12 * 8 + 12 * 34 + 34


def test_student_head_with_layer_norm_looks_at_one_token():
    head = StudentHead(12, 8, 34, "layer")
    tokens = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    for whole, alone in zip(head(tokens), head(tokens[2:3]), strict=True):
        torch.testing.assert_close(whole[2:3], alone)


def test_gather_is_the_identity_in_one_process():
    x = torch.randn(3, 2)
    assert gather_rows(x) is x


def _gather_worker(rank, folder):
    """Contrast of this rank's three anchors with the teacher of both ranks; saves values and gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    z_student, z_teacher, similarity, _, valid = _problem(rows=6, columns=6)
    mine = slice(3 * rank, 3 * rank + 3)
    student, teacher = z_student[mine].clone().requires_grad_(), z_teacher[mine].clone().requires_grad_()
    gathered = gather_rows(teacher)
    loss = contrastive_loss(
        student, gathered, similarity[mine], torch.arange(3) + 3 * rank, torch.ones_like(valid), temperature=0.2
    ).loss
    loss.backward()
    values = {"gathered": gathered.detach(), "loss": loss.detach(), "student": student.grad, "teacher": teacher.grad}
    torch.save(values, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gather_over_two_processes_equals_one(tmp_path):
    torch.multiprocessing.spawn(_gather_worker, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    z_student, z_teacher, similarity, _, valid = _problem(rows=6, columns=6)
    z_student.requires_grad_()
    z_teacher.requires_grad_()
    loss = contrastive_loss(
        z_student, z_teacher, similarity, torch.arange(6), torch.ones_like(valid), temperature=0.2
    ).loss
    loss.backward()
    for part in parts:
        assert torch.equal(part["gathered"], z_teacher.detach())
    assert sum(part["loss"].item() for part in parts) / 2 == pytest.approx(loss.item(), rel=1e-6)
    # each rank's loss is the mean over its own half of the anchors, so the gradients average to the single one
    for name, whole in (("student", z_student.grad), ("teacher", z_teacher.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]) / 2, whole, rtol=1e-5, atol=1e-8)


# --- soft positives and the queue (METHOD 7.4) ---


def test_soft_positives_equal_their_definition_and_forgive_nan():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 34, generator=generator), torch.randn(7, 34, generator=generator)
    expected = torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * 0.8**2))
    torch.testing.assert_close(soft_positives(a, b, sigma=0.8), expected.float(), rtol=1e-3, atol=1e-7)
    assert soft_positives(a, a, sigma=0.1).diagonal().tolist() == pytest.approx([1.0] * 5, abs=1e-3)
    a[2] = torch.nan
    assert soft_positives(a, b, sigma=0.8).isfinite().all()


def test_soft_contrast_equals_the_double_loop():
    z_student, z_teacher, _, own, valid = _problem()
    weights = torch.rand(7, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    losses, mass = [], []
    for i in range(7):
        if not valid[own[i]]:
            continue
        logits = {j: float(z_student[i] @ z_teacher[j]) / 0.07 for j in range(11) if valid[j]}
        log_total = math.log(sum(math.exp(v) for v in logits.values()))
        w = {j: 1.0 if j == own[i] else float(weights[i, j]) for j in logits}
        losses.append(-sum(w[j] * (logits[j] - log_total) for j in logits) / sum(w.values()))
        mass.append(sum(w.values()))
    result = contrastive_loss(z_student, z_teacher, weights, own, valid, temperature=0.07, contrast="soft")
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.mean_positives.item() == pytest.approx(sum(mass) / len(mass), rel=1e-5)


def test_soft_contrast_of_far_pairs_is_the_diagonal():
    z_student, z_teacher, similarity, own, valid = _problem()
    far = contrastive_loss(
        z_student, z_teacher, torch.zeros_like(similarity), own, valid, temperature=0.07, contrast="soft"
    )
    own_only = contrastive_loss(z_student, z_teacher, similarity, own, valid, temperature=0.07, contrast="diagonal")
    assert far.loss.item() == pytest.approx(own_only.loss.item(), rel=1e-6)


@pytest.mark.parametrize("pushes", [(3,), (3, 4), (3, 4, 5), (10, 2), (25,), (1,) * 23])
def test_queue_keeps_the_rows_pushed_last(pushes):
    queue, pushed, number = DescriptorQueue(10, 2), [], 0
    for count in pushes:
        rows = torch.arange(number, number + count, dtype=torch.float32)[:, None].expand(count, 2)
        queue.push(rows)
        pushed += rows[:, 0].tolist()
        number += count
        assert sorted(queue.rows[:, 0].tolist()) == pushed[-10:]


def test_queue_goes_on_from_its_state_and_may_be_empty():
    queue, copy = DescriptorQueue(10, 2), DescriptorQueue(10, 2)
    queue.push(torch.randn(13, 2))
    copy.load_state_dict(queue.state_dict())
    more = torch.randn(4, 2)
    queue.push(more)
    copy.push(more)
    assert torch.equal(queue.rows, copy.rows)
    none = DescriptorQueue(0, 2)
    none.push(torch.randn(5, 2))
    assert none.rows.shape == (0, 2)
