"""The model card of a run, and its way to the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from mambalign.data.mixer import TokenizedData
from mambalign.models import lineage
from mambalign.recipe import Recipe, UserError

logger = logging.getLogger("mambalign")

STAGES = {
    "cpt": "continued pre-training",
    "sft": "supervised fine-tuning",
    "dpo": "preference optimisation",
    "reward": "training of a reward head",
}
# A run folder holds much that is nobody's business on the hub, checkpoints above all.
NOT_UPLOADED = ["checkpoint-*", "checkpoint-*/**", "previous-*/**", "reference/**", "runs/**", ".*", ".*/**"]


def write(
    folder: Path, stage: str, recipe: Recipe, facts: dict[str, Any], data: TokenizedData, lines: list[dict[str, Any]]
) -> None:
    """`README.md` in `folder`: what it was made from, with what recipe and data, and how it measured."""
    header = {
        "library_name": "peft" if recipe.use_peft else "transformers",
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "base_model": facts["lineage"]["base"]["path"],
        "datasets": [name for name in recipe.dataset_mixer if not Path(name).expanduser().exists()],
        "tags": ["mambalign", "mamba", stage],
    }
    settings = recipe.to_dict()
    shown = {key: value for key, value in settings.items() if value != getattr(Recipe(), key)}
    parent = f" (itself the result of {STAGES[facts['trained_by']]})" if facts.get("trained_by") in STAGES else ""
    text = f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {recipe.run_name or folder.name}

Made from `{facts["model"]}`{parent} by {STAGES[stage]} with mambalign: {_objective(stage, recipe)}.

```python
{_usage(stage, recipe, str(recipe.hub_model_id or folder), facts)}
```

## Lineage

| | |
|---|---|
{_ancestry(facts["lineage"])}
| weights of `{facts["lineage"]["base"]["path"]}` (SHA-256) | `{facts["lineage"]["base"]["weights"]}` |
| training data (SHA-256 of the token ids) | `{data.fingerprint}` |

## Data

{_table(data.report)}

## Metrics

![Curves of the run](curves.svg)

{_metrics(lines)}

## Recipe

```yaml
{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()}
```
"""
    (folder / "README.md").write_text(text)


def _objective(stage: str, recipe: Recipe) -> str:
    if stage == "dpo":
        return f"`{recipe.loss_type}`, beta {recipe.beta}"
    return "Bradley-Terry on pairs" if stage == "reward" else "next-token cross-entropy"


def _usage(stage: str, recipe: Recipe, name: str, facts: dict[str, Any]) -> str:
    """How to load it."""
    if stage == "reward":
        return f"""# transformers has no sequence classification for Mamba; or: mambalign score {name} FILE.jsonl
from mambalign import load_model, load_tokenizer

tokenizer = load_tokenizer("{name}")
model = load_model("{name}", head="reward")
chat = [{{"role": "user", "content": "Hello?"}}, {{"role": "assistant", "content": "Hello!"}}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()  # ends with the end-of-turn token, as trained
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # the template wrote them all
reward = model(ids).logits.item()"""
    text = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
    if not recipe.use_peft:
        return text + f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    base = facts["lineage"]["base"]["path"]
    return (
        f"from peft import PeftModel\n{text}# An adapter on {base}, and on no other model.\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")'
    )


def _ancestry(line: dict[str, Any]) -> str:
    rows = [
        f"| {STAGES.get(step['stage'], step['stage'])} of | `{step['model']}`, revision "
        f"{step['revision'] or 'not pinned'} |"
        for step in lineage.steps(line)
    ]
    return "\n".join(rows)


def _table(values: dict[str, Any]) -> str:
    rows = [
        f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value} |" for key, value in values.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _metrics(lines: list[dict[str, Any]]) -> str:
    training = [line for line in lines if "learning_rate" in line]
    evaluation = [line for line in lines if any(key.startswith("eval_") for key in line)]
    rows = []
    for name, chosen in (("last training line", training[-1:]), ("last evaluation", evaluation[-1:])):
        for line in chosen:
            rows += [f"| {name} | {key} | {value:.5g} |" for key, value in line.items() if isinstance(value, float)]
    return "\n".join(["| when | metric | value |", "|---|---|---|", *rows]) if rows else "None were logged."


def push(folder: Path, recipe: Recipe) -> None:
    """Upload the finished run if the recipe asks for it. The model is safe on disk whatever the hub says."""
    if not recipe.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        repo = _repository(folder, recipe)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=NOT_UPLOADED, revision=recipe.hub_revision,
            commit_message="Finished run",
        )  # fmt: skip
    except _hub_errors() as error:
        raise UserError(
            f"the run is finished and whole in {folder}, but pushing it to the hub failed: {error}. "
            "Log in with `hf auth login` and upload the folder, or set push_to_hub: false"
        ) from error
    logger.info("pushed to https://huggingface.co/%s", repo)


def _hub_errors() -> tuple[type[Exception], ...]:
    """No network, no right, no login, a name that cannot be a repository's."""
    from huggingface_hub import errors

    return (errors.HTTPError, OSError, ValueError)  # type: ignore[attr-defined]  # of whichever HTTP library it uses


def _repository(folder: Path, recipe: Recipe) -> str:
    """The full name of the repository to push to, made (with its branch) if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo: str = api.create_repo(
        recipe.hub_model_id or folder.name, private=recipe.hub_private_repo, exist_ok=True
    ).repo_id
    if recipe.hub_revision:
        api.create_branch(repo, branch=recipe.hub_revision, exist_ok=True)
    return repo


class _PushCheckpoints(TrainerCallback):
    """Uploads the model of every checkpoint in the background; a failed upload is reported and forgotten."""

    def __init__(self, repository: str, recipe: Recipe):
        self.repository, self.recipe = repository, recipe

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        from huggingface_hub import HfApi

        future: Any = HfApi().upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            allow_patterns=["*.json", "*.safetensors", "*.jinja"],
            ignore_patterns=["trainer_state.json", "manifest.json", "accumulators.json", "trained.safetensors"],
            revision=self.recipe.hub_revision,
            commit_message=f"Step {state.global_step}",
            run_as_future=True,
        )
        future.add_done_callback(self._report)

    @staticmethod
    def _report(done: Any) -> None:
        if done.exception() is not None:
            logger.warning("pushing a checkpoint failed: %s", done.exception())


def attach_hub(trainer: Any, recipe: Recipe) -> None:
    """Make the repository of a run with `push_to_hub: true` before days are spent, and push along the way if asked.

    Raises:
        UserError: the hub does not take it: not logged in, no network, no right to write there.
    """
    if not recipe.push_to_hub or not trainer.is_world_process_zero():
        return
    try:
        repository = _repository(Path(trainer.args.output_dir), recipe)
    except _hub_errors() as error:
        raise UserError(
            f"push_to_hub: the hub refuses the repository ({error}). Log in with `hf auth login`, or train with "
            "push_to_hub: false and upload the folder later"
        ) from error
    if recipe.hub_strategy != "end":
        trainer.add_callback(_PushCheckpoints(repository, recipe))
