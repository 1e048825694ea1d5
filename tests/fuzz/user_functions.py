"""Habits of user code: custom functions, gradients and precision, random numbers, einops."""

from __future__ import annotations

import importlib.util
import random

from tests.fuzz.user_draft import Draft
from tests.fuzz.user_habit import collector

HABITS, habit = collector()


@habit
def straight_through(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        """
        class Rounds(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return (x * 4).round() / 4

            @staticmethod
            def backward(ctx, grad):
                return grad
        """,
    )
    draft.add_at(rng, "{v} = Rounds.apply({v})")


@habit
def scaled_gradient(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        f"""
        class Scales(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view_as(x)

            @staticmethod
            def backward(ctx, grad):
                return grad * {rng.choice(["0.3", "-1.0"])}
        """,
    )
    draft.add_at(rng, "{v} = Scales.apply({v})")


@habit
def own_activation(draft: Draft, rng: random.Random) -> None:
    """A function with a hand-written, right backward pass."""
    draft.add(
        "top",
        """
        class Swish(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x.sigmoid()

            @staticmethod
            def backward(ctx, grad):
                (x,) = ctx.saved_tensors
                s = x.sigmoid()
                return grad * (s * (1 + x * (1 - s)))
        """,
    )
    draft.add_at(rng, "{v} = Swish.apply({v})")


@habit
def no_grad_part(draft: Draft, rng: random.Random) -> None:
    draft.add_at(
        rng,
        rng.choice(
            [
                "with torch.no_grad():\n    size = {v}.abs().mean(-1, keepdim=True) + 1\n"
                "{v} = {v} / size",
                "with torch.set_grad_enabled(self.training):\n    {v} = {v} * 0.9",
                "with torch.no_grad():\n    more = torch.tanh({v})\n{v} = {v} + more",
                "with torch.no_grad():\n    gate = {v}.sigmoid()\n{v} = {v} * gate",
                "with torch.enable_grad():\n    {v} = {v} * 0.9",
            ]
        ),
    )


@habit
def no_grad_method(draft: Draft, rng: random.Random) -> None:
    draft.add("top", "@torch.no_grad()\ndef measured(x):\n    return x.std(-1, keepdim=True) + 0.5")
    draft.add_at(rng, "{v} = {v} / measured({v})")


@habit
def detached_part(draft: Draft, rng: random.Random) -> None:
    draft.add_at(
        rng,
        rng.choice(
            [
                "{v} = {v} + ((({v} * 4).round() / 4) - {v}).detach()",
                "{v} = {v} * {v}.detach().sigmoid()",
                "{v} = 0.1 * {v} + 0.9 * {v}.detach()",
                "{v} = {v} + {v}.data.tanh()",
            ]
        ),
    )


@habit
def autocast_off(draft: Draft, rng: random.Random) -> None:
    """A part in float32 whatever is around it, which shows at 300 + h."""
    draft.add_at(
        rng,
        """
        dtype = {v}.dtype
        with torch.autocast("cpu", enabled=False):
            wide = {v}.float() + 300.0
            {v} = (wide @ torch.eye(wide.shape[-1]) - 300.0).to(dtype)
        """,
    )


@habit
def autocast_on(draft: Draft, rng: random.Random) -> None:
    draft.add_at(
        rng,
        """
        with torch.autocast("cpu", dtype=torch.bfloat16):
            {v} = ({v} @ torch.eye({v}.shape[-1], dtype={v}.dtype)).to({v}.dtype)
        """,
        ("block.normed2", "block.fed", "mlp.hidden", "attn.start"),
    )


@habit
def wide_part(draft: Draft, rng: random.Random) -> None:
    """Computed in float32, or in float64, and cast back."""
    wide = rng.choice(["float()", "double()", "to(torch.float32)"])
    draft.add_at(rng, f"{{v}} = (({{v}}.{wide} + 300) - 300).to({{v}}.dtype)")


@habit
def wide_softmax(draft: Draft, rng: random.Random) -> None:
    draft.written()
    draft.add("attn.scores", "dtype, scores = scores.dtype, scores.float()")
    draft.add("attn.weights", "scores = scores.to(dtype)")


@habit
def in_place(draft: Draft, rng: random.Random) -> None:
    places = ("block.middle", "block.attended", "block.fed", "block.end", "mlp.end", "attn.merged")
    text = rng.choice(
        ["{v} += 0.5", "{v} *= 0.8", "{v}.add_({v}.detach().mean())", "{v}[:, 0] += 1.0"]
    )
    draft.add_at(rng, text, places)


