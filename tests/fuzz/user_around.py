"""Habits of user code: what is done to a model and around its blocks, before and after."""

from __future__ import annotations

import random

from tests.fuzz.user_draft import Draft
from tests.fuzz.user_habit import collector

HABITS, habit = collector()


@habit
def part_in_eval(draft: Draft, rng: random.Random) -> None:
    """A part stays in eval mode while the model trains, or the other way round."""
    draft.add_at(rng, "{v} = self.drop({v})", ("attn.end", "attn.merged"))
    draft.add("attn.init", "self.drop = nn.Dropout(0.3)")
    draft.add_at(rng, "{v} = F.dropout({v}, 0.3, self.training)", ("mlp.end", "mlp.hidden"))
    mode = rng.choice(["b.attn.eval()", "b.mlp.eval()", "b.attn.drop.eval()", "b.mlp.train()"])
    draft.each_block("mode", mode)


@habit
def part_in_eval_later(draft: Draft, rng: random.Random) -> None:
    draft.add("attn.init", "self.drop = nn.Dropout(0.3)")
    draft.add_at(rng, "{v} = self.drop({v})", ("attn.end", "attn.merged"))
    draft.add_at(rng, "{v} = F.dropout({v}, 0.3, self.training)", ("mlp.end", "mlp.hidden"))
    mode = rng.choice(["b.attn", "b.mlp", "b.attn.drop", "b"])
    draft.add("model.init", "self.late = False")
    draft.add("mode", f"if model.late:\n    for b in model.blocks:\n        {mode}.eval()")
    draft.add("later", "model.late = True")


@habit
def batch_norm_in_eval(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        """
        class Turned(nn.BatchNorm1d):
            def forward(self, x):
                return super().forward(x.flatten(0, -2)).view(x.shape)
        """,
    )
    which = rng.choice(["norm1", "norm2"])
    draft.add("block.init", f"self.{which} = Turned(dim)")
    draft.keeps_state = True
    draft.told_by = (*draft.told_by, "running statistics")
    if rng.random() < 0.7:
        draft.each_block("mode", f"b.{which}.eval()")


@habit
def frozen_parts(draft: Draft, rng: random.Random) -> None:
    part = rng.choice(["b", "b.attn", "b.attn.qkv", "b.mlp", "b.norm1"])
    draft.each_block(rng.choice(["ready", "later"]), f"{part}.requires_grad_(False)")


@habit
def frozen_backbone(draft: Draft, rng: random.Random) -> None:
    draft.add(
        rng.choice(["ready", "later"]),
        "model.requires_grad_(False)\nmodel.head.requires_grad_(True)",
    )


@habit
def checkpointed_blocks(draft: Draft, rng: random.Random) -> None:
    draft.checkpointed.add("block")


@habit
def checkpointed_part(draft: Draft, rng: random.Random) -> None:
    if rng.random() < 0.5:
        draft.checkpointed.add(rng.choice(["attn", "mlp"]))
        return
    draft.add_at(
        rng,
        """
        if self.training:
            {v} = checkpoint(lambda t: t * t.sigmoid(), {v}, use_reentrant=False)
        else:
            {v} = {v} * {v}.sigmoid()
        """,
    )


@habit
def swapped_norm_later(draft: Draft, rng: random.Random) -> None:
    which = rng.choice(["norm1", "norm2"])
    new = rng.choice(
        [
            "nn.RMSNorm(dim)",
            "nn.LayerNorm(dim, elementwise_affine=False)",
            "nn.Identity()",
            "nn.Sequential(nn.LayerNorm(dim), nn.Tanh())",
            "nn.LayerNorm(dim, eps=0.5)",
        ]
    )
    draft.each_block(
        "later",
        f"""
        dim, dtype = b.norm1.weight.shape[0], b.mlp.fc1.weight.dtype
        b.{which} = {new}.to(dtype)
        """,
    )


@habit
def swapped_part_later(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        """
        class Adapted(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.scale = base, 1.4

            def forward(self, *args):
                return self.base(*args) * self.scale
        """,
    )
    change = rng.choice(
        [
            "b.mlp.act = nn.ReLU()",
            "b.attn.proj = Adapted(b.attn.proj)",
            "b.attn.qkv = Adapted(b.attn.qkv)",
            "b.mlp = Adapted(b.mlp)",
            "b.attn = Adapted(b.attn)",
            "b.mlp.fc1 = Adapted(b.mlp.fc1)",
            "b.mlp.fc2 = nn.Sequential(b.mlp.fc2, nn.Tanh())",
        ]
    )
    draft.each_block("later", change)


@habit
def blocks_changed_later(draft: Draft, rng: random.Random) -> None:
    """The list of blocks itself."""
    draft.add("top", "import copy")
    draft.add(
        "later",
        rng.choice(
            [
                "del model.blocks[1]",
                "model.blocks.append(copy.deepcopy(model.blocks[0]))",
                "model.blocks = model.blocks[::-1]",
                "model.blocks.append(model.blocks[0])",
            ]
        ),
    )


