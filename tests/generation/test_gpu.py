"""Generation on a CUDA device: the model's own choices; the same bits alone, in company, with and without graphs."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from mambalign.generation.engine import Engine
from mambalign.generation.fused import FusedDecoder
from mambalign.generation.requests import Request, Sampling
from mambalign.generation.state import LayerState
from tests.generation.conftest import FAMILIES, V, pair
from tests.generation.test_engine import GREEDY, prompt, requests_of_all_kinds
from tests.generation.test_fused import plainly
from tests.train.conftest import byte_tokenizer

pytestmark = pytest.mark.gpu
PROMPTS = (1, 2, 3, 16, 70, 255, 256, 257, 700)
KINDS = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
# Of the spread of logits. bf16 has 8 bits, and three layers round in other places than one long forward pass.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15}


@cache
def model(family: str, dtype: torch.dtype) -> Any:
    """Large enough that products of few and of many rows take different kernels."""
    sizes: dict[str, Any] = {"hidden_size": 256, "state_size": 16}
    if family == "mamba2":
        sizes |= {"num_heads": 8, "head_dim": 64}
    _, ours = pair(family, **sizes)
    with torch.no_grad():  # at this width `pair`'s weights make a chaotic model, in which nothing could be compared
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(0.3)
    ours = ours.to("cuda", dtype)
    if family == "mamba2":
        ours.set_backend("torch")  # what reads prompts; other kernels have other limits
    return ours


@cache
def engine(family: str, dtype: torch.dtype, exact: bool = True, step: str = "auto", slots: int = 0) -> Engine:
    slots = slots or (16 if family == "mamba2" else 64)  # its prompts are read one by one
    return Engine(model(family, dtype), byte_tokenizer(), slots=slots, exact=exact, step=step)


def logits_of(family: str, dtype: torch.dtype, tokens: tuple[int, ...]) -> torch.Tensor:
    """fp32 `[tokens, V]` of one forward pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(family, dtype)(torch.tensor([tokens], device="cuda")).logits
    return logits[0].float()


def many(slots: int) -> list[Request]:
    """More than twice the slots, answers of 1 to 40 tokens, prompts of 1 to 700."""
    draw = random.Random(0)
    uneven = [
        Request(
            prompt(draw.choice((1, 2, 3, 16, 70, 255, 256, 257, 700)), i), replace(GREEDY, max_new_tokens=1 + i % 40)
        )
        for i in range(2 * slots + 5)
    ]
    return [*uneven, *requests_of_all_kinds()]


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("family", "dtype"), KINDS, ids=str)
def test_answers_are_the_models_own(family: str, dtype: torch.dtype, exact: bool) -> None:
    """Every token of every answer is the likeliest of the model's forward pass over the whole text, or as likely."""
    ours = engine(family, dtype, exact)
    assert ours.decoder.step_kind[0] == "graph"
    assert isinstance(ours.decoder, FusedDecoder) == (family != "mamba2")
    lengths = (1, 2, 3, 4, 5, 63, 64, 255, 257, 500)
    found = ours.generate([Request(prompt(n), replace(GREEDY, max_new_tokens=20)) for n in lengths])
    seen = set()
    for length, (answer,) in zip(lengths, found, strict=True):
        assert len(answer.tokens) == 20
        with torch.no_grad():
            logits = (
                model(family, dtype)(torch.tensor([prompt(length) + answer.tokens], device="cuda")).logits[0].float()
            )
        rows = logits[length - 1 : -1]
        given = rows.gather(1, torch.tensor(answer.tokens, device="cuda")[:, None])[:, 0]
        assert float((rows.amax(1) - given).max()) <= TOLERANCE[dtype] * float(rows.std()), length
        seen |= set(answer.tokens)
    assert len(seen) > 20  # they are not all alike