@habit
def in_place_input(draft: Draft, rng: random.Random) -> None:
    """Writes into the stream that it was given."""
    draft.add("block.start", rng.choice(["x += 0.5", "x.mul_(0.8)", "x[:, :1] += 1.0"]))
    draft.add("model.loop", "before = x")
    draft.add("model.after", "x = x + 0.1 * before.mean()")


@habit
def python_random(draft: Draft, rng: random.Random) -> None:
    text = "if {c}random.random() < 0.5:\n    {v} = {v} * 1.5"
    draft.add_at(rng, text.replace("{c}", rng.choice(["", "self.training and "])))


@habit
def torch_random(draft: Draft, rng: random.Random) -> None:
    text = rng.choice(
        [
            "{v} = {v} + 0.1 * torch.randn_like({v})",
            "if torch.rand(()) < 0.5:\n    {v} = {v} * 1.5",
            "if torch.rand(1).item() < 0.5:\n    {v} = {v} * 1.5",
            "{v} = {v} * torch.empty({v}.shape[0], 1, 1).bernoulli_(0.5).to({v})",
            "{v} = {v} * (1 + torch.rand({v}.shape[0], 1, 1).to({v}))",
            "{v} = F.dropout({v}, 0.2)",
        ]
    )
    inner = ("attn.start", "attn.merged", "attn.end")
    draft.add_at(rng, text, inner if "1, 1" in text else ())


@habit
def stochastic_depth(draft: Draft, rng: random.Random) -> None:
    draft.add_at(
        rng,
        """
        if self.training:
            keep = torch.rand({v}.shape[0], *[1] * ({v}.ndim - 1)).to({v}) < 0.7
            {v} = {v} * keep / 0.7
        """,
        ("block.attended", "block.fed"),
    )


def _needs_einops(draft: Draft, *names: str) -> bool:
    """Whether it is there; the habit adds nothing otherwise."""
    if importlib.util.find_spec("einops") is None:
        return False
    draft.add("top", f"from einops import {', '.join(names)}")
    return True


@habit
def einops_heads(draft: Draft, rng: random.Random) -> None:
    if _needs_einops(draft, "rearrange"):
        draft.whole["attn.project"] = (
            "q, k, v = rearrange(self.qkv(x), 'b n (t h d) -> t b h n d', t=3, h=self.heads)"
        )
        draft.whole["attn.merge"] = "x = rearrange(x, 'b h n d -> b n (h d)')"


@habit
def einops_chunks(draft: Draft, rng: random.Random) -> None:
    """As in lucidrains' repositories."""
    if _needs_einops(draft, "rearrange"):
        draft.whole["attn.project"] = (
            "q, k, v = map(\n    lambda t: rearrange(t, 'b n (h d) -> b h n d', h=self.heads),\n"
            "    self.qkv(x).chunk(3, dim=-1),\n)"
        )
        draft.whole["attn.merge"] = "x = rearrange(x, 'b h n d -> b n (h d)')"


@habit
def einops_einsum(draft: Draft, rng: random.Random) -> None:
    if _needs_einops(draft, "einsum"):
        draft.written()
        draft.whole["attn.core"] = draft.whole["attn.core"].replace(
            "q @ k.transpose(-2, -1)", "einsum(q, k, 'b h i d, b h j d -> b h i j')"
        )
        draft.whole["attn.core"] = draft.whole["attn.core"].replace(
            "scores @ v", "einsum(scores, v, 'b h i j, b h j d -> b h i d')"
        )


@habit
def einops_reduce(draft: Draft, rng: random.Random) -> None:
    if _needs_einops(draft, "reduce", "repeat"):
        text = "{v} = {v} - reduce({v}, 'b n c -> b n 1', 'mean')"
        if rng.random() < 0.5:
            text = "{v} = {v} + repeat({v}[..., 0], 'b n -> b n c', c={v}.shape[-1])"
        draft.add_at(rng, text, ("attn.start", "attn.merged", "attn.end"))


@habit
def einops_pack(draft: Draft, rng: random.Random) -> None:
    if _needs_einops(draft, "pack", "unpack"):
        places = ("block.normed2", "block.fed", "mlp.hidden")
        text = (
            "{v}, shape = pack([{v}], '* c')\n{v} = {v}.tanh()\n({v},) = unpack({v}, shape, '* c')"
        )
        draft.add_at(rng, text, places)


@habit
def einops_layer(draft: Draft, rng: random.Random) -> None:
    if _needs_einops(draft, "rearrange") and draft.layout == "BNC":
        draft.add("top", "from einops.layers.torch import Rearrange")
        draft.add("mlp.init", "self.turn = Rearrange('b n c -> b c n')")
        draft.add("mlp.init", "self.back = Rearrange('b c n -> b n c')")
        draft.add("mlp.hidden", "h = self.back(self.turn(h) * 0.7)")
