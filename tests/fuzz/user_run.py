"""One call of a user's model: what it gives, its gradients and the state that it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.fuzz.user_spec import Made
from tests.helpers import images

Values = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """grid: of the images. kind: of the images, "plain" or "hot", with one image far out.
    grad: "all", "none" (under no_grad) or "inference"."""

    grid: tuple[int, int]
    count: int = 2
    training: bool = False
    kind: str = "plain"
    grad: str = "all"
    autocast: bool = False
    variant: str = "{}"

    def __str__(self) -> str:
        told = [f"{self.count} of {self.grid[0]}x{self.grid[1]}"]
        told += ["train" if self.training else "eval"]
        told += [self.kind] * (self.kind != "plain") + [self.grad] * (self.grad != "all")
        told += ["autocast"] * self.autocast + [self.variant] * (self.variant != "{}")
        return " ".join(told)

    def images(self, dtype: torch.dtype, seed: int) -> Tensor:
        height, width = self.grid
        made = images(self.count, (2 * height, 2 * width), seed=seed + self.count)
        if self.kind == "hot":
            made[-1] = made[-1] * 8 + 3
        return made.to(dtype)


class ToldDropout(TorchFunctionMode):
    """Dropout without chance that still tells its p: both models draw the elements of one in
    another order where queries and keys are dropped apart, but at the same p."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "dropout":
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", (*args, True, True, True)[2]))
            value = args[0] if args else kwargs["input"]
            return value * (1 - p) if training else value
        if name == "scaled_dot_product_attention":
            p = kwargs.pop("dropout_p", args[4] if len(args) > 4 else 0.0)
            return func(*args[:4], **kwargs) * (1 - p)
        return func(*args, **kwargs)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def fresh(model: nn.Module) -> nn.Module:
    """A copy whose hooks and settings are those of the model."""
    return copy.deepcopy(model)


def state(model: nn.Module) -> Values:
    """Plain attributes and buffers of every module, by name."""
    values: Values = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        for key, value in {**plain, **module._buffers}.items():
            if isinstance(value, nn.Module):
                continue
            leaves, tree = pytree.tree_flatten(value)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    values[f"{name}.{key}[{i}]"] = leaf.detach().clone()
                elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                    values[f"{name}.{key}[{i}]"] = leaf
            if isinstance(value, (list, dict, tuple)):
                values[f"{name}.{key} has"] = str(tree.num_leaves)
    return values


@contextlib.contextmanager
def _around(call: Call) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if call.grad == "none":
            stack.enter_context(torch.no_grad())
        if call.grad == "inference":
            stack.enter_context(torch.inference_mode())
        if call.autocast:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


def forward(made: Made, model: nn.Module, call: Call) -> tuple[Tensor, list[Tensor]]:
    """(images, output tensors), in the call's mode and from a fixed seed."""
    torch.manual_seed(5)
    random.seed(5)
    with _around(call):
        x = call.images(dtype_of(model), made.spec.seed).clone()
        if call.grad == "all":
            x.requires_grad_()
        output = model(x, **made.kwargs(call.variant, x))
    return x, [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def loss(output: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in output]
    return torch.stack([(t.double() * w).sum() for t, w in zip(output, weights, strict=True)]).sum()


def set_mode(made: Made, model: nn.Module, training: bool) -> None:
    made.module.mode(model.train(training))


def gathered(model: nn.Module, x: Tensor, output: list[Tensor]) -> Values:
    """All that a call gave."""
    values: Values = {f"output {i}": t.detach().clone() for i, t in enumerate(output)}
    if x.grad is not None:
        values["gradient of images"] = x.grad.clone()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        values[f"gradient of {name}"] = None if grad is None else grad.clone()
    values.update({f"state {name}": value for name, value in state(model).items()})
    return values


def run(made: Made, model: nn.Module, call: Call) -> Values:
    """Output, gradients and state of one call."""
    set_mode(made, model, call.training)
    model.zero_grad(set_to_none=True)
    x, output = forward(made, model, call)
    total = loss(output)
    if call.grad == "all" and total.requires_grad:
        total.backward()
    return gathered(model, x, output)


def perturbed(model: nn.Module, eps: float, seed: int) -> nn.Module:
    """A copy whose parameters are off by at most one rounding."""
    copied = fresh(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            steps = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_((1 + eps * steps).to(parameter.dtype))
    return copied


def _size(value: Tensor) -> float:
    return float(value.double().norm())


def _error(found: Any, wanted: Any, least: float) -> float:
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return float("inf")
        if not torch.equal(found.isfinite(), wanted.isfinite()):
            return float("inf")
        both = wanted.isfinite()
        a, b = found[both].double(), wanted[both].double()
        error = float((a - b).norm())
        return error / max(float(b.norm()), least, 1e-30) if error else 0.0
    if isinstance(found, float) and isinstance(wanted, float):
        return abs(found - wanted) / max(abs(wanted), 1e-30) if found != wanted else 0.0
    same = type(found) is type(wanted) and not isinstance(found, Tensor) and found == wanted
    return 0.0 if same else float("inf")


def errors(found: Values, wanted: Values) -> dict[str, float]:
    """Relative error per value; infinite where there is none, or of another kind or shape.

    Gradients that are nearly zero are measured by a thousandth of the largest one.
    """
    grads = [
        _size(v) for k, v in wanted.items() if k.startswith("gradient") and isinstance(v, Tensor)
    ]
    least = 1e-3 * max(grads, default=0.0)
    missing = object()
    return {
        name: _error(found.get(name, missing), value, least if name.startswith("gradient") else 0.0)
        for name, value in wanted.items()
    }
