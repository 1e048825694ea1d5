"""Fine-tune a converted, calibrated Swin: windows, nested granularities, one budget per image.

Without options: a small Swin (three stages of two blocks, windows of 7 x 7) is trained from scratch
on scikit-learn's digits at 112 px, converted to half of its multiply-accumulates, calibrated on a
hundred images and fine-tuned with the dense model as teacher. A few minutes on two CPU cores, no
download. With `--pretrained`, `--weights` or `--data` it is the full Swin-T at 224 px.

    python examples/finetune_swin.py
    python examples/finetune_swin.py --resume
    python examples/finetune_swin.py --pretrained --data FOLDER --epochs 30 --bf16 --batch-size 128
    torchrun --nproc-per-node 8 examples/finetune_swin.py --pretrained --data FOLDER ...

FOLDER has `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or one of the two, which is then split.
"""

from __future__ import annotations

import _recipe
import dgefx
from _arguments import Defaults

DEFAULTS = Defaults(
    description=__doc__ or "",
    model="swin_tiny_patch4_window7_224",
    out="finetune-swin-out",
    epochs=5,
    img_size=112,
    config=dgefx.DGEConfig(),
    model_kwargs={"depths": (2, 2, 2), "embed_dim": 48, "num_heads": (2, 4, 8)},
    dense_epochs=10,
    gamma_warmup=0.3,
)

if __name__ == "__main__":
    _recipe.main(DEFAULTS)
