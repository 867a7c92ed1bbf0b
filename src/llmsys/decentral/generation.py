"""Generation as a job: a step is the next token of every sequence, and nothing is trained.

Sequences are in `streams` of some rows each, which are under way one behind the other, as micro-batches are; each has
keys and values of its own on every stage. What the last stage sends to the owner is tokens, chosen there: greedily, or
by adding Gumbel noise, which the owner draws, so that a step that is done again draws the same. A stage that is lost is
computed again from the prefix: from what its neighbour had sent it, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsys.decentral.planes import Rules
from llmsys.decentral.training import Update

TOKENS, POSITION, NOISE = "input_ids", "cache_position", "noise"


@dataclass(kw_only=True)
class Generation:
    """`prompts`: of each stream, of each row, its tokens; `new` tokens after each row's prompt, as far as `length`
    goes. `updates`: a job's committed steps, by number: what has been generated so far."""

    prompts: Sequence[Sequence[Sequence[int]]]
    new: int
    length: int
    vocabulary: int
    temperature: float = 0.0
    seed: int = 0
    updates: Mapping[int, Update] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts or not all(row for stream in self.prompts for row in stream):
            raise ValueError("prompts: there is none, or an empty one")
        longest = max(len(row) for stream in self.prompts for row in stream)
        if longest + self.new > self.length:
            raise ValueError(f"length={self.length}: a prompt of {longest} tokens and {self.new} new ones are more")

    @property
    def steps(self) -> int:
        """Until the longest row is done; shorter ones have gone on longer, and are cut."""
        return max(len(row) for stream in self.prompts for row in stream) + self.new - 1

    def rules(self) -> Rules:
        return Rules(micro_batches=len(self.prompts), seed=self.seed, streams=True)

    def data(self, step: int) -> list[dict[str, Tensor]]:
        """Of step `step`, from 1: each stream's tokens at position `step` - 1."""
        made = []
        for at, stream in enumerate(self.prompts):
            rows = [[self.token(at, row, step - 1)] for row in range(len(stream))]
            given = {TOKENS: torch.tensor(rows), POSITION: torch.tensor([step - 1])}
            if self.temperature:
                given[NOISE] = self.noise(step, at, len(rows))
            made.append(given)
        return made

    def token(self, stream: int, row: int, position: int) -> int:
        """Of the prompt, or generated."""
        prompt = self.prompts[stream][row]
        return prompt[position] if position < len(prompt) else self.updates[position].tokens[stream][row]

    def noise(self, step: int, stream: int, rows: int) -> Tensor:
        """[rows, V] of Gumbel's distribution, times the temperature: the largest of logits and it is a token drawn by
        softmax (logits / temperature)."""
        draw = torch.Generator().manual_seed(Rules(micro_batches=1, seed=self.seed).draw(step, stream, NOISE))
        uniform = torch.rand(rows, self.vocabulary, generator=draw).clamp(min=1e-20)
        return -torch.log(-torch.log(uniform)) * self.temperature

    def texts(self) -> list[list[list[int]]]:
        """New tokens of each row, of each stream; once all steps are done."""
        return [
            [[self.token(at, row, len(prompt) + new) for new in range(self.new)] for row, prompt in enumerate(stream)]
            for at, stream in enumerate(self.prompts)
        ]
