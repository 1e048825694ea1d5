"""`GridShape`: the token grid of the running call, for blocks that are not told it.

A (B, N, C) block of a model that accepts several image sizes cannot know H and W from N. What lays
the grid out reports them here through a forward hook, or what takes the image by its size
(`nn.image_hook`), and the blocks' generated code asks (`resolve_grid`).

The grid belongs to the call. Several may be under way: in threads, in pipelines that run the first
half of two images before the second half of either, and in backward, where activation
checkpointing runs blocks again. So a grid is known by the stream that a block takes and gives, that
is by its memory; where that is new, by what was laid out in the thread and this block has not used.
Compiled code looks at the last grid of its thread alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dgefx.nn.symbolic import refuse_inlined

Size = tuple[int, int]


class _Here(threading.local):
    """What one thread has laid out. Attributes only: torch.compile follows no methods of it.

    grids: what the last grid may be, one for every number of tokens; none: not known.
    laid: by number of tokens and grid, the blocks that have used it. unread: whether compiled code
    set `grids`, of which `laid` does not know yet.
    """

    def __init__(self, grid: Size) -> None:
        self.grids: tuple[Size, ...] = (grid,)
        self.laid: dict[int, dict[Size, set[int]]] = {}
        self.unread = False


class _Streams:
    """Grids of streams, by the memory that they lie in; of all threads, as autograd has its own.

    Memory is held weakly, so an entry ends with it and no other stream takes its place.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[StorageWeakRef, int | None, Size]] = {}
        self._limit = 128

    def grid_of(self, stream: Tensor, waiting: Collection[Size]) -> Size | None:
        """The grid of a stream as it was noted, unless it was written to since.

        Args:
            waiting: grids that are to be used. Writes to inference tensors are not counted; of
                these only streams of such a grid are taken for what they were.
        """
        place = _place(stream)
        found = self._found.get((place[0].cdata, place[1])) if place else None
        if found is None:
            return None
        _, version, grid = found
        if version is None:
            return grid if not waiting or grid in waiting else None
        return grid if version == _version(stream) else None

    def note(self, stream: Tensor, grid: Size) -> None:
        """Remember the grid of a stream."""
        place = _place(stream)
        if place is None:
            return
        self._found[place[0].cdata, place[1]] = (place[0], _version(stream), grid)
        if len(self._found) > self._limit:
            for key, entry in self._found.copy().items():
                if entry[0].expired():
                    self._found.pop(key, None)
            self._limit = max(128, 2 * len(self._found))


def _place(stream: Tensor) -> tuple[StorageWeakRef, int] | None:
    """The memory of a stream and where it begins there; None where it has none of its own."""
    try:
        return StorageWeakRef(stream.untyped_storage()), int(stream.storage_offset())
    except (NotImplementedError, RuntimeError):  # inside torch.func transforms
        return None


def _version(stream: Tensor) -> int | None:
    return None if stream.is_inference() else stream._version