@habit
def new_weights_later(draft: Draft, rng: random.Random) -> None:
    """Weights loaded, replaced or assigned."""
    draft.add("later", "torch.manual_seed(3)")
    draft.each_block(
        "later",
        rng.choice(
            [
                "b.attn.qkv.weight = nn.Parameter(torch.randn_like(b.attn.qkv.weight))",
                "b.mlp.fc1.weight.data = torch.randn_like(b.mlp.fc1.weight)",
                "b.mlp.load_state_dict({k: v * 1.5 for k, v in b.mlp.state_dict().items()})",
                "b.norm1.bias = None",
                "b.attn.qkv.bias = None",
                "b.norm1.eps = 0.5",
            ]
        ),
    )


@habit
def weight_norm(draft: Draft, rng: random.Random) -> None:
    draft.add("top", "from torch.nn.utils import parametrizations")
    layer = rng.choice(["b.attn.qkv", "b.attn.proj", "b.mlp.fc1"])
    kind = rng.choice(["weight_norm", "weight_norm", "spectral_norm"])
    draft.keeps_state = kind == "spectral_norm"
    if draft.keeps_state:
        draft.told_by = (*draft.told_by, "running statistics")
    draft.each_block(
        rng.choice(["ready", "later"]), f"torch.manual_seed(4)\nparametrizations.{kind}({layer})"
    )


@habit
def own_parametrization(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        """
        from torch.nn.utils import parametrize

        class Doubled(nn.Module):
            def forward(self, weight):
                return weight * 2
        """,
    )
    layer = rng.choice(["b.attn.qkv", "b.attn.proj", "b.mlp.fc1"])
    when = rng.choice(["ready", "later"])
    draft.each_block(when, f"parametrize.register_parametrization({layer}, 'weight', Doubled())")


@habit
def shared_modules(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "model.init",
        rng.choice(
            [
                "self.blocks[1].attn = self.blocks[0].attn",
                "self.blocks[1].mlp = self.blocks[0].mlp",
                "for b in self.blocks:\n    b.norm2 = b.norm1",
                "self.blocks[1] = self.blocks[0]",
                "self.blocks[1].attn.qkv.weight = self.blocks[0].attn.qkv.weight",
            ]
        ),
    )


@habit
def optional_mask(draft: Draft, rng: random.Random) -> None:
    """Padding, given or not."""
    for place in ("model.args", "block.args", "attn.args"):
        draft.given[place].append("mask=None")
    draft.given["model.call"].append("mask=mask")
    draft.given["block.attend"].append("mask=mask")
    draft.written()
    draft.add(
        "attn.scores",
        """
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        """,
    )
    variants = [
        "dict(mask=torch.arange(N).expand(B, N) < N - 3 * torch.arange(B)[:, None])",
        "{}",
        "dict(mask=torch.ones(B, N, dtype=torch.bool))",
    ]
    shift = rng.randrange(3)
    draft.vary(*variants[shift:], *variants[:shift])


@habit
def flag_arguments(draft: Draft, rng: random.Random) -> None:
    """None or False by default, passed on to the blocks by name."""
    draft.given["model.args"].append("strong=None")
    draft.given["block.args"].append(rng.choice(["strong=None", "strong=False"]))
    draft.given["model.call"].append("strong=strong")
    draft.add_at(rng, "if strong:\n    {v} = {v} * 0.5", ("block.normed", "block.fed", "block.end"))
    draft.vary("{}", "dict(strong=False)", "dict(strong=None)", "dict(strong=True)")


@habit
def number_argument(draft: Draft, rng: random.Random) -> None:
    """A float or an integer that changes from call to call."""
    kind = rng.choice(["0.5", "2"])
    draft.given["model.args"].append(f"gain={kind}")
    draft.given["block.args"].append(f"gain={kind}")
    draft.given["model.call"].append("gain=gain")
    draft.add_at(rng, "{v} = {v} * gain", ("block.normed", "block.fed", "block.end"))
    draft.vary("{}", f"dict(gain={kind})", "dict(gain=3)", "dict(gain=0.25)")


@habit
def extra_outputs(draft: Draft, rng: random.Random) -> None:
    """A tensor beside the stream, if asked for."""
    draft.given["model.args"].append("more=False")
    draft.given["block.args"].append("more=False")
    draft.given["model.call"].append("more=more")
    draft.whole["block.return"] = "return (x, h.mean(-1)) if more else (x, None)"
    draft.whole["model.return"] = "return (self.head(x), beside) if more else self.head(x)"
    draft.add("model.after", "x, beside = x")
    draft.vary(*["{}", "dict(more=False)", "dict(more=True)"][:: rng.choice([1, -1])])
