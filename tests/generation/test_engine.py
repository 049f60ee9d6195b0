"""The engine: transformers' greedy generate() token by token, and answers that depend on nothing but their request."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.generation import logits_process

from mambalign.generation import stepper
from mambalign.generation.decode import Decoder
from mambalign.generation.engine import Engine, end_ids
from mambalign.generation.requests import Completion, Delta, Request, Sampling
from mambalign.generation.sampling import draw, warped
from mambalign.generation.state import LayerState, State
from mambalign.generation.stepper import Plan, Stepper, select_step
from mambalign.generation.text import TextStream
from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import load_model
from mambalign.ops.native import COMPILERS
from mambalign.recipe import UserError
from tests.generation.conftest import FAMILIES, FUSED, V, pair
from tests.train.conftest import byte_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=10, ignore_end=True)
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 100, 500)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2, V, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist())


def greedy(plain: Any, ids: tuple[int, ...], count: int = 10) -> tuple[int, ...]:
    """transformers' own."""
    row = torch.tensor([ids])
    out = plain.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return tuple(out[0, len(ids) :].tolist())


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="no C++ compiler here for the native step"
)
NATIVE = [pytest.param((family, "native"), marks=needs_compiler, id=f"{family}-native") for family in FUSED]
EVERY_STEP = [*((family, "eager") for family in FAMILIES), *NATIVE]


# The last has sizes of whole vectors, where PyTorch's step takes other functions (see `Decoder.steady`).
@pytest.fixture(scope="module", params=[*EVERY_STEP, ("mamba", "eager", {"hidden_size": 32})], ids=str)
def engine(request: pytest.FixtureRequest) -> Engine:
    family, step, *changes = request.param
    return Engine(pair(family, **dict(*changes))[1], byte_tokenizer(), slots=4, prefill_tokens=96, step=step)


@pytest.fixture(scope="module")
def mamba() -> Engine:
    return Engine(pair("mamba")[1], byte_tokenizer(), slots=4, prefill_tokens=96)


def only(found: list[list[Completion]]) -> Completion:
    ((completion,),) = found
    return completion


# ---------------------------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize("stepped", EVERY_STEP, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_greedy_is_transformers_generate_for_prompts_of_many_lengths(stepped: tuple[str, str], exact: bool) -> None:
    """In one batch with more requests than slots, the longest prompts in several parts."""
    family, step = stepped
    plain, ours = pair(family)
    engine = Engine(ours, None, slots=4, prefill_tokens=96, exact=exact, step=step)
    found = engine.generate([Request(prompt(length), GREEDY) for length in LENGTHS])
    for length, answers in zip(LENGTHS, found, strict=True):
        assert only([answers]).tokens == greedy(plain, prompt(length)), length
    assert len({token for answers in found for token in answers[0].tokens}) > 20  # they are not all alike


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("mamba", {"expand": 3, "time_step_rank": 7, "state_size": 1, "layer_norm_epsilon": 1e-3}),
    ("mamba", {"hidden_act": "gelu", "tie_word_embeddings": False, "residual_in_fp32": False}),
    ("falcon_mamba", {"mixer_rms_eps": 0.1, "use_bias": True}),
    ("falcon_mamba", {"tie_word_embeddings": False}),
    ("mamba2", {"n_groups": 1, "use_bias": True}),
    ("mamba2", {"n_groups": 6, "time_step_limit": (0.005, 0.5), "tie_word_embeddings": True}),
    ("mamba2", {"use_conv_bias": False, "conv_kernel": 3}),
]


