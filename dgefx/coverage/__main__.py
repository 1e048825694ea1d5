"""`python -m dgefx.coverage [NAME ...]`: measure models and write the coverage table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dgefx.coverage.cases import select
from dgefx.coverage.measure import Result
from dgefx.coverage.run import Options, kept, run_cases
from dgefx.coverage.table import one_line, summary, write


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m dgefx.coverage",
        description="Measure which models dgefx converts, exactly or not, and write a table.",
    )
    made.add_argument(
        "names",
        nargs="*",
        help="models or patterns: timm:pvt_v2_b0, 'timm:vit_*' (also models that are not listed), "
        "hf:segformer, 'torchvision:*', or a source alone: timm, torchvision, hf. Default: "
        "everything listed",
    )
    made.add_argument("--quick", action="store_true", help="of what is listed, a small subset")
    made.add_argument(
        "--base", action="store_true", help="time the conversion of the base-size models instead"
    )
    made.add_argument("--list", action="store_true", help="print the cases and do nothing")
    made.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    made.add_argument(
        "--timeout", type=float, default=900.0, help="seconds per model (default 900)"
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("docs"),
        help="folder of coverage.md and coverage.json, or of coverage_base.* (default docs)",
    )
    made.add_argument(
        "--progress",
        type=Path,
        help="keep each result in this file of JSON lines as it comes, and measure nothing again "
        "that is in it: an interrupted run goes on",
    )
    made.add_argument(
        "--compile-backend",
        default="eager",
        choices=("eager", "aot_eager", "inductor"),
        help="of torch.compile(fullgraph=True), default eager",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a model was converted wrongly, 2 for bad arguments, 130 if interrupted."""
    asked = parser().parse_args(arguments)
    try:
        options = Options(asked.jobs, asked.timeout, asked.compile_backend, asked.base)
        cases = select(asked.names, base=asked.base, quick=asked.quick)
        before = kept(asked.progress, cases) if asked.progress else {}
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.list:
        for case in cases:
            print(f"{case.name}\t{case.family}\t{case.note}")
        return 0

    def done(result: Result) -> None:
        print(one_line(result), flush=True)
        if asked.progress:
            with asked.progress.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")

    print(f"models: {len(cases)}, of which known: {len(before)}", flush=True)
    # what ends this process has to end those that it started
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        new = run_cases([case for case in cases if case.name not in before], options, done)
    except KeyboardInterrupt:
        kept_in = f"; {asked.progress} has what was measured" if asked.progress else ""
        print(f"interrupted: no table was written{kept_in}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    found = before | {result.name: result for result in new}
    results = [found[case.name] for case in cases]
    paths = write(results, asked.out, options)
    print("\n".join(summary(results)))
    print(f"written: {', '.join(str(path) for path in paths)}")
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
