"""How far a routed model's output is from the dense model's: KL of logits, or relative distance.

Used by every step of calibration. `probe` gives scalars whose gradients' squares are, on average,
the curvature of that distance at the dense output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgefx.passes.verify import output_tensors

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
        linear_outputs: addresses of what the `nn.Linear` modules of this call returned.
    """
    logits = logits_of(output)
    if logits is None:
        return "relative"
    config = getattr(model, "config", None)
    classes = (getattr(model, "num_classes", None), getattr(config, "num_labels", None))
    named = not isinstance(output, (Tensor, tuple, list))
    known = logits.shape[1] in [c for c in classes if isinstance(c, int)]
    return "kl" if named or known or logits.data_ptr() in linear_outputs else "relative"


def reference(output: Any, kind: Kind) -> list[Tensor]:
    """The tensors of an output that distances are taken of, detached, in float32."""
    if kind == "kl":
        logits = logits_of(output)
        assert logits is not None
        return [logits.detach().float()]
    return [t.detach().float() for t in output_tensors(output)]


def distance(dense: list[Tensor], routed: Any, kind: Kind) -> Tensor:
    """(B,) distance of every image's output.

    Args:
        dense: `reference` of the dense output.
        routed: output of the same call.
    """
    found = reference(routed, kind)
    if kind == "kl":
        wanted = dense[0].log_softmax(-1)
        return (wanted.exp() * (wanted - found[0].log_softmax(-1))).sum(-1)
    images = dense[0].shape[0]
    total = torch.zeros(images, device=dense[0].device)
    for a, b in zip(found, dense, strict=True):
        if b.dim() and b.shape[0] == images:
            a, b = a.reshape(images, -1), b.reshape(images, -1)
            total = total + (a - b).square().sum(1) / b.square().sum(1).clamp(min=1e-12)
    return total / len(dense)


def probe(output: Any, kind: Kind, generator: torch.Generator) -> Tensor:
    """A random scalar of the output: the log-probability of a class drawn from the prediction, or
    a random projection of the relative output. Gradients flow."""
    if kind == "kl":
        logits = logits_of(output)
        assert logits is not None
        scores = logits.float().log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
        return scores.gather(1, drawn.to(scores.device)).sum()
    total: Tensor | None = None
    for tensor in output_tensors(output):
        flat = tensor.float().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        noise = torch.randn(flat.shape, generator=generator).to(flat.device)
        size = flat.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
        part = (noise * flat / size).sum()
        total = part if total is None else total + part
    assert total is not None
    return total
