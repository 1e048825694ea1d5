"""Why a block that was traced and split does not equal its dense block: what users do, by trial.

Asked by `dgefx.passes.pipeline` where verification failed, so that the reason names the cause and
not only the difference.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from dgefx.kernels.layout import to_tokens
from dgefx.nn.callspec import CallSpec
from dgefx.outputs import Call, tensors_in
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.reasons import Reason
from dgefx.passes.trace.block_trace import trace
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.decisions import is_shaped_by_data
from dgefx.passes.trace.deterministic import Deterministic, seed_all
from dgefx.passes.trace.guards import keeps_statistics
from dgefx.passes.trace.in_place import set_item
from dgefx.passes.user_code import lines_run, place_text

_TORCH = os.path.dirname(torch.__file__)
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


def why_unequal(example: BlockExample, constant: bool) -> Reason | None:
    """The cause of a difference; None where it is not known.

    Args:
        example: of the dense block.
        constant: whether input that is constant within patches was what told the difference.
    """

    block, call, layout, shape = example.block, example.call, example.layout, example.shape

    def run(
        seed: int,
        change: Callable[[Tensor], Tensor] = lambda stream: stream,
        training: bool = False,
    ) -> Tensor:
        seed_all(seed)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: change(t.clone()), call)
        # in train mode chance is expected, as far as it is known
        with Deterministic() if training else contextlib.nullcontext():
            return tensors_in(copy_block(block).train(training)(*args, **kwargs))[0]

    def same_everywhere(value: Tensor) -> Tensor:
        if tuple(value.shape) != shape:
            return value
        constant = value.clone()
        for letter in "NHW":
            if letter in layout.order:
                axis = layout.axis(letter)
                constant = constant.narrow(axis, 0, 1).expand_as(value)
        return constant.clone()

    def beside(image: int, value: Tensor) -> Tensor:
        """One of the images beside others: either holds the largest number of a batch."""
        if tuple(value.shape) != shape:
            return value
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(value)
        noise[image] = value[image]
        return noise

    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            for training, mode in ((False, "eval"), (True, "train")):
                if not torch.equal(run(2, training=training), run(1, training=training)):
                    return Reason(
                        f"it draws random numbers in {mode} mode, other than for dropout, for "
                        f"queries others than for tokens",
                        "draws random numbers",
                    )
            moving = _moving(block, call)
            if moving:
                return Reason(
                    f"what it gives in train mode is another from call to call, by what "
                    f"{', '.join(moving)} keeps, and a converted block calls that twice",
                    "moves in training",
                )
            for way, holders, what in (
                ("forward", _FORWARD, "what it computes"),
                ("backward", _BACKWARD, "its gradients"),
            ):
                hooked = _hooked(block, holders)
                if hooked:
                    return Reason(
                        f"{way} hooks on {', '.join(hooked)} change {what}, and not every part of "
                        f"a converted block is called",
                        "hooks inside",
                    )
            if layout.order[0] == "B" and any(
                _differs(run(1, functools.partial(beside, image))[image], run(1)[image])
                for image in range(2)
            ):
                return Reason(
                    "what it makes of an image depends on the other images of the batch",
                    "mixes images",
                )
            known = _told_by_trace(block, call)
            if known is not None:
                return known
            other = _other_lines(block, call)
            if other:
                return Reason(
                    f"it goes another way when it is traced, by something that is fixed then (a "
                    f"type asked for by isinstance, the identity of an object), at "
                    f"{place_text(other[0])}",
                    "not traceable",
                )
            if not constant:
                return None
            same = run(1, lambda t: t[:1].expand_as(t).clone() if tuple(t.shape) == shape else t)
            if layout.order[0] == "B" and _differs(same, same[:1].expand_as(same)):
                return Reason(
                    "it does to some images what it does not do to others, by their place in the "
                    "batch",
                    "tokens by place",
                )
            tokens = to_tokens(run(1, same_everywhere), layout.order)[:, layout.prefix :]
            spread = (tokens - tokens[:, :1]).norm() / tokens.norm()
            if bool(spread > 1e-4):
                return Reason(
                    "it does to some tokens what it does not do to others, by their place",
                    "tokens by place",
                )
    except Exception:  # user code may raise anything on other values
        return None
    return None


def _moving(block: nn.Module, call: Call) -> list[str]:
    """Parts whose own tensors make every call in train mode another one, as spectral norm's do."""
    copied = copy_block(block).train()

    def run() -> Tensor:
        seed_all(1)
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, call)
        with Deterministic():
            return tensors_in(copied(*args, **kwargs))[0]

    if torch.allclose(run(), run(), rtol=1e-6, atol=1e-6):
        return []
    keeping = [name for name, part in block.named_modules() if keeps_statistics(part)]
    # the innermost, by the names that the user gave
    own = [name for name in keeping if "parametrizations" not in name.split(".")]
    return [n for n in own if n and not any(other.startswith(f"{n}.") for other in own)]


def _differs(found: Tensor, wanted: Tensor) -> bool:
    return not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def _told_by_trace(block: nn.Module, call: Call) -> Reason | None:
    """An operation that no converted block can run on fewer tokens."""
    traced = trace(block, CallSpec.of(block, *call), False)
    for node in traced.graph.nodes:
        place = node.meta.get("place")
        where = f", at {place_text(place)}" if place else ""
        if is_shaped_by_data(node, traced.values, traced.root):
            what = "a value of the block changes its shape with the data"
            return Reason(what + where, "shapes follow the data")
        if node.target is set_item and not any(map(_has_node, node.args[1:2])):
            what = "it writes into some of its tokens and not into others, by their place"
            return Reason(what + where, "tokens by place")
    return None


def _has_node(argument: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(argument))


def _other_lines(block: nn.Module, call: Call) -> list[tuple[str, int]]:
    """Lines of the user's code that only the block or only its trace goes through."""
    (args, kwargs), spec = call, CallSpec.of(block, *call)
    classes = {type(module) for module in block.modules()}
    files = {inspect.getfile(kind) for kind in classes if kind.__module__ in sys.modules}
    files = {file for file in files if not file.startswith(_TORCH)}
    ran = lines_run(lambda: copy_block(block)(*args, **kwargs), files)
    traced = lines_run(lambda: trace(block, spec, False), files)
    return sorted(ran - traced) or sorted(traced - ran)


def _hooked(block: nn.Module, holders: tuple[str, ...]) -> list[str]:
    """Names of the parts with hooks of a kind."""
    return [
        name or "the block itself"
        for name, part in block.named_modules()
        if any(getattr(part, holder) for holder in holders)
    ]
