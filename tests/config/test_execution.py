"""How a command runs: shards, devices, and what excludes what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.fields import from_dict
from lungseg.errors import UsageError


@given(items=st.lists(st.integers(), max_size=30), count=st.integers(1, 12))
def test_shards_share_the_cases_without_rest_or_overlap(items: list[int], count: int) -> None:
    shards = [Execution(shard=f"{i}/{count}").take_shard(items) for i in range(1, count + 1)]
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    joined: list[int] = [0] * len(items)
    for i, shard in enumerate(shards):
        joined[i::count] = shard
    assert joined == items
    assert Execution().take_shard(items) == items


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/2/3", "1/0", "-1/2", "/", "1/"])
def test_row_63_shards(shard: str) -> None:
    with pytest.raises(UsageError, match="is not i/n with 1 <= i <= n") as caught:
        from_dict(Execution, {"shard": shard})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert from_dict(Execution, {"device": device}).device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "cuda:²", "cuda:0\n"])
def test_row_63_devices(device: str) -> None:
    with pytest.raises(UsageError, match="is not one of auto, cpu, cuda, cuda:N"):
        from_dict(Execution, {"device": device})


def test_row_65_quiet_and_verbose_and_the_rest_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        from_dict(Execution, {"quiet": True, "verbose": True, "shard": "x", "device": "tpu"})
    assert len(str(caught.value).splitlines()) == 3


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(available=False, count=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found.count)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="this machine has 0 CUDA devices; use --device cpu or auto"):
            resolve_device(name)
    found.available, found.count = True, 2
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(UsageError, match="has 2 CUDA devices"):
        resolve_device("cuda:2")
