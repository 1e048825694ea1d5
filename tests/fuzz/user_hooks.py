"""Habits of user code: hooks that read and hooks that change, before and after conversion."""

from __future__ import annotations

import random

from tests.fuzz.user_draft import Draft
from tests.fuzz.user_habit import collector

HABITS, habit = collector()

#: modules of a block `b` that people hook
_HOOKED = (
    "b.norm1",
    "b.attn.qkv",
    "b.attn",
    "b.attn.proj",
    "b.norm2",
    "b.mlp",
    "b.mlp.fc1",
    "b.mlp.act",
    "b",
)


def _when(draft: Draft, rng: random.Random) -> str:
    """Hooks on what has no one place in a converted block are told of by a warning."""
    draft.told_by = (*draft.told_by, "hook on", "hooks on")
    draft.seen_by_hooks = (".seen", ".given", ".features", ".slope")
    return rng.choice(["ready", "later"])


@habit
def hook_reads(draft: Draft, rng: random.Random) -> None:
    draft.shares_calls = True
    draft.add(
        "top",
        """
        def reads(module, args, output):
            module.seen = output
        """,
    )
    draft.each_block(_when(draft, rng), f"{rng.choice(_HOOKED)}.register_forward_hook(reads)")


@habit
def pre_hook_reads(draft: Draft, rng: random.Random) -> None:
    draft.shares_calls = True
    draft.add(
        "top",
        """
        def reads_before(module, args):
            module.given = args[0].detach()
        """,
    )
    hook = "register_forward_pre_hook(reads_before)"
    draft.each_block(_when(draft, rng), f"{rng.choice(_HOOKED)}.{hook}")


@habit
def hook_keeps_list(draft: Draft, rng: random.Random) -> None:
    """Features of every block, gathered by the model."""
    draft.keeps_state = draft.shares_calls = True
    draft.add(
        "top",
        """
        def gathers(module, args, output):
            module.features.append(output.detach())
        """,
    )
    where = rng.choice(["b", "b.mlp", "b.attn"])
    draft.each_block(
        _when(draft, rng), f"{where}.features = []\n{where}.register_forward_hook(gathers)"
    )


@habit
def hook_changes(draft: Draft, rng: random.Random) -> None:
    change = rng.choice(
        ["output * 1.5", "output.clamp(-0.5, 0.5)", "output + module.steer", "output.detach()"]
    )
    draft.add("top", f"def changes(module, args, output):\n    return {change}")
    where = rng.choice(_HOOKED)
    text = f"{where}.register_forward_hook(changes)"
    if "steer" in change:
        text = f"{where}.steer = 0.3\n{text}"
    draft.each_block(_when(draft, rng), text)


@habit
def pre_hook_changes(draft: Draft, rng: random.Random) -> None:
    draft.add("top", "def changes_before(module, args):\n    return (args[0] * 0.6, *args[1:])")
    draft.each_block(
        _when(draft, rng), f"{rng.choice(_HOOKED)}.register_forward_pre_hook(changes_before)"
    )


@habit
def hook_with_kwargs(draft: Draft, rng: random.Random) -> None:
    draft.add(
        "top",
        """
        def changes_with(module, args, kwargs, output):
            return output * (1.2 + len(kwargs))
        """,
    )
    draft.each_block(
        _when(draft, rng),
        f"{rng.choice(_HOOKED)}.register_forward_hook(changes_with, with_kwargs=True)",
    )


@habit
def hook_in_place(draft: Draft, rng: random.Random) -> None:
    draft.add("top", "def in_place(module, args, output):\n    output.mul_(0.8)")
    where = rng.choice(["b.attn", "b.mlp", "b.attn.proj", "b.mlp.fc2", "b.norm1"])
    draft.each_block(_when(draft, rng), f"{where}.register_forward_hook(in_place)")


@habit
def hook_lora(draft: Draft, rng: random.Random) -> None:
    """Low-rank adapters by hooks."""
    draft.add(
        "top",
        """
        def adapted(module, args, output):
            return output + module.up(module.down(args[0]))
        """,
    )
    where = rng.choice(["b.attn.qkv", "b.attn.proj", "b.mlp.fc1"])
    draft.each_block(
        _when(draft, rng),
        f"""
        layer = {where}
        torch.manual_seed(1)
        layer.down = nn.Linear(layer.in_features, 2, bias=False).to(layer.weight.dtype)
        layer.up = nn.Linear(2, layer.out_features, bias=False).to(layer.weight.dtype)
        layer.register_forward_hook(adapted)
        """,
    )


@habit
def backward_hook(draft: Draft, rng: random.Random) -> None:
    """Gradients of a module's output are kept, or scaled."""
    draft.shares_calls = True
    if rng.random() < 0.5:
        text = "module.slope = grad_output[0].detach()"
    else:
        text = "return tuple(None if g is None else g * 0.5 for g in grad_input)"
    draft.add("top", f"def backwards(module, grad_input, grad_output):\n    {text}")
    where = rng.choice(["b.norm1", "b.attn", "b.mlp", "b.attn.proj", "b.mlp.fc2", "b"])
    draft.each_block(_when(draft, rng), f"{where}.register_full_backward_hook(backwards)")


@habit
def tensor_hook(draft: Draft, rng: random.Random) -> None:
    """In forward, on a value."""
    draft.add_at(
        rng, "if {v}.requires_grad:\n    {v} = {v} * 1\n    {v}.register_hook(lambda g: g * 0.5)"
    )


@habit
def keeps_grad(draft: Draft, rng: random.Random) -> None:
    """`retain_grad` of a value that is kept, as for attention rollout."""
    draft.shares_calls = True
    draft.written()
    draft.add(
        "attn.weights", "if scores.requires_grad:\n    scores.retain_grad()\nself.weights = scores"
    )


@habit
def patched_forward(draft: Draft, rng: random.Random) -> None:
    """A method put on an instance."""
    draft.add(
        "top",
        """
        import functools

        def patched(forward, x, *args):
            return forward(x, *args) * 1.3
        """,
    )
    where = rng.choice(["b.attn", "b.mlp", "b.norm1", "b.attn.qkv", "b"])
    draft.each_block(
        _when(draft, rng), f"{where}.forward = functools.partial(patched, {where}.forward)"
    )
