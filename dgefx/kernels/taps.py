"""Taps of a convolution on patches: which positions around a patch are read, and how much of every
tap each of them takes. Plain integers; used by `kernels.stencil` and `kernels.stencil_tables`.
"""

from __future__ import annotations


def patch_shapes(grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Shapes of the patches on `grid`: whole first, then clipped in x, in y, in both."""
    heights = [side] + ([grid[0] % side] if grid[0] % side else [])
    widths = [side] + ([grid[1] % side] if grid[1] % side else [])
    return [(h, w) for h in heights for w in widths]


def ring_of(side: int, kernel: int) -> list[tuple[int, int]]:
    """Positions around a patch in its (side + kernel - 1)^2 frame."""
    frame, reach = side + kernel - 1, kernel // 2
    own = range(reach, reach + side)
    return [(y, x) for y in range(frame) for x in range(frame) if y not in own or x not in own]


def tap_shares(
    side: int, kernel: int, shapes: tuple[tuple[int, int], ...]
) -> list[list[list[float]]]:
    """(1 + ring, shapes, k * k): how much of each tap reads the patch itself (first) and each
    ring position, in the mean over the patch's tokens."""
    reach = kernel // 2
    ring = {position: index + 1 for index, position in enumerate(ring_of(side, kernel))}
    shares = [[[0.0] * kernel**2 for _ in shapes] for _ in range(len(ring) + 1)]
    for shape, (height, width) in enumerate(shapes):
        for tap in range(kernel**2):
            down, right = divmod(tap, kernel)
            for y in range(height):
                for x in range(width):
                    inside = 0 <= y + down - reach < height and 0 <= x + right - reach < width
                    place = 0 if inside else ring.get((y + down, x + right))
                    if place is not None:  # else beyond a clipped border, where there is nothing
                        shares[place][shape][tap] += 1.0 / (height * width)
    return shares
