"""Why a block that was traced and split does not equal its dense block: what users do, by trial.

Asked by `dgefx.passes.pipeline` where verification failed, so that the reason names the cause and
not only the difference. Every cause is a function of the dense block's example; the first that
holds is the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from dgefx.kernels.layout import to_tokens
from dgefx.nn.callspec import CallSpec
from dgefx.passes.plan.example import BlockExample
from dgefx.passes.reasons import Reason
from dgefx.passes.trace.block_trace import Trace, trace
from dgefx.passes.trace.copies import copy_block
from dgefx.passes.trace.decisions import is_shaped_by_data
from dgefx.passes.trace.deterministic import Deterministic
from dgefx.passes.trace.guards import keeps_statistics
from dgefx.passes.trace.tensor_versions import set_item
from dgefx.passes.user_code import lines_run, place_text

_TORCH = os.path.dirname(torch.__file__)


def why_unequal(example: BlockExample, constant: bool) -> Reason | None:
    """The cause of a difference; None where it is not known.

    Args:
        example: of the dense block.
        constant: whether input that is constant within patches was what told the difference.
    """
    causes = _CAUSES + (_OF_CONSTANT_INPUT if constant else ())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            return next(filter(None, (cause(example) for cause in causes)), None)
    except Exception:  # user code may raise anything on other values
        return None


def _run(example: BlockExample, seed: int = 1, training: bool = False) -> Tensor:
    # in train mode random numbers are left out, as far as they are known
    mode = Deterministic() if training else None
    return example.run(copy_block(example.block).train(training), mode, seed)


def _changed(example: BlockExample, change: Callable[[Tensor], Tensor]) -> BlockExample:
    """The call with all tensors of the stream's shape changed."""

    def made(value: Tensor) -> Tensor:
        return change(value) if tuple(value.shape) == example.shape else value

    return dataclasses.replace(example, call=pytree.tree_map_only(Tensor, made, example.call))


def _differs(found: Tensor, wanted: Tensor) -> bool:
    return not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def _trace(example: BlockExample) -> Trace:
    return trace(example.block, CallSpec.of(example.block, *example.call), False)


def _draws(example: BlockExample) -> Reason | None:
    for training, mode in ((False, "eval"), (True, "train")):
        if not torch.equal(_run(example, 2, training), _run(example, 1, training)):
            return Reason(
                f"it draws random numbers in {mode} mode, other than for dropout, for queries "
                f"others than for tokens",
                "draws random numbers",
            )
    return None


def _moves(example: BlockExample) -> Reason | None:
    """Parts whose own tensors make every call in train mode another one, as spectral norm's do."""
    copied = copy_block(example.block).train()
    first, second = (example.run(copied, Deterministic(), 1) for _ in range(2))
    if torch.allclose(first, second, rtol=1e-6, atol=1e-6):
        return None
    keeping = [name for name, part in example.block.named_modules() if keeps_statistics(part)]
    # the innermost, by the names that the user gave
    own = [name for name in keeping if name and "parametrizations" not in name.split(".")]
    names = [n for n in own if not any(other.startswith(f"{n}.") for other in own)]
    if not names:
        return None
    return Reason(
        f"what it gives in train mode is another from call to call, by what {', '.join(names)} "
        f"keeps, and a converted block calls that twice",
        "moves in training",
    )


def _hooked(example: BlockExample) -> Reason | None:
    for way, what in (("forward", "what it computes"), ("backward", "its gradients")):
        names = [
            name or "the block itself"
            for name, part in example.block.named_modules()
            if getattr(part, f"_{way}_hooks") or getattr(part, f"_{way}_pre_hooks")
        ]
        if names:
            return Reason(
                f"{way} hooks on {', '.join(names)} change {what}, and not every part of a "
                f"converted block is called",
                "hooks inside",
            )
    return None


def _mixes_images(example: BlockExample) -> Reason | None:
    if example.layout.order[0] != "B":
        return None
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    alone = _run(example)
    for image in range(2):  # either holds the largest number of a batch

        def beside(value: Tensor, image: int = image) -> Tensor:
            others = noise.to(value, copy=True)
            others[image] = value[image]
            return others

        if _differs(_run(_changed(example, beside))[image], alone[image]):
            what = "what it makes of an image depends on the other images of the batch"
            return Reason(what, "mixes images")
    return None


def _bound_to_tokens(example: BlockExample) -> Reason | None:
    """An operation that no converted block can run on fewer tokens."""
    traced = _trace(example)
    for node in traced.graph.nodes:
        place = node.meta.get("place")
        where = f", at {place_text(place)}" if place else ""
        if is_shaped_by_data(node, traced.values, traced.root):
            what = "a value of the block changes its shape with the data"
            return Reason(what + where, "shapes follow the data")
        index = pytree.tree_leaves(node.args[1:2])
        if node.target is set_item and not any(isinstance(leaf, fx.Node) for leaf in index):
            what = "it writes into some of its tokens and not into others, by their place"
            return Reason(what + where, "tokens by place")
    return None


def _goes_another_way(example: BlockExample) -> Reason | None:
    """Lines of the user's code that only the block or only its trace goes through."""
    args, kwargs = example.call
    classes = {type(module) for module in example.block.modules()}
    files = {inspect.getfile(kind) for kind in classes if kind.__module__ in sys.modules}
    files = {file for file in files if not file.startswith(_TORCH)}
    ran = lines_run(lambda: copy_block(example.block)(*args, **kwargs), files)
    traced = lines_run(lambda: _trace(example), files)
    other = sorted(ran - traced) or sorted(traced - ran)
    if not other:
        return None
    return Reason(
        f"it goes another way when it is traced, by something that is fixed then (a type asked for "
        f"by isinstance, the identity of an object), at {place_text(other[0])}",
        "not traceable",
    )


def _tells_images_apart(example: BlockExample) -> Reason | None:
    if example.layout.order[0] != "B":
        return None
    same = _run(_changed(example, lambda stream: stream[:1].expand_as(stream)))
    if not _differs(same, same[:1].expand_as(same)):
        return None
    what = "it does to some images what it does not do to others, by their place in the batch"
    return Reason(what, "tokens by place")


def _tells_tokens_apart(example: BlockExample) -> Reason | None:
    layout = example.layout

    def same_everywhere(stream: Tensor) -> Tensor:
        for letter in set("NHW") & set(layout.order):
            stream = stream.narrow(layout.axis(letter), 0, 1).expand(stream.shape)
        return stream

    found = _run(_changed(example, same_everywhere))
    tokens = to_tokens(found, layout.order)[:, layout.prefix :]
    if not bool((tokens - tokens[:, :1]).norm() / tokens.norm() > 1e-4):
        return None
    what = "it does to some tokens what it does not do to others, by their place"
    return Reason(what, "tokens by place")


_CAUSES = (_draws, _moves, _hooked, _mixes_images, _bound_to_tokens, _goes_another_way)
_OF_CONSTANT_INPUT = (_tells_images_apart, _tells_tokens_apart)
