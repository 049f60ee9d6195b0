"""From logits to tokens: the choice of every answer by its own rules and its own random numbers.

The rules come in transformers' order (`GenerationMixin._get_logits_processor`): repetition penalty, temperature, top-k,
top-p, min-p. Answers with the same rules are computed together, row by row, so nothing depends on which they are.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mambalign.generation.requests import Sampling, TokenLogprob
from mambalign.ops.backends import send

Rules = tuple[float, int, float, float]


class Chooser(Protocol):
    """What an answer brings. random: 53 bits a draw. seen: bool `[V]`, tokens that the repetition penalty falls on."""

    sampling: Sampling
    random: random.Random
    seen: Tensor | None


class Choice:
    """Chosen tokens: int64 `[n]` on the device, and on their way to the host."""

    def __init__(self, tokens: Tensor, sound: Tensor):
        self.tokens = tokens
        self._arrived = None
        # Elsewhere nothing would say when it is there.
        self._copy = torch.where(sound, tokens, -1).to("cpu", non_blocking=tokens.is_cuda)
        if tokens.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[int]:
        """The tokens, -1 where the logits are no numbers; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


def choose(logits: Tensor, answers: Sequence[Chooser]) -> Choice:
    """A token a row of `logits [n, V]`, without waiting for the device; chosen tokens become `seen`.

    Exactly one random number is used for each row that is not greedy.
    """
    scores, device = logits, logits.device
    for row, answer in enumerate(answers):
        if answer.seen is not None:
            scores = logits.clone() if scores is logits else scores
            penalty = answer.sampling.repetition_penalty
            scores[row] = torch.where(answer.seen, torch.where(scores[row] < 0, scores[row] * penalty, scores[row] / penalty), scores[row])  # fmt: skip # noqa: E501
    groups: dict[Rules, list[int]] = defaultdict(list)
    for row, answer in enumerate(answers):
        s = answer.sampling
        if s.temperature > 0:
            groups[(s.temperature, s.top_k, s.top_p, s.min_p)].append(row)
    # Of equals the first, as argmax; the highest is a number where all are.
    highest, chosen = scores.max(-1)
    for rules, rows in groups.items():
        where = send(torch.tensor(rows), device)
        part = scores if len(rows) == len(answers) else scores.index_select(0, where)
        draws = send(torch.tensor([answers[row].random.random() for row in rows], dtype=torch.float64), device)
        if len(rows) == 1 and device.type == "cuda":  # a running sum of one row alone has no fixed order there
            part, draws = part.expand(2, -1), draws.expand(2)
        drawn = draw(warped(part, *rules), draws)[: len(rows)]
        chosen.index_copy_(0, where, drawn)
    for row, answer in enumerate(answers):
        if answer.seen is not None:
            answer.seen.index_fill_(0, chosen[row : row + 1], True)
    return Choice(chosen, highest.isfinite())


def warped(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`scores [n, V]` over the temperature, `-inf` where top-k, top-p or min-p leave a token out."""
    scores = scores / temperature
    if top_k and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, stable=True)
        # A GPU orders running sums by the number of rows: in fp32 a token at the edge could come and go with the batch.
        out = ordered.softmax(-1).cumsum(-1, dtype=torch.float64) <= 1 - top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return scores


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """int64 `[n]`: the token in whose part of the cumulative distribution `uniform [n]` of [0, 1) falls."""
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return token[:, 0].clamp(max=scores.shape[-1] - 1)


def token_logprobs(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Of `logits [V]`, the model's own distribution: that of `token`, and the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), alternatives)
