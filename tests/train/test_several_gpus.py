"""Two GPUs, each with a process of its own, and NCCL between them: started as users do, held to what gloo's tests are.

About ten runs, a few at a time; each test waits for those it is about. Without GPUs, to debug this file with gloo:
`MAMBALIGN_SEVERAL_ON_CPU=1 pytest tests/train/test_several_gpus.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from mambalign.cluster.launch import visible_gpus
from mambalign.recipe import PAIR_STAGES, Recipe
from mambalign.train import checkpoint
from tests.train.conftest import history
from tests.train.leash import let
from tests.train.test_preemption import step_of

ON_CPU = "MAMBALIGN_SEVERAL_ON_CPU" in os.environ
REPOSITORY = Path(__file__).resolve().parents[2]
AT_ONCE = 2 if ON_CPU else 5  # runs
LIMIT = 300.0 if ON_CPU else 90.0  # seconds that a run may take, start and imports included: what hangs is ended
SAVED, MISTAKE = 85, 2  # exit codes

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices")
pytestmark = [] if ON_CPU else [pytest.mark.gpu, needs_two]

# Of 38 rows 12 make a step: in an epoch's last one, one process gets two rows and the other none. Under the bound on
# tokens they have unequal numbers of micro-batches, too. Without CUDA graphs, which fill batches up, where not they are
# the matter.
COMMON: dict[str, Any] = dict(
    max_length=128, max_train_samples=38, global_batch_size=12, per_device_train_batch_size=3, packing=False,
    per_device_eval_batch_size=3, max_tokens_per_device=140, learning_rate=3e-3, adam_epsilon=1e-3, bf16=True,
    cuda_graphs=False, logging_steps=1, eval_strategy="steps", eval_steps=8, save_steps=8, report_to="none",
    disable_tqdm=True, use_cpu=ON_CPU,
)  # fmt: skip
LORA: dict[str, Any] = dict(
    use_peft=True, dtype="bfloat16", lora_r=4, lora_dropout=0.0, lora_target_modules=["in_proj", "dt_proj"]
)


@dataclass(frozen=True)
class Run:
    """A run, or two of them: `stopped` says how it is asked to stop half way, after which the same command goes on.

    way: how it is started, see `Bench.command`.
    """

    stage: str
    way: str
    changes: dict[str, Any]
    stopped: Callable[[Bench, str, subprocess.Popen[bytes]], None] | None = None


class Bench:
    """Runs by name in folders of their own: `NAME/out` is the run's, `NAME/log` what it said, `NAME/notes` of ranks."""

    def __init__(self, folder: Path, workbench: Path):
        self.folder, self.workbench = folder, workbench
        self.codes: dict[str, list[int]] = {}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
        paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self.env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": shown}

    def out(self, name: str) -> Path:
        return self.folder / name / "out"

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / name).rglob("*log")))

    def ranks(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / name / "notes").glob("rank-*.json"))]

    def write(self, name: str, stage: str, changes: dict[str, Any]) -> None:
        (self.folder / name / "notes").mkdir(parents=True)
        values = COMMON | dict(
            model_name_or_path=str(self.workbench / "model"),
            dataset_mixer={str(self.workbench / stage): 1.0},
            output_dir=str(self.out(name)),
            **({"max_prompt_length": 64} if stage in PAIR_STAGES else {}),
        )
        recipe = self.folder / name / "recipe.yaml"
        recipe.write_text(Recipe.from_dict(values | changes, stage=stage).to_yaml())
        stages = {stage: {"recipe": str(recipe)}}
        resources = {"gpus": 2, "cpus": 2, "memory": "8GB", "time": "1h"}
        pipeline = {"name": name, "resources": resources, "stages": stages}
        (self.folder / name / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))

    def command(self, name: str, stage: str, way: str) -> list[str]:
        """One process, torchrun, what job files start, or `mambalign run`."""
        here, python = self.folder / name, [sys.executable, "-m"]
        words = ["tests.train.witness", str(here / "notes"), stage, str(here / "recipe.yaml")]
        launcher = ["mambalign.cluster.launch", "--gpus", "2", "--record", str(here / "record")]
        return [
            *python,
            *{
                "one": words,
                "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m", *words],
                "launch": [*launcher, "--", *python, *words],
                "run": ["mambalign", "run", str(here / "pipeline.yaml"), "--gpus", "2", "--out", str(here / "run")],
            }[way],
        ]

    def start(self, name: str, stage: str, way: str) -> subprocess.Popen[bytes]:
        with (self.folder / name / "log").open("ab") as log:
            return subprocess.Popen(
                self.command(name, stage, way), stdout=log, stderr=log, env=self.env, cwd=self.folder / name
            )

    def ended(self, name: str, job: subprocess.Popen[bytes], code: int) -> None:
        """Wait for it; every process of it is gone afterwards, also of one that hangs."""
        family: list[int] = []
        try:
            self.codes.setdefault(name, []).append(job.wait(LIMIT))
        except subprocess.TimeoutExpired:
            family = family_of(job.pid)
            raise AssertionError(f"{name} does not end:\n{self.log(name)[-12000:]}") from None
        finally:
            for pid in family if job.poll() is None else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self.codes[name][-1] == code, f"{name}: {self.codes[name]}\n{self.log(name)[-6000:]}"

    def do(self, name: str, run: Run) -> Path:
        self.write(name, run.stage, run.changes)
        if run.stopped is not None:
            job = self.start(name, run.stage, run.way)
            try:
                run.stopped(self, name, job)
            finally:
                self.ended(name, job, SAVED)
        self.ended(name, self.start(name, run.stage, run.way), 0)
        return self.out(name)


