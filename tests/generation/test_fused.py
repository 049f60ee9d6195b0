"""The GPU's way of generating, without a GPU: fused kernels emulated, steps begun before their tokens are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalign.generation import engine as engines
from mambalign.generation import fused, stepper
from mambalign.generation.engine import Engine, make_decoder
from mambalign.generation.fused import FusedDecoder
from mambalign.generation.requests import Completion, Delta, Request, Sampling
from tests.generation.conftest import pair
from tests.generation.test_engine import GREEDY, LENGTHS, greedy, only, prompt, requests_of_all_kinds
from tests.ops import emulated
from tests.train.conftest import byte_tokenizer

needs_compiler = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here to compile the emulation with")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def fused_engine(model: Any, built: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    """Its decoder takes the kernels, emulated; the model reads prompts with plain PyTorch, which is faster here."""
    emulated.install(monkeypatch, built)
    engine = Engine(model, byte_tokenizer(), **options)
    model.set_backend("torch")
    assert isinstance(engine.decoder, FusedDecoder)
    engine.ahead = True
    return engine


# --------------------------------------------------------------------------------------------------- the fused step

FAMILY_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("mamba", {"residual_in_fp32": False, "time_step_rank": 7, "tie_word_embeddings": False}),
    ("falcon_mamba", {"mixer_rms_eps": 0.1, "use_bias": True}),
]


@needs_compiler
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("family", "changes"), FAMILY_VARIANTS, ids=str)
def test_greedy_is_transformers_generate(
    family: str, changes: dict[str, Any], exact: bool, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = pair(family, **changes)
    engine = fused_engine(ours, built, monkeypatch, slots=4, prefill_tokens=96, exact=exact)
    found = engine.generate([Request(prompt(length), GREEDY) for length in LENGTHS[:-1]])
    for length, answers in zip(LENGTHS, found, strict=False):
        assert only([answers]).tokens == greedy(plain, prompt(length)), length


@needs_compiler
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_step_in_bf16_is_the_models(family: str, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pair(family)[1].to(torch.bfloat16)
    engine = fused_engine(ours, built, monkeypatch, slots=2)
    answer = only(engine.generate([Request(prompt(20), replace(GREEDY, logprobs=0), keep_state=True)]))
    logprobs = ours(torch.tensor([prompt(20) + answer.tokens])).logits[0].detach().log_softmax(-1)
    got = torch.tensor([item.logprob for item in answer.logprobs or ()])
    assert float((got - logprobs[19:-1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]).abs().max()) < 0.05
    assert answer.state is not None
    assert {t.dtype for t in answer.state.conv} == {torch.bfloat16}
    assert {t.dtype for t in answer.state.ssm} == {torch.float32}
    # Read on from the state: the same as never having stopped.
    rest = Request(answer.tokens[-1:], replace(GREEDY, max_new_tokens=4), answer.state)
    longer = only(engine.generate([Request(prompt(20), replace(GREEDY, max_new_tokens=14))])).tokens
    assert only(engine.generate([rest])).tokens == longer[10:]


@needs_compiler
def test_answers_alone_and_together_are_the_same_bits(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts read together, padded to one length, too: products of one shape."""
    engine = fused_engine(pair("mamba")[1], built, monkeypatch, slots=4, prefill_tokens=96)
    monkeypatch.setattr(engines, "SHORT", 40)
    requests = requests_of_all_kinds()
    alone = [engine.generate([request])[0] for request in requests]
    sizes = []
    backbone = engine.model.backbone.forward

    def counted(ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        sizes.append((len(ids), int(attention_mask.sum())))
        return backbone(ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(engine.model.backbone, "forward", counted)
    assert engine.generate(requests) == alone
    together = [tokens for rows, tokens in sizes if rows > 1]
    assert set(together) == {96} and len(sizes) < 14, sizes


@needs_compiler
def test_a_recorded_program_is_a_step(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph replays it: recorded once for each number of rows, with the buffers of that moment."""
    engine = fused_engine(pair("mamba")[1], built, monkeypatch, slots=4)
    requests = [Request(prompt(n), GREEDY) for n in (3, 9, 4, 5, 6, 7)]
    expected = engine.generate(requests)
    recorded: list[Any] = []

    def captured(calls: list[Any], stream: Any) -> Any:
        recorded.append(calls)
        return lambda: [call() for call in calls]

    monkeypatch.setattr(stepper, "_captured", captured)
    engine.decoder._programs.clear()
    engine.decoder.step_kind = ("graph", "")
    assert engine.generate(requests) == expected
    assert 0 < len(recorded) <= len(engine.decoder.plans)


def test_what_has_no_kernels_takes_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("mamba")
    assert "needs an NVIDIA GPU" in str(fused.unavailable(ours)) and not isinstance(make_decoder(ours, 1), FusedDecoder)
    monkeypatch.setattr(fused.nvrtc, "_unavailable", lambda device: None)
    assert fused.unavailable(ours) is None
    for family, changes, says in (
        ("mamba2", {}, "not written for mamba2"),
        ("mamba", {"hidden_act": "gelu"}, "no activation 'gelu'"),
        ("mamba", {"state_size": 65}, "64 states"),
    ):
        assert says in str(fused.unavailable(pair(family, **changes)[1]))
    assert "in one of bfloat16 or float16 or float32" in str(fused.unavailable(pair("mamba")[1].double()))
    ours.set_backend("torch")
    assert "backend 'torch'" in str(fused.unavailable(ours))


# ------------------------------------------------------------------------------------- steps begun before the tokens


@pytest.fixture(params=["plain", pytest.param("fused", marks=needs_compiler)])
def both(request: pytest.FixtureRequest, built: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Engine]:
    """(one that looks at every token before the next step, one that does not), with answers that end early."""
    found = []
    for ahead in (False, True):
        options = {"slots": 4, "prefill_tokens": 96}
        if request.param == "fused":
            engine = fused_engine(pair("mamba")[1], built, monkeypatch, **options)
        else:
            engine = Engine(pair("mamba")[1], byte_tokenizer(), **options)
        engine.ahead, engine.ends = ahead, frozenset(range(40))  # of 264: an answer in seven tokens ends
        found.append(engine)
    return found[0], found[1]


def ending_requests() -> list[Request]:
    kept = [replace(r, keep_state=i % 3 == 0) for i, r in enumerate(requests_of_all_kinds())]
    kept += [Request(prompt(n, 4), Sampling(max_new_tokens=12), keep_state=True) for n in (3, 4, 50, 6, 7, 8, 90, 1, 2)]
    stops = [Request(prompt(n), Sampling(max_new_tokens=30, stop=("a", "Z"))) for n in (3, 8, 21)]
    ending = [Request(prompt(n, 3), Sampling(n=2, max_new_tokens=25, temperature=1.2)) for n in (2, 9, 33, 100, 7)]
    return [*kept, *ending, *stops, Request(prompt(5, 2), replace(GREEDY, ignore_end=False, max_new_tokens=20))]


def plainly(found: list[list[Completion]]) -> list[Any]:
    return [
        (
            a.text,
            a.tokens,
            a.finish_reason,
            a.logprobs,
            a.state and (a.state.tokens, [t.tolist() for t in (*a.state.conv, *a.state.ssm)]),
        )
        for answers in found
        for a in answers
    ]


def test_beginning_before_the_tokens_are_known_changes_nothing(both: tuple[Engine, Engine]) -> None:
    usual, ahead = both
    requests = ending_requests()
    expected = usual.generate(requests)
    assert plainly(ahead.generate(requests)) == plainly(expected)
    assert {answer.finish_reason for answers in expected for answer in answers} == {"stop", "length"}
    assert ahead.running == ahead.waiting == 0 and ahead.step() == 0
    assert plainly(ahead.generate(requests[:3])) == plainly(expected[:3])  # nothing of the last batch is left


def test_no_step_is_spent_on_answers_that_have_their_length(both: tuple[Engine, Engine]) -> None:
    requests = [Request(prompt(n), replace(GREEDY, max_new_tokens=n)) for n in (5, 9, 2, 1, 7, 12, 3)]
    counts = []
    for engine in both:
        rows: list[int] = []
        real = engine.decoder.step
        engine.decoder.step = lambda count, rows=rows, real=real: (rows.append(count), real(count))[1]  # type: ignore
        engine.generate(requests)
        counts.append(sum(rows))
    assert counts[0] == counts[1] == sum(n - 1 for n in (5, 9, 2, 1, 7, 12, 3))


def test_a_hole_is_filled_before_anything_moves(both: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves close holes that no answer waits for, one each; and a step makes one choice, whoever begins in it."""
    for engine in both:
        moves: list[tuple[int, int, int]] = []
        counts = {"choose": 0, "step": 0, "read": 0}

        def counted(name: str, real: Any, counts: dict[str, int] = counts) -> Any:
            def call(*args: Any) -> Any:
                counts[name] += 1
                return real(*args)

            return call

        def move(source: int, target: int, engine: Engine = engine, moves: Any = moves, real: Any = None) -> None:
            moves.append((source, target, engine.waiting))
            type(engine.decoder).move(engine.decoder, source, target)

        with monkeypatch.context() as patched:
            patched.setattr(engine.decoder, "move", move)
            patched.setattr(engines, "choose", counted("choose", engines.choose))
            patched.setattr(engine.decoder, "step", counted("step", engine.decoder.step))
            patched.setattr(engine, "_read", counted("read", engine._read))
            requests = [Request(prompt(n), replace(GREEDY, max_new_tokens=n)) for n in (5, 9, 2, 7, 12, 3, 4, 6, 8)]
            engine.generate(requests)
            assert moves and all(waiting == 0 for *_, waiting in moves), moves
            assert counts["choose"] == counts["step"] + counts["read"]
            moves.clear()
            # Three end in one step: the fourth closes the first hole, and nothing that is about to go moves.
            engine.generate([Request(prompt(5, n), replace(GREEDY, max_new_tokens=n)) for n in (4, 4, 4, 9)])
            assert moves == [(3, 0, 0)]


def test_answers_of_one_token_take_no_slot(both: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those that end with their first; the state behind one is the prompt's."""
    usual, ahead = both
    longer = usual.generate([Request(prompt(5), replace(GREEDY, max_new_tokens=2), keep_state=True)])
    state = only(longer).state
    assert state is not None
    reread = [Request(prompt(5), replace(GREEDY, max_new_tokens=1), keep_state=True)]
    for engine in both:
        with monkeypatch.context() as patched:
            patched.delattr(type(engine.decoder), "load")
            ((answer,),) = engine.generate(reread)
        assert answer.tokens == only(longer).tokens[:1] and answer.state is not None
        assert answer.state.tokens == prompt(5) and answer.state.conv.dtype == state.conv.dtype
        rest = Request(answer.tokens, replace(GREEDY, max_new_tokens=1), answer.state)
        assert only(engine.generate([rest])).tokens == only(longer).tokens[1:]
        assert engine.running == engine.waiting == 0 and engine.step() == 0
    # More answers than slots to one prompt that begins with an end: slots are for the others.
    usual.ends = ahead.ends = frozenset(only(longer).tokens[:1])
    ending = Request(prompt(5), replace(GREEDY, n=9, ignore_end=False), keep_state=True)
    for engine in both:
        found = engine.generate([ending, *reread])
        assert all(a.tokens == () and a.finish_reason == "stop" for a in found[0])
        assert all(a.state is not None and a.state.tokens == prompt(5) for a in found[0])
        assert engine.running == engine.waiting == 0 and engine.step() == 0


def test_a_sink_that_raises_before_logprobs_are_read(both: tuple[Engine, Engine]) -> None:
    """Tokens of a step begun early raise, while those of the next, whose logits are to be read, are not handed out."""
    usual, engine = both
    wanted = Request(prompt(7), replace(GREEDY, logprobs=2, max_new_tokens=9))
    expected, got = only(usual.generate([wanted])), []
    raised = 0

    def sink(delta: Delta) -> None:
        raise RuntimeError("a sink's own")

    for length in (3, 4, 5, 6):  # `wanted` waits for the slot of the first
        engine.add(Request(prompt(9), replace(GREEDY, max_new_tokens=length)), sink)
    engine.add(wanted, got.append)
    while True:
        try:
            if not engine.step():
                break
        except RuntimeError:
            raised += 1
    assert raised > 8
    assert tuple(item for delta in got for item in delta.logprobs or ()) == expected.logprobs


def test_cancelling_between_a_step_and_its_tokens(both: tuple[Engine, Engine]) -> None:
    usual, ahead = both
    kept = Request(prompt(9), replace(GREEDY, max_new_tokens=12))
    expected = only(usual.generate([kept])).tokens
    got: list[Delta] = []
    dropped: list[Delta] = []
    ticket = ahead.add(Request(prompt(3), Sampling(n=6, max_new_tokens=2, ignore_end=True)), dropped.append)
    ahead.add(kept, got.append)
    ahead.step()  # those of the first have their length now, and gave their slots away
    before = len(dropped)
    ahead.cancel(ticket)
    while ahead.step():
        pass
    assert len(dropped) == before and tuple(t for delta in got for t in delta.tokens) == expected
    assert ahead.running == ahead.waiting == 0


def test_a_sink_that_raises_between_a_step_and_its_tokens(both: tuple[Engine, Engine]) -> None:
    engine = both[1]
    kept = Request(prompt(5), replace(GREEDY, max_new_tokens=12, ignore_end=True), keep_state=True)
    expected, got = only(engine.generate([kept])), []

    def sink(delta: Delta) -> None:
        raise RuntimeError("a sink's own")

    short = replace(GREEDY, max_new_tokens=3, ignore_end=True)
    ticket = engine.add(Request(prompt(9), short, keep_state=True), sink)
    engine.add(kept, got.append)
    with pytest.raises(RuntimeError, match="a sink's own"):
        while engine.step():
            pass
    engine.cancel(ticket)
    while engine.step():
        pass
    state, whole = got[-1].state, expected.state
    assert tuple(token for delta in got for token in delta.tokens) == expected.tokens
    assert state is not None and whole is not None and state.tokens == whole.tokens
    assert all(map(torch.equal, (*state.conv, *state.ssm), (*whole.conv, *whole.ssm)))


def test_logits_that_are_no_numbers_are_said() -> None:
    from mambalign.recipe import UserError

    broken = pair("mamba")[1]
    broken.backbone.norm_f.weight.data.fill_(torch.nan)
    engine = Engine(broken, None, slots=1)
    engine.ahead = True
    with pytest.raises(UserError, match="logits that are no numbers"):
        engine.generate([Request(prompt(3), GREEDY)])
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize(
    ("parameters", "tokens"), [(1, 4096), (129_000_000, 4096), (168_000_000, 2048), (10**10, 1024)]
)
def test_a_small_model_reads_more_at_a_time(parameters: int, tokens: int) -> None:
    class Model:
        def parameters(self) -> list[torch.Tensor]:
            return [torch.empty(parameters, device="meta")]

    assert engines.bin_of(Model()) == tokens


@needs_compiler
def test_no_more_is_read_ahead_than_there_is_room_for_states(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass has room for many prompts of a token, and each of them waits with a state of its own."""
    engine = fused_engine(pair("mamba")[1], built, monkeypatch, slots=2, prefill_tokens=96)
    for number in range(60):
        engine.add(Request((3 + number % 7,), GREEDY), lambda delta: None)
    most = 0
    while engine.step():
        most = max(most, len(engine._ready))
    assert 2 <= most <= engines.READ_AHEAD * 2
