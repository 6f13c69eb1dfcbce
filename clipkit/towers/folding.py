"""Fold batch norms with fixed statistics into the convolutions before them.

Such a norm multiplies each channel and adds to it. A convolution can do both itself, with its kernel
multiplied and a bias added, which saves passes over the largest tensors. The usual folding (torch's
`fuse_conv_bn_eval`) writes new weights; here the weights stay those of the checkpoint and the product
is formed in every pass, at little cost, so that training changes the convolution and the norm as it
would without folding. The algebra is that of Jacob et al. 2018 (arXiv 1712.05877, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def fold_batch_norms(model: torch.nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Fold every batch norm whose input comes straight from a convolution; return how many.

    run: pass something small through `model` and return the output, of any shape. It is called once
        to see which norm follows which convolution, and again to check the result: if another module
        reads a convolution's output too, nothing is folded.
    A norm in training mode, or without running statistics, computes as usual while it is so.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    with torch.no_grad():
        plain, pairs = _watched(model, norms, run)
        for conv, norm in pairs:
            conv.forward = partial(_convolve, conv, norm, conv.forward)  # type: ignore[method-assign]
            norm.forward = partial(_activate, norm, norm.forward)  # type: ignore[method-assign]
        error = (run() - plain).float().norm() / plain.float().norm()
    if error < 1e-3 or (plain.dtype.itemsize < 4 and error < 0.05):
        return len(pairs)
    for module in chain.from_iterable(pairs):
        del module.forward
    return 0


def synchronise_batch_norms(model: torch.nn.Module) -> None:
    """Undo all folding, and let batch norms in training mode take their statistics over all processes.

    torch does that on GPUs only. In evaluation mode they compute as before, anywhere.
    """
    from timm.layers import convert_sync_batchnorm  # torch's own would drop timm's activations

    for module in model.modules():
        folded = vars(module).get("forward")
        if isinstance(folded, partial) and folded.func in (_convolve, _activate):
            del module.forward
    convert_sync_batchnorm(model)


@contextmanager
def unfolded(model: torch.nn.Module) -> Iterator[None]:
    """Let convolutions and norms compute as they did before `fold_batch_norms`, until the block ends."""
    folds = {
        module: module.__dict__.pop("forward")
        for module in model.modules()
        if getattr(module.__dict__.get("forward"), "func", None) in (_convolve, _activate)
    }
    try:
        yield
    finally:
        for module, forward in folds.items():
            module.forward = forward


def _watched(
    model: torch.nn.Module, norms: list[_BatchNorm], run: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, list[tuple[torch.nn.Conv2d, _BatchNorm]]]:
    """Return the output of `run`, and each convolution with the only norm that reads its output."""
    made: list[tuple[torch.nn.Conv2d, torch.Tensor]] = []  # the outputs stay alive: `is` is certain
    read: list[tuple[_BatchNorm, torch.Tensor]] = []
    hooks = [
        conv.register_forward_hook(lambda m, _, out: made.append((m, out)))
        for conv in model.modules()
        if type(conv) is torch.nn.Conv2d  # a subclass may do more than convolve
    ]
    hooks += [norm.register_forward_pre_hook(lambda m, x: read.append((m, x[0]))) for norm in norms]
    try:
        result = run()
    finally:
        for hook in hooks:
            hook.remove()
    used = Counter(id(module) for module, _ in (*made, *read))
    pairs = []
    for conv, out in made:
        takers = [norm for norm, x in read if x is out]
        if len(takers) == 1 and used[id(conv)] == used[id(takers[0])] == 1:
            pairs.append((conv, takers[0]))
    return result, pairs


def _is_fixed(norm: _BatchNorm) -> bool:
    return not norm.training and norm.running_mean is not None


def _convolve(
    conv: torch.nn.Conv2d, norm: _BatchNorm, plain: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    if not _is_fixed(norm):
        return plain(x)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    kernel = conv.weight  # read once: an adapter makes it at every reading
    # In float32 if the weights are in half: small variances would lose their digits.
    wide = torch.promote_types(kernel.dtype, torch.float32)
    gain = torch.rsqrt(variance.to(wide) + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.to(wide)
    shift = -mean.to(wide) * gain
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide) * gain
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    weight = (kernel * gain[:, None, None, None]).to(kernel.dtype)
    folded: torch.Tensor = conv._conv_forward(x, weight, shift.to(kernel.dtype))
    return folded


def _activate(norm: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply what is left of a folded norm: timm's BatchNormAct2d also drops and activates."""
    if not _is_fixed(norm):
        return plain(x)
    for name in ("drop", "act"):
        if (part := getattr(norm, name, None)) is not None:
            x = part(x)
    return x
