"""End-to-end speed: a converted model against the dense one, both compiled, in one run.

    python benchmarks/models.py vit_small_patch16_224 pvt_v2_b2 --gamma 0.5 --batch-size 8

Prints one row per model: measured MAC ratio, its limit 1 / ratio, the medians of alternating runs,
the speed-up as the median of the paired quotients and as a share of the limit; writes JSON with
`--json`. Refuses to time a model whose compiled output differs from eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import dgefx

COLUMNS = ("model", "ratio", "limit", "dense ms", "converted ms", "speed-up", "share of limit")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def paired_times(
    models: tuple[nn.Module, nn.Module], x: Tensor, runs: int
) -> tuple[list[float], list[float]]:
    """Seconds per call of two models, called in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in tqdm(range(runs), desc="timing", leave=False):
        for model, record in zip(models, times, strict=True):
            synchronise(x.device)
            start = time.perf_counter()
            model(x)
            synchronise(x.device)
            record.append(time.perf_counter() - start)
    return times


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """One row of the table."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = timm.create_model(name).eval().to(args.device)
    side = args.img_size or dense.pretrained_cfg["input_size"][-1]
    x = torch.randn(args.batch_size, 3, side, side, device=args.device)
    converted = dgefx.convert(dense, args.gamma, example_inputs=x[:2])
    ratio = dgefx.report(converted).ratio
    with torch.inference_mode():
        wanted = converted(x)
        start = time.perf_counter()
        fast = torch.compile(dense), torch.compile(converted, fullgraph=True)
        fast[0](x)
        middle = time.perf_counter()
        found = fast[1](x)
        end = time.perf_counter()
        difference = float((found - wanted).norm() / wanted.norm())
        if not difference < 1e-4:
            raise SystemExit(f"{name}: compiled differs from eager by {difference:.1e}; not timed")
        paired_times(fast, x, 3)
        a, b = paired_times(fast, x, args.runs)
    speed = statistics.median(p / q for p, q in zip(a, b, strict=True))
    return {
        "model": name,
        "batch": args.batch_size,
        "size": side,
        "ratio": ratio,
        "limit": 1 / ratio,
        "dense ms": 1e3 * statistics.median(a),
        "converted ms": 1e3 * statistics.median(b),
        "speed-up": speed,
        "share of limit": speed * ratio,
        "compile seconds": [middle - start, end - middle],
        "torch": torch.__version__,
        "device": str(args.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="timm model names")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--runs", type=int, default=15, help="timed calls of each model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    rows = [measure(name, args) for name in tqdm(args.models, desc="models")]
    table = Table(title=f"batch {args.batch_size}, gamma {args.gamma:g}, {args.device}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        cells = [row[c] for c in COLUMNS]
        table.add_row(*(c if isinstance(c, str) else f"{c:.3f}" for c in cells))
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
