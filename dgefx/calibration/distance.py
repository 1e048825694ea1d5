"""How far a routed model's output is from the dense model's: KL of logits, or relative distance.

Used by every step of calibration. `probe` gives scalars whose gradients' squares are, on average,
the curvature of that distance at the dense output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgefx.outputs import output_tensors

Kind = Literal["kl", "relative"]


def logits_of(output: Any) -> Tensor | None:
    """(B, classes) scores of a model output that could be logits, else None."""
    if hasattr(output, "get") or hasattr(output, "logits"):
        output = output.get("logits") if hasattr(output, "get") else output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1:
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1:
        return output
    return None


def find_kind(model: nn.Module, output: Any, linear_outputs: set[int]) -> Kind:
    """KL where the output is a classifier's logits, otherwise the relative distance.

    Logits are two-dimensional and either named so, or as many as the model says it has classes,
    or what an `nn.Linear` returned (features come out of a norm or a pool).

    Args:
        linear_outputs: addresses of what the `nn.Linear` modules of this call returned, all of it
            still alive (a freed address is used again).
    """
    logits = logits_of(output)
    if logits is None:
        return "relative"
    config = getattr(model, "config", None)
    classes = (getattr(model, "num_classes", None), getattr(config, "num_labels", None))
    named = not isinstance(output, (Tensor, tuple, list))
    known = logits.shape[1] in [c for c in classes if isinstance(c, int)]
    return "kl" if named or known or logits.data_ptr() in linear_outputs else "relative"


def compared(output: Any, kind: Kind, images: int) -> list[Tensor]:
    """The tensors of an output that distances are taken of, in float32; gradients flow.

    Logits, or every floating point tensor with one entry per image on its first axis. An output
    that has none such (images on another axis) is compared whole.
    """
    if kind == "kl":
        logits = logits_of(output)
        if logits is None or logits.shape[0] != images:
            raise ValueError(
                f"the output was logits (B, classes) on the first calibration images, but is not "
                f"on a batch of {images}; use distance='relative', or a batch_size that it keeps "
                f"its shape for"
            )
        return [logits.float()]
    tensors = [t.float() for t in output_tensors(output) if t.numel()]
    per_image = [t for t in tensors if t.dim() and t.shape[0] == images]
    return per_image or tensors


def reference(output: Any, kind: Kind, images: int) -> list[Tensor]:
    """`compared` of a dense output, to be kept: no graph, no memory that the model may reuse."""
    return [t.detach().clone() for t in compared(output, kind, images)]


def distance(dense: list[Tensor], routed: list[Tensor], kind: Kind, images: int) -> Tensor:
    """(B,) distance of every image's output; gradients flow through `routed`.

    Args:
        dense: `reference` of the dense output. routed: `compared` of the routed one, same call.
        images: B.
    """
    if kind == "kl":
        wanted = dense[0].log_softmax(-1)
        return (wanted.exp() * (wanted - routed[0].log_softmax(-1))).sum(-1)
    total = torch.zeros(images, device=dense[0].device, dtype=torch.float32)
    for a, b in zip(routed, dense, strict=True):
        rows = images if b.dim() and b.shape[0] == images else 1
        a, b = a.reshape(rows, -1), b.reshape(rows, -1)
        total = total + (a - b).square().sum(1) / b.square().sum(1).clamp(min=1e-12)
    return total / len(dense)


def probe(output: Any, kind: Kind, images: int, generator: torch.Generator) -> Tensor:
    """A random scalar of the output: the log-probability of a class drawn from the prediction, or
    a random projection of the relative output. Gradients flow."""
    tensors = compared(output, kind, images)
    if kind == "kl":
        scores = tensors[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
        return scores.gather(1, drawn.to(scores.device)).sum()
    total = torch.zeros((), device=tensors[0].device, dtype=torch.float32)
    for tensor in tensors:
        rows = images if tensor.dim() and tensor.shape[0] == images else 1
        flat = tensor.reshape(rows, -1)
        noise = torch.randn(flat.shape, generator=generator).to(flat.device)
        size = flat.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
        total = total + (noise * flat / size).sum()
    return total
