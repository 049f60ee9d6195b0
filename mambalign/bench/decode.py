"""Decoding: tokens a second by the number of answers, and time a token and memory behind contexts of any length.

Ours is the engine. Beside it: mamba-ssm's own loop under its CUDA graph (on a GPU, where it is installed), or
transformers' `generate()` of the same Mamba (on a CPU), and a Transformer of the same size with its key-value cache.
Correctness comes first: no number is shown unless those with the same weights give the same greedy tokens, or in 16
bits tokens whose logits are next to the highest, since two implementations part at a near tie.

Rates are differences between a short and a long answer, so reading the prompt does not count, medians of turns. With
uneven answers (each length from an eighth to all, no order) mamba-ssm goes on until its longest answer is done, and the
engine gives the slot to the next. The Transformer's steps are transformers' eager ones: at short contexts they are
bound by the host, and the floor, not their time, is what a tuned engine would come near. The floor is the time to read
the weights and the state or cache once, at the bandwidth of a copy: nobody goes below it. Where a processor's cache
could hold them all, there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from mambalign.bench import contestants
from mambalign.bench.measure import DEVICE, NoNumbers, Result, Row, free_memory, result_of, say, spread_of, timed
from mambalign.bench.scan import bandwidth
from mambalign.generation.engine import Engine
from mambalign.generation.requests import Request, Sampling
from mambalign.recipe import UserError, nearest

PROMPT = 16
SHORT = 4  # tokens of the short answer
CACHE = 2**27  # bytes: no processor's cache holds as many
ROUNDS = 16  # uneven answers for each slot: fewer, and slots that run empty at the end would decide
NEAR_TIE = 0.15  # standard deviations of the logits; a token chosen blindly lies about four below the highest
Prompts = Sequence[tuple[int, ...]]
OURS, PEER, HF_MAMBA, TRANSFORMER = "ours", "mamba-ssm", "transformers' Mamba", "transformer"

# What fits the machine where the user says nothing.
DEFAULTS: dict[str, Row] = {
    "cpu": {},
    "cuda": {"size": "130m", "weights": "bf16", "batches": (1, 8, 64), "contexts": (1024, 4096, 16384, 65536)},
}


@dataclass(frozen=True)
class Options:
    """size: of random weights; model, transformer: folders or hub ids instead. batches: answers at once. contexts:
    tokens read before. tokens: of an answer. weights: "bf16" or "fp32". minutes: no new case begins after them."""

    size: str = "4m"
    model: str | None = None
    transformer: str | None = None
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (1024, 4096)
    tokens: int = 64
    weights: str = "fp32"
    repeats: int = 5
    minutes: float = 3.0

    def check(self) -> None:
        """UserError for an option that is none."""
        if self.size not in contestants.MAMBA:
            choices = ", ".join(contestants.MAMBA)
            raise UserError(f"--size {self.size!r}: choose {choices}{nearest(self.size, contestants.MAMBA)}")
        if self.weights not in ("bf16", "fp32"):
            raise UserError(f"--weights {self.weights!r}: choose bf16 or fp32")
        if min((*self.batches, *self.contexts, self.tokens), default=0) < 1:
            raise UserError("--batches, --contexts and --tokens must be at least 1")


# ---------------------------------------------------------------------------------------------------------- contestants


def prompts(count: int, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(length)
    return [tuple(row) for row in torch.randint(1, vocabulary, (count, length), generator=generator).tolist()]


def sampling(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, temperature=0, ignore_end=True)


def engine_tokens(engine: Engine, rows: Prompts, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    requests = [Request(row, sampling(length)) for row, length in zip(rows, lengths, strict=True)]
    return [answers[0].tokens for answers in engine.generate(requests)]


def peer_tokens(model: Any, rows: Prompts, tokens: int) -> list[tuple[int, ...]]:
    """mamba-ssm's own loop, greedy, under its CUDA graph."""
    from mamba_ssm.utils.generation import decode

    ids = torch.tensor(rows, device=DEVICE)
    out = decode(ids, model, max_length=ids.shape[1] + tokens, top_k=1, cg=True)
    return [tuple(row[ids.shape[1] :]) for row in out.sequences.tolist()]


def transformers_tokens(model: Any, rows: Prompts, tokens: int) -> list[tuple[int, ...]]:
    """transformers' `generate()`, greedy, any model of its own."""
    ids = torch.tensor(rows, device=DEVICE)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
    return [tuple(row[ids.shape[1] :]) for row in out.tolist()]


