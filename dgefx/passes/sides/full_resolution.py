"""Sides, full resolution: where the query path needs the real grid, and where it comes back.

A node that mixes tokens runs on un-pooled values. If its result is on the tokens' grid it is pooled
again at once; if not (another grid on the way, values whose features depend on the place of their
token), what follows runs un-pooled too ("full_resolution"), until a value is on the grid again.
Used by `passes.sides.find_axes`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dgefx.passes.labels import moved as run_on_labels
from dgefx.passes.labels import numbered, varies
from dgefx.passes.sides.token_axes import TokenAxes
from dgefx.passes.sides.window_axes import is_movement, labels_of, moved_by, window_candidates

if TYPE_CHECKING:
    from dgefx.passes.sides.find_axes import AxesSearch

Moved = list[dict[fx.Node, Any]]


def token_sources(search: AxesSearch, node: fx.Node) -> list[tuple[fx.Node, TokenAxes]]:
    """Operands that hold tokens, or are un-pooled, with their token axes."""
    axes, sides = search.token_axes, search.sides
    return [
        (source, axes[source])
        for source, crosses in sides.sources(node)
        if source in axes
        and (not crosses or source in sides.main)
        and axes[source].kind != "no_tokens"
    ]


def reads_full_resolution(search: AxesSearch, node: fx.Node) -> bool:
    """Whether a node reads what is un-pooled."""
    return any(held.kind == "full_resolution" for _, held in token_sources(search, node))


def mixing_axes(
    search: AxesSearch, node: fx.Node, value: Tensor, moved: Moved, found: TokenAxes | None
) -> TokenAxes:
    """The token axes of a node that mixes tokens.

    Args:
        moved: per probe, what every node is; what changed elsewhere than at the probed token is
            put back where the node is back on the grid.
        found: those that the changes fit as they are.
    """
    sources = token_sources(search, node)
    on_way = [source for source, held in sources if held.kind == "in_transit"]
    if search.partition is None:
        for source in on_way:
            _unpool_way(search, source)
    if found is not None:
        return dataclasses.replace(found, mixes=True)
    kept = _back_on_grid(search, node, value, moved, [held for _, held in sources])
    if kept is not None:
        return kept
    inside = [held for _, held in sources if _is_plane(value, held)]
    stays = any(held.kind == "full_resolution" for _, held in sources)
    if inside or stays or (on_way and search.partition is None):
        return TokenAxes("full_resolution", (2, 3) if inside else (), batch=0)
    for values in moved:
        values[node] = value
    return TokenAxes("no_tokens", mixes=True)


def _unpool_way(search: AxesSearch, node: fx.Node) -> None:
    """What was thought to be tokens on their way is un-pooled."""
    axes = search.token_axes
    while node in axes and axes[node].kind == "in_transit":
        axes[node] = TokenAxes("full_resolution", batch=0)
        node = moved_by(node)


def _back_on_grid(
    search: AxesSearch, node: fx.Node, value: Tensor, moved: Moved, sources: list[TokenAxes]
) -> TokenAxes | None:
    for source in sources:
        if source.kind == "window":
            candidates = [f for f in window_candidates(search, value) if f == source]
        else:
            candidates = search.candidates(value, source.batch)
        for held in candidates:
            if source.kind in (held.kind, "full_resolution") and held.axes == source.axes:
                labels = labels_of(search, held, value.shape, search.layout.grid)
                for values, probe in zip(moved, search.probes, strict=True):
                    probed = labels == search.label(held, probe)
                    values[node] = torch.where(probed, values[node], value)
                return dataclasses.replace(held, mixes=True)
    return None


def is_scrambled(search: AxesSearch, node: fx.Node, held: TokenAxes) -> bool:
    """Whether the movement that ends at `node`, at a value with these token axes, gives the tokens'
    features another order from token to token (relative to absolute positions)."""
    way: list[fx.Node] = []
    current = node
    while is_movement(search, current):
        way.append(current)
        current = moved_by(current)
    if held.kind in ("no_tokens", "in_transit", "full_resolution") or not any(
        search.token_axes[n].kind == "in_transit" for n in way[1:]
    ):
        return False
    value, start = search.values[current], search.token_axes[current]
    features = [a for a in range(value.dim()) if a not in start.counting_axes]
    labels: dict[fx.Node, Any] = {current: numbered(value.shape, features, 1)}  # 0: padding
    for step in reversed(way):
        labels[step] = run_on_labels(step, labels, search.values.__getitem__, search.trace.root)
    return any(varies(labels[node], axis) for axis in held.counting_axes)


def _is_plane(value: Tensor, held: TokenAxes) -> bool:
    """Whether a value that is not on the tokens' grid is on another one, on the same axes."""
    if held.kind == "full_resolution":
        return held.axes == (2, 3) and value.dim() == 4 and min(value.shape[2:]) > 1
    plane = held.kind == "grid" and held.axes == (2, 3) and held.batch == 0 and not held.prefix
    return plane and value.dim() == 4 and min(value.shape[2:]) > 1
