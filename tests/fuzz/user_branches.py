"""Habits of user code: branches on dtype, size, batch, data, mode and autocast."""

from __future__ import annotations

import random

from tests.fuzz.user_draft import Draft
from tests.fuzz.user_habit import collector

HABITS, habit = collector()

#: what a branch does to a value
_CHANGES = ("{v} = {v} * 1.5", "{v} = {v}.clamp(-0.3, 0.3)", "{v} = {v} + 0.5", "{v} = {v}.relu()")


def _branch(draft: Draft, rng: random.Random, *conditions: str) -> None:
    """One of `conditions`, about the value {v}, decides."""
    change = rng.choice(_CHANGES)
    draft.add_at(rng, f"if {rng.choice(conditions)}:\n    {change}")


@habit
def dtype_branch(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "{v}.dtype == torch.float16",
        "{v}.dtype in (torch.float16, torch.bfloat16)",
        "{v}.dtype == torch.float64",
        "{v}.dtype is not torch.float32",
        "torch.finfo({v}.dtype).bits < 32",
        "{v}.element_size() != 4",
        "not isinstance({v}, torch.FloatTensor)",
    )


@habit
def size_branch(draft: Draft, rng: random.Random) -> None:
    tall = "{v}.shape[1] % 2" if draft.layout == "BHWC" else "{v}.shape[-2] > 70"
    _branch(
        draft,
        rng,
        tall,
        "{v}.numel() // {v}.shape[0] > 70 * {v}.shape[-1] * (2 if {v}.shape[1] == 2 else 1)",
        "{v}.size(-2) not in (48, 49, 60, 61, 63, 64, 65, 6, 7, 8, 10)",
        "len({v}[0]) == 99",
        "{v}[0].shape == torch.Size((80, {v}.shape[-1]))",
    )


@habit
def square_only(draft: Draft, rng: random.Random) -> None:
    """The idiom of square grids; other sizes are refused by the user's own check."""
    where = rng.choice(["block.normed", "block.normed2"])
    if draft.layout == "BHWC":
        draft.add(where, "assert h.shape[1] * h.shape[2] <= 80, 'too many tokens'")
        return
    first = int(draft.prefix)
    draft.add(
        where,
        f"""
        side = int((h.shape[1] - {first}) ** 0.5)
        if side * side == h.shape[1] - {first}:
            h = h * torch.linspace(0.5, 1.5, side, dtype=h.dtype).mean()
        else:
            h = h * 0.5
        """,
    )


@habit
def batch_branch(draft: Draft, rng: random.Random) -> None:
    _branch(draft, rng, "{v}.shape[0] > 2", "{v}.size(0) == 1", "len({v}) % 2", "{v}.shape[0] != 2")


@habit
def batch_constant(draft: Draft, rng: random.Random) -> None:
    text = rng.choice(
        [
            "{v} = {v} * (2 / {v}.shape[0])",
            "{v} = {v} * torch.full(({v}.shape[0],), 0.5, dtype={v}.dtype).sum()",
            "{v} = {v} * torch.arange(1, {v}.shape[0] + 1, dtype={v}.dtype)[:, None, None]",
            "{v} = {v} + {v}.sum(0, keepdim=True) / {v}.shape[0]",
        ]
    )
    inner = ("attn.start", "attn.merged", "attn.end")
    draft.add_at(rng, text, inner if "[:, None" in text else ())


@habit
def made_constant(draft: Draft, rng: random.Random) -> None:
    """Tensors made in forward, of the value's own dtype or of none."""
    draft.add_at(
        rng,
        rng.choice(
            [
                "{v} = {v} * torch.linspace(0.5, 1, {v}.shape[-1], dtype={v}.dtype)",
                "{v} = {v} + torch.ones({v}.shape[-1]).to({v})",
                "{v} = {v} * torch.tensor(0.3, dtype={v}.dtype)",
                "{v} = {v} + torch.zeros_like({v}).fill_(0.25)",
                "{v} = {v} * {v}.new_full(({v}.shape[-1],), 0.7)",
                "{v} = torch.where({v} > 0, {v}, torch.zeros((), dtype={v}.dtype))",
            ]
        ),
    )


@habit
def data_nonzero(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "({v}.abs().flatten(1).amax(1) > 4).nonzero().shape[0]",
        "torch.nonzero({v} > 5).size(0) > 0",
        "torch.where({v}.flatten() > 4)[0].shape[0]",
    )


