"""Why blocks stay dense: a frozen vocabulary, and what the user can do about each kind.

Every pass that refuses names one of these kinds beside its reason, a text about the one block.
`dgefx.report` shows a kind's advice once, `dgefx.coverage` asks whether dense is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

KindName = Literal[
    "class attention",
    "channel attention",
    "pooling head or learned queries",
    "cross attention",
    "foreign queries",
    "pooled or projected shortcut",
    "queries on another grid",
    "nothing to pool",
    "causal attention",
    "no query-key scores",
    "attention mask",
    "nn.MultiheadAttention in windows",
    "output does not follow queries",
    "several grids",
    "several images",
    "several views",
    "selected tokens",
    "volume or video",
    "packed patches",
    "layout unknown",
    "token order",
    "no block module",
    "shared module",
    "outer block",
    "forward signature",
    "further results",
    "not traceable",
    "keeps state",
    "moves in training",
    "draws random numbers",
    "hooks inside",
    "tokens by place",
    "other gradients",
    "decides by type",
    "follows the batch size",
    "own code fails",
    "shapes follow the data",
    "train and eval differ",
    "mixes images",
    "mixes tokens",
    "windows",
    "table beside the queries",
    "packed queries",
    "NaN or infinity",
    "verification failed",
    "nothing to save",
    "left out by filter",
    "quantised",
    "compiled",
    "other",
]


@dataclass(frozen=True)
class Reason:
    """Why one attention stays dense."""

    text: str
    kind: KindName


#: kinds for which staying dense is right, because this is no attention of the tokens of a stream's
#: grid among themselves
RIGHTLY_DENSE: frozenset[KindName] = frozenset(
    {
        "class attention",
        "channel attention",
        "pooling head or learned queries",
        "cross attention",
        "foreign queries",
        "pooled or projected shortcut",
        "queries on another grid",
        "nothing to pool",
        "causal attention",
        "no query-key scores",
    }
)
#: what the user can do next where a block stays dense
ADVICE: dict[KindName, str] = {
    "class attention": "nothing to do: a few class queries per image cost next to nothing",
    "channel attention": (
        "nothing to do: its queries are channels, so there are no tokens to ask for less often"
    ),
    "pooling head or learned queries": (
        "nothing to do for a head or learned queries; a block of the backbone has to add its "
        "attention to its stream in forward, x + attention(norm(x))"
    ),
    "cross attention": (
        "nothing to do: only attention of a stream to itself converts, this asks another one"
    ),
    "foreign queries": (
        "nothing to do: blocks whose queries are projections of their own stream convert"
    ),
    "pooled or projected shortcut": (
        "nothing to do where the block changes the grid or the width, the blocks after it convert; "
        "where it does not, add the attention to what its queries are made of"
    ),
    "queries on another grid": (
        "nothing to do: the layer sets its number of queries itself; layers that ask with every "
        "token of their stream convert"
    ),
    "nothing to pool": (
        "nothing to do at this image size; if the model is to run on larger images, pass those as "
        "example_inputs"
    ),
    "causal attention": (
        "nothing to do where the order of the tokens matters; attention among all tokens of an "
        "image is called with is_causal=False"
    ),
    "no query-key scores": (
        "nothing to do: its cost does not grow with queries times keys; blocks with softmax "
        "attention in the same model convert"
    ),
    "attention mask": (
        "call the model without a mask, or write the attention with "
        "torch.nn.functional.scaled_dot_product_attention, whose attn_mask converts"
    ),
    "nn.MultiheadAttention in windows": (
        "write the attention in the windows with "
        "torch.nn.functional.scaled_dot_product_attention between nn.Linear layers"
    ),
    "output does not follow queries": (
        "nothing to do if it attends over channels or heads, or samples around points that are "
        "not its tokens; else keep the tokens of the queries on an axis of their own, the same "
        "from the projection to the output"
    ),
    "several grids": (
        "build the model with one feature level if it allows that (num_feature_levels=1 in "
        "transformers); a stream of several grids one after another is not supported"
    ),
    "several images": (
        "nothing to do where the images have to attend to each other (trackers join template and "
        "search image); else run every image by itself, as one of the batch"
    ),
    "several views": (
        "convert the encoder alone, with one view or image: model.encoder = "
        "dgefx.convert(model.encoder, gamma, example_inputs=view); where its blocks and patch "
        "embedding belong to the whole model, put them in a module of their own first"
    ),
    "selected tokens": (
        "switch off what drops, selects, merges or shuffles tokens before the block "
        "(patch_drop_rate=0, no masking, a keep rate of 1), or what does so in eval mode, which "
        "convert() looks at; nothing to do for proposals that a detector's decoder asks with"
    ),
    "volume or video": (
        "blocks of tokens over space and time stay dense; a model that attends within single "
        "frames converts as a model of images of (B, C, H, W), with the frames in the batch"
    ),
    "packed patches": (
        "pass images of one size as (B, C, H, W) in example_inputs where the model takes these "
        "too; else the grid is known by data alone (patches of images of any sizes, packed or "
        "padded as in NaViT), and the blocks stay dense"
    ),
    "layout unknown": (
        "convert the model together with its patch embedding (a convolution, unfold, or view and "
        "linear, on images of (B, C, H, W)) and pass images as example_inputs, not tokens"
    ),
    "token order": (
        "hand the stream from block to block as (B, prefix + H * W, C), prefix tokens in front and "
        "every token of the grid behind them, or as (B, H, W, C) or (B, C, H, W) in raster order; "
        "windows belong inside the block"
    ),
    "no block module": (
        "put the attention together with its residual add into an nn.Module of its own that takes "
        "the stream as a tensor and returns it updated, in the same shape"
    ),
    "shared module": "give every use a module of its own; the modules may share their parameters",
    "outer block": (
        "nothing to do for the inner block; the outer one's own attention converts when the inner "
        "block is moved out of its module"
    ),
    "forward signature": (
        "define forward in the block's class, with named arguments: not *args, and not assigned "
        "to the instance (block.forward = ...)"
    ),
    "further results": (
        "switch off what the block returns beside its stream: attention maps "
        "(output_attentions=False, need_weights=False), caches (use_cache=False)"
    ),
    "not traceable": (
        "rewrite the operation that the reason names (no .item() or branch on tensor values, no "
        "in-place change of parameters, buffers or constants; sizes as a tuple, torch.rand((n, 1)) "
        "instead of torch.rand(n, 1)) or mark its function with torch.fx.wrap; else report it with "
        "the block's code"
    ),
    "keeps state": (
        "let forward set no attribute (switch off what saves maps or counts calls); a forward hook "
        "on the block can note down what is needed"
    ),
    "moves in training": (
        "train it until it has settled, or take it out "
        "(torch.nn.utils.parametrize.remove_parametrizations), and convert then"
    ),
    "draws random numbers": (
        "let it draw none but for dropout and drop path, or in a module of its own that works on "
        "every token alike"
    ),
    "hooks inside": (
        "hook the block itself, or layers that are called on all tokens (norms, an MLP); or write "
        "what the hooks do into forward"
    ),
    "tokens by place": (
        "add positions by a table of one entry per token, (1, N, C) or (N, N), and let nothing "
        "else tell tokens apart by an index or slice"
    ),
    "other gradients": (
        "put the autograd function into a module of its own that works on every token alike: it "
        "stays a call. Stop gradients around the block, not in it"
    ),
    "decides by type": (
        "convert and run the model in float32 (model.float()), or put what "
        "depends on the type into a module of its own that works on every token alike: it stays a "
        "call"
    ),
    "follows the batch size": (
        "take the batch size from x.shape or a -1 in view(), without int(), range() or a loop over "
        "the images"
    ),
    "own code fails": (
        "mend the line that the reason names: the block has to run alone, in eval and in train "
        "mode, on random tokens of the example's shape; filter_fn=lambda module, name: ... leaves "
        "it out"
    ),
    "shapes follow the data": (
        "switch off what selects, prunes or merges tokens by their values in the block"
    ),
    "train and eval differ": (
        "let forward compute the same in both modes but for dropout, drop path and batch norm, "
        "from the same constants and windows"
    ),
    "mixes images": (
        "let the block treat every image by itself; statistics over a batch belong into a layer "
        "that keeps them, as nn.BatchNorm2d does in eval mode"
    ),
    "mixes tokens": (
        "move the operation out of the block, or let it take and give back the whole grid as "
        "(B, tokens, C), (B, H, W, C) or (B, C, H, W), with images alone on the first axis"
    ),
    "windows": (
        "cut the grid into windows once per block, by view and permute (padding and roll are "
        "followed), with images first, and let nothing but attention mix tokens inside them"
    ),
    "table beside the queries": (
        "give the table one entry per query on the axis of the queries, as (heads, N, N) for "
        "scores of (B, heads, N, N), and images an axis of their own"
    ),
    "packed queries": (
        'use DGEConfig(budget="per_image"), whose queries are not packed; attention that is '
        "written out converts packed once the model's fused attention is switched on"
    ),
    "NaN or infinity": (
        "find what yields NaN or infinity in the dense block in float32 on random tokens "
        "(a division, exp or log without a bound, a mask over all keys of a query)"
    ),
    "verification failed": (
        "please report it with the block's code and this message; the block stays dense, so the "
        "model's output is right"
    ),
    "nothing to save": (
        "nothing to do at this image size: too few queries to make up for pooling; larger images "
        "or coarser DGEConfig(granularities=...) may save some"
    ),
    "left out by filter": "nothing to do: filter_fn asked for it",
    "quantised": "convert the model first and quantise the converted one",
    "compiled": (
        "put block._orig_mod back in the block's place before convert(); compile it afterwards, "
        "or use block.compile(), which wraps nothing"
    ),
    "other": (
        "please report it with the block's code and this message; filter_fn=lambda module, name: "
        "... leaves a block out"
    ),
}


def advice_lines(kinds: Iterable[str]) -> list[str]:
    """ "kind: advice", once per kind, in the order in which kinds come first."""
    known: dict[str, str] = dict(ADVICE.items())
    return [f"{kind}: {known[kind]}" for kind in dict.fromkeys(kinds) if kind in known]
