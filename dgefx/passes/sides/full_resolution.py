"""Pass 4b', island forms: where the query path needs the real grid, and where it comes back.

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

from dgefx.passes.ops import run_node
from dgefx.passes.sides.token_axes import TokenAxes

if TYPE_CHECKING:
    from dgefx.passes.sides.find_axes import TokenAxesFinder

Moved = list[dict[fx.Node, Any]]


class FullResolution:
    """Decides about the nodes that mix tokens, for one `TokenAxesFinder`."""

    def __init__(self, finder: TokenAxesFinder) -> None:
        self.finder = finder

    def sources(self, node: fx.Node) -> list[tuple[fx.Node, TokenAxes]]:
        """Operands that hold tokens, or are un-pooled, with their forms."""
        forms, sides = self.finder.forms, self.finder.sides
        return [
            (source, forms[source])
            for source, crosses in sides.sources(node)
            if source in forms
            and (not crosses or source in sides.main)
            and forms[source].kind != "no_tokens"
        ]

    def is_inside(self, node: fx.Node) -> bool:
        """Whether a node reads what is un-pooled."""
        return any(form.kind == "full_resolution" for _, form in self.sources(node))

    def leave(
        self, node: fx.Node, value: Tensor, moved: Moved, found: TokenAxes | None
    ) -> TokenAxes:
        """The form of a node that mixes tokens.

        Args:
            moved: per probe, what every node is; what changed elsewhere than at the probed token is
                put back where the node is back on the grid.
            found: the form that the changes fit as they are.
        """
        sources = self.sources(node)
        on_way = [source for source, form in sources if form.kind == "in_transit"]
        if not self.finder.windowed:
            for source in on_way:
                self._unpool_way(source)
        if found is not None:
            return dataclasses.replace(found, mixes=True)
        kept = self._back_on_grid(node, value, moved, [form for _, form in sources])
        if kept is not None:
            return kept
        inside = [form for _, form in sources if _is_plane(value, form)]
        stays = any(form.kind == "full_resolution" for _, form in sources)
        if inside or stays or (on_way and not self.finder.windowed):
            return TokenAxes("full_resolution", (2, 3) if inside else (), batch=0)
        for values in moved:
            values[node] = value
        return TokenAxes("no_tokens", mixes=True)

    def _unpool_way(self, node: fx.Node) -> None:
        """What was thought to be tokens on their way is un-pooled."""
        forms = self.finder.forms
        while node in forms and forms[node].kind == "in_transit":
            forms[node] = TokenAxes("full_resolution", batch=0)
            source = node.args[0] if node.args else None
            assert isinstance(source, fx.Node)
            node = source

    def _back_on_grid(
        self, node: fx.Node, value: Tensor, moved: Moved, sources: list[TokenAxes]
    ) -> TokenAxes | None:
        finder = self.finder
        for source in sources:
            candidates = finder.candidates(value, source.batch)
            if source.kind == "window":
                candidates = [f for f in finder.windows.candidates(value) if f == source]
            for form in candidates:
                if source.kind in (form.kind, "full_resolution") and form.axes == source.axes:
                    for values, probe in zip(moved, finder.probes, strict=True):
                        inside = _box(value, finder.place(form, probe), form.batch, probe.image)
                        values[node] = torch.where(inside, values[node], value)
                    return dataclasses.replace(form, mixes=True)
        return None

    def is_scrambled(self, node: fx.Node, form: TokenAxes) -> bool:
        """Whether the movement that ends at `node`, at a value of this form, gives the tokens'
        features another order from token to token (relative to absolute positions)."""
        way: list[fx.Node] = []
        current = node
        while self.finder.windows.moves_tokens(current):
            way.append(current)
            current = current.args[0]  # type: ignore[assignment]
        if form.kind in ("no_tokens", "in_transit", "full_resolution") or not any(
            self.finder.forms[n].kind == "in_transit" for n in way[1:]
        ):
            return False
        start = self.finder.forms[current]
        numbers = _numbered_features(self.finder.base[current], start)
        for step in reversed(way):
            args, kwargs = fx.map_arg(
                (step.args, step.kwargs),
                lambda n: numbers if n is step.args[0] else self.finder.base[n],  # noqa: B023
            )
            numbers = run_node(step, self.finder.trace.root, args, kwargs)
        return not _same_for_all(numbers, form)


def _token_axes(form: TokenAxes) -> tuple[int, ...]:
    batch = () if form.batch is None else (form.batch,)
    return tuple({*batch, *form.windows, *form.axes})


def _numbered_features(value: Tensor, form: TokenAxes) -> Tensor:
    """Numbers along all axes but those of images and tokens; 0 is left for padding."""
    taken = _token_axes(form)
    rest = [axis for axis in range(value.dim()) if axis not in taken]
    count = torch.Size([value.shape[a] for a in rest]).numel()
    line = torch.arange(1, count + 1).view(
        [value.shape[a] if a in rest else 1 for a in range(value.dim())]
    )
    return line.expand(value.shape)


def _same_for_all(numbers: Tensor, form: TokenAxes) -> bool:
    for axis in _token_axes(form):
        if not torch.equal(numbers, numbers.narrow(axis, 0, 1).expand_as(numbers)):
            return False
    return True


def _is_plane(value: Tensor, form: TokenAxes) -> bool:
    """Whether a value that is not on the tokens' grid is on another one, on the same axes."""
    if form.kind == "full_resolution":
        return form.axes == (2, 3) and value.dim() == 4 and min(value.shape[2:]) > 1
    plane = form.kind == "grid" and form.axes == (2, 3) and form.batch == 0 and not form.prefix
    return plane and value.dim() == 4 and min(value.shape[2:]) > 1


def _box(value: Tensor, place: dict[int, range], batch: int | None, image: int) -> Tensor:
    inside = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    where = dict(place)
    if batch is not None:
        where.setdefault(batch, range(image, image + 1))
    for axis, index in where.items():
        line = torch.arange(value.shape[axis], device=value.device)
        line = (line >= index.start) & (line < index.stop)
        inside = inside & line.view([-1 if a == axis else 1 for a in range(value.dim())])
    return inside
