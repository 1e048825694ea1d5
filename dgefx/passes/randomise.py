"""Parameters without constants, which hide mistakes; wherever blocks run on random input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def randomise_constants(module: nn.Module) -> None:
    """Add noise, in place, to parameters that are constant (zeros, ones, layer scales of 1e-6), and
    to what is as good as zero in convolutions' kernels (that pass their input on).

    They would hide what they multiply, from who looks for it and from verification.
    """
    generator = torch.Generator().manual_seed(0)
    kernels = {id(m.weight) for m in module.modules() if isinstance(m, _ConvNd)}
    with torch.no_grad():
        for parameter in module.parameters():
            # quantised weights and the like are tensors of their own kind, and no constants
            plain = type(parameter.data) is Tensor and parameter.is_floating_point()
            if not plain or not parameter.numel():
                continue
            low, high = parameter.aminmax()
            size = float(torch.maximum(high.abs(), low.abs()))
            if float(high - low) <= 1e-3 * size:
                hides = torch.ones_like(parameter, dtype=torch.bool)
            elif id(parameter) in kernels:
                hides = parameter.abs() <= 1e-6 * size
            else:
                continue
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_(noise.to(parameter) * hides)
