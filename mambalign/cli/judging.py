"""Verbs that ask a judge: `eval mt-bench judge`, `eval alpaca judge`, `eval calibrate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mambalign
from mambalign.cli.common import AsJson, Debug, log_to_stderr, make_console, make_table, say, user_errors
from mambalign.cli.evaluation import DataDir, alpaca_app, eval_app, mt_bench_app

if TYPE_CHECKING:
    from mambalign.evals.judge import Call
    from mambalign.evals.judging import Asking, Judged

UNFINISHED = 3  # exit code: verdicts are missing; the same command asks for them
RESUME = "; what was judged is kept, run the same command again to go on"

BaseUrl = Annotated[
    str,
    typer.Option(
        "--judge-base-url",
        help="The judge's OpenAI-compatible address, ending in /v1; or `rule`: the judge that is rule-based, not a "
        "language model, in this process.",
    ),
]
Model = Annotated[str | None, typer.Option("--judge-model", help="The judge's name at that address.")]
KeyEnv = Annotated[str | None, typer.Option("--judge-key-env", help="Environment variable that holds the API key.")]
KeyFile = Annotated[Path | None, typer.Option("--judge-key-file", help="File that holds the API key.")]
Extra = Annotated[str, typer.Option("--judge-extra", help='More keys of a request: \'{"reasoning_effort": "low"}\'.')]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Calls at once.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for one call.")]
PriceIn = Annotated[float | None, typer.Option("--price-in", help="Money for a million tokens of prompts.")]
PriceOut = Annotated[float | None, typer.Option("--price-out", help="Money for a million tokens of replies.")]
MaxCost = Annotated[float | None, typer.Option("--max-cost", help="Stop before this command spends more; exit code 3.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many calls, tokens and how much money; ask nothing.")]
Store = Annotated[Path | None, typer.Option("--store", help="Folder of all replies so far; default: OUT/replies.")]


def asking(
    base_url: str,
    model: str | None,
    key_env: str | None,
    key_file: Path | None,
    extra: str,
    concurrency: int,
    timeout: float,
    price_in: float | None,
    price_out: float | None,
    max_cost: float | None,
    store: Path,
) -> Asking:
    from mambalign.evals.cost import Budget, Prices
    from mambalign.evals.endpoint import Endpoint, read_key
    from mambalign.evals.judging import Asking
    from mambalign.evals.rule_judge import IN_PROCESS, RuleEndpoint

    try:
        more = json.loads(extra)
    except ValueError as error:
        raise mambalign.UserError(f"--judge-extra: {extra!r} is no JSON ({error})") from error
    if not isinstance(more, dict):
        raise mambalign.UserError(f"--judge-extra: {extra!r} must be a JSON object")
    if (price_in is None) is not (price_out is None):
        raise mambalign.UserError("prices go together: give both --price-in and --price-out")
    prices = None if price_in is None or price_out is None else Prices(price_in, price_out)
    Budget(prices, max_cost)
    if base_url == IN_PROCESS:
        if model not in (None, RuleEndpoint.model):
            raise mambalign.UserError(f"--judge-model: the judge `{IN_PROCESS}` is {RuleEndpoint.model}, not {model}")
        return Asking(RuleEndpoint(), store, concurrency, prices, max_cost)
    if model is None:
        raise mambalign.UserError("--judge-model is missing: the judge's name at --judge-base-url")
    endpoint = Endpoint(base_url, model, read_key(key_env, key_file), timeout, more)
    return Asking(endpoint, store, concurrency, prices, max_cost)


def show_plan(asking: Asking, calls: Sequence[Call], as_json: bool) -> None:
    from dataclasses import asdict

    plan = asdict(asking.plan(calls)) | {"judge": asking.endpoint.name}
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    told = {
        "calls": f"{plan['calls']:,}, {plan['stored']:,} of them in {asking.store} already",
        "tokens in": f"about {plan['tokens_in']:,} (4.5 characters a token)",
        "tokens out": f"at most {plan['tokens_out_at_most']:,}",
        "cost": f"at most about {plan['cost']:,.2f}" if plan["cost"] is not None else "--price-in and --price-out tell",
    }
    if not plan["probed"]:
        told["the judge"] = "was not probed yet: one tiny call more, and its limits may differ"
    make_console().print(make_table(f"would ask {asking.endpoint.name}", told))


def show_judged(judged: Judged, as_json: bool) -> None:
    """Raises typer.Exit(3) where verdicts are missing."""
    from dataclasses import asdict

    if as_json:
        print(json.dumps(asdict(judged) | {"file": str(judged.file), "complete": judged.complete}, indent=2))
    else:
        told: dict[str, Any] = {"judge": judged.judge}
        told |= {f"judge, note {i}": note for i, note in enumerate(judged.notes, start=1)}
        told |= {"verdicts": f"{judged.verdicts:,} of {judged.wanted:,}", "unreadable": judged.unparsed}
        told |= {"requests": judged.requests} | judged.spent
        print(judged.file)
        make_console().print(make_table("", told))
    if not judged.complete:
        reasons = sorted(set(judged.missing.values()) - {"not asked"})
        why = judged.stopped or "; ".join(reasons[:3])
        say(f"{judged.wanted - judged.verdicts} verdicts are missing ({why}){RESUME}")
        raise typer.Exit(UNFINISHED)


@mt_bench_app.command("judge")
def judge_mt_bench(
    answers: Annotated[list[Path], typer.Argument(metavar="ANSWERS.jsonl...", help="Answer files, one a model.")],
    judge_base_url: BaseUrl,
    judge_model: Model = None,
    mode: Annotated[str, typer.Option(help="single, pairwise-baseline or pairwise-all.")] = "single",
    baseline: Annotated[str | None, typer.Option(help="Model, or its answer file, for pairwise-baseline.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of judgment files.")] = Path("model_judgment"),
    store: Store = None,
    data_dir: DataDir = None,
    references: Annotated[Path | None, typer.Option(help="Other reference answers than GPT-4's.")] = None,
    judge_key_env: KeyEnv = None,
    judge_key_file: KeyFile = None,
    judge_extra: Extra = "{}",
    concurrency: Concurrency = 16,
    timeout: Timeout = 300.0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Have MT-Bench answers judged, by any OpenAI-compatible endpoint, into FastChat's judgment files.

    160 calls a model for single, 320 a pair of models. Nothing is asked twice: interrupted, killed or stopped, the same
    command goes on. The judge's name is part of file and rows.

    Example: [bold]mambalign eval mt-bench judge model_answer/mine.jsonl --judge-base-url http://127.0.0.1:8000/v1
    --judge-model my-judge --dry-run[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted=RESUME):
        from mambalign.evals import judging

        asks = asking(
            judge_base_url, judge_model, judge_key_env, judge_key_file, judge_extra, concurrency, timeout,
            price_in, price_out, max_cost, store or out / "replies",
        )  # fmt: skip
        matches = judging.mt_bench_matches(answers, mode, baseline=baseline, data_dir=data_dir, references=references)
        if dry_run:
            show_plan(asks, judging.mt_bench_calls(matches), as_json)
        else:
            show_judged(judging.judge_mt_bench(matches, asks, out), as_json)


@alpaca_app.command("judge")
def judge_alpaca(
    outputs: Annotated[Path, typer.Argument(metavar="OUTPUTS.json", help="A model's model_outputs.json.")],
    judge_base_url: BaseUrl,
    judge_model: Model = None,
    annotator: Annotated[
        str,
        typer.Option(
            help="alpaca_eval_gpt4 (AlpacaEval 1), weighted_alpaca_eval_gpt4_turbo (AlpacaEval 2, reads "
            "log-probabilities) or alpaca_eval_clf (for judges without)."
        ),
    ] = "weighted_alpaca_eval_gpt4_turbo",
    reference: Annotated[Path | None, typer.Option(help="Other outputs to compare with.")] = None,
    tolerant: Annotated[bool, typer.Option("--tolerant", help="Read rankings with more around them too.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of results: OUT/model/annotator.")] = Path("results"),
    store: Store = None,
    data_dir: DataDir = None,
    judge_key_env: KeyEnv = None,
    judge_key_file: KeyFile = None,
    judge_extra: Extra = "{}",
    concurrency: Concurrency = 16,
    timeout: Timeout = 300.0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Have a model's AlpacaEval outputs judged against the reference's, into alpaca_eval's files.

    At most 805 calls; identical outputs are ties without one. Nothing is asked twice: interrupted, killed or stopped,
    the same command goes on. Another judge than the annotator's own is part of the result's name.

    Example: [bold]mambalign eval alpaca judge model_outputs.json --judge-base-url http://127.0.0.1:8000/v1
    --judge-model my-judge --annotator alpaca_eval_gpt4 --dry-run[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted=RESUME):
        from mambalign.evals import judging

        asks = asking(
            judge_base_url, judge_model, judge_key_env, judge_key_file, judge_extra, concurrency, timeout,
            price_in, price_out, max_cost, store or out / "replies",
        )  # fmt: skip
        compared = judging.alpaca_comparisons(outputs, annotator, data_dir=data_dir, reference=reference)
        if dry_run:
            show_plan(asks, judging.alpaca_calls(compared, tolerant), as_json)
        else:
            show_judged(judging.judge_alpaca(compared, asks, out, tolerant=tolerant), as_json)


@eval_app.command()
def calibrate(
    published: Annotated[
        list[Path], typer.Argument(metavar="JUDGMENTS...", help="FastChat's judgments or alpaca_eval's annotations.")
    ],
    judge_base_url: BaseUrl,
    judge_model: Model = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many of the published verdicts to judge again.")] = 200,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    annotator: Annotated[str | None, typer.Option(help="For annotations: the annotator; default: as they say.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("calibration"),
    store: Store = None,
    data_dir: DataDir = None,
    judge_key_env: KeyEnv = None,
    judge_key_file: KeyFile = None,
    judge_extra: Extra = "{}",
    concurrency: Concurrency = 16,
    timeout: Timeout = 300.0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """How far a judge can stand for the one whose verdicts were published: agreement, bias and rank correlation.

    A seeded sample of published verdicts (FastChat's gpt-4_single.jsonl or _pair.jsonl, alpaca_eval's annotations.json)
    is judged again, shown exactly the same texts.

    Example: [bold]mambalign eval calibrate gpt-4_single.jsonl --judge-base-url http://127.0.0.1:8000/v1
    --judge-model my-judge -n 100 --dry-run[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted=RESUME):
        from mambalign.evals import calibrate as calibration

        asks = asking(
            judge_base_url, judge_model, judge_key_env, judge_key_file, judge_extra, concurrency, timeout,
            price_in, price_out, max_cost, store or out / "replies",
        )  # fmt: skip
        sample = calibration.sampled(published, n=n, seed=seed, annotator=annotator, data_dir=data_dir)
        if dry_run:
            show_plan(asks, calibration.calls_of(sample), as_json)
            return
        report = calibration.calibrate(sample, asks, out)
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            told = {name: calibration.in_words(value) for name, value in report["numbers"].items()}
            make_console().print(make_table(f"{report['judge']} against {report['published_judge']}", told))
            print(report["verdict"])
        if report["missing"]:
            say(f"{report['missing']} verdicts are missing ({report['stopped'] or report['why_missing']}){RESUME}")
            raise typer.Exit(UNFINISHED)
