"""What makes training faster without changing what is computed: the fused optimiser and compilation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def fused_adamw(
    groups: Iterable[Any], *, learning_rate: float, weight_decay: float, device: torch.device | str
) -> torch.optim.AdamW:
    """AdamW in one kernel over all parameters, where the device has it (CPU and CUDA do); else torch's default.

    Parameters
    ----------
    groups : iterable
        Parameters, or parameter groups.
    learning_rate, weight_decay : float
        Without weight decay it is Adam.
    device : torch.device or str
        Where the parameters live.
    """
    fused = torch.device(device).type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def compile_network(
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    *,
    mode: str,
    autocast: AbstractContextManager[Any] | None = None,
) -> bool:
    """Compile a network in place where that pays and works; else leave it as it is, with a warning.

    It is compiled and run once, forward and backward, here and now: a compiler that fails does so before the
    training begins. Parameter names, and what is saved, stay as they are.

    Parameters
    ----------
    network : module
        Its gradients are left as they were: None.
    inputs : tuple of tensors
        An input of the shapes, types and device of the training.
    mode : str
        `on`, `off`, or `auto`: on CUDA only, quietly left out where there is no compiler.
    autocast : context manager, optional
        The autocast region the training runs in.

    Returns
    -------
    bool
        Whether the network is compiled.
    """
    if mode == "off" or (mode == "auto" and inputs[0].device.type != "cuda"):
        return False
    network.forward = torch.compile(network.forward, dynamic=False)
    try:
        with autocast or contextlib.nullcontext():
            outputs = network(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward([output.float().mean() for output in outputs])
    except torch.cuda.OutOfMemoryError:
        del network.forward
        raise
    except Exception as error:  # compilers fail in too many ways to name; eager mode computes the same
        del network.forward  # back to the method of the class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        log.warning("the network cannot be compiled (%s: %s); going on without", type(error).__name__, reason)
        return False
    finally:
        network.zero_grad(set_to_none=True)
    return True
