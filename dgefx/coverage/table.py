"""Results as Markdown and JSON, with a summary on top. Last step of the coverage run."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from dgefx.coverage.measure import GAMMA, TOLERANCE, Result
from dgefx.coverage.run import Options

_LIBRARIES = ("torch", "timm", "torchvision", "transformers")


def has_grid_attention(result: Result) -> bool:
    """Whether the model has blocks of query-key attention over the image's tokens. A model that
    could not be measured counts as one that has."""
    if result.status in ("error", "timeout", "crash"):
        return result.over_grid
    return result.count("converted") + result.count("left") > 0


def complete(result: Result) -> bool:
    """Whether every such block converts and the model is exact."""
    return result.status == "converted" and not result.count("left") and not result.wrong


def families(results: Sequence[Result]) -> dict[str, bool]:
    """Families that have query-key attention over the image's tokens: whether every such block of
    every representative converts, exactly."""
    found: dict[str, bool] = {}
    for result in results:
        if has_grid_attention(result):
            found[result.family] = found.get(result.family, True) and complete(result)
    return found


def summary(results: Sequence[Result]) -> list[str]:
    """The figures on top of the table, one a line."""
    lines = []
    sources = sorted({result.name.partition(":")[0] for result in results})
    for source in sources:
        own = [r for r in results if r.name.startswith(f"{source}:")]
        found = families(own)
        every = len({r.family for r in own})
        share = f" ({sum(found.values()) / len(found):.1%})" if found else ""
        lines.append(
            f"{source}: {sum(found.values())} of {len(found)} families with query-key attention "
            f"over the image's tokens convert in every such block{share}; "
            f"{every - len(found)} families have none"
        )
    counts = {v: sum(r.count(v) for r in results) for v in ("converted", "refused", "left")}
    lines.append(
        f"blocks: {counts['converted']} converted, {counts['refused']} rightly refused, "
        f"{counts['left']} that could convert and do not"
    )
    exact = [r for r in results if r.exact is not None]
    converted = sum(r.status == "converted" for r in results)
    lines.append(
        f"models: {len(results)}; {converted} converted, {len(exact)} compared: "
        f"{sum(not r.wrong for r in exact)} exact to {TOLERANCE:g}, "
        f"{sum(r.wrong for r in exact)} wrong"
    )
    tried = [r for r in results if r.compiled is not None]
    if tried:
        lines.append(
            f"torch.compile(fullgraph=True): {sum(bool(r.compiled) for r in tried)} of {len(tried)}"
        )
    seconds = [r.seconds for r in results if r.seconds is not None]
    if seconds:
        lines.append(
            f"convert: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s"
        )
    failed = [r.name for r in results if r.status in ("error", "timeout", "crash")]
    if failed:
        lines.append(f"not measured: {', '.join(failed)}")
    return lines


def one_line(result: Result) -> str:
    """One result for the terminal."""
    cells = dict(zip(_COLUMNS, _cells(result), strict=True))
    parts = [f"{key} {value}" for key, value in cells.items() if key != "model" and value]
    return f"{result.name}: " + ", ".join(parts)


_COLUMNS = (
    "model",
    "M parameters",
    "converted",
    "rightly refused",
    "left",
    "relative error",
    "coarse moves",
    "one graph",
    "ratio",
    "counted",
    "convert s",
    "note",
)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _status(result: Result) -> str:
    return {
        "no attention": "no softmax attention",
        "unseen": "attention not recognised",
        "error": result.error,
        "timeout": f"timeout: {result.error}",
        "crash": f"crash: {result.error}",
    }.get(result.status, "")


def _cells(result: Result) -> list[str]:
    attended = result.blocks or (result.unseen and result.over_grid)
    total = sum(result.count(v) for v in ("converted", "refused", "left"))
    floor = result.floor is not None and result.gamma is not None and result.gamma > GAMMA
    notes = [result.note, _status(result)]
    notes.append(f"floor {result.floor:.2f}" if floor else "")
    if result.moved is not None and not result.moved > 10 * TOLERANCE:
        notes.append("its output hardly depends on the blocks: the error says little")
    if result.compile_difference is not None and not result.compile_difference <= TOLERANCE:
        notes.append(f"compiled differs by {result.compile_difference:.0e}")
    parameters = None if result.parameters is None else result.parameters / 1e6
    return [
        result.name.partition(":")[2],
        _number(parameters, ".1f"),
        f"{result.count('converted')} of {total}" if attended else "",
        str(result.count("refused")) if attended else "",
        str(result.count("left")) if attended else "",
        _number(result.exact, ".0e") + (" WRONG" if result.wrong else ""),
        _number(result.moved, ".0e"),
        {None: "", True: "yes", False: "no"}[result.compiled],
        _number(result.ratio, ".3f"),
        _number(result.counted, ".3f"),
        _number(result.seconds, ".1f"),
        "; ".join(note for note in notes if note),
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tables(results: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    found = families(results)
    for source in dict.fromkeys(r.name.partition(":")[0] for r in results):
        lines += ["", f"## {source}", "", _row(("family", *_COLUMNS))]
        lines += [_row(["---"] * (len(_COLUMNS) + 1))]
        last = ""
        for result in results:
            if not result.name.startswith(f"{source}:"):
                continue
            mark = {None: " (-)", True: "", False: " (incomplete)"}[found.get(result.family)]
            family = "" if result.family == last else result.family + mark
            lines.append(_row([family, *_cells(result)]))
            last = result.family
    return lines


def grouped(names: Sequence[str]) -> str:
    """Block names with their numbers folded: blocks.0.attn, blocks.1.attn -> blocks.0-1.attn."""
    groups: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in names:
        words = (name or "(root)").split(".")
        groups[tuple(re.sub(r"^\d+$", "#", w) for w in words)].append(words)
    texts = []
    for pattern, members in groups.items():
        words = []
        for place, word in enumerate(pattern):
            numbers = sorted({int(m[place]) for m in members}) if word == "#" else []
            if not numbers:
                words.append(word)
            elif numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
                words.append(f"{numbers[0]}-{numbers[-1]}")
            else:
                words.append(",".join(str(n) for n in numbers))
        many = f" ({len(members)})" if len(members) > 1 else ""
        texts.append(f"`{'.'.join(words)}`{many}")
    return ", ".join(texts)


def _refusals(result: Result) -> list[str]:
    """Each reason once per model, with its blocks; numbers in reasons that only name the block
    or a node do not make another reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    said: dict[tuple[str, str], str] = {}
    for block in result.blocks:
        if block.verdict == "converted":
            continue
        alike = block.reason.replace(block.name, "#") if block.name else block.reason
        alike = re.sub(r"(?<=[\w.])\d+", "#", alike)
        key = (block.what, alike)
        groups[key].append(block.name)
        said.setdefault(key, block.reason)
    lines = []
    for key, names in groups.items():
        verdict = f"rightly refused, {key[0]}" if key[0] else "**left**"
        lines.append(f"  - {verdict}: {said[key]}: {grouped(names)}")
    if result.unseen and result.over_grid:
        lines.append(f"  - **left**: softmax that the passes do not see: {grouped(result.unseen)}")
    return lines


