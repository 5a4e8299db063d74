"""Self-attention biased per head by edge weights.

The bias of head h between regions i and j is ``w[0, h] · adjacency[i, j] + w[1, h] · edge_prompt[i, j]``; tokens that
are no regions have none.

torch's fused kernels give no gradient to a bias on CPUs, and its plain fallback moves (batch, heads, tokens, tokens) arrays
through memory a dozen times. Training on CPUs therefore has a pass of its own (docs/performance.md): a few items at a time,
so that such arrays stay in the cache, and nothing of that size is kept for the backward pass, which computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

_twice: ContextVar[bool] = ContextVar("twice", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention has second derivatives, at the price of memory: for steps through gradients (second-order MAML)."""
    token = _twice.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _twice.reset(token)


@dataclass(frozen=True, kw_only=True)
class EdgeBias:
    """What attention knows about edges, over all tokens; shared by every layer of an encoder."""

    adjacency: Tensor | None
    """(batch, tokens, tokens) prompted adjacency."""
    prompt: Tensor | None
    """(1 or batch, tokens, tokens) edge prompt."""
    absent: Tensor | None
    """(batch, tokens) bool, never attended to; none where every token is present."""

    @classmethod
    def over_tokens(cls, adjacency: Tensor, prompt: Tensor | None, present: Tensor | None, *, num_extra: int) -> EdgeBias:
        """Region matrices padded for the ``num_extra`` tokens that stand before the regions."""
        pad = (num_extra, 0, num_extra, 0)
        return cls(
            adjacency=functional.pad(adjacency, pad),
            prompt=None if prompt is None else functional.pad(prompt, pad),
            absent=None if present is None else functional.pad(~present, (num_extra, 0)),
        )


NO_BIAS = EdgeBias(adjacency=None, prompt=None, absent=None)


def biased_attention(qkv: Tensor, bias: EdgeBias, weights: Tensor | None, *, dropout: float = 0.0) -> Tensor:
    """(batch, tokens, width) attended values.

    ``qkv`` is (batch, tokens, 3, heads, head width); ``weights`` (2, heads), none for unbiased attention.
    """
    if _trained_on_cpu(qkv) and (weights is not None or dropout > 0):
        per_edge = (None, None) if weights is None else (bias.adjacency, bias.prompt)
        return _InPieces.apply(qkv, weights, *per_edge, bias.absent, dropout)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)
    mask = head_bias(bias, weights)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


def attention_weights(qkv: Tensor, bias: EdgeBias, weights: Tensor | None) -> Tensor:
    """(batch, heads, tokens, tokens) what each token attends to; arguments as for :func:`biased_attention`."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)
    mask, scores = head_bias(bias, weights), q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1)


def head_bias(bias: EdgeBias, weights: Tensor | None) -> Tensor | None:
    """(batch, heads or 1, tokens, tokens) additive attention bias; none where there is nothing to add."""
    total: Tensor | None = None
    if weights is not None and bias.adjacency is not None:
        total = weights[0, None, :, None, None] * bias.adjacency[:, None]
        if bias.prompt is not None:
            total = total + weights[1, None, :, None, None] * bias.prompt[:, None]
    if bias.absent is not None:
        blocked = torch.where(bias.absent, -torch.inf, 0.0)[:, None, None, :]
        total = blocked if total is None else total + blocked
    return total


_PIECE = 1 << 18
"""Attention weights worked on at a time: 1 MiB, which caches hold."""


def _trained_on_cpu(qkv: Tensor) -> bool:
    return (
        qkv.device.type == "cpu"
        and not _twice.get()
        and qkv.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class _InPieces(torch.autograd.Function):
    """:func:`biased_attention` with gradients to everything that has one; not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (autograd's own)
        qkv: Tensor,
        weights: Tensor | None,
        adjacency: Tensor | None,
        prompt: Tensor | None,
        absent: Tensor | None,
        dropout: float,
    ) -> Tensor:
        ctx.save_for_backward(qkv, weights, adjacency, prompt, absent)
        ctx.dropout = dropout
        ctx.seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
        batch, tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(batch, tokens, heads, width)
        for part in _pieces(qkv):
            q, k, v = _heads_first(qkv[part])
            attended = _attended(q, k, _bias_of(part, weights, adjacency, prompt, absent), heads)
            if dropout > 0:
                attended.mul_(_kept(attended, dropout, ctx.seed + part.start))
            out[part] = (attended @ v).view(-1, heads, tokens, width).transpose(1, 2)
        return out.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        qkv, weights, adjacency, prompt, absent = ctx.saved_tensors
        batch, tokens, _, heads, width = qkv.shape
        for_qkv = torch.empty_like(qkv)
        for_edges = _EdgeGradients(weights, adjacency, prompt, wanted=ctx.needs_input_grad[1:4])
        outer_all = gradient.view(batch, tokens, heads, width).transpose(1, 2)
        for part in _pieces(qkv):
            q, k, v = _heads_first(qkv[part])
            attended = _attended(q, k, _bias_of(part, weights, adjacency, prompt, absent), heads)
            outer = outer_all[part].reshape(q.shape)
            inner, used = outer @ v.transpose(1, 2), attended
            if ctx.dropout > 0:
                kept = _kept(attended, ctx.dropout, ctx.seed + part.start)
                used = attended * kept
                inner.mul_(kept)
            scores = torch.ops.aten._softmax_backward_data(inner, attended, -1, attended.dtype)  # noqa: SLF001  (its name in the operator library)
            found = (scores @ k, scores.transpose(1, 2) @ q, used.transpose(1, 2) @ outer)
            for place, (values, factor) in enumerate(zip(found, (width**-0.5, width**-0.5, 1.0), strict=True)):
                torch.mul(values.view(-1, heads, tokens, width).transpose(1, 2), factor, out=for_qkv[part, :, place])
            for_edges.add(scores.view(-1, heads, tokens * tokens), part)
        return for_qkv, *for_edges.sums, None, None


