"""Habits of user code: attributes that forward or a parent reads and sets, caches, buffers."""

from __future__ import annotations

import random

from tests.fuzz.user_draft import Draft
from tests.fuzz.user_habit import collector

HABITS, habit = collector()


@habit
def parent_sets_size(draft: Draft, rng: random.Random) -> None:
    """As PVT and UperNet do: the parent tells the grid by attributes."""
    draft.shares_calls = True
    if draft.depthwise or draft.layout == "BHWC":  # that knows its grid
        draft.add("model.loop", "blk.H, blk.W = H, W")
        draft.add("block.end", "x = x * (self.H / (self.H + self.W))")
        return
    if rng.random() < 0.5:
        draft.add("model.loop", "blk.H, blk.W = H, W")
        draft.given["mlp.args"] += ["H", "W"]
        draft.given["block.feed"] += ["self.H", "self.W"]
        draft.convolve("H", "W")
    else:
        draft.add("model.loop", "blk.mlp.size = (H, W)")
        draft.convolve("self.size[0]", "self.size[1]")


@habit
def parent_sets_value(draft: Draft, rng: random.Random) -> None:
    draft.shares_calls = True
    draft.add("model.loop", rng.choice(["blk.scale = W / 8", "blk.scale = x.mean() + 1"]))
    draft.add_at(rng, "{v} = {v} * self.scale", ("block.normed", "block.fed", "block.end"))


@habit
def parent_sets_index(draft: Draft, rng: random.Random) -> None:
    """Once, from the constructor on."""
    draft.add("model.init", "for i, blk in enumerate(self.blocks):\n    blk.index = i")
    draft.add_at(rng, "{v} = {v} * (0.5 + self.index)", ("block.normed", "block.attended"))


@habit
def keeps_last(draft: Draft, rng: random.Random) -> None:
    value = rng.choice(["{v}", "{v}.detach()", "{v}.mean(-1).detach()", "{v}[:, :1].detach()"])
    draft.shares_calls = True
    draft.add_at(rng, f"self.last = {value}")


@habit
def keeps_maps(draft: Draft, rng: random.Random) -> None:
    """Attention maps, kept for whoever draws them."""
    draft.written()
    draft.shares_calls = True
    draft.add("attn.init", f"self.save_attn = {rng.random() < 0.5}\nself.maps = None")
    draft.add("attn.weights", "if self.save_attn:\n    self.maps = scores.detach()")
    draft.each_block("later", "b.attn.save_attn = not b.attn.save_attn")


@habit
def uses_last(draft: Draft, rng: random.Random) -> None:
    draft.keeps_state = draft.shares_calls = True
    part = draft.add_at(
        rng,
        """
        if self.before is not None:
            {v} = {v} + 0.1 * self.before
        self.before = {v}.mean().detach()
        """,
    )
    draft.add(f"{part}.init", "self.before = None")


@habit
def counts_calls(draft: Draft, rng: random.Random) -> None:
    draft.keeps_state = draft.shares_calls = True
    use = rng.choice(["", "\nif self.calls % 2 == 0:\n    {v} = {v} * 1.2"])
    part = draft.add_at(rng, "self.calls += 1" + use)
    draft.add(f"{part}.init", "self.calls = 0")


@habit
def gain_changed_later(draft: Draft, rng: random.Random) -> None:
    gain = rng.choice(["0.7", "[0.7]", "{'gain': 0.7}", "True"])
    read = {"[0.7]": "self.gain[0]", "{'gain': 0.7}": "self.gain['gain']"}.get(gain, "self.gain")
    change = "{v} = {v} * " + read
    if gain == "True":
        change = "if self.gain:\n    {v} = {v} * 0.4"
    part = draft.add_at(rng, change)
    draft.add(f"{part}.init", f"self.gain = {gain}")
    later = "False" if gain == "True" else "0.2"
    draft.each_block("later", f"{read.replace('self', draft.owner(part))} = {later}")


@habit
def attention_scale_later(draft: Draft, rng: random.Random) -> None:
    draft.each_block("later", rng.choice(["b.attn.scale *= 4", "b.attn.scale = 0.05"]))


@habit
def lazy_cache(draft: Draft, rng: random.Random) -> None:
    """Made at the first call, or at the first of a size."""
    draft.memos = (".cache",)
    where = ("attn.start", "attn.merged", "attn.end")
    made = rng.choice(
        [
            "torch.linspace(0.5, 1.5, {v}.shape[1], dtype={v}.dtype)[:, None]",
            "torch.linspace(0.5, 1.5, {v}.shape[1])[:, None].to({v})",
            "torch.cos(torch.arange({v}.shape[1]).to({v}))[None, :, None]",
        ]
    )
    if rng.random() < 0.5:
        draft.add_at(
            rng,
            f"""
            key = ({{v}}.shape[1], str({{v}}.dtype))
            if key not in self.cache:
                self.cache[key] = {made}
            {{v}} = {{v}} * self.cache[key]
            """,
            where,
        )
        draft.add("attn.init", "self.cache = {}")
        return
    draft.shares_calls = True
    draft.add_at(
        rng,
        f"""
        if self.cache is None or self.cache.numel() != {{v}}.shape[1]:
            self.cache = {made}
        {{v}} = {{v}} * self.cache.to({{v}}.dtype)
        """,
        where,
    )
    draft.add("attn.init", "self.cache = None")


