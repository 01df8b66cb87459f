"""The number of processes does not change a run."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusion_fixture import tiny_config
from training_batches import batch_of, equal_states, images_of

import lungseg.diffusion.training as training_module
from lungseg.diffusion.checkpoint import load_training_state, save_training_state
from lungseg.diffusion.training import Trainer
from lungseg.errors import UsageError


def test_synchronised_batch_norm_on_cpus_is_refused(statistics, monkeypatch):
    monkeypatch.setattr(training_module, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="--head-norm batch needs GPUs or a single process"):
        Trainer(tiny_config(head_norm="batch"), statistics, device="cpu")


FULL = {
    # everything at once: parts, a queue, the rank floor, two windows' worth of columns, images at t = 0, in float64
    "precision": "fp64", "batch_size": 4, "total_images": 80, "accumulate": 2, "queue_size": 30, "rank_floor": 10.0,
    "collapse_weight": 0.5, "low_noise_share": 0.5, "distill_levels": 0.1, "axial_turns": True, "distill_full": 0.2,
    "learning_rate": 3e-4,
}  # fmt: skip
STEPS = 10


def _rank_worker(rank, folder, volumes, config, statistics, short):
    """Steps on this rank's rows of each batch; saves its state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer, images = Trainer(config, statistics, device="cpu"), images_of(volumes, config)
    for batch in _some_batches(images, short):
        trainer.step({key: value[rank::2] for key, value in batch.items()}, num_images=4)
    save_training_state(folder / f"rank{rank}.pt", trainer.state_dict())
    torch.distributed.destroy_process_group()


def _some_batches(images, short):
    """Batches of 4; with ``short`` most slots of rank 1 (rows 1 and 3) are empty."""
    for i in range(0, 4 * STEPS, 4):
        batch = batch_of(images, range(i, i + 4))
        if short:
            batch["token_valid"][1::2, 1:] = False
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["grey-zone", "soft"])
@pytest.mark.parametrize("short", [False, True], ids=["full", "unequal number of tokens"])
def test_row_49_two_processes_train_like_one(volumes, statistics, tmp_path, short, contrast):
    config = tiny_config(**FULL, contrast=contrast)
    torch.multiprocessing.spawn(_rank_worker, args=(tmp_path, volumes, config, statistics, short), nprocs=2)
    states = [load_training_state(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert equal_states(states[0], states[1])
    single = Trainer(config, statistics, device="cpu")
    start = copy.deepcopy(single.model.state_dict())
    for batch in _some_batches(images_of(volumes, config), short):
        single.step(batch, num_images=4)
    assert states[0]["images"] == single.images == 4 * STEPS
    assert states[0]["skipped"] == 0
    whole = single.model.state_dict()
    assert all((value - start[name]).norm() > 0 for name, value in whole.items())
    for name, value in whole.items():
        apart = (value - states[0]["model"][name]).norm()
        assert apart <= 1e-5 * value.norm(), name
    assert torch.equal(states[0]["queue"]["rows"], single.queue.state_dict()["rows"])
