"""A pipeline: named stages, what each runs, needs and asks of a machine. Pure: files are read by the caller.

```yaml
name: tiny
resources: {gpus: 1-4, cpus: 8, memory: 64GB, time: 4h}     # of every stage; a stage's own win
stages:
  sft: {recipe: recipes/tiny/sft/config_full.yaml}
  dpo: {recipe: recipes/tiny/dpo/config_full.yaml, model: sft, overrides: {beta: 0.05}}
  mt-bench: {model: dpo, output_dir: runs/mt-bench, judge: {base_url: http://127.0.0.1:8000/v1, model: my-judge}}
  more: {command: "lm-eval --model_args pretrained=${dpo.output_dir}", resources: {gpus: 1}}
```
"""

# ruff: noqa: RUF009 - `key` only calls dataclasses.field
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mambalign.cluster.evaluation import EVALUATIONS, evaluation_command
from mambalign.cluster.keys import (
    ClusterError,
    block,
    build,
    environment,
    key,
    mebibytes,
    number,
    one_of,
    plain_map,
    seconds,
    span,
    text,
    texts,
    whole,
)
from mambalign.support import nearest

TRAINING = ("cpt", "sft", "dpo", "reward")
KINDS = (*TRAINING, "merge", *EVALUATIONS, "command")
_OF_EVALUATIONS = ("answer", "judge", "report")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^${}\s]*)\.([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Resources:
    """What a stage asks of a machine; `cpus`, `memory` and `disk` are those of one node."""

    gpus: tuple[int, int] = key((1, 1), span, "GPUs a node: 4, or 1-4 to take what comes first; 0 for none.")
    nodes: tuple[int, int] = key((1, 1), span, "Machines: 2, or 1-4 (Slurm only).")
    cpus: int = key(4, whole, "CPU cores of a node.")
    memory: int = key(32 * 1024, mebibytes, "Main memory of a node: 64GB.")
    disk: int = key(50 * 1024, mebibytes, "Scratch space (HTCondor): 60GB.")
    gpu_memory: int | None = key(None, mebibytes, "Least memory of a GPU. A 40 GB card reports 40536 MB: say 38GB.")
    gpu_capability: float | None = key(None, number, "Least CUDA capability; 8.0 has bfloat16.")
    time: int = key(24 * 3600, seconds, "Longest stretch without a pause: Slurm's time limit.")
    slice: int | None = key(
        None, seconds, "Shortest stretch that is worth a start. The stage fits into holes of this length, and saves."
    )


@dataclass(frozen=True)
class RecipeFacts:
    """What a training stage's recipe says, as the caller read it, overrides included.

    `text`: the whole recipe as YAML. `inputs`: local paths it reads. `accumulation(devices)` raises ValueError where
    the global batch cannot be reached. `fixed_batch`: whether the batch of a step is the same on any number of devices.
    """

    text: str
    output_dir: str
    model: str
    inputs: tuple[str, ...] = ()
    fixed_batch: bool = True
    accumulation: Callable[[int], Any] = lambda devices: 1


ReadRecipe = Callable[[str, str, Mapping[str, Any]], RecipeFacts]  # kind, path, overrides


@dataclass(frozen=True)
class Stage:
    """A stage, resolved: references replaced, its recipe read. `world` lists the numbers of devices it can run on."""

    name: str
    kind: str
    needs: tuple[str, ...]
    resources: Resources
    env: dict[str, str]
    output_dir: str | None = None
    shell: str | None = None
    recipe: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    gpu_counts: tuple[int, ...] = (1,)
    node_counts: tuple[int, ...] = (1,)

    @property
    def trains(self) -> bool:
        return self.kind in TRAINING

    def recipe_file(self, folder: str) -> str:
        return os.path.join(folder, f"{self.name}.yaml")

    def command(self, folder: str, program: str = "mambalign") -> str:
        """The stage as one shell command, run in the working directory; `folder` holds the frozen recipes."""
        if self.trains:
            return f"{program} {self.kind} {shlex.quote(self.recipe_file(folder))}"
        assert self.shell is not None
        return self.shell


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which they can run."""

    name: str
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = field(default=())

    def stage(self, name: str) -> Stage:
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise ClusterError(f"there is no stage {name!r}{nearest(name, found)} (there are {', '.join(found)})")
        return found[name]


@dataclass(frozen=True)
class _Written:
    """A stage as the file says it."""

    kind: str | None = key(None, one_of(*KINDS), "What it is; default: its name, its recipe's folder, or command.")
    recipe: str | None = key(None, text, "Recipe of a training stage.")
    overrides: dict[str, Any] = key({}, plain_map, "Keys of the recipe that are different here.")
    model: str | None = key(None, text, "Stage (or path, or hub id) whose model this one starts from.")
    command: str | None = key(None, block, "Shell command of any other stage.")
    answer: dict[str, Any] = key({}, plain_map, "Of an evaluation: options of `mambalign eval ... answer`.")
    judge: dict[str, Any] = key({}, plain_map, "Of an evaluation: base_url, model and other options of the judge.")
    report: dict[str, Any] = key({}, plain_map, "Of an evaluation: options of `mambalign eval ... report`.")
    data_dir: str | None = key(None, text, "Of an evaluation: folder with the benchmark's files.")
    output_dir: str | None = key(None, text, "Folder the stage writes; default: its recipe's.")
    needs: tuple[str, ...] = key((), texts, "Stages that must have finished before, beside those it refers to.")
    inputs: tuple[str, ...] = key((), texts, "Local files it reads, to be taken along where no file system is shared.")
    outputs: tuple[str, ...] = key((), texts, "Files it writes beside output_dir, to be brought back.")
    resources: dict[str, Any] = key({}, plain_map, "What it asks of a machine.")
    env: dict[str, str] = key({}, environment, "Environment variables.")


@dataclass(frozen=True)
class _File:
    name: str = key("pipeline", text, "Name of the pipeline.")
    resources: dict[str, Any] = key({}, plain_map, "What every stage asks for.")
    env: dict[str, str] = key({}, environment, "Environment variables of every stage.")
    stages: dict[str, Any] = key({}, plain_map, "The stages by name.")


def read_pipeline(values: Mapping[str, Any], source: str, read_recipe: ReadRecipe) -> Pipeline:
    """The pipeline of a YAML file's map.

    Args:
        values: the map; `source` names it in errors.
        read_recipe: (kind, path, overrides) -> what the recipe says; raises ValueError in a user's words.

    Raises:
        ClusterError: an unknown key, a missing recipe, a cycle, a stage before the one it starts from, a request that
            no machine can meet, two stages that write one folder.
    """
    file = build(_File, values, source)
    _check_name(file.name, f"{source}: name")
    if not file.stages:
        raise ClusterError(f"{source}: stages is missing: name at least one, such as `sft: {{recipe: FILE}}`")
    build(Resources, file.resources, f"{source}: resources")
    written: dict[str, _Written] = {}
    for name, entry in file.stages.items():
        _check_name(name, f"{source}: stage")
        written[name] = build(_Written, entry, f"{source}: stage {name}")
    needs = {name: _needs(name, stage, written, source) for name, stage in written.items()}
    notes: list[str] = []
    stages: dict[str, Stage] = {}
    models: dict[str, str] = {}
    for name in _in_order(needs, source):
        where = f"{source}: stage {name}"
        stage, model = _resolve(name, written[name], file, stages, read_recipe, where, notes)
        stages[name], models[name] = replace(stage, needs=needs[name]), model
    needs = _model_needs(list(written), stages, models, needs, source)
    order = _in_order(needs, source)
    _check_outputs(stages, models, source)
    notes += _suspicious(stages, models, needs)
    return Pipeline(file.name, tuple(replace(stages[name], needs=needs[name]) for name in order), tuple(notes))


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise ClusterError(f"{where} {name!r} must be letters, digits, - and _: files and jobs are named by it")


# -------------------------------------------------------------------------------------------------------------- order


def _texts_of(stage: _Written) -> Iterable[str]:
    yield from filter(None, (stage.command, stage.recipe, stage.output_dir, stage.model, stage.data_dir))
    yield from (*stage.inputs, *stage.outputs, *stage.env.values())
    for values in (stage.overrides, stage.answer, stage.judge, stage.report):
        yield from _leaves(values)


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from (str(name), *_leaves(item))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _needs(name: str, stage: _Written, all_stages: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Named in `needs`, in `model`, or in a reference."""
    found = list(stage.needs)
    if stage.model in all_stages:
        found.append(str(stage.model))
    for other, attribute in (match for words in _texts_of(stage) for match in _REFERENCE.findall(words)):
        if attribute != "output_dir":
            raise ClusterError(f"{source}: stage {name}: ${{{other}.{attribute}}}: a stage has only an output_dir")
        found.append(other)
    for other in found:
        if other == name:
            raise ClusterError(f"{source}: stage {name} needs itself")
        if other not in all_stages:
            hint = nearest(other, all_stages)
            raise ClusterError(f"{source}: stage {name} needs {other!r}, which is no stage{hint}")
    return tuple(dict.fromkeys(found))


def _in_order(needs: Mapping[str, tuple[str, ...]], source: str) -> list[str]:
    """Every stage behind those it needs, otherwise as written."""
    order: list[str] = []
    while len(order) < len(needs):
        ready = [name for name, others in needs.items() if name not in order and set(others) <= set(order)]
        if not ready:
            raise ClusterError(f"{source}: the stages wait for each other in a circle: {' -> '.join(_cycle(needs))}")
        order.append(ready[0])
    return order


def _cycle(needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    stuck = dict(needs)
    while removable := [name for name, others in stuck.items() if not set(others) & set(stuck)]:
        for name in removable:
            del stuck[name]
    path = [next(iter(stuck))]
    while path[-1] not in path[:-1]:
        path.append(next(other for other in stuck[path[-1]] if other in stuck))
    return path[path.index(path[-1]) :]


def _ancestors(name: str, needs: Mapping[str, tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    queue = list(needs[name])
    while queue:
        other = queue.pop()
        if other not in found:
            found.add(other)
            queue += needs[other]
    return found


def _model_needs(
    written: list[str],
    stages: Mapping[str, Stage],
    models: Mapping[str, str],
    needs: Mapping[str, tuple[str, ...]],
    source: str,
) -> dict[str, tuple[str, ...]]:
    """A stage needs the one that writes the model (or other input) it reads, whether or not it says so."""
    result = dict(needs)
    makers = {_path(stage.output_dir): name for name, stage in stages.items() if stage.output_dir}
    for name, stage in stages.items():
        for path in (models[name], *stage.inputs):
            maker = makers.get(_path(path)) if path else None
            if maker is None or maker == name or maker in _ancestors(name, result):
                continue
            if name in _ancestors(maker, result) or written.index(maker) > written.index(name):
                raise ClusterError(
                    f"{source}: stage {name} starts from {path}, the result of {maker}, but comes before it; "
                    f"put {maker} above {name}, or say `needs: [{maker}]`"
                )
            result[name] = (*result[name], maker)
    return result


def _path(path: str | None) -> str:
    return os.path.normpath(os.path.expanduser(str(path)))


def _check_outputs(stages: Mapping[str, Stage], models: Mapping[str, str], source: str) -> None:
    owner: dict[str, str] = {}
    for name, stage in stages.items():
        for path in filter(None, (stage.output_dir, *stage.outputs)):
            other = owner.setdefault(_path(path), name)
            if other != name:
                raise ClusterError(
                    f"{source}: stages {other} and {name} both write {path}; give one of them another output_dir"
                )
        if stage.output_dir and models[name] and _path(models[name]) == _path(stage.output_dir):
            raise ClusterError(f"{source}: stage {name} would overwrite the model it starts from, {stage.output_dir}")


def _suspicious(
    stages: Mapping[str, Stage], models: Mapping[str, str], needs: Mapping[str, tuple[str, ...]]
) -> Iterable[str]:
    trained = [name for name, stage in stages.items() if stage.kind == "sft"]
    for name, stage in stages.items():
        if stage.kind == "dpo" and trained and not any(other in _ancestors(name, needs) for other in trained):
            yield (
                f"stage {name} starts from {models[name]}, not from what {trained[0]} makes; "
                f"if that is not meant, say `model: {trained[0]}`"
            )


# ------------------------------------------------------------------------------------------------------------ a stage


def _resolve(
    name: str,
    written: _Written,
    file: _File,
    done: Mapping[str, Stage],
    read_recipe: ReadRecipe,
    where: str,
    notes: list[str],
) -> tuple[Stage, str]:
    """(the stage, the model it starts from or an empty text)."""

    def fill(words: Any) -> Any:
        if isinstance(words, str):
            return _REFERENCE.sub(lambda match: _output_of(done[match[1]], where), words)
        if isinstance(words, Mapping):
            return {fill(key): fill(value) for key, value in words.items()}
        return [fill(word) for word in words] if isinstance(words, list) else words

    kind = _kind(name, written, where)
    resources = build(Resources, {**file.resources, **written.resources}, f"{where}: resources")
    env = {**file.env, **{variable: fill(value) for variable, value in written.env.items()}}
    model = fill(written.model or "")
    if model in done:
        model = _output_of(done[model], where)
    inputs = tuple(fill(path) for path in written.inputs)
    stage = Stage(name, kind, (), resources, env, fill(written.output_dir), inputs=inputs,
                  outputs=tuple(fill(path) for path in written.outputs))  # fmt: skip
    if kind in TRAINING:
        overrides = fill(written.overrides)
        if model:
            overrides["model_name_or_path"] = model
        if stage.output_dir:
            overrides["output_dir"] = stage.output_dir
        try:
            facts = read_recipe(kind, fill(str(written.recipe)), overrides)
        except (ValueError, FileNotFoundError) as error:
            raise ClusterError(f"{where}: {error}") from error
        model = facts.model
        made = [model] if _path(model) in {_path(other.output_dir) for other in done.values()} else []
        found = dict.fromkeys((*made, *facts.inputs, *inputs))
        stage = replace(stage, output_dir=facts.output_dir, recipe=facts.text, inputs=tuple(found))
        stage = _with_counts(stage, facts, where, notes)
    elif kind == "merge":
        if not model or not stage.output_dir:
            raise ClusterError(f"{where}: merge needs `model:` (what to merge) and `output_dir:` (where to)")
        shell = f"mambalign merge {shlex.quote(model)} {shlex.quote(stage.output_dir)}"
        stage = replace(stage, shell=shell, inputs=(model, *inputs))
    elif kind in EVALUATIONS:
        options = {verb: fill(getattr(written, verb)) for verb in _OF_EVALUATIONS}
        data_dir = fill(written.data_dir)
        shell = evaluation_command(kind, model, stage.output_dir or "", options, data_dir, where)
        stage = replace(stage, shell=shell, inputs=tuple(dict.fromkeys((model, *filter(None, [data_dir]), *inputs))))
    else:
        named = [_output_of(done[other], where) for other, _ in _REFERENCE.findall(str(written.command))]
        found = dict.fromkeys((*([model] if model else []), *named, *inputs))
        stage = replace(stage, shell=fill(written.command), inputs=tuple(found))
    if kind not in TRAINING:
        if resources.nodes[1] > 1:
            raise ClusterError(f"{where}: nodes: a {kind} stage runs on one machine")
        stage = replace(stage, gpu_counts=_counts(resources.gpus))
    if resources.slice and resources.slice > resources.time:
        raise ClusterError(f"{where}: slice ({resources.slice} s) is longer than time ({resources.time} s)")
    if resources.cpus < 1:
        raise ClusterError(f"{where}: cpus is {resources.cpus}; a stage needs at least one")
    return stage, model


def _kind(name: str, written: _Written, where: str) -> str:
    kind = written.kind
    if kind is None and written.command is not None:
        kind = "command"
    if kind is None:
        parts = (name, *os.path.normpath(written.recipe or "").split(os.sep)[-2:-1])
        kind = next((part for part in parts if part in KINDS), None)
    if kind is None:
        raise ClusterError(f"{where}: say what it is, `kind:` one of {', '.join(KINDS)}")
    if kind in TRAINING and not written.recipe:
        raise ClusterError(f"{where}: recipe is missing: the YAML file of the {kind} run")
    if kind == "command" and not written.command:
        raise ClusterError(f"{where}: command is missing: what to run")
    useless = [n for n in ("recipe", "overrides") if getattr(written, n) and kind not in TRAINING]
    useless += [n for n in (*_OF_EVALUATIONS, "data_dir") if getattr(written, n) and kind not in EVALUATIONS]
    useless += ["command"] if written.command and kind != "command" else []
    if useless:
        raise ClusterError(f"{where}: {useless[0]} means nothing for a {kind} stage; leave it out")
    return kind


def _output_of(stage: Stage, where: str) -> str:
    if not stage.output_dir:
        raise ClusterError(f"{where} refers to the output of {stage.name}, which has no output_dir; give it one")
    return stage.output_dir


def _counts(wanted: tuple[int, int]) -> tuple[int, ...]:
    return tuple(range(wanted[0], wanted[1] + 1))


def _with_counts(stage: Stage, facts: RecipeFacts, where: str, notes: list[str]) -> Stage:
    """The numbers of GPUs and nodes on which every step has the recipe's batch."""
    wanted = stage.resources
    if wanted.nodes[0] < 1:
        raise ClusterError(f"{where}: nodes is {wanted.nodes[0]}; a stage needs at least one")
    if wanted.nodes[1] > 1 and wanted.gpus[0] != wanted.gpus[1]:
        raise ClusterError(f"{where}: gpus and nodes are both ranges; fix one of them")
    if (wanted.gpus[0] != wanted.gpus[1] or wanted.nodes[0] != wanted.nodes[1]) and not facts.fixed_batch:
        raise ClusterError(
            f"{where}: a range of devices would change the batch of a step with their number; set global_batch_size "
            "in the recipe instead of gradient_accumulation_steps, or fix the number of GPUs"
        )
    worlds: dict[tuple[int, int], str] = {}
    for gpus in _counts(wanted.gpus):
        for nodes in _counts(wanted.nodes):
            try:
                facts.accumulation(max(gpus, 1) * nodes)
                worlds[gpus, nodes] = ""
            except ValueError as error:
                worlds[gpus, nodes] = str(error)
    good = [world for world, problem in worlds.items() if not problem]
    if not good:
        raise ClusterError(f"{where}: {next(iter(worlds.values()))}; ask for another number of GPUs")
    if len(good) < len(worlds):
        left = sorted({gpus * nodes for (gpus, nodes), problem in worlds.items() if problem})
        notes.append(f"stage {stage.name} will not use {', '.join(map(str, left))} devices: its batch does not divide")
    gpu_counts, node_counts = (tuple(sorted({world[i] for world in good})) for i in (0, 1))
    return replace(stage, gpu_counts=gpu_counts, node_counts=node_counts)


def to_dict(pipeline: Pipeline, folder: str) -> dict[str, Any]:
    """What `status` reads later: plain values."""
    stages = {
        stage.name: {
            "kind": stage.kind,
            "needs": list(stage.needs),
            "output_dir": stage.output_dir,
            "command": stage.command(folder),
            "resources": {item.name: getattr(stage.resources, item.name) for item in fields(Resources)},
        }
        for stage in pipeline.stages
    }
    return {"name": pipeline.name, "stages": stages}