@pytest.mark.parametrize(("family", "dtype"), KINDS, ids=str)
def test_logprobs_and_states_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    request = Request(prompt(20), replace(GREEDY, logprobs=0, max_new_tokens=12), keep_state=True)
    ((answer,),) = engine(family, dtype).generate([request])
    logits = logits_of(family, dtype, prompt(20) + answer.tokens)
    expected = logits[19:-1].log_softmax(-1).gather(1, torch.tensor(answer.tokens, device="cuda")[:, None])[:, 0]
    got = torch.tensor([item.logprob for item in answer.logprobs or ()], device="cuda")
    assert float((got - expected).abs().max()) <= TOLERANCE[dtype] * float(logits.std())
    assert answer.state is not None and answer.state.tokens == prompt(20) + answer.tokens[:-1]
    reread = Request(answer.state.tokens, replace(GREEDY, max_new_tokens=1), keep_state=True)
    ((again,),) = engine(family, dtype).generate([reread])
    assert again.state is not None
    for ours, theirs in zip(
        (*answer.state.conv, *answer.state.ssm), (*again.state.conv, *again.state.ssm), strict=True
    ):
        scale = max(1.0, float(theirs.float().abs().max()))
        assert float((ours.float() - theirs.float()).abs().max()) <= TOLERANCE[dtype] * scale


# --------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize(("family", "dtype"), KINDS, ids=str)
def test_a_row_alone_is_that_row_in_a_full_batch(family: str, dtype: torch.dtype) -> None:
    """The assumption under `exact`: what a product does to a row does not depend on its place or the other rows."""
    decoder = engine(family, dtype).decoder
    generator = torch.Generator("cuda").manual_seed(0)
    zero = decoder.read(0)

    def state() -> LayerState:
        return LayerState(
            *(torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (zero.conv, zero.ssm))
        )

    mine, others = state(), [state() for _ in range(7)]

    def stepped(row: int, count: int) -> list[torch.Tensor]:
        for place in range(count):
            decoder.load(place, mine if place == row else others[place % 7])
            decoder.tokens[place] = 7 if place == row else place % V
        with torch.inference_mode():
            logits = decoder.step(count)[row].clone()
            after = decoder.read(row)
        return [logits, *after.conv, *after.ssm]

    alone = stepped(0, 1)
    assert all(bool(x.isfinite().all()) for x in alone)
    full = decoder.capacity
    for row, count in ((0, full), (full * 37 // 64, full), (full - 1, full), (2, 3), (8, 9), (full // 2, full - 3)):
        assert all(map(torch.equal, stepped(row, count), alone)), (row, count)


@pytest.mark.parametrize(("family", "dtype"), KINDS, ids=str)
def test_an_answer_alone_is_the_answer_in_any_batch(family: str, dtype: torch.dtype) -> None:
    """Greedy and drawn, slots freed and filled, prompts read together and alone; and in another order."""
    ours = engine(family, dtype)
    requests = many(ours.slots)
    together = ours.generate(requests)
    picked = range(0, len(requests), 9)
    assert plainly([ours.generate([requests[i]])[0] for i in picked]) == plainly([together[i] for i in picked])
    order = random.Random(1).sample(range(len(requests)), len(requests) // 2)
    assert plainly(ours.generate([requests[i] for i in order])) == plainly([together[i] for i in order])
    assert ours.running == ours.waiting == 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("family", "dtype"), KINDS, ids=str)
def test_graphs_change_nothing(family: str, dtype: torch.dtype, exact: bool) -> None:
    """Row by row in the same shapes; and what the engine begins before it knows the tokens changes nothing either."""
    graph, eager = engine(family, dtype, exact), engine(family, dtype, exact, "eager")
    # Without `exact` only prompts that are read with the same others can be compared.
    requests = many(graph.slots) if exact else many(graph.slots)[:5]
    eager.ahead = False
    if not exact:  # eager steps have as many rows as answers, graphs a power of two
        eager.decoder.plans = graph.decoder.plans
    expected = plainly(eager.generate(requests))
    assert plainly(graph.generate(requests)) == expected
    assert plainly(graph.generate(requests)) == expected  # and again


def test_a_slots_last_occupant_leaves_nothing() -> None:
    ours = engine("mamba", torch.bfloat16)
    request = Request(prompt(2), GREEDY)
    fresh = ours.generate([request])
    for buffer in ours.decoder.buffers():
        buffer.fill_(torch.nan)
    assert ours.generate([request]) == fresh
    for buffer in ours.decoder.buffers():
        buffer.zero_()


def test_few_slots_and_sampling() -> None:
    """A batch of one row: its running sums must have a fixed order, too."""
    ours = engine("mamba", torch.bfloat16, slots=1)
    request = Request(prompt(9), Sampling(n=3, max_new_tokens=30, top_p=0.9, ignore_end=True))
    assert ours.generate([request]) == ours.generate([request])