class _EdgeGradients:
    """Gradients to the bias' weights and edges, summed over pieces from those to the attention scores."""

    def __init__(self, weights: Tensor | None, adjacency: Tensor | None, prompt: Tensor | None, *, wanted: Sequence[bool]) -> None:
        self.weights = weights
        self.edges = (adjacency, prompt)
        self.sums = [
            torch.zeros_like(given) if given is not None and needed else None
            for given, needed in zip((weights, adjacency, prompt), wanted, strict=True)
        ]

    def add(self, scores: Tensor, part: slice) -> None:
        """``scores`` is (items, heads, tokens²)."""
        if self.weights is None:
            return
        for row, edges in enumerate(self.edges):
            if edges is None:
                continue
            shared = len(edges) == 1
            mine = (edges if shared else edges[part]).flatten(1)
            if (total := self.sums[0]) is not None:
                total[row] += (scores @ mine[:, :, None]).sum(dim=(0, 2))
            if (total := self.sums[row + 1]) is not None:
                weighted = (self.weights[row] @ scores).view(-1, *edges.shape[1:])
                total[slice(None) if shared else part] += weighted.sum(0, keepdim=True) if shared else weighted


def _pieces(qkv: Tensor) -> list[slice]:
    batch, tokens, _, heads, _ = qkv.shape
    size = max(1, _PIECE // (heads * tokens**2))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, (items · heads, tokens, head width) each."""
    return tuple(qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(dim=0))


def _bias_of(part: slice, weights: Tensor | None, adjacency: Tensor | None, prompt: Tensor | None, absent: Tensor | None) -> Tensor | None:
    """:func:`head_bias` of some items."""
    bias = EdgeBias(
        adjacency=None if adjacency is None else adjacency[part],
        prompt=prompt if prompt is None or len(prompt) == 1 else prompt[part],
        absent=None if absent is None else absent[part],
    )
    return head_bias(bias, weights)


def _attended(q: Tensor, k: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """(items · heads, tokens, tokens) attention weights before dropout."""
    if bias is None:
        return (q @ k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5).softmax(-1)
    start = bias.expand(len(q) // heads, heads, q.shape[1], -1).flatten(0, 1)
    return torch.baddbmm(start, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)


def _kept(like: Tensor, dropout: float, seed: int) -> Tensor:
    """0 where dropped, 1 / (1 - dropout) elsewhere; the same again for the same seed. ``dropout`` is rounded to 256ths."""
    dropped = max(1, round(dropout * 256))
    # One byte decides on each weight: a generator that draws 64 bits at a time is the slowest part of training with dropout.
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    kept = words.view(torch.uint8)[: like.numel()].view(like.shape) >= dropped
    return kept.to(like.dtype).mul_(256 / (256 - dropped))
