"""How a block is called: which leaves of its arguments are graph inputs and which are fixed.

Made when a block is traced, used by the traced block to bind later calls. Tensors and integers
(sizes) are graph inputs; everything else (None, flags, floats, strings) took part in the trace as
a constant, so a call that differs there is refused instead of computed wrongly. Optional masks may
come in several forms, each with a spec and a graph of its own (`passes.plan.call_forms`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool))


def _holds_dynamic(value: Any) -> bool:
    """Whether a list or tuple, maybe of others (the sizes of several grids), holds graph inputs."""
    return isinstance(value, (tuple, list)) and any(
        _is_dynamic(v) or _holds_dynamic(v) for v in value
    )


def _walk(value: Any, path: Path) -> list[tuple[Path, Any]]:
    if _holds_dynamic(value):
        return [leaf for i, v in enumerate(value) for leaf in _walk(v, (*path, i))]
    if isinstance(value, dict) and value:
        return [leaf for k, v in value.items() for leaf in _walk(v, (*path, k))]
    return [(path, value)]


def _comparable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, float, str))


@dataclass(frozen=True)
class MaskInput:
    """A mask among the graph inputs.

    kinds: whether it may be bool (True), floating point (False), or either. rank: its axes.
    per_query: whether its last axis but one has an entry per query, of which one may stand for
        all; or has one entry only (False); or is of something else (None).
    """

    kinds: frozenset[bool]
    rank: int
    per_query: bool | None

    def fits(self, value: Tensor) -> bool:
        """Whether a tensor can be brought to the form that was traced."""
        boolean = value.dtype == torch.bool
        if boolean not in self.kinds or not (boolean or value.is_floating_point()):
            return False
        if not self.per_query:
            return value.dim() == self.rank and (self.per_query is None or value.shape[-2] == 1)
        return 2 <= value.dim() <= self.rank

    def shaped(self, value: Tensor) -> Tensor:
        """A tensor that fits, in the form that was traced."""
        if not self.per_query:
            return value
        value = value.reshape((1,) * (self.rank - value.dim()) + tuple(value.shape))
        if value.shape[-2] == 1:
            value = value.expand(*value.shape[:-2], value.shape[-1], -1)
        return value

    def __str__(self) -> str:
        kinds = " or ".join(("float", "bool")[kind] for kind in sorted(self.kinds, reverse=True))
        shape = f"up to {self.rank} axes, (queries or 1, keys) last" if self.per_query else ""
        return f"a {kinds} tensor of {shape or f'{self.rank} axes'}"


def _may_be(value: Any, mask: MaskInput | None) -> bool:
    if mask is None or value is None:
        return mask is None and value is None
    return isinstance(value, Tensor) and mask.fits(value)


@dataclass(frozen=True)
class CallSpec:
    """Signature of a block's forward and the example call it was traced with."""

    names: tuple[str, ...]  # positional parameters, without self
    defaults: dict[str, Any]
    accepts_extra: bool  # **kwargs
    positional: int  # how many of the names may be given by position
    inputs: tuple[Path, ...]  # leaves that are graph inputs
    fixed: tuple[tuple[Path, Any], ...]  # leaves that were constants
    example: dict[str, Any]
    stream: int = 0  # which graph input is the residual stream
    #: masks that may come in several forms, by name; None: left out in this one
    masks: tuple[tuple[str, MaskInput | None], ...] = ()
    alike: frozenset[Path] = frozenset()  # fixed leaves for which None and False are the same

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSpec:
        """The spec of calling `module` with these arguments."""
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = sum(p.kind in plain for p in parameters)
        if len(args) > positional:
            raise ValueError("its forward takes *args, which cannot be told apart in later calls")
        names = tuple(
            p.name
            for p in parameters
            if p.kind in plain or p.kind == inspect.Parameter.KEYWORD_ONLY
        )
        defaults = {
            p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty
        }
        extra = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        leaves = [leaf for name, value in values.items() for leaf in _walk(value, (name,))]
        # what the example call left out was traced at its default
        leaves += [((name,), value) for name, value in defaults.items() if name not in values]
        return cls(
            names=names,
            defaults=defaults,
            accepts_extra=extra,
            positional=positional,
            inputs=tuple(path for path, v in leaves if path[0] in values and _is_dynamic(v)),
            fixed=tuple(
                (path, v)
                for path, v in leaves
                if _comparable(v) or (path[0] not in values and isinstance(v, int))
            ),
            example=values,
        )

    def without_example(self) -> CallSpec:
        """The same spec without the example's tensors."""
        return dataclasses.replace(self, example={})

    def input_names(self) -> list[str]:
        """A placeholder name per graph input."""
        return ["_".join(str(part) for part in path) for path in self.inputs]

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the masks of a call have the forms of this one."""
        return all(_may_be(self._given(name, args, kwargs), mask) for name, mask in self.masks)

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = self.names.index(name) if name in self.names else len(args)
        return args[place] if place < len(args) else self.defaults.get(name)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The graph inputs of a call.

        Raises:
            ValueError: an argument differs from the traced call in something that is fixed.
        """
        if len(args) > self.positional:
            raise TypeError(
                f"this block takes {self.positional} positional arguments, {len(args)} were given"
            )
        known = {path[0] for path in self.inputs} | {path[0] for path, _ in self.fixed}
        for name, value in kwargs.items():
            # flags for others that ride along in **kwargs are harmless, data is not
            harmless = self.accepts_extra and not isinstance(value, Tensor)
            if name not in known and name not in self.names and not harmless:
                raise TypeError(
                    f"this block was converted for calls without {name}; convert with "
                    f"example_inputs that use it, or revert() the model"
                )
        values: dict[str, Any] = dict(self.defaults)
        for name, value in zip(self.names, args, strict=False):
            values[name] = value
        values.update(kwargs)
        for path, wanted in self.fixed:
            found: Any = values.get(path[0])
            for key in path[1:]:
                found = found[key]
            if path in self.alike and (found is None or found is False):
                continue
            if isinstance(found, Tensor) or found != wanted:
                raise ValueError(
                    f"this block was converted for {path[0]}={wanted!r} and is called with another "
                    f"value; convert with example_inputs that use it, or revert() the model"
                )
        leaves, masks = [], dict(self.masks)
        for path in self.inputs:
            value = values.get(path[0])
            for key in path[1:]:
                value = value[key]  # type: ignore[index]
            if value is None:
                raise ValueError(
                    f"this block was converted for calls with {path[0]}, which is missing here; "
                    f"convert with example_inputs that leave it out, or revert() the model"
                )
            mask = masks.get(path[0]) if len(path) == 1 else None
            leaves.append(value if mask is None else mask.shaped(value))
        return leaves

    def assemble(self, leaves: list[Any]) -> dict[str, Any]:
        """Keyword arguments of the example call with its graph inputs replaced."""
        replaced = dict(zip(self.inputs, leaves, strict=True))

        def build(value: Any, path: Path) -> Any:
            if path in replaced:
                return replaced[path]
            if _holds_dynamic(value):
                return tuple(build(v, (*path, i)) for i, v in enumerate(value))
            if isinstance(value, dict) and value:
                return {k: build(v, (*path, k)) for k, v in value.items()}
            return value

        return {name: build(value, (name,)) for name, value in self.example.items()}


def choose_form(specs: Sequence[CallSpec], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which of a block's forms a call has.

    Raises:
        ValueError: none; the message says which masks the block takes.
    """
    for index, spec in enumerate(specs):
        if spec.takes(args, kwargs):
            return index
    first = specs[0]
    lines = []
    for name in dict(first.masks):
        value = first._given(name, args, kwargs)
        found = value if not isinstance(value, Tensor) else (value.dtype, tuple(value.shape))
        known = dict.fromkeys(str(dict(spec.masks)[name]) for spec in specs)
        lines.append(f"{name} may be {' or '.join(known)}, found {found}")
    raise ValueError(
        f"this block was not converted for calls with these masks: {'; '.join(lines)}; convert "
        f"with example_inputs that use them, or revert() the model"
    )