@pytest.mark.parametrize("step", ["eager", "auto"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_every_variant_of_a_config_is_the_models_own(family: str, changes: dict[str, Any], step: str) -> None:
    """Against the whole text read again for each token; transformers' step of Mamba-2 ignores the limits."""
    _, ours = pair(family, **changes)
    engine = Engine(ours, None, slots=2, step=step)
    for length in (1, 2, 9):
        answer = only(engine.generate([Request(prompt(length), GREEDY)])).tokens
        logits = ours(torch.tensor([prompt(length) + answer])).logits[0]
        assert answer == tuple(logits[length - 1 : -1].argmax(-1).tolist()), length


@pytest.mark.parametrize("gated_norm", ["norm_first", "none"])
def test_mamba2_with_the_original_layouts_norms(gated_norm: str) -> None:
    _, ours = pair("mamba2")
    config = transformers.Mamba2Config(**ours.config.to_dict() | {"gated_norm": gated_norm})
    model = FAMILIES["mamba2"](config).eval()
    model.load_state_dict(ours.state_dict(), strict=False)
    answer = only(Engine(model, None, slots=2).generate([Request(prompt(9), GREEDY)])).tokens
    logits = model(torch.tensor([prompt(9) + answer])).logits[0]
    assert answer == tuple(logits[8:-1].argmax(-1).tolist())


@pytest.mark.parametrize("step", ["eager", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_of_other_precisions_is_the_models(family: str, dtype: torch.dtype, step: str) -> None:
    _, ours = pair(family)
    engine = Engine(ours.to(dtype), None, slots=2, step=step)
    answer = only(engine.generate([Request(prompt(20), replace(GREEDY, logprobs=0))]))
    logprobs = ours(torch.tensor([prompt(20) + answer.tokens])).logits[0].detach().double().log_softmax(-1)
    got = torch.tensor([item.logprob for item in answer.logprobs or ()], dtype=torch.float64)
    expected = logprobs[19:-1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    # bf16 has 8 bits, and here each of 3 layers rounds in other places than the model does.
    assert float((got - expected).abs().max()) < (1e-10 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("step", ["eager", "auto"])
def test_adapters_count(step: str) -> None:
    from mambalign.models.adapters import AdapterOptions, attach

    _, ours = pair("mamba")
    before = only(Engine(ours, None, slots=1, step=step).generate([Request(prompt(9), GREEDY)])).tokens
    attach(ours, AdapterOptions(r=2, targets=("in_proj", "x_proj", "dt_proj", "out_proj")), seed=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    answer = only(Engine(ours, None, slots=1, step=step).generate([Request(prompt(9), GREEDY)])).tokens
    logits = ours.eval()(torch.tensor([prompt(9) + answer])).logits[0]
    assert answer == tuple(logits[8:-1].argmax(-1).tolist()) and answer != before


# ------------------------------------------------------------------------------------------- nothing but the request


def requests_of_all_kinds() -> list[Request]:
    kinds = [
        GREEDY,
        Sampling(max_new_tokens=7, ignore_end=True, logprobs=2),
        Sampling(n=3, max_new_tokens=12, temperature=1.5, top_p=0.9, top_k=50, min_p=0.01, ignore_end=True),
        Sampling(n=2, max_new_tokens=9, temperature=0.7, repetition_penalty=1.3, logprobs=0, ignore_end=True),
        Sampling(max_new_tokens=1, temperature=0, repetition_penalty=2.0, ignore_end=True),
    ]
    return [Request(prompt(length, 1), kinds[i % 5]) for i, length in enumerate((5, 64, 1, 300, 17, 3, 97, 2, 130, 33))]


def test_an_answer_alone_is_the_answer_in_any_batch_to_the_last_bit(engine: Engine) -> None:
    """Tokens and log-probabilities; batches of every size and composition, with slots freed and filled between."""
    requests = requests_of_all_kinds()
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    shuffler = random.Random(0)
    for size in (2, 3, 5, 7):
        order = shuffler.sample(range(len(requests)), size)
        assert engine.generate([requests[i] for i in order]) == [alone[i] for i in order]
    assert len({answer.tokens for answers in alone for answer in answers}) == sum(r.sampling.n for r in requests)


def test_rows_of_a_step_are_the_same_bits_in_every_batch(engine: Engine) -> None:
    """Logits and states, which say more than tokens; for every number of rows and every place in it."""
    decoder = engine.decoder
    tokens = prompt(8)
    states = []
    for length in range(8):
        row: list[Delta] = []
        engine.add(Request(prompt(length + 1), replace(GREEDY, max_new_tokens=1), keep_state=True), row.append)
        engine.step()
        states.append(row[-1].state)

    def stepped(rows: list[int]) -> list[tuple[torch.Tensor, LayerState]]:
        for place, row in enumerate(rows):
            assert states[row] is not None
            decoder.load(place, states[row])
            decoder.tokens[place] = tokens[row]
        logits = decoder.step(len(rows)).clone()
        return [(logits[place], decoder.read(place)) for place in range(len(rows))]

    alone = [stepped([row])[0] for row in range(8)]
    for rows in ([3, 0], [1, 2, 3], [7, 6, 5, 4], [0, 1, 2, 3, 4], [*range(8)], [*range(8)][::-1]):
        for row, (logits, state) in zip(rows, stepped(rows), strict=True):
            expected, after = alone[row]
            assert torch.equal(logits, expected), (rows, row)
            assert all(map(torch.equal, (*state.conv, *state.ssm), (*after.conv, *after.ssm)))


def test_plans_leave_out_what_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose products of fewer than 4 rows round otherwise is noticed, and given 4."""
    real = torch.addmm

    def rough(a: Any, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        real(a, x, w, out=out)
        return out if x.shape[0] >= 4 else out.mul_(1 + 2**-20)

    monkeypatch.setattr(torch, "addmm", rough)
    _, ours = pair("mamba", hidden_size=32)
    plans = Decoder(ours, 8).plans
    assert all(plan.width >= 4 for plan in plans.values()) and 8 in plans
    monkeypatch.setattr(torch, "addmm", lambda a, x, w, out: real(a, x, w, out=out)[0].add_(1e-3))
    assert Decoder(ours, 8).plans == {1: Plan(1, 1)}  # rows of one batch part: one by one


def test_plans_leave_out_what_changes_bits_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows with one token in a hundred only, where there are fewer than 4 of them: one trial would not notice."""
    real = torch.index_select

    def rough(x: torch.Tensor, dim: int, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        real(x, dim, index, out=out)
        return out if len(index) >= 4 else out.mul_(torch.where(index == 3, 1 + 2**-7, 1)[:, None])

    ours = pair("mamba")[1].to(torch.bfloat16)
    monkeypatch.setitem(stepper.DRAWS, "cpu", (1, 1, 0))
    usual = Decoder(ours, 8).plans
    monkeypatch.setattr(torch, "index_select", rough)
    assert Decoder(ours, 8).plans == usual
    monkeypatch.setitem(stepper.DRAWS, "cpu", (1, 4, 2**20))
    assert all(plan.width >= 4 for plan in Decoder(ours, 8).plans.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_16_bits_hides_no_sum_in_another_order(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has them: the sum in a norm of fewer than 4 rows differs in the last bit, which results rarely show."""
    real = torch.linalg.vector_norm

    def other_order(x: torch.Tensor, *rest: Any, out: torch.Tensor) -> torch.Tensor:
        real(x, *rest, out=out)
        return out if len(x) >= 4 else out.copy_(torch.nextafter(out, torch.full_like(out, torch.inf)))

    monkeypatch.setattr(torch.linalg, "vector_norm", other_order)
    _, ours = pair(family)
    assert all(plan.width >= 4 for plan in Decoder(ours.to(torch.bfloat16), 8).plans.values())


def test_a_slots_last_occupant_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt(2), GREEDY)
    fresh = engine.generate([request])
    for buffer in engine.decoder.buffers():
        buffer.fill_(torch.nan)
    assert engine.generate([request]) == fresh
    # That this can fail: a load that forgets the window, or the state of the recurrence.
    for forgotten in ("conv", "ssm"):
        for buffer in engine.decoder.buffers():
            buffer.fill_(3)
        kind = type(engine.decoder)
        real = kind.load

        def leaky(self: Stepper, row: int, state: LayerState, forgotten: str = forgotten, real: Any = real) -> None:
            before = self.read(row)
            real(self, row, LayerState(**{**vars(before), forgotten: getattr(state, forgotten)} | {
                name: getattr(before if name == forgotten else state, name) for name in ("conv", "ssm")}))  # fmt: skip

        with monkeypatch.context() as patched:
            patched.setattr(kind, "load", leaky)
            assert engine.generate([request]) != fresh


def test_seeds_decide(mamba: Engine) -> None:
    request = Request(prompt(9), Sampling(n=3, max_new_tokens=8, ignore_end=True))
    first, again = mamba.generate([request, request])
    assert first == again and len({answer.tokens for answer in first}) == 3
    other = Request(request.prompt, replace(request.sampling, seed=7))
    assert mamba.generate([other])[0] != first
    # An answer is decided by its own number: asking for fewer gives the first of them.
    assert mamba.generate([Request(request.prompt, replace(request.sampling, n=2))])[0] == first[:2]
    state = torch.get_rng_state()
    mamba.generate([request])
    assert torch.equal(state, torch.get_rng_state()), "the caller's randomness is its own"


def test_a_long_prompt_does_not_hold_up_running_answers(mamba: Engine) -> None:
    arrived: list[Delta] = []
    mamba.add(Request(prompt(4), replace(GREEDY, max_new_tokens=40)), arrived.append)
    mamba.step()
    long: list[Delta] = []
    mamba.add(Request(prompt(960), replace(GREEDY, max_new_tokens=1)), long.append)
    lengths = []
    while not long:
        mamba.step()
        lengths.append(sum(len(delta.tokens) for delta in arrived))
    assert len(lengths) == 10 and all(b >= a for a, b in pairwise(lengths))
    running = mamba._running[0]
    assert running is not None and len(running.tokens) == 12  # one a step, however much was read beside it
    while mamba.step():
        pass


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_reading_in_parts_is_reading_at_once(size: int) -> None:
    for family in FAMILIES:
        plain, ours = pair(family)
        got = Engine(ours, None, slots=1, prefill_tokens=size).generate([Request(prompt(65), GREEDY)])
        assert only(got).tokens == greedy(plain, prompt(65))


# --------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "rules", [(0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (0.9, 20, 0.9, 0.05)]
)
def test_rules_are_transformers_own(rules: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = rules
    logits = 3 * torch.randn(6, 40)
    logits[0, 3:9] = logits[0, 3]  # ties
    ids = torch.zeros(6, 1, dtype=torch.long)
    steps: list[Any] = [logits_process.TemperatureLogitsWarper(temperature)]
    steps += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    expected = logits
    for step in steps:
        expected = step(ids, expected)
    assert torch.equal(warped(logits, *rules), expected)


def test_draws_have_the_distribution_and_never_what_is_left_out() -> None:
    scores = torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf])
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    tokens = draw(scores.expand(10000, 5), uniform)
    shares = tokens.bincount(minlength=5) / 10000
    assert float((shares - scores.softmax(-1)).abs().max()) < 2e-4
    ends = draw(scores.expand(2, 5), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


def test_repetition_penalty_is_transformers_own(mamba: Engine) -> None:
    """Over prompt and answer, those that a continued state covers included."""
    plain, _ = pair("mamba")
    row = torch.tensor([prompt(30)])
    options: dict[str, Any] = dict(max_new_tokens=15, do_sample=False, repetition_penalty=1.8, eos_token_id=None)
    expected = tuple(plain.generate(row, attention_mask=torch.ones_like(row), **options)[0, 30:].tolist())
    sampling = replace(GREEDY, max_new_tokens=15, repetition_penalty=1.8)
    assert only(mamba.generate([Request(prompt(30), sampling)])).tokens == expected
    assert expected != greedy(plain, prompt(30), 15)
    first = only(mamba.generate([Request(prompt(30)[:20], replace(GREEDY, max_new_tokens=1), keep_state=True)]))
    rest = Request(prompt(30)[20:], sampling, first.state)
    assert only(mamba.generate([rest])).tokens == expected


def test_logprobs_are_the_models_own_before_any_rule(mamba: Engine) -> None:
    _, ours = pair("mamba")
    sampling = Sampling(max_new_tokens=6, temperature=0.5, top_k=3, logprobs=4, ignore_end=True)
    answer = only(mamba.generate([Request(prompt(9), sampling)]))
    logprobs = ours(torch.tensor([prompt(9) + answer.tokens])).logits[0, 8:-1].detach().log_softmax(-1)
    assert answer.logprobs is not None and len(answer.logprobs) == 6
    for row, token, item in zip(logprobs, answer.tokens, answer.logprobs, strict=True):
        assert item.token_id == token and item.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in item.top] == row.topk(4).indices.tolist()
        assert [p for _, p in item.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- ends and text


def test_ends_and_lengths(mamba: Engine) -> None:
    assert end_ids(mamba.model, mamba.tokenizer) == {1, mamba.tokenizer.eos_token_id}
    free = only(mamba.generate([Request(prompt(9), replace(GREEDY, max_new_tokens=30))]))
    assert len(free.tokens) == 30 and free.finish_reason == "length"
    stop = free.tokens[4]
    at = free.tokens.index(stop)
    ends, mamba.ends = mamba.ends, frozenset({stop})
    try:
        ended = only(mamba.generate([Request(prompt(9), replace(GREEDY, max_new_tokens=30, ignore_end=False))]))
        exactly = only(mamba.generate([Request(prompt(9), replace(GREEDY, max_new_tokens=at + 1, ignore_end=False))]))
    finally:
        mamba.ends = ends
    assert ended.tokens == free.tokens[:at] and ended.finish_reason == "stop"
    assert exactly == ended  # the end came as the last token that was allowed


def streamed(engine: Engine, request: Request) -> list[Delta]:
    deltas: list[Delta] = []
    engine.add(request, deltas.append)
    while engine.step():
        pass
    return deltas


def test_deltas_add_up_to_the_answer(mamba: Engine) -> None:
    request = Request(prompt(9), Sampling(max_new_tokens=40, temperature=2.0, logprobs=1, ignore_end=True))
    whole, deltas = only(mamba.generate([request])), streamed(mamba, request)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert whole.text == mamba.tokenizer.decode(list(whole.tokens), skip_special_tokens=True)
    assert tuple(token for delta in deltas for token in delta.tokens) == whole.tokens
    assert tuple(item for delta in deltas for item in delta.logprobs or ()) == whole.logprobs
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"


TEXTS = [
    "plain words, and more",
    "naïve café — ünïcödé",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "a\ufffdb\ufffd",
    " leading",
    "x" * 99,
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_by_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in (len(tokens), len(tokens) - 1, len(tokens) // 2):  # also within a character
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens[:cut]]
        if "\ufffd" not in text:
            assert all("\ufffd" not in piece for piece in pieces)
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens[:cut], skip_special_tokens=True)


def test_random_bytes_and_special_tokens_decode_as_a_whole() -> None:
    tokenizer, shuffler = byte_tokenizer(), random.Random(0)
    for _ in range(60):
        tokens = [shuffler.randrange(len(tokenizer)) for _ in range(80)]
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["e t", "ne"], "o"),
        ("ababac", ["abac"], "ab"),
        ("never", ["rx", "verb"], "never"),
        ("ends in par", ["part"], "ends in par"),
        ("日本語。終", ["。"], "日本語"),
        ("stop", ["stop"], ""),
    ],
)
def test_stop_strings_across_tokens(text: str, stop: list[str], expected: str) -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stop)
    got = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        got += stream.push(token)
        assert expected.startswith(got)  # nothing was let out that belongs to a stop string
        if stream.stopped:
            break
    assert got + ("" if stream.stopped else stream.finish()) == expected
    assert stream.stopped == (expected != text)


def test_an_answer_ends_before_its_stop_string(mamba: Engine) -> None:
    sampling = Sampling(max_new_tokens=60, temperature=2.0, ignore_end=True)
    free = only(mamba.generate([Request(prompt(9), sampling)]))
    stop = free.text[20:23]
    request = Request(prompt(9), replace(sampling, stop=(stop, "never there")))
    stopped = only(mamba.generate([request]))
    assert stopped.text == free.text[: free.text.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.tokens) < 60
    assert "".join(delta.text for delta in streamed(mamba, request)) == stopped.text


# ------------------------------------------------------------------------------------------- cancelling and refusing


def test_cancelling_frees_slots_and_disturbs_nobody(mamba: Engine) -> None:
    kept = Request(prompt(9), replace(GREEDY, max_new_tokens=20))
    expected = only(mamba.generate([kept]))
    got: list[Delta] = []
    dropped: list[Delta] = []
    tickets = [mamba.add(Request(prompt(3), Sampling(n=9, max_new_tokens=50)), dropped.append)]
    for _ in range(3):
        mamba.step()
    tickets.append(mamba.add(Request(prompt(700), GREEDY), dropped.append))
    mamba.add(kept, got.append)
    mamba.step()
    assert mamba.running == 4 and mamba.waiting == 9 - 4 + 2
    for ticket in (*tickets, tickets[0], 12345):
        mamba.cancel(ticket)
    count = len(dropped)
    assert mamba.running + mamba.waiting == 1
    while mamba.step():
        pass
    assert len(dropped) == count
    assert tuple(token for delta in got for token in delta.tokens) == expected.tokens


def test_a_sink_may_cancel_and_add(mamba: Engine) -> None:
    seen: list[Delta] = []
    more: list[Delta] = []
    tickets: list[int] = []

    def sink(delta: Delta) -> None:
        seen.append(delta)
        for ticket in tickets:
            mamba.cancel(ticket)
        if len(seen) == 1:
            mamba.add(Request(prompt(4), GREEDY), more.append)

    tickets.append(mamba.add(Request(prompt(3), replace(GREEDY, n=3)), sink))
    while mamba.step():
        pass
    assert more[-1].finish_reason == "length" and mamba.running == mamba.waiting == 0
    assert all(delta.finish_reason is None for delta in seen)


def test_a_sink_that_raises_costs_no_one_else_a_token(engine: Engine) -> None:
    greedy = replace(GREEDY, max_new_tokens=12, ignore_end=True)
    requests = [Request(prompt(n), greedy, keep_state=True) for n in (5, 7)]
    expected = [only(engine.generate([request])) for request in requests]
    got: list[list[Delta]] = [[], []]

    def sink(delta: Delta) -> None:
        raise RuntimeError("a sink's own")

    ticket = engine.add(Request(prompt(9), replace(greedy, max_new_tokens=3)), sink)
    for request, deltas in zip(requests, got, strict=True):
        engine.add(request, deltas.append)
    with pytest.raises(RuntimeError, match="a sink's own"):
        while engine.step():
            pass
    engine.cancel(ticket)
    while engine.step():
        pass
    for deltas, completion in zip(got, expected, strict=True):
        state, whole = deltas[-1].state, completion.state
        assert tuple(token for delta in deltas for token in delta.tokens) == completion.tokens
        assert state is not None and whole is not None and state.tokens == whole.tokens
        assert all(map(torch.equal, (*state.conv, *state.ssm), (*whole.conv, *whole.ssm)))


def test_what_is_refused(mamba: Engine) -> None:
    with pytest.raises(UserError, match=f"token {V} is none of the model's {V}"):
        mamba.add(Request((3, V), GREEDY), print)
    state = only(mamba.generate([Request(prompt(3), GREEDY, keep_state=True)])).state
    other = Engine(pair("mamba", seed=1)[1], None, slots=1)
    with pytest.raises(UserError, match="made by another model"):
        other.add(Request(prompt(3), GREEDY, state), print)
    with pytest.raises(UserError, match="need a tokenizer"):
        other.add(Request(prompt(3), replace(GREEDY, stop=("x",))), print)
    with pytest.raises(UserError, match="slots"):
        Engine(other.model, None, slots=-1)
    broken = pair("mamba")[1]
    broken.backbone.norm_f.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="logits that are no numbers"):
        Engine(broken, None, slots=1).generate([Request(prompt(3), GREEDY)])
    assert mamba.running == mamba.waiting == 0


def test_reading_that_fails_leaves_nothing(mamba: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompts read before it in the same step, whose first tokens are chosen, neither."""
    request = Request(prompt(3), replace(GREEDY, n=2, max_new_tokens=1))
    expected = mamba.generate([request])
    real, calls = mamba.model.backbone.forward, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(mamba.model.backbone, "forward", failing)
        with pytest.raises(MemoryError):
            mamba.generate([request, request])
    assert mamba.running == mamba.waiting == 0 and mamba.step() == 0
    assert mamba.generate([request]) == expected


def test_generate_that_fails_leaves_nothing(mamba: Engine) -> None:
    calls = []

    def progress(count: int) -> None:
        calls.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mamba.generate([Request(prompt(n), GREEDY) for n in (3, 4, 5, 6, 7, 8)], progress)
    assert calls == [1] and mamba.running == mamba.waiting == 0


# ---------------------------------------------------------------------------------------------------------- states


def test_a_state_is_continued_forked_and_kept_on_disk(engine: Engine, tmp_path: Path) -> None:
    text = prompt(80)
    whole = only(engine.generate([Request(text, replace(GREEDY, max_new_tokens=20))])).tokens
    first = only(engine.generate([Request(text, replace(GREEDY, max_new_tokens=8), keep_state=True)]))
    assert first.state is not None and first.state.tokens == text + whole[:7]  # the last one was not read yet
    first.state.save(tmp_path / "s.safetensors")
    loaded = State.load(tmp_path / "s.safetensors", engine.fingerprint)
    assert all(map(torch.equal, (*loaded.conv, *loaded.ssm), (*first.state.conv, *first.state.ssm)))
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:  # a tensor a layer, as ever
        assert {name: list(file.get_slice(name).get_shape()) for name in file.keys() if name != "tokens"} == {  # noqa: SIM118
            f"{kind}.{i}": list(part[i].shape)
            for kind, part in (("conv", loaded.conv), ("ssm", loaded.ssm)) for i in range(len(part))
        }  # fmt: skip
    assert loaded.tokens == first.state.tokens
    rest = Request(whole[7:8], replace(GREEDY, n=1, max_new_tokens=12), loaded)
    other = Request((5, 6), rest.sampling, loaded)
    continued, forked, again = engine.generate([rest, other, rest])
    assert continued[0].tokens == whole[8:] == again[0].tokens
    reread = only(engine.generate([Request((*loaded.tokens, 5, 6), rest.sampling)]))
    assert forked[0].tokens == reread.tokens
    with pytest.raises(UserError, match="another precision"):
        State.load(tmp_path / "s.safetensors", "x")
    for wrong, says in (("none", "there is no saved state"), ("junk", "damaged or no saved state")):
        (tmp_path / "junk").write_bytes(b"junk" * 9)
        with pytest.raises(UserError, match=says):
            State.load(tmp_path / wrong, engine.fingerprint)


def test_states_behind_every_kind_of_ending_equal_a_rereading(engine: Engine) -> None:
    for count in (1, 2, 9):
        answer = only(engine.generate([Request(prompt(40), replace(GREEDY, max_new_tokens=count), keep_state=True)]))
        assert answer.state is not None
        reread = only(
            engine.generate([Request(answer.state.tokens, replace(GREEDY, max_new_tokens=1), keep_state=True)])
        )
        assert reread.state is not None and reread.state.tokens == answer.state.tokens
        for a, b in zip((*answer.state.conv, *answer.state.ssm), (*reread.state.conv, *reread.state.ssm), strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def test_states_keep_the_weights_precision(tmp_path: Path) -> None:
    _, ours = pair("mamba")
    engine = Engine(ours.to(torch.bfloat16), None, slots=2)
    state = only(engine.generate([Request(prompt(9), GREEDY, keep_state=True)])).state
    assert state is not None
    assert {t.dtype for t in state.conv} == {torch.bfloat16} and {t.dtype for t in state.ssm} == {torch.float32}
    state.save(tmp_path / "s.safetensors")
    loaded = State.load(tmp_path / "s.safetensors", engine.fingerprint)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(loaded.conv, state.conv, strict=True))


# ------------------------------------------------------------------------------------------------------- the GPU's way


def test_how_a_step_runs_is_chosen_by_device() -> None:
    assert select_step("auto", torch.device("cuda", 0))[0] == "graph"
    assert select_step("auto", torch.device("cpu"))[0] == "eager"
    assert select_step("eager", torch.device("cuda", 0)) == ("eager", "asked for by name")
    for step, device, says in (
        ("graph", "cpu", "needs a cuda device"),
        ("native", "cuda", "needs a cpu device"),
        ("fast", "cpu", "must be auto"),
    ):
        with pytest.raises(ValueError, match=says):
            select_step(step, torch.device(device))


def test_a_program_that_is_only_replayed_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph does: the calls are recorded once, with the buffers of that moment, and nothing else runs later."""
    recorded: list[Any] = []

    def captured(calls: list[Any], stream: Any) -> Any:
        recorded.append(calls)
        return lambda: [call() for call in calls]

    requests = requests_of_all_kinds()
    expected = Engine(pair("mamba")[1], None, slots=4, step="eager").generate(requests)
    monkeypatch.setattr(stepper, "_captured", captured)
    engine = Engine(pair("mamba")[1], None, slots=4, step="eager")
    engine.decoder.step_kind = ("graph", "")
    assert engine.generate(requests) == expected
    assert 0 < len(recorded) <= 4 * len(engine.decoder.plans)  # once for each number of rows and place in the rings


def test_engine_loads_from_a_folder(tmp_path: Path) -> None:
    from mambalign.models.checkpoint import save_model

    _, ours = pair("mamba")
    save_model(ours, tmp_path / "m", tokenizer=byte_tokenizer())
    engine = Engine.load(str(tmp_path / "m"), device="cpu", slots=1)
    assert isinstance(load_model(tmp_path / "m"), MambaForCausalLM)
    assert only(engine.generate([Request(prompt(9), GREEDY)])).tokens == greedy(pair("mamba")[0], prompt(9))
