"""What a case is, and how names given on the command line become cases.

First step of the coverage run. The lists are in `timm_cases`, `torchvision_cases` and `hf_cases`.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: example inputs as `dgefx.convert` takes them, of two images, drawn from a seed
Inputs = Callable[[nn.Module, int], Any]

_SOURCES = {
    "timm": "dgefx.coverage.timm_cases",
    "torchvision": "dgefx.coverage.torchvision_cases",
    "hf": "dgefx.coverage.hf_cases",
}
_EXTRAS = {"timm": "dgefx[train]", "torchvision": "dgefx[examples]", "transformers": "dgefx[test]"}


@dataclass(frozen=True)
class Case:
    """One model to measure.

    name: "source:model". family: a module of the source and the kind of its attention. build: makes
    the model, without weights of anybody's. inputs: its example inputs from a seed. note: how it
    was made smaller, "" if it was not. over_grid: whether it has attention of query-key dot
    products and a softmax over tokens; False for what only bears the name (lambda layers, linear
    attention). aside: (pattern of block names, what they are) for attention that is not over the
    image's tokens, such as a decoder's over object queries. quick: part of `--quick`.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    note: str = ""
    over_grid: bool = True
    aside: tuple[tuple[str, str], ...] = ()
    quick: bool = False

    def beside(self, block: str) -> str | None:
        """What attention `block` is if not one over the image's tokens."""
        return next((what for p, what in self.aside if fnmatch.fnmatchcase(block, p)), None)


def library(name: str) -> Any:
    """The imported library whose models are measured.

    Raises:
        ImportError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"dgefx.coverage needs {name} for these models: {error}; install it with "
            f"pip install '{_EXTRAS[name]}', or name the models of another source"
        ) from error


def images(height: int, width: int | None = None, channels: int = 3) -> Inputs:
    """Two images of normal noise, (2, channels, height, width) float32."""

    def make(_model: nn.Module, seed: int) -> Tensor:
        return noise((2, channels, height, height if width is None else width), seed)

    return make


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal noise from a seed, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _source(name: str) -> ModuleType:
    if name not in _SOURCES:
        raise ValueError(
            f"unknown source {name!r}: names are like timm:pvt_v2_b0, hf:segformer or "
            f"torchvision:swin_t, or a source alone ({', '.join(_SOURCES)})"
        )
    return importlib.import_module(_SOURCES[name])


def listed(source: str) -> list[Case]:
    """The list of one source.

    Raises:
        ValueError: unknown source. ImportError: its library is absent.
    """
    found: list[Case] = _source(source).cases()
    return found


def select(patterns: Iterable[str], base: bool = False, quick: bool = False) -> list[Case]:
    """The cases that names and patterns mean; of everything listed if there are none.

    A source alone ("timm") means its list. "timm:pattern" also finds models that are not listed.

    Args:
        base: choose from the base-size models whose conversion is timed.
        quick: of what is listed, the small subset.

    Raises:
        ValueError: unknown source, or a pattern that nothing matches.
        ImportError: a library that is absent.
    """
    found: dict[str, Case] = {}
    for pattern in list(patterns) or list(_SOURCES):
        source, colon, glob = pattern.partition(":")
        module = _source(source)
        known: list[Case] = module.base_cases() if base else module.cases()
        if quick:
            known = [case for case in known if case.quick]
        matching = [c for c in known if not colon or fnmatch.fnmatchcase(c.name, pattern)]
        if colon and not base and not quick and hasattr(module, "unlisted"):
            names = {case.name for case in known}
            matching += [c for c in module.unlisted(glob) if c.name not in names]
        if not matching:
            raise ValueError(
                f"no model matches {pattern!r}; {'of the quick ones' if quick else 'listed'} are "
                f"{', '.join(case.name for case in known[:8])}, ... ({len(known)} in all)"
            )
        found |= {case.name: case for case in matching}
    return list(found.values())
