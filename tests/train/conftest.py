"""A tiny model, tokenizer and data set on disk, and runs of them that can be killed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MambaConfig, PreTrainedTokenizerFast

from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import save_model
from mambalign.recipe import PAIR_STAGES, Recipe
from mambalign.train.run import run
from tests.train.leash import hold
from tests.waiting import until

WORDS = "red blue green dog cat bird runs sleeps eats the a big small yes no why because not very".split()
# Nothing after the end of turn, so that a completion is the same tokens to every library.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>\n{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an end-of-text token: nothing to train, nothing unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def sentence(generator: torch.Generator, longest: int = 6) -> str:
    count = int(torch.randint(1, longest + 1, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"messages": [{"role": r, "content": sentence(generator)} for r in ("user", "assistant")]} for _ in range(count)
    ]


def preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": sentence(generator)}]
        answers = [[{"role": "assistant", "content": f"{sentence(generator)} {i} {side}"}] for side in ("yes", "no")]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `sft/` and `dpo/` (each train.jsonl and test.jsonl)."""
    folder = tmp_path_factory.mktemp("workbench")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4)
    save_model(MambaForCausalLM(config), folder / "model", tokenizer=byte_tokenizer())
    for name, make in (("sft", conversations), ("dpo", preferences)):
        (folder / name).mkdir()
        write_jsonl(folder / name / "train.jsonl", make(40, 1))
        write_jsonl(folder / name / "test.jsonl", make(8, 2))
    return folder


@pytest.fixture
def recipe(workbench: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(stage: str, **changes: Any) -> Recipe:
        values: dict[str, Any] = dict(
            model_name_or_path=str(workbench / "model"),
            dataset_mixer={str(workbench / ("dpo" if stage == "reward" else stage)): 1.0},
            output_dir=str(tmp_path / stage),
            max_length=128,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            num_train_epochs=2,
            logging_steps=2,
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        if stage in PAIR_STAGES:
            values |= dict(max_prompt_length=64, per_device_train_batch_size=4)
        return Recipe.from_dict(values | changes, stage=stage)

    return make


def history(folder: Path) -> list[dict[str, Any]]:
    """The training lines of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocked = ("tokens_per_second", "runtime")
    return [{k: v for k, v in line.items() if not any(word in k for word in clocked)} for line in lines]


def _child(stage: str, values: dict[str, Any], prepare: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    run(stage, Recipe.from_dict(values))


def start(stage: str, recipe: Recipe, prepare: Callable[[], None] | None = None) -> Any:
    """The run in a process of its own, behind `prepare`, a function of a module."""
    # A fork server: as quick as a fork, without the threads of the libraries this process has already used.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambalign.train.run"])
    child = context.Process(target=_child, args=(stage, recipe.to_dict(), prepare))
    child.start()
    return child


def held_at_the_last_step() -> None:
    hold(lambda trainer: trainer.state.max_steps - 1)


def killed_run(
    stage: str, recipe: Recipe, when: Callable[[Path], bool], prepare: Callable[[], None] = held_at_the_last_step
) -> None:
    """Run in a process of its own, as far as `prepare` lets it, and SIGKILL it as soon as `when(output_dir)` holds."""
    child = start(stage, recipe, prepare)
    try:
        until(lambda: when(Path(str(recipe.output_dir))) or not child.is_alive())
        assert child.is_alive(), f"the run ended by itself with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
