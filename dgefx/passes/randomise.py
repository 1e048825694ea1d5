"""Parameters without constants, which hide mistakes; wherever blocks run on random input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: of the largest element, what adds nothing to it; and of all elements, how many of those hide
_NEGLIGIBLE, _SPARSE = 1e-6, 1e-2
#: elements of a parameter that are looked at to tell
_LOOKED_AT = 2**14


def randomise_constants(module: nn.Module) -> None:
    """Add noise, in place, to parameters that are constant (zeros, ones, layer scales of 1e-6), and
    to what is as good as zero where many of the elements are (kernels and matrices that pass their
    input on).

    They would hide what they multiply, from who looks for it and from verification.
    """
    generator = torch.Generator().manual_seed(0)
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
            else:
                some = parameter.flatten()[:: parameter.numel() // _LOOKED_AT + 1]
                if float((some.abs() <= _NEGLIGIBLE * size).float().mean()) <= _SPARSE:
                    continue
                hides = parameter.abs() <= _NEGLIGIBLE * size
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_(noise.to(parameter) * hides)
