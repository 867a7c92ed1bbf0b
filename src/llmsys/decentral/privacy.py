"""What a provider can read of its inputs: attacks that find tokens again from hidden states, each with more knowledge.

    nearest    the embedding's row of the least angle: who has the model's embedding, and nothing else
    ridge      a linear decoder, fitted to hidden states of public text: who has the layers before its own as well
    mlp        the same with a hidden layer, trained

A rate is the share of tokens that are found, each token on its own: an attacker with a language model finds more. So
what is measured is a lower bound of what leaks, and a small one says nothing of privacy (activations of LLMs have been
inverted to 88 %, arXiv 2503.09022). N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTACKS = ("nearest", "ridge", "mlp")
Decoder = Callable[[Tensor], Tensor]


def noisy(hidden: Tensor, share: float, seed: int) -> Tensor:
    """[N, D] with Gaussian noise of `share` of the standard deviation that hidden states have."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(hidden.shape, generator=draw).to(hidden)
    return hidden + share * hidden.std() * noise


def nearest(embedding: Tensor) -> Decoder:
    """`embedding` [V, D]."""
    rows = F.normalize(embedding.float(), dim=-1)
    return lambda hidden: (F.normalize(hidden.float(), dim=-1) @ rows.T).argmax(dim=-1)


def ridge(hidden: Tensor, tokens: Tensor, vocabulary: int, strength: float = 1e-3) -> Decoder:
    """Fitted to [N, D] of public text, whose tokens [N] are known."""
    mean, scale = hidden.mean(dim=0), hidden.std(dim=0) + 1e-6
    x = _with_one((hidden - mean) / scale).double()
    gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(tokens, vocabulary).double())
    return lambda other: (_with_one((other - mean) / scale).double() @ weights).argmax(dim=-1)


def mlp(
    hidden: Tensor, tokens: Tensor, vocabulary: int, *, width: int = 512, epochs: int = 8, seed: int = 0
) -> Decoder:
    """Likewise, of one hidden layer."""
    draw = torch.Generator().manual_seed(seed)
    mean, scale = hidden.mean(dim=0), hidden.std(dim=0) + 1e-6
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(hidden.shape[1], width), nn.GELU(), nn.Linear(width, vocabulary))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    x = (hidden - mean) / scale
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(256):
            loss = F.cross_entropy(net(x[rows]), tokens[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def decode(other: Tensor) -> Tensor:
        found: Tensor = net((other - mean) / scale).argmax(dim=-1)
        return found

    return decode


def decoders(hidden: Tensor, tokens: Tensor, embedding: Tensor, seed: int) -> dict[str, Decoder]:
    """All attacks, with public text's hidden states and tokens."""
    vocabulary = len(embedding)
    return {
        "nearest": nearest(embedding),
        "ridge": ridge(hidden, tokens, vocabulary),
        "mlp": mlp(hidden, tokens, vocabulary, seed=seed),
    }


def recovered(decode: Decoder, hidden: Tensor, tokens: Tensor) -> float:
    """The share of tokens [N] that are found from [N, D]."""
    return float((decode(hidden) == tokens).double().mean())


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
