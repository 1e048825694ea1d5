"""Fine-tune a converted PVT v2 with the paper's learned gates, to the paper's budget.

Without options: a PVT v2-B0 is trained from scratch on scikit-learn's digits, converted with one
linear gate per block (arXiv 2301.03831), whose gates are fitted to a hundred images, and fine-tuned
with the dense model as teacher and a budget loss: the gates ask for half of the
multiply-accumulates, on average over the images. A few minutes on two CPU cores, no download.

    python examples/finetune_pvt.py
    python examples/finetune_pvt.py --resume
    python examples/finetune_pvt.py --pretrained --data FOLDER --epochs 30 --bf16 --batch-size 128
    torchrun --nproc-per-node 8 examples/finetune_pvt.py --pretrained --data FOLDER ...

FOLDER has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or one of the two, which is then split.
"""

from __future__ import annotations

import _recipe
import dgefx
from _arguments import Defaults

DEFAULTS = Defaults(
    description=__doc__ or "",
    model="pvt_v2_b0",
    out="finetune-pvt-out",
    epochs=5,
    img_size=128,
    config=dgefx.DGEConfig(router="linear", budget="average", capacity=None),
)

if __name__ == "__main__":
    _recipe.main(DEFAULTS)
