"""`Guards`: what a block's generated code holds for, asked in every call of a `DGEBlock`.

A trace fixes what Python read and decided: settings and training flags of the modules it went
through, branches on sizes and types, whether autocast is on. What differs at run time is an error
that names the part, never ignored. Made by `passes.plan.plan`, one for eval and one for train mode.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgefx.kernels.autocast import autocast_dtype
from dgefx.nn.code import GraphCode

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_AGAIN = (
    "take the conversion back (dgefx.revert), change the dense model, and convert that one again"
)

#: where modules keep hooks that their call runs
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BYPASSED = (
    "dgefx: a hook on {} does not run: the converted block computes this module's part for "
    "queries and for keys and values apart. Hook the block, or the layers inside that "
    "docs/keeps.md names; or convert with filter_fn leaving the block dense"
)
_DOUBLED = (
    "dgefx: a hook on {} runs twice in every call of the converted block, for the tokens that keys "
    "and values come from and for the queries; hook the block, its MLP or the norm before that to "
    "see one of them"
)
_TWICE = (
    "dgefx: {} runs twice in a training step of its converted block, for queries and for keys and "
    "values, and updates its running statistics in both; keep it in eval mode, or the block dense "
    "by filter_fn, if that matters"
)


@dataclass(frozen=True)
class Setting:
    """An attribute of a module inside the block ("" is the block) as the trace read it."""

    module: str
    name: str
    value: Any

    def is_now(self, found: Any) -> bool:
        """Whether what the module has there is what the trace read."""
        return type(found) is type(self.value) and bool(found == self.value)


@dataclass(frozen=True)
class Guards:
    """What holds of a block while its generated code is right.

    settings: attributes that forward read. kinds: classes of the modules that it went through.
    bypassed: modules whose own forward never runs, so that their hooks do not.
    types: floating types in which it branches as it was traced. device: that it was traced on,
    where it branches on that. questions: code that answers all its branches on sizes, of the inputs
    of the generated code; answers: what they were where it was traced, and on other sizes on which
    it equals the dense block.
    knows_autocast: whether it runs otherwise under autocast. doubled: modules that run for queries
    and again for keys and values; twice: those of them with running statistics. unpatched: modules
    gone through whose forward is their class's. aliases: pairs of names of one module.
    """

    settings: tuple[Setting, ...] = ()
    kinds: tuple[tuple[str, type[Any]], ...] = ()
    bypassed: tuple[str, ...] = ()
    types: frozenset[torch.dtype] = FLOATS
    device: str | None = None
    questions: GraphCode | None = None
    answers: frozenset[tuple[bool, ...]] = frozenset()
    knows_autocast: bool = False
    doubled: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    unpatched: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_holds", self._compiled())

    def __deepcopy__(self, _memo: Any) -> Guards:
        return self  # immutable

    def __reduce__(self) -> Any:
        return Guards, tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def _compiled(self) -> Callable[[nn.Module], bool]:
        """Whether settings and classes are the same and no hook is bypassed, as one expression: it
        is asked in every call of every block."""
        names: dict[str, Any] = {}
        terms = ["True"]
        for index, setting in enumerate(self.settings):
            names[f"value_{index}"] = setting.value
            terms.append(f"{_path(setting.module)}.{setting.name} == value_{index}")
        for index, (name, kind) in enumerate(self.kinds):
            names[f"kind_{index}"], names[f"forward_{index}"] = kind, kind.forward
            part = _path(name)
            # classes that a library derives from it (FSDP2) have its forward
            derived = (
                f"isinstance({part}, kind_{index}) and type({part}).forward is forward_{index}"
            )
            terms.append(f"(type({part}) is kind_{index} or {derived})")
        for name in self.bypassed:
            terms += [f"not {_path(name)}.{kept}" for kept in _HOOKS]
        for name in self.doubled:
            terms += [f"not {_path(name)}.{kept}" for kept in _HOOKS]
        terms += [f"not {_path(name)}.training" for name in self.twice]
        terms += [f"'forward' not in {_path(name)}.__dict__" for name in self.unpatched]
        terms += [f"{_path(one)} is {_path(other)}" for one, other in self.aliases]
        made: Callable[[nn.Module], bool] = eval(f"lambda block: {' and '.join(terms)}", names)
        return made

    def _is_as_traced(self, block: nn.Module) -> bool:
        try:
            return self._holds(block)  # type: ignore[attr-defined]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # something is gone, or is now of a kind that cannot be compared

    def check(self, block: nn.Module, label: str, stream: Tensor, leaves: list[Any]) -> None:
        """Raise ValueError where the call would be computed wrongly, warn of hooks that do not run.

        Args:
            block: the converted block. label: its name. leaves: inputs of the generated code,
                `stream` among them.
        """
        if not self._is_as_traced(block):
            self._explain(block, label)
        if stream.dtype not in self.types and stream.is_floating_point():
            held = ", ".join(sorted(str(t).removeprefix("torch.") for t in self.types))
            raise ValueError(
                f"block {label} decides by the floating type and was converted for {held}, found "
                f"{stream.dtype}; convert the model in that type, or keep the block dense by "
                f"filter_fn"
            )
        if self.device is not None and stream.device.type != self.device:
            raise ValueError(
                f"block {label} decides by the device and was converted on {self.device}, found "
                f"{stream.device.type}; convert the model there"
            )
        if self.questions is not None:
            self._ask(label, leaves)
        cast = autocast_dtype(stream.device.type)
        if cast is not None and (self.knows_autocast or cast not in self.types):
            raise ValueError(
                f"block {label} switches autocast off inside, asks whether it is on, or decides by "
                f"the floating type; its converted code does not: call the model without autocast "
                f"(in bfloat16, say), or keep the block dense by filter_fn"
            )

    def _explain(self, block: nn.Module, label: str) -> None:
        for setting in self.settings:
            found = getattr(_part(block, setting.module), setting.name, "nothing")
            if not setting.is_now(found):
                raise ValueError(_changed(label, setting, found))
        for name, kind in self.kinds:
            part = _part(block, name)
            if not isinstance(part, kind) or type(part).forward is not kind.forward:
                raise ValueError(
                    f"block {label}: {name} was {kind.__name__} when the model was converted, and "
                    f"{type(part).__name__}, which it is now, is not called; {_AGAIN}"
                )
        for name, other in self.aliases:
            if _part(block, name) is not _part(block, other):
                raise ValueError(
                    f"block {label}: {name} and {other} were one module when it was converted and "
                    f"are two now, of which its converted code calls one for both; {_AGAIN}"
                )
        for name in self.unpatched:
            if "forward" in vars(_part(block, name)):
                raise ValueError(
                    f"block {label}: {name}.forward was replaced after the conversion, and is not "
                    f"called; {_AGAIN}"
                )
        for name in self.bypassed:
            part = _part(block, name)
            for hook in part._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils."):
                    raise ValueError(
                        f"block {label}: since the conversion the weights of {name} are computed "
                        f"by a hook ({type(hook).__name__}), which the converted block does not "
                        f"call; make them plain ones, with torch.nn.utils.prune.remove(module, "
                        f"name) after pruning, or do it before dgefx.convert"
                    )
            if _has_hooks(part):
                _warn(block, name, _BYPASSED.format(f"{label}.{name}"))
        for name in self.doubled:
            if _has_hooks(_part(block, name)):
                _warn(block, name, _DOUBLED.format(f"{label}.{name}"))
        for name in self.twice:
            if _part(block, name).training:
                _warn(block, name, _TWICE.format(f"{label}.{name}"))

    def answered(self, leaves: list[Any]) -> tuple[bool, ...]:
        """What the branches on sizes are for these inputs."""
        return () if self.questions is None else tuple(map(bool, self.questions.run(None, *leaves)))

    def also_on(self, answers: Iterable[tuple[bool, ...]]) -> Guards:
        """The same, where the branches on sizes may come out in further ways."""
        return dataclasses.replace(self, answers=self.answers.union(answers))

    def _ask(self, label: str, leaves: list[Any]) -> None:
        found = self.answered(leaves)
        if found not in self.answers:
            sizes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves]
            raise ValueError(
                f"block {label} decides by the size of its input, and for {sizes} otherwise than "
                f"on any size that it was compared with the dense block on; convert() the model "
                f"at this image size"
            )


def _path(name: str) -> str:
    """Source of a module inside `block`."""
    return "block" + "".join(f"._modules[{step!r}]" for step in name.split(".") if step)


def _part(block: nn.Module, name: str) -> Any:
    part: Any = block
    for step in name.split(".") if name else ():
        part = getattr(part, step, None)
    return part


def _changed(label: str, setting: Setting, found: Any) -> str:
    where = f"{setting.module}.{setting.name}" if setting.module else setting.name
    if setting.name == "training":
        part = setting.module or "the block"
        own = "train" if found else "eval"
        return (
            f"block {label}: {part} is in {own} mode, which its converted code knows only while "
            f"the block is; call train() or eval() on the whole block, or for {own} mode in a part "
            f"alone keep the block dense by filter_fn"
        )
    return (
        f"block {label}: {where} was {setting.value!r} when the model was converted and is "
        f"{found!r} now, which its converted code does not read; {_AGAIN}"
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that are not this library's own, as calibration's are."""
    hooks = (hook for kept in _HOOKS for hook in getattr(module, kept).values())
    owners = (getattr(hook, "func", hook) for hook in hooks)
    return any(not str(owner.__module__).startswith("dgefx.") for owner in owners)


def _warn(block: nn.Module, name: str, text: str) -> None:
    """Warn once of a part of a block."""
    told: set[str] = block.__dict__.setdefault("_dge_told_of", set())
    if not torch.compiler.is_compiling() and name not in told:
        told.add(name)
        warnings.warn(text, stacklevel=2)
