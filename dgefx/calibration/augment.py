"""Random views of calibration images, so that a hundred of them do for fitting by gradient.

Only what makes sense for any image in any normalisation: mirrored, cropped and resized, and half of
the batches mixed. The dense model sees the same view, so no label has to stay right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: least area of a crop
_AREA = 0.5


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """As many views of the same size.

    Args:
        images: (B, C, H, W), floating point.
        generator: on the CPU.
    """
    batch = images.shape[0]

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    side = (_AREA + (1.0 - _AREA) * draw(batch)).sqrt()
    mirror = torch.where(draw(batch) < 0.5, -1.0, 1.0).float()
    transform = torch.zeros(batch, 2, 3, dtype=torch.float32)
    transform[:, 0, 0] = side * mirror
    transform[:, 1, 1] = side
    transform[:, :, 2] = (1.0 - side)[:, None] * (2.0 * draw(batch, 2) - 1.0)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    views = F.grid_sample(
        images.float(), grid.to(images.device), padding_mode="reflection", align_corners=False
    )
    if float(draw(1)) < 0.5:
        share = draw(batch, 1, 1, 1).to(images.device)
        views = share * views + (1.0 - share) * views.roll(1, 0)
    return views.to(images.dtype)
