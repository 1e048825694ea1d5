"""`GraphCode`: the source of a generated graph, compiled. Run by `nn.block` and `nn.outlined`."""

from __future__ import annotations

import importlib
import linecache
from typing import Any

import torch
from torch import fx

#: child of a converted block that holds the constants of its generated code
CONSTANTS = "dge_constants"


class GraphCode:
    """Python source of a graph over a module, compiled; picklable as its source."""

    def __init__(self, graph: fx.Graph, label: str) -> None:
        code = graph.python_code("self")
        self.label = label
        self.source = code.src
        self.names = {name: value for name, value in code.globals.items() if f"{name}" in code.src}
        self._compile()

    @property
    def body(self) -> str:
        """The source without what its arguments are."""
        return self.source.partition("):\n")[2]

    def _compile(self) -> None:
        filename = f"<dgefx {self.label} {id(self)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        scope: dict[str, Any] = {"torch": torch, **self.names}
        exec(compile(self.source, filename, "exec"), scope)
        self.run = scope["forward"]

    def labelled(self, label: str) -> GraphCode:
        """The same code under another label."""
        made = GraphCode.__new__(GraphCode)
        made.label, made.source, made.names = label, self.source, self.names
        made._compile()
        return made

    def with_constants(self, prefix: str) -> GraphCode:
        """The same code with `prefix` before the names of its constants."""
        made = self.labelled(self.label)
        made.source = made.source.replace(f"self.{CONSTANTS}.", f"self.{CONSTANTS}.{prefix}")
        made._compile()
        return made

    def is_same(self, other: GraphCode) -> bool:
        """Whether both run the same code, whatever their labels."""
        same = self.source == other.source and self.names.keys() == other.names.keys()
        return same and all(other.names[name] is value for name, value in self.names.items())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("run")
        state["names"] = {
            name: ("module", value.__name__)
            if type(value).__name__ == "module"
            else ("object", value)
            for name, value in self.names.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.names = {
            name: importlib.import_module(value) if kind == "module" else value
            for name, (kind, value) in state["names"].items()
        }
        self._compile()

    def __deepcopy__(self, _memo: Any) -> GraphCode:
        return self  # immutable
