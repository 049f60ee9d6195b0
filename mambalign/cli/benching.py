"""Verbs of measuring: each checks first, says how it goes on stderr, and writes JSON and a figure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import AsJson, Debug, log_to_stderr, make_console, quiet_libraries, user_errors

PANEL = "Measuring"
bench_app = typer.Typer(
    help="Time, memory, perplexity, scan and decoding on this machine, beside the peers that are installed.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(bench_app, name="bench", rich_help_panel=PANEL)

Size = Annotated[
    str | None,
    typer.Option(help="Random weights in the shapes of 4m, 130m, 790m or 2.8b; default: 130m on a GPU, else 4m."),
]
ModelPath = Annotated[str | None, typer.Option("--model", help="A Mamba's folder or hub id instead of a size.")]
TransformerPath = Annotated[
    str | None,
    typer.Option("--transformer", help="A Transformer's folder or hub id; default: a GPT-NeoX of that size."),
]
Repeats = Annotated[int | None, typer.Option(min=1, help="Timed runs of each contestant, in turn; medians are shown.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Nothing new begins after so long.")]
JsonFile = Annotated[Path | None, typer.Option("--out", help="JSON file to write; default: the verb's name here.")]


def _drawable(path: Path | None) -> Path | None:
    """Checked before anything is measured."""
    if path is not None:
        from mambalign.train.curves import FORMATS

        if path.suffix not in FORMATS:
            raise typer.BadParameter(f"{path}: give a file name that ends in {', '.join(FORMATS)}")
    return path


Plot = Annotated[
    Path | None,
    typer.Option("--plot", callback=_drawable, help="Figure: .png, .svg or .pdf; default: beside the JSON."),
]
LISTED = "512,2k,8k or 512..64k (doubling)."
# What the table on stdout shows: (heading, key, format).
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "length": (
        ("tokens", "length", ",d"), ("rows", "rows", "d"), ("who", "who", "s"), ("recomputed", "recompute", ""),
        ("tokens/s", "tokens_per_second", ",.0f"), ("peak GiB", "peak_gib", ".2f"), ("", "outcome", "s"),
    ),
    "scan": (
        ("tokens", "length", ",d"), ("rows", "batch", "d"), ("who", "who", "s"), ("forward ms", "forward_ms", ",.3f"),
        ("+ backward ms", "both_ms", ",.3f"), ("peak GiB", "peak_gib", ".2f"),
    ),
    "decode": (
        ("case", "case", "s"), ("answers", "batch", "d"), ("read before", "context", ",d"), ("who", "who", "s"),
        ("tokens/s", "tokens_per_second", ",.0f"), ("ms/token", "ms_per_token", ".3f"),
        ("state or cache, MiB", "state_mib", ",.2f"),
    ),
    "perplexity": (
        ("who", "who", "s"), ("", "kind", "s"), ("from", "from", ",d"), ("to", "to", ",d"), ("every", "length", ",d"),
        ("perplexity", "perplexity", ",.3f"), ("low", "perplexity_low", ",.3f"), ("high", "perplexity_high", ",.3f"),
    ),
}  # fmt: skip


@bench_app.callback()
def _bench() -> None:
    pass


def numbers(words: str | None, option: str) -> tuple[int, ...] | None:
    """`512,2k` or `512..4k`, which doubles; UserError for anything else."""
    if words is None:
        return None
    found: list[int] = []
    for word in words.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(k?)(?:\.\.(\d+)(k?))?", word, re.IGNORECASE)
        if match is None:
            raise mambalign.UserError(f"{option} {words!r}: {word!r} is no number; write {LISTED}")
        first, last = (int(n) * (1024 if k else 1) for n, k in ((match[1], match[2]), (match[3] or 0, match[4])))
        if match[3] and last < first:
            raise mambalign.UserError(f"{option} {words!r}: {word} ends before it begins; write {LISTED}")
        found.append(first)
        while match[3] and 0 < found[-1] <= last // 2:
            found.append(2 * found[-1])
    return tuple(dict.fromkeys(found))


def _finish(result: dict[str, Any], out: Path | None, plot: Path | None, as_json: bool) -> None:
    from mambalign.bench import measure

    measure.write(result, out or Path(f"bench-{result['benchmark']}.json"), plot)
    if as_json:
        print(measure.as_json(result))
        return
    from rich.table import Table

    rows = result["rows"]
    shown = [column for column in COLUMNS[result["benchmark"]] if any(row.get(column[1]) is not None for row in rows)]
    table = Table(*(heading for heading, _, _ in shown), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_cell(row.get(key), form) for _, key, form in shown))
    console = make_console()
    console.print(table)
    for what, found in result.get("summary", {}).items():
        console.print(f"{what}: {found['says'] if 'says' in found else _ratios(found)}")


def _cell(value: Any, form: str) -> str:
    if value is None or value is False or value != value:
        return ""
    return str(value) if not form else f"{value:{form}}"


def _ratios(found: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.2f} at {int(length):,}" for length, ratio in found.items())


def _given(options: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the user gave, over what fits this machine; says so where that is little."""
    from mambalign.bench.measure import DEVICE, say

    if DEVICE.type == "cpu":
        say("no CUDA device: small shapes and short lengths unless you give others; figures of this machine alone")
    return defaults[DEVICE.type] | {name: value for name, value in options.items() if value is not None}


