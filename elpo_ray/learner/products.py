"""Matrix products of fp32 on the CPU by oneDNN, for the linear layers and the output head.

torch itself multiplies fp32 matrices with MKL, which does not use AVX-512 on AMD's processors:
oneDNN, a part of torch too, takes less than half the time there. Both compute in fp32. Other
precisions and devices are left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [..., K], weight [N, K], bias [N] or None -> rows weightᵀ + bias [..., N]. It has no
    gradient."""
    if not _by_onednn(rows):
        return nn.functional.linear(rows, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def _by_onednn(rows: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and rows.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class _LinearFunction(torch.autograd.Function):
    """`product` with its gradients. The weight itself is saved, not a view of it: ZeRO-3 gives it
    other memory between the passes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = product(grad, weight.T).view(rows.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(grad.T, rows.flatten(0, -2).T)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0)
        return of_rows, of_weight, of_bias


class Linear(nn.Linear):
    """A linear layer whose products are `product`s."""

    def forward(self, input: Tensor) -> Tensor:
        if not _by_onednn(input):
            return super().forward(input)
        out: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias
        )
        return out


def use_in(model: nn.Module) -> None:
    """Make every plain linear layer of `model` a `Linear`, its parameters and hooks kept."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
