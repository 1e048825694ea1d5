"""The process that measures one model: `python -m dgefx.coverage.worker NAME OPTIONS`.

Started by `run`. Writes one JSON line to its standard output; whatever else is printed there, by a
model or by torch, goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import warnings

import torch

from dgefx.coverage.cases import select
from dgefx.coverage.measure import Result, first_line, measure, time_convert


def main(name: str, options: str) -> None:
    """Measure the case `name`; options: JSON of {"base": bool, "backend": str, "threads": int}."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    settings = json.loads(options)
    torch.set_num_threads(settings["threads"])
    (case,) = (c for c in select([name], base=settings["base"]) if c.name == name)
    try:
        result = time_convert(case) if settings["base"] else measure(case, settings["backend"])
    except Exception as error:
        result = Result(case.name, case.family, case.note, case.over_grid)
        result.error = f"not built: {first_line(error)}"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.peak = kib / 2**20
    pipe.write(json.dumps(dataclasses.asdict(result)) + "\n")
    pipe.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