class Cached:
    """A Transformer that has read a context: greedy steps from its key-value cache, as often as one asks."""

    def __init__(self, model: Any, context: tuple[int, ...]):
        self.model = model
        with torch.inference_mode():
            ids = torch.tensor([context], device=DEVICE)
            self.cache = transformers.DynamicCache(config=model.config)
            model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @property
    def bytes(self) -> int:
        """Of the keys and values."""
        layers: Any = self.cache.layers
        held: list[Tensor] = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @torch.inference_mode()
    def generate(self, tokens: int) -> Tensor:
        token = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
        for _ in range(tokens):
            logits = self.model(token, past_key_values=self.cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        self.cache.crop(-tokens)
        return token


def same(found: Prompts, expected: Prompts, who: str) -> None:
    """NoNumbers where two with the same weights part."""
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(theirs))
            raise NoNumbers(f"answer {number} differs from {who}'s from token {at} on: no numbers")


@torch.inference_mode()
def follows(model: Any, asked: Prompts, answers: Prompts, who: str) -> None:
    """NoNumbers where a token of an answer is not what `model`, given all before it, would say, but for near ties."""
    ids = torch.tensor([[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)], device=DEVICE)
    logits = model(ids).logits[:, PROMPT - 1 : -1].float()
    chosen = logits.gather(2, ids[:, PROMPT:, None])[..., 0]
    missed = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    if not missed <= NEAR_TIE:
        raise NoNumbers(f"a token is {missed:.2f} standard deviations below {who}'s first choice: no numbers")


# ------------------------------------------------------------------------------------------------------------ measuring