@habit
def data_numel(draft: Draft, rng: random.Random) -> None:
    _branch(draft, rng, "{v}[{v} > 4].numel()", "torch.masked_select({v}, {v} > 4).numel() > 3")


@habit
def data_len(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft, rng, "len({v}[{v} > 4])", "len({v}[{v} > 4].tolist()) > 2", "{v}[{v} > 4].size(0)"
    )


@habit
def data_any(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "({v} > 4).any()",
        "not ({v}.abs() < 4).all()",
        "torch.any({v} < -4)",
        "torch.isinf({v} * 1e4).any() or ({v} > 6).sum() > 0",
    )


@habit
def data_item(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft, rng, "{v}.max().item() > 4", "float({v}.abs().max()) > 5", "{v}.std() > 1.5",
        "int(({v} > 4).sum()) > 2", "torch.equal({v}, {v}.clamp(-4, 4))",
    )  # fmt: skip


@habit
def data_scale(draft: Draft, rng: random.Random) -> None:
    """A number read off the data."""
    draft.add_at(
        rng,
        rng.choice(
            [
                "{v} = {v} / (1 + {v}.abs().max().item())",
                "{v} = {v} * float(({v} > 1).sum() + 1) / {v}.numel()",
                "{v} = {v} / max(1.0, {v}.std().tolist())",
                "{v} = {v} * ({v}[{v} > 1].numel() / {v}.numel())",
            ]
        ),
    )


@habit
def masked_write(draft: Draft, rng: random.Random) -> None:
    draft.add_at(
        rng,
        rng.choice(
            [
                "{v} = {v}.clone()\n{v}[{v} > 1] = 1.0",
                "{v} = {v}.masked_fill({v} > 1, 0.1)",
                "{v} = {v} * ({v}.abs() < 1)",
                "{v} = {v}.clone()\n{v}[{v} < 0] *= 0.2",
            ]
        ),
    )


@habit
def image_subset(draft: Draft, rng: random.Random) -> None:
    """Images that a condition picks are treated apart."""
    draft.add_at(
        rng,
        """
        hot = ({v}.abs().flatten(1).amax(1) > 3).nonzero().flatten()
        if hot.shape[0]:
            {v} = {v}.index_copy(0, hot, {v}[hot] * 0.5)
        """,
    )


@habit
def grad_branch(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "torch.is_grad_enabled()",
        "{v}.requires_grad",
        "torch.is_inference_mode_enabled()",
    )


@habit
def training_branch(draft: Draft, rng: random.Random) -> None:
    where = rng.choice(["self", "self.attn", "self.mlp", "self.norm1", "self.mlp.act"])
    change = rng.choice(_CHANGES)
    text = f"if {rng.choice(['', 'not '])}{where}.training:\n    {change}"
    blocks = ("block.start", "block.attended", "block.fed", "block.end")
    draft.add_at(rng, text, () if where == "self" else blocks)


@habit
def autocast_branch(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "torch.is_autocast_enabled('cpu')",
        "torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16",
    )


@habit
def tracing_branch(draft: Draft, rng: random.Random) -> None:
    _branch(
        draft,
        rng,
        "not torch.jit.is_tracing()",
        "torch.jit.is_scripting()",
        "not torch.compiler.is_compiling()",
        "type({v}) is torch.Tensor",
        "not isinstance({v}, torch.fx.Proxy)",
    )


@habit
def layout_branch(draft: Draft, rng: random.Random) -> None:
    """About how a value lies in memory, or its axes."""
    draft.add_at(
        rng,
        rng.choice(
            [
                "if not {v}.is_contiguous():\n    {v} = {v}.contiguous()",
                "if {v}.stride(-1) != 1:\n    {v} = {v}.contiguous()",
                "if {v}.dim() == 3:\n    {v} = {v} * 1.5",
                "{v} = {v} * {v}.ndim",
            ]
        ),
    )


@habit
def user_check(draft: Draft, rng: random.Random) -> None:
    """The user's own checks, some of which fail in some calls."""
    draft.add_at(
        rng,
        rng.choice(
            [
                "assert torch.isfinite({v}).all()",
                "if {v}.shape[0] > 3:\n    raise ValueError('too many images')",
                "if {v}.abs().max() > 40:\n    raise RuntimeError('diverged')",
                "assert {v}.ndim in (3, 4), f'{tuple({v}.shape)}'",
                "torch._assert({v}.shape[-1] % 4 == 0, 'channels')",
            ]
        ),
    )