def family_of(pid: int) -> list[int]:
    """The process and those that come from it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # has ended
            continue
    found = [pid]
    for one in found:
        found.extend(child for child, parent in parents.items() if parent == one)
    return found


def waited(holds: Callable[[], Any], bench: Bench, name: str, job: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert job.poll() is None, f"{name} ended too early ({job.returncode}):\n{bench.log(name)[-6000:]}"
        assert time.monotonic() < end, f"{name} does not get on"
        time.sleep(0.005)


def all_are_told(bench: Bench, name: str, job: subprocess.Popen[bytes]) -> None:
    """As by a scheduler or a person: SIGTERM to what they have started."""
    waited(lambda: step_of(bench.out(name)) >= 2, bench, name, job)
    job.send_signal(signal.SIGTERM)


def one_is_told(bench: Bench, name: str, job: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the second process alone, while all are held before the sixth step; that they may still make."""
    leash, second = bench.folder / name / "notes" / "leash", bench.folder / name / "notes" / "rank-1.json"
    let(leash, 5)
    waited(lambda: step_of(bench.out(name)) >= 5 and second.exists(), bench, name, job)
    os.kill(json.loads(second.read_text())["pid"], signal.SIGTERM)
    let(leash, 6)
    waited(lambda: (bench.out(name) / "checkpoint-6").exists() or job.poll() is not None, bench, name, job)
    leash.unlink()


EPOCHS = dict(num_train_epochs=8)  # 32 steps, for a signal that comes anywhere in between
BEST = dict(load_best_model_at_end=True)
DROPOUT = LORA | dict(lora_dropout=0.1)
RUNS = {
    "sft-one": Run("sft", "one", EPOCHS | BEST),
    "sft": Run("sft", "launch", EPOCHS | BEST),
    "sft-stopped": Run("sft", "run", EPOCHS | BEST, all_are_told),
    "fsdp": Run("sft", "launch", EPOCHS | BEST | dict(fsdp="full_shard")),
    "fsdp-stopped": Run("sft", "launch", EPOCHS | BEST | dict(fsdp="full_shard"), one_is_told),
    "graphs-one": Run("sft", "one", EPOCHS | dict(cuda_graphs=True)),
    "graphs": Run("sft", "launch", EPOCHS | dict(cuda_graphs=True)),
    "graphs-stopped": Run("sft", "launch", EPOCHS | dict(cuda_graphs=True), all_are_told),
    "dropout": Run("dpo", "launch", DROPOUT | dict(num_train_epochs=3)),
    "dropout-stopped": Run("dpo", "launch", DROPOUT | dict(num_train_epochs=3), one_is_told),
    "dpo-one": Run("dpo", "one", dict(num_train_epochs=2)),
    "dpo": Run("dpo", "launch", dict(num_train_epochs=2)),
    "lora-one": Run("dpo", "one", LORA | dict(num_train_epochs=2)),
    "lora": Run("dpo", "torchrun", LORA | dict(num_train_epochs=2)),
}


@pytest.fixture(scope="module")
def bench(workbench: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("several"), workbench)


@pytest.fixture(scope="module")
def runs(bench: Bench) -> Iterator[Callable[[str], Path]]:
    """A function that waits for a run and returns its folder. All are begun at once, the long ones first."""
    order = sorted(RUNS, key=lambda name: RUNS[name].stopped is None)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[str, Future[Path]] = {name: pool.submit(bench.do, name, RUNS[name]) for name in order}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).exists()))


def losses(folder: Path) -> list[dict[str, Any]]:
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    return history(folder)


def farthest(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]], name: str) -> float:
    return max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) if name in a)


