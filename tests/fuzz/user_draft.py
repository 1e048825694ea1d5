"""The source of a small vision transformer as a user writes it, with places for habits of theirs.

`tests.fuzz.user_habits` holds the habits; `tests.fuzz.user_spec` draws which; the source is run as
a module of its own, so that whatever reads it (`inspect`, a traceback) finds it.
"""

from __future__ import annotations

import linecache
import random
import re
import textwrap
from collections import defaultdict
from types import ModuleType

from tests.fuzz.user_template import QKV, SDPA, SPOTS, TEMPLATE, WRITTEN


class Draft:
    """A source in the making.

    Args:
        layout: of the stream, "BNC" or "BHWC". core: "sdpa" or "written". embed: "conv" or "cut".
        prefix: whether a class token stands before the grid. position: whether tokens get one.
        depthwise: whether the MLP holds a depthwise convolution, told the grid by arguments.
    """

    def __init__(
        self, layout: str, core: str, embed: str, prefix: bool, position: bool, depthwise: bool
    ) -> None:
        self.layout, self.prefix, self.depthwise = layout, prefix, depthwise
        self.code: defaultdict[str, list[str]] = defaultdict(list)
        self.whole: dict[str, str] = {
            "attn.project": QKV,
            "attn.core": SDPA if core == "sdpa" else WRITTEN,
            "attn.merge": "x = x.transpose(1, 2).reshape(B, N, C)",
            "block.return": "return x",
            "model.return": "return self.head(x)",
        }
        self.given: defaultdict[str, list[str]] = defaultdict(list)
        #: keyword arguments of the model, as expressions; the first is what it is converted with
        self.variants: list[str] = ["{}"]
        #: words by which a warning of the library tells of what it leaves out
        self.told_by: tuple[str, ...] = ()
        #: attributes set by hooks: inside a block they may see its queries in rows, as (B, N, C)
        self.seen_by_hooks: tuple[str, ...] = ()
        #: attributes that hold what was computed before, which no one else reads
        self.memos: tuple[str, ...] = ()
        self.keeps_state = False  # what a call gives depends on the calls before
        self.shares_calls = False  # what one call sets another one reads: not for two threads
        self.checkpointed: set[str] = set()  # of "block", "attn", "mlp"
        self._embed(embed, prefix, position)
        if depthwise:
            self.size_arguments()

    def add(self, place: str, text: str) -> None:
        self.code[place].append(textwrap.dedent(text).strip("\n"))

    def add_at(self, rng: random.Random, text: str, places: tuple[str, ...] = ()) -> str:
        """`text` about the value {v} at one of `places`, whose owner is returned."""
        place = rng.choice(places or tuple(SPOTS))
        self.add(place, textwrap.dedent(text).replace("{v}", SPOTS[place]))
        return place.split(".")[0]

    def owner(self, part: str) -> str:
        """`block`, `attn` or `mlp` as reached from a block `b`."""
        return "b" if part == "block" else f"b.{part}"

    def each_block(self, place: str, text: str) -> None:
        """`text` about every block `b`, in `ready`, `mode` or `later`."""
        body = textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")
        self.add(place, f"for b in model.blocks:\n{body}")

    def vary(self, *variants: str) -> None:
        """Keyword arguments of the model besides those that others give it."""
        count = max(len(variants), len(self.variants))
        self.variants = [
            f"{{**{self.variants[i % len(self.variants)]}, **{variants[i % len(variants)]}}}"
            for i in range(count)
        ]

    def written(self) -> None:
        """Attention that has its scores at hand."""
        self.whole["attn.core"] = WRITTEN

    def _embed(self, embed: str, prefix: bool, position: bool) -> None:
        if embed == "conv":
            self.add("model.embed", "self.embed = nn.Conv2d(3, dim, 2, stride=2)")
            self.add("model.patches", "x = self.embed(images).flatten(2).transpose(1, 2)")
        else:
            self.add("model.embed", "self.embed = nn.Linear(12, dim)")
            self.add(
                "model.patches",
                """
                x = images.reshape(B, 3, H, 2, W, 2).permute(0, 2, 4, 3, 5, 1)
                x = self.embed(x.reshape(B, H * W, 12))
                """,
            )
        if position:
            self.add("model.embed", "self.place = nn.Parameter(torch.randn(1, dim, *grid))")
            self.add(
                "model.patches",
                """
                place = F.interpolate(self.place, (H, W), mode="bilinear")
                x = x + place.flatten(2).transpose(1, 2)
                """,
            )
        if prefix:
            self.add("model.embed", "self.first = nn.Parameter(torch.randn(1, 1, dim))")
            self.add("model.patches", "x = torch.cat([self.first.expand(B, -1, -1), x], 1)")
        if self.layout == "BHWC":
            self.add("model.patches", "x = x.view(B, H, W, -1)")

    def size_arguments(self) -> None:
        """The grid as arguments of a block and its MLP."""
        self.given["block.args"] += ["H", "W"]
        self.given["mlp.args"] += ["H", "W"]
        self.given["model.call"] += ["H", "W"]
        self.given["block.feed"] += ["H", "W"]
        self.convolve("H", "W")

    def convolve(self, height: str, width: str) -> None:
        """A depthwise convolution in the MLP, which reads the grid there."""
        self.add(
            "mlp.init", "self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, 1, 1, groups=2 * dim)"
        )
        cut = "[:, 1:]" if self.prefix else ""
        text = f"""
            grid = h{cut}.transpose(1, 2).reshape(h.shape[0], -1, {height}, {width})
            grid = self.depthwise(grid).flatten(2).transpose(1, 2)
            """
        if self.layout == "BHWC":
            text = "h = self.depthwise(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)"
        elif self.prefix:
            text += "h = torch.cat([h[:, :1], grid], 1)"
        else:
            text += "h = grid"
        self.add("mlp.conv", "\n".join(line.strip() for line in text.strip().splitlines()))

    def _calls(self) -> None:
        def with_given(place: str) -> str:
            return "".join(f", {name}" for name in self.given[place])

        def call(part: str, module: str, value: str, place: str) -> str:
            if part in self.checkpointed:
                return f"checkpoint({module}, {value}{with_given(place)}, use_reentrant=False)"
            return f"{module}({value}{with_given(place)})"

        tokens, back = ("h.flatten(1, 2)", ".view(x.shape)") if self.layout == "BHWC" else ("h", "")
        attend = call("attn", "self.attn", tokens, "block.attend")
        self.whole["block.attend"] = f"h = {attend}{back}"
        self.whole["block.feed"] = f"h = {call('mlp', 'self.mlp', 'h', 'block.feed')}"
        self.whole["model.call"] = f"x = {call('block', 'blk', 'x', 'model.call')}"

    def source(self) -> str:
        self._calls()
        text = TEMPLATE
        for name in ("attn.args", "mlp.args", "block.args", "model.args"):
            text = text.replace(f", *ARGS {name}", "".join(f", {a}" for a in self.given[name]))
        while found := re.search(r"^( *)\{([a-z0-9.]+)\}\n?", text, re.MULTILINE):
            lines = ([self.whole[found[2]]] if found[2] in self.whole else []) + self.code[found[2]]
            body = textwrap.indent("\n".join(lines), found[1])
            text = text[: found.start()] + (f"{body}\n" if lines else "") + text[found.end() :]
        return re.sub(r"\n{4,}", "\n\n\n", text)


def load(source: str, name: str) -> ModuleType:
    """The source as a module, which tracebacks can quote."""
    module = ModuleType(name)
    filename = f"<user {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