def differences(runs: dict[str, Callable[[int], Any]], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds for `tokens` tokens: a long answer's less a short one's, in turn, one a turn and contestant.

    Who runs out of memory is left out, aloud.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            if name not in found:
                continue
            try:
                short, long = (timed(partial(run, n))[0] for n in (SHORT, SHORT + tokens))
            except torch.OutOfMemoryError:
                del found[name]
            if name not in found:  # past the exception, which holds on to the tensors
                say(f"{name}: out of memory")
                free_memory()
            elif turn:
                found[name].append(long - short)
    return found


def _times(who: str, found: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of differences as "", "_low" and "_high"; NaN where noise made one negative: no measure."""
    times = spread_of(found, "")
    if min(times.values()) > 0:
        return times
    say(f"{who}: a long answer took no longer than a short one; give more --tokens or --repeats")
    return dict.fromkeys(times, float("nan"))


def run(options: Options) -> Result:
    """Rows of case "even" and "uneven" (tokens/s by batch) and "context" (ms a token and MiB behind a context).

    Raises:
        UserError: an option that is none, a model that is not there.
        NoNumbers: two with the same weights answer differently.
    """
    options.check()
    deadline = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    weights = options.weights
    model = contestants.ours(options.size, weights) if options.model is None else contestants.load_ours(
        options.model, weights
    )  # fmt: skip
    model.eval().requires_grad_(False)
    other = contestants.transformer(options.size, weights) if options.transformer is None else (
        contestants.load_transformer(options.transformer, weights)
    )  # fmt: skip
    other.eval().requires_grad_(False)
    peer = contestants.mamba_ssm(model, weights) if DEVICE.type == "cuda" else None
    plain = _plain(model) if DEVICE.type == "cpu" else None
    rows: list[Row] = []
    for batch in options.batches:
        if rows and time.monotonic() > deadline:
            say(f"{options.minutes:g} minutes are over: no batch from {batch} on")
            break
        rows += batched(options, batch, model, {PEER: peer, HF_MAMBA: plain, TRANSFORMER: other})
    speed = bandwidth()
    for length in options.contexts:
        if rows and time.monotonic() > deadline:
            say(f"{options.minutes:g} minutes are over: no context from {length:,} on")
            break
        rows += behind(options, length, model, other, speed)
    settings = asdict(options) | {"bytes_per_second": speed, "prompt": PROMPT}
    return result_of("decode", rows, settings)


def _plain(model: Any) -> Any:
    """transformers' own class with the weights of ours."""
    plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def batched(options: Options, batch: int, model: Any, others: dict[str, Any]) -> list[Row]:
    """Tokens/s of `batch` answers at once: all of one length, then many more uneven ones."""
    vocabulary = min(int(one.config.vocab_size) for one in (model, others[TRANSFORMER]))
    asked, tokens = prompts(batch, PROMPT, vocabulary), options.tokens
    engines = {OURS: Engine(model, None, slots=batch)}
    if DEVICE.type == "cuda":
        engines["ours, not exact"] = Engine(model, None, slots=batch, exact=False)
    runs: dict[str, Callable[[int], Any]] = {
        name: partial(_engine_run, engine, asked) for name, engine in engines.items()
    }
    for name, generate in ((PEER, peer_tokens), (HF_MAMBA, transformers_tokens), (TRANSFORMER, transformers_tokens)):
        if others[name] is not None:
            runs[name] = partial(generate, others[name], asked)
    first = engine_tokens(engines[OURS], asked, [SHORT] * batch)
    for name in (PEER, HF_MAMBA):
        if others[name] is not None:
            follows(others[name], asked, first, name)
    if others[HF_MAMBA] is not None and options.weights == "fp32":
        same(runs[OURS](tokens), runs[HF_MAMBA](tokens), HF_MAMBA)
    rows = []
    for name, found in differences(runs, tokens, options.repeats).items():
        times = _times(name, found)
        ends = {"": "", "_low": "_high", "_high": "_low"}
        rates = {f"tokens_per_second{end}": 1e3 * batch * tokens / times[other] for end, other in ends.items()}
        rows.append({"case": "even", "batch": batch, "who": name, **rates})
    if batch > 1 and others[PEER] is not None:
        rows += _uneven(options, batch, engines, others[PEER], asked)
    for row in rows:
        say(f"{row['case']:>7} {row['batch']:>4} answers {row['who']:>16}: {row['tokens_per_second']:>12,.0f} tokens/s")
    return rows


def _engine_run(engine: Engine, asked: Prompts, tokens: int) -> Any:
    return engine_tokens(engine, asked, [tokens] * len(asked))


def _uneven(options: Options, batch: int, engines: dict[str, Engine], peer: Any, asked: Prompts) -> list[Row]:
    tokens = options.tokens
    lengths = [max(1, tokens // 8 + (7 * tokens // 8) * (i * 37 % 64) // 63) for i in range(ROUNDS * batch)]
    given = [*asked] * ROUNDS

    def theirs() -> None:
        for start in range(0, len(given), batch):
            peer_tokens(peer, given[start : start + batch], max(lengths[start : start + batch]))

    runs: dict[str, Callable[[], Any]] = {
        name: partial(engine_tokens, engine, given, lengths) for name, engine in engines.items()
    }
    runs[PEER] = theirs
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.repeats + 1):
        for name, call in runs.items():
            ms = timed(call)[0]
            if turn:
                times[name].append(ms)
    return [
        {
            "case": "uneven", "batch": batch, "who": name,
            **spread_of([1e3 * sum(lengths) / ms for ms in found], "tokens_per_second"),
        }
        for name, found in times.items()
    ]  # fmt: skip


def behind(options: Options, length: int, model: Any, other: Any, bytes_a_second: float) -> list[Row]:
    """Milliseconds a token of one answer, from the state or cache that a context left, and the size of that."""
    (context,) = prompts(1, length, min(int(one.config.vocab_size) for one in (model, other)))
    engine = Engine(model, None, slots=1)
    state = engine.generate([Request(context, sampling(1), keep_state=True)])[0][0].state
    assert state is not None
    held = {OURS: sum(tensor.numel() * tensor.element_size() for tensor in (state.conv, state.ssm))}
    runs: dict[str, Callable[[int], Any]] = {
        OURS: lambda tokens: engine.generate([Request((1,), sampling(tokens), state)])
    }
    can, why = contestants.reach(other, length + SHORT + options.tokens)
    try:
        if can < length + SHORT + options.tokens:
            say(f"{TRANSFORMER}: not behind {length:,} tokens, {why}")
        else:
            cached = Cached(other, context)
            held[TRANSFORMER], runs[TRANSFORMER] = cached.bytes, cached.generate
    except torch.OutOfMemoryError:
        say(f"{TRANSFORMER}: out of memory behind {length:,} tokens")
    weights = {OURS: contestants.gib(model) * 2**30, TRANSFORMER: contestants.gib(other) * 2**30}
    rows: list[Row] = []
    for who, found in differences(runs, options.tokens, options.repeats).items():
        row: Row = {"case": "context", "context": length, "who": who, "state_mib": held[who] / 2**20}
        row |= {f"ms_per_token{key}": ms / options.tokens for key, ms in _times(who, found).items()}
        read = weights[who] + held[who]
        rows.append(row | {"floor_ms": 1e3 * read / bytes_a_second if read > CACHE else None})
        say(
            f"behind {length:>7,} tokens {who:>12}: {row['ms_per_token']:.3f} ms a token, "
            f"{row['state_mib']:,.1f} MiB of {'state' if who == OURS else 'cache'}"
        )
    return rows