@pytest.mark.parametrize(("one", "two"), [("sft-one", "sft"), ("sft-one", "fsdp"), ("dpo-one", "dpo"),
                                          ("lora-one", "lora"), ("graphs-one", "graphs")])  # fmt: skip
def test_two_processes_are_one(one: str, two: str, runs: Callable[[str], Path]) -> None:
    """The loss is that of all rows and tokens, however unequal their shares are.

    Micro-batches are the same, so what differs is the order in which gradients are added: nothing that a loss shows,
    until it moves a weight over an edge of bfloat16's rounding, which is 1e-4 of a loss (with gloo, after 20 steps). A
    process that is left out, or a mean of means, shows in the first epoch, whose last step is uneven.
    """
    expected, found = losses(runs(one)), losses(runs(two))
    assert [line.keys() for line in expected] == [line.keys() for line in found]
    assert farthest(expected[:4], found[:4], "loss") < 1e-5
    assert farthest(expected, found, "loss") < 1e-3
    assert farthest(expected, found, "eval_loss") < 1e-3
    for a, b in zip(expected, found, strict=True):
        b["epoch"] = a["epoch"]  # it has as many steps, but they are parts of a device batch more, an empty one
        assert a == pytest.approx(b, rel=2e-3, abs=2e-3)
    trained = [line["loss"] for line in expected if "loss" in line]
    assert trained[-1] < trained[0]
    for name, value in weights(runs(one)).items():
        assert (value.float() - weights(runs(two))[name].float()).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", ["sft", "fsdp", "graphs", "dropout"])
def test_stopped_and_resumed_it_is_the_same_run(name: str, runs: Callable[[str], Path], bench: Bench) -> None:
    """To the last bit; dropout's random numbers, of which every device has its own, included."""
    calm, shaken = runs(name), runs(f"{name}-stopped")
    assert bench.codes[f"{name}-stopped"] == [SAVED, 0]
    assert losses(calm) == losses(shaken)
    found = weights(shaken)
    assert all(torch.equal(value, found[key]) for key, value in weights(calm).items())
    attempts = json.loads((shaken / "run.json").read_text())["attempts"]
    assert [(attempt["status"], attempt["processes"]) for attempt in attempts] == [("preempted", 2), ("finished", 2)]


def test_shards_are_saved_as_a_whole_model(runs: Callable[[str], Path]) -> None:
    newest = checkpoint.newest_complete(runs("fsdp"))
    assert newest is not None and newest.name == "checkpoint-32"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(newest)
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.items())


@pytest.mark.skipif(ON_CPU, reason="about GPUs")
def test_processes_run_graphs_and_average_their_gradients(runs: Callable[[str], Path], bench: Bench) -> None:
    for name in ("graphs-one", "graphs"):
        runs(name)
        assert all(rank["graphs"] > 1 and rank["way"] == "MambaForCausalLM" for rank in bench.ranks(name))


@pytest.mark.parametrize(("name", "way"), [("sft", "DistributedDataParallel"), ("fsdp", "fsdp"),
                                           ("lora", "DistributedDataParallel")])  # fmt: skip
def test_every_process_has_a_gpu_of_its_own(name: str, way: str, runs: Callable[[str], Path], bench: Bench) -> None:
    runs(name)
    ranks = bench.ranks(name)
    assert [rank["way"] for rank in ranks] == [way, way]
    assert [rank["backend"] for rank in ranks] == ["gloo" if ON_CPU else "nccl"] * 2
    if ON_CPU:
        return
    assert [rank["device"] for rank in ranks] == ["cuda:0", "cuda:1"]
    assert [[held > 0 for held in rank["held"][:2]] for rank in ranks] == [[True, False], [False, True]]
    assert [rank["contexts"] for rank in ranks] == [[0], [1]]
    for op in ("selective_scan", "causal_conv1d", "token_logps"):
        assert f"{op}: backend cuda" in bench.log(name)


@pytest.mark.skipif(ON_CPU, reason="about GPUs")
def test_all_gpus_are_seen_without_a_driver() -> None:
    assert visible_gpus(os.environ) == torch.cuda.device_count()


def test_what_the_first_process_refuses_is_refused_by_all(runs: Callable[[str], Path], bench: Bench) -> None:
    """None waits for it: over NCCL nobody would notice that it has gone."""
    runs("lora")
    path = bench.folder / "lora" / "recipe.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.003", "learning_rate: 0.004"))
    started = time.monotonic()
    job = bench.start("lora", "dpo", "launch")
    bench.ended("lora", job, MISTAKE)
    assert bench.log("lora").count("holds a run of another recipe") == 2
    assert time.monotonic() - started < 60, "killed, not told"