@habit
def frozen_cache(draft: Draft, rng: random.Random) -> None:
    """Computed once from the weights in eval mode, dropped in train mode."""
    draft.keeps_state, draft.memos = True, (".cached",)
    draft.add("block.init", "self.weight, self.cached = nn.Parameter(torch.randn(dim)), None")
    draft.add_at(
        rng,
        """
        if self.training:
            self.cached = None
            scale = self.weight.sigmoid()
        else:
            if self.cached is None:
                self.cached = self.weight.sigmoid().detach()
            scale = self.cached
        {v} = {v} * scale
        """,
        ("block.normed", "block.attended", "block.fed", "block.end"),
    )


@habit
def updates_buffer(draft: Draft, rng: random.Random) -> None:
    draft.keeps_state = draft.shares_calls = True
    places = ("block.normed", "block.attended", "block.normed2", "block.fed", "mlp.hidden")
    update = rng.choice(
        [
            "self.mean.mul_(0.9).add_(0.1 * {v}.detach().mean().to(self.mean.dtype))",
            "self.mean = 0.9 * self.mean + 0.1 * {v}.detach().mean()",
            "self.mean.lerp_({v}.detach().mean().to(self.mean.dtype), 0.1)",
            "self.mean += 1",
        ]
    )
    text = f"if self.training:\n    {update}\n{{v}} = {{v}} - 0.3 * self.mean"
    part = draft.add_at(rng, text, places)
    draft.add(f"{part}.init", "self.register_buffer('mean', torch.zeros(()))")


@habit
def appends_to_list(draft: Draft, rng: random.Random) -> None:
    draft.keeps_state = draft.shares_calls = True
    what = rng.choice(["{v}.detach().mean()", "tuple({v}.shape)", "f'{tuple({v}.shape)}'", "1"])
    part = draft.add_at(rng, f"self.log.append({what})")
    draft.add(f"{part}.init", "self.log = []")


@habit
def writes_shared_dict(draft: Draft, rng: random.Random) -> None:
    """A dict that the model shares with its blocks; what they leave there the model may use."""
    draft.shares_calls = True
    draft.add("model.init", "self.store = {}\nfor b in self.blocks:\n    b.store = self.store")
    draft.add_at(rng, "self.store['seen'] = {v}.mean((1, 2))", ("block.attended", "block.fed"))
    if rng.random() < 0.5:
        draft.add("model.end", "x = x + self.store['seen'].mean()")


@habit
def dropout_p_later(draft: Draft, rng: random.Random) -> None:
    """A functional dropout reads its p at each call."""
    part = draft.add_at(rng, "{v} = F.dropout({v}, self.p, self.training)")
    draft.add(f"{part}.init", "self.p = 0.1")
    draft.each_block("later", f"{draft.owner(part)}.p = {rng.choice(['0.6', '0.0'])}")


@habit
def dropout_module_later(draft: Draft, rng: random.Random) -> None:
    part = draft.add_at(rng, "{v} = self.drop({v})")
    draft.add(f"{part}.init", f"self.drop = nn.Dropout({rng.choice(['0.1', '0.0'])})")
    draft.each_block("later", f"{draft.owner(part)}.drop.p = 0.6")


@habit
def attention_dropout_later(draft: Draft, rng: random.Random) -> None:
    draft.add("attn.init", f"self.p = {rng.choice(['0.0', '0.2'])}")
    draft.whole["attn.core"] = (
        "p = self.p if self.training else 0.0\n"
        "x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)"
    )
    draft.each_block("later", f"b.attn.p = {rng.choice(['0.5', '0.0'])}")


@habit
def branch_flag_later(draft: Draft, rng: random.Random) -> None:
    """A switch of a user, turned after conversion."""
    kind = rng.choice(["'plain'", "False", "None", "0", "1.0"])
    other = {"'plain'": "'strong'", "False": "True", "None": "0.3", "0": "2", "1.0": "3.0"}[kind]
    part = draft.add_at(rng, f"if self.kind == {other}:\n    {{v}} = {{v}} * 0.3")
    draft.add(f"{part}.init", f"self.kind = {kind}")
    draft.each_block("later", f"{draft.owner(part)}.kind = {other}")
