"""How a block is called: which leaves of its arguments are graph inputs and which are fixed.

Made when a block is traced, used by the traced block to bind later calls. Tensors and integers
(sizes) are graph inputs; everything else (None, flags, floats, strings) took part in the trace as
a constant, so a call that differs there is refused instead of computed wrongly.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

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
class CallSpec:
    """Signature of a block's forward and the example call it was traced with."""

    names: tuple[str, ...]  # positional parameters, without self
    defaults: dict[str, Any]
    accepts_extra: bool  # **kwargs
    positional: int  # how many of the names may be given by position
    inputs: tuple[Path, ...]  # leaves that are graph inputs
    fixed: tuple[tuple[Path, Any], ...]  # leaves that were constants
    example: dict[str, Any]

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
            if isinstance(found, Tensor) or found != wanted:
                raise ValueError(
                    f"this block was converted for {path[0]}={wanted!r} and is called with another "
                    f"value; convert with example_inputs that use it, or revert() the model"
                )
        leaves = []
        for path in self.inputs:
            value = values.get(path[0])
            for key in path[1:]:
                value = value[key]  # type: ignore[index]
            if value is None:
                raise ValueError(
                    f"this block was converted for calls with {path[0]}, which is missing here; "
                    f"convert with example_inputs that leave it out, or revert() the model"
                )
            leaves.append(value)
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