@bench_app.command()
def length(
    size: Size = None,
    model: ModelPath = None,
    transformer: TransformerPath = None,
    lengths: Annotated[str | None, typer.Option(help=f"Tokens of a sequence: {LISTED}")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of a step, in as many rows as fit.")] = None,
    weights: Annotated[str | None, typer.Option(help="bf16, 'fp32 + autocast' or fp32.")] = None,
    recompute: Annotated[
        str, typer.Option(help="auto (only where memory runs out), none, selective (ours alone has it) or full.")
    ] = "auto",
    optimizer: Annotated[bool, typer.Option("--optimizer", help="AdamW's step is part of it.")] = False,
    repeats: Repeats = None,
    minutes: Minutes = None,
    out: JsonFile = None,
    plot: Plot = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time and peak memory of a training step by sequence length: ours, mamba-ssm, and a Transformer of the same size.

    The same tokens a step for all, forward and backward pass, in turn in one process, medians. Ours is first compared
    with its definition and with mamba-ssm's loss. Running out of memory is a result, not an end. The last lines say
    from which length on a Mamba takes less time and memory than the Transformer, or that it does not in this range.

    Example: [bold]mambalign bench length --size 130m --minutes 2[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        from mambalign.bench import length as bench

        given = {
            "size": size, "model": model, "transformer": transformer, "lengths": numbers(lengths, "--lengths"),
            "tokens": tokens, "weights": weights, "repeats": repeats, "minutes": minutes,
        }  # fmt: skip
        options = bench.Options(recompute=recompute, optimizer=optimizer, **_given(given, bench.DEFAULTS))
        _finish(bench.run(options), out, plot, as_json)


@bench_app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Mamba's folder or hub id.", show_default=False)],
    data: Annotated[
        str, typer.Option(help="Long documents: .jsonl, .parquet, .txt, a folder or a dataset.", show_default=False)
    ],
    transformer: Annotated[str | None, typer.Option(help="A Transformer with the same tokenizer, beside it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the model has none beside it.")] = None,
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str | None, typer.Option(help="Of a dataset; default: test, validation, else train.")] = None,
    lengths: Annotated[
        str, typer.Option(help=f"Contexts; the longest is how much of a document is read: {LISTED}")
    ] = "128..2k",
    join: Annotated[
        str | None, typer.Option(help="Rows that are equal in this column are parts of one document.")
    ] = None,
    concatenate: Annotated[
        bool, typer.Option("--concatenate", help="Lay documents end to end where none is long enough.")
    ] = False,
    documents: Annotated[int, typer.Option(min=1, help="At most so many.")] = 64,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens read at a time.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    minutes: Minutes = 10.0,
    out: JsonFile = None,
    plot: Plot = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity of long documents, by position and by context length, with intervals over documents.

    A Mamba reads in pieces with its state carried: memory is constant, and documents may have any length. A Transformer
    reads the same documents whole, also past its training length, which is marked. "position" rows are of tokens that
    have seen `from` to `to` others; in "reset" rows reading begins anew every so many tokens, as in the usual figure.

    Example: [bold]mambalign bench perplexity runs/cpt --data novels.jsonl --lengths 512..32k[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        from mambalign.bench import perplexity as bench

        wanted = numbers(lengths, "--lengths") or ()
        options = bench.Options(
            model, data, transformer, tokenizer, column, split, wanted, join, concatenate, documents, chunk, dtype,
            minutes or 0.0,
        )  # fmt: skip
        _finish(bench.run(options), out, plot, as_json)


@bench_app.command()
def scan(
    channels: Annotated[int | None, typer.Option(min=1, help="Of the layer; 5120 are mamba-2.8b's.")] = None,
    lengths: Annotated[str | None, typer.Option(help=f"Tokens of a sequence: {LISTED}")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a call, in as many rows as fit.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    repeats: Repeats = None,
    minutes: Minutes = None,
    out: JsonFile = None,
    plot: Plot = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """The selective scan by sequence length: ours, mamba-ssm's kernel or a plain loop, and what the machine allows.

    First the errors of outputs and all gradients against float64, in rows and in forked segments; a wrong kernel ends
    the bench before any time is taken. The floors are bytes at the speed of a copy, and exponentials.

    Example: [bold]mambalign bench scan --channels 1536[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        from mambalign.bench import scan as bench

        given = {
            "channels": channels, "lengths": numbers(lengths, "--lengths"), "tokens": tokens, "dtype": dtype,
            "repeats": repeats, "minutes": minutes,
        }  # fmt: skip
        _finish(bench.run(bench.Options(**_given(given, bench.DEFAULTS))), out, plot, as_json)


@bench_app.command()
def decode(
    size: Size = None,
    model: ModelPath = None,
    transformer: TransformerPath = None,
    batches: Annotated[str | None, typer.Option(help="Answers at once: 1,8,64.")] = None,
    contexts: Annotated[str | None, typer.Option(help=f"Tokens read before: {LISTED}")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    weights: Annotated[str | None, typer.Option(help="bf16 or fp32.")] = None,
    repeats: Repeats = None,
    minutes: Minutes = None,
    out: JsonFile = None,
    plot: Plot = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Generated tokens a second by batch, and time a token and memory behind long contexts.

    The engine beside mamba-ssm's CUDA graph (GPU) or transformers' generate() of the same Mamba (CPU), and beside a
    Transformer with its key-value cache. Those with the same weights must give the same tokens first.

    Example: [bold]mambalign bench decode --size 130m --contexts 1k,4k,16k,64k[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        from mambalign.bench import decode as bench

        given = {
            "size": size, "model": model, "transformer": transformer, "batches": numbers(batches, "--batches"),
            "contexts": numbers(contexts, "--contexts"), "weights": weights, "repeats": repeats, "minutes": minutes,
        }  # fmt: skip
        options = bench.Options(tokens=tokens, **_given(given, bench.DEFAULTS))
        _finish(bench.run(options), out, plot, as_json)


@bench_app.command("plot")
def draw(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What the other verbs wrote.")],
    out: Annotated[Path | None, typer.Option("--out", help="Figure; default: a .png beside the first.")] = None,
    debug: Debug = False,
) -> None:
    """Draw results again: several files of one verb become one figure.

    Example: [bold]mambalign bench plot bench-length.json --out length.pdf[/]
    """
    with user_errors(debug):
        from mambalign.bench.figures import draw as drawn

        print(drawn(results, out))