class GridShape:
    """The token grid of the running call; see above. Shared by the blocks of one grid.

    Args:
        grid: of the conversion; holds as long as nothing is laid out.
        told_by: the module whose call tells the image's size, where that is the model itself, so
            that its parts can be called without it.
    """

    def __init__(self, grid: Size, told_by: str | None = None) -> None:
        self.converted, self.told_by = grid, told_by
        self._here = _Here(grid)
        self._known: dict[int, dict[Size, None]] = {}  # laid out in any thread
        self._streams = _Streams()

    def __reduce__(self) -> Any:
        return GridShape, (self.converted, self.told_by)  # what runs is not part of a copy

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the module whose output shows the grid, (B, C, H, W)."""
        if isinstance(output, fx.Proxy):
            refuse_inlined(module)
        if isinstance(output, Tensor) and output.dim() == 4:
            self.lay_out((output.shape[2], output.shape[3]))

    def lay_out(self, *grids: Size) -> None:
        """From now on this thread's grid is the one of `grids` that the number of tokens fits."""
        here = self._here
        here.grids = grids
        if torch.compiler.is_compiling():
            here.unread = True
        else:
            self._file(grids)

    def _file(self, grids: tuple[Size, ...]) -> None:
        here = self._here
        here.unread = False
        for height, width in grids:
            if type(height) is int and type(width) is int:  # else of a trace
                here.laid.setdefault(height * width, {})[height, width] = set()
                self._known.setdefault(height * width, {})[height, width] = None

    def resolve(self, block: nn.Module, stream: Tensor, tokens: int) -> Size:
        """(H, W) of a grid of `tokens`.

        Args:
            block: whoever asks. stream: that it is to be run on.

        Raises:
            ValueError: no grid of so many tokens was laid out, or several, of which it is not
                known which one is this stream's.
        """
        here = self._here
        if torch.compiler.is_compiling() or type(tokens) is not int:
            return self._last(tokens)
        if here.unread:
            self._file(here.grids)
        laid = here.laid.get(tokens, {})
        waiting = [grid for grid, used in laid.items() if id(block) not in used]
        grid = self._streams.grid_of(stream, waiting)
        if grid is None or grid[0] * grid[1] != tokens:
            grid = self._laid_out(waiting, tokens)
        laid.get(grid, set()).add(id(block))
        here.grids = (grid,)
        self._streams.note(stream, grid)
        return grid

    def remember(self, stream: Tensor, grid: Size) -> None:
        """What a block of `grid` gives is on it too."""
        if not torch.compiler.is_compiling() and type(grid[0]) is int:
            self._streams.note(stream, grid)

    def _last(self, tokens: int) -> Size:
        for height, width in self._here.grids:
            if height * width == tokens:
                return height, width
        if not self._here.grids:
            raise ValueError(
                f"a converted block got {tokens} grid tokens of an image of another size than the "
                f"model was converted at, for a grid of {self.converted[0]} x {self.converted[1]}; "
                f"its own grid is not known. convert() the model at this image size"
            )
        height, width = self._here.grids[0]
        raise ValueError(
            f"a converted block got {tokens} grid tokens, but the model last laid out a grid "
            f"of {height} x {width}; run the block as part of its model, or convert() at this "
            f"image size. If the model drops tokens (in train mode: patch_drop_rate, masking), "
            f"switch that off: a converted block needs the whole grid"
        )

    def _laid_out(self, waiting: list[Size], tokens: int) -> Size:
        """The grid of a stream that no block has taken or given."""
        here = self._here
        found = waiting or list(self._known.get(tokens, ()))
        if not self._known and self.converted[0] * self.converted[1] == tokens:
            found = [self.converted]
        if not here.grids or not found:
            return self._last(tokens)
        if len(found) > 1:
            here.laid.pop(tokens, None)  # what is laid out next is known again
            listed = " and ".join(f"{height} x {width}" for height, width in found)
            raise ValueError(
                f"a converted block got {tokens} grid tokens, and the model laid out grids of "
                f"{listed}: it is not known which one this is. Run the blocks of one image before "
                f"the next image's patches are embedded, or hand every block the tensor that the "
                f"block before it gave, not a copy of it"
            )
        if not waiting and self.told_by is not None:
            warnings.warn(
                f"converted blocks run without {self.told_by or 'the model'} being called, whose "
                f"input tells the image's size; their {tokens} tokens are taken for a grid of "
                f"{found[0][0]} x {found[0][1]}",
                stacklevel=2,
            )
        return found[0]


def resolve_grid(shape: GridShape, block: nn.Module, stream: Tensor, tokens: int) -> Size:
    """(H, W) for the generated code; see `GridShape.resolve`."""
    return shape.resolve(block, stream, tokens)


def remember_grid(shape: GridShape, stream: Tensor, grid: Size) -> Tensor:
    """`stream`, for the generated code; see `GridShape.remember`."""
    shape.remember(stream, grid)
    return stream