def _reasons(results: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for result in results:
        refusals = _refusals(result)
        if refusals:
            lines += [f"- {result.name}", *refusals]
    if lines:
        lines = ["", "## Blocks that stay dense, and why", "", *lines]
    failures = [r for r in results if r.compile_error]
    if failures:
        lines += ["", "## Not one graph", ""]
        lines += [f"- {r.name}: {r.compile_error}" for r in failures]
    return lines


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(results: Sequence[Result], options: Options) -> str:
    """The whole document."""
    title = "# Time to convert base-size models" if options.base else "# Coverage"
    command = "python -m dgefx.coverage" + (" --base" if options.base else "")
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [title, "", f"Written by `{command}` ({made}).", ""]
    lines += [f"- {line}" for line in summary(results)]
    if not options.base:
        lines += ["", _LEGEND.format(backend=options.backend, tolerance=TOLERANCE, gamma=GAMMA)]
    lines += _tables(results)
    lines += _reasons(results)
    return "\n".join(lines) + "\n"


_LEGEND = """\
Models are made without pretrained weights: linear weights are drawn so that layers keep the size of
what they are given, constant parameters at random. Columns:
converted of all attention blocks; rightly refused: attention that is not query-key over the tokens
of its own residual stream (class, pooling, channel, cross attention, ...); left: blocks that could
convert and do not, and softmaxes that the passes do not see. Relative error: of the whole model's
output at the finest granularity (gamma 1), float32, on images it was not converted with;
{tolerance:g} is asked for. Coarse moves: by how much coarse queries change that output at gamma
{gamma:g}, so that an error of nothing is not one of an output that its blocks do not reach. One
graph: `torch.compile(fullgraph=True, backend="{backend}")`. Ratio: MACs over the dense model's at
gamma {gamma:g} (at the floor where the note names one), by `dgefx.report`; counted: the same by
`FlopCounterMode`. Convert s: one call of `dgefx.convert`. A
family marked (-) has no query-key attention over tokens; (incomplete): at least one block left."""


def write(results: Sequence[Result], folder: Path, options: Options) -> tuple[Path, Path]:
    """Write both files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "coverage_base" if options.base else "coverage"
    text, data = folder / f"{stem}.md", folder / f"{stem}.json"
    text.write_text(markdown(results, options))
    content = {
        "versions": versions(),
        "summary": summary(results),
        "families": families(results),
        "models": [dataclasses.asdict(result) for result in results],
    }
    data.write_text(json.dumps(content, indent=1) + "\n")
    return text, data
