"""Submit files: golden texts, values and matches by HTCondor's own bindings, a starter that evicts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mambalign.cli.cluster import read_recipe
from mambalign.cluster import htcondor
from mambalign.cluster.attempts import newest_step, read_lines
from mambalign.cluster.htcondor import HTCondorProfile, gpu_request, render
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.pipeline import read_pipeline
from mambalign.recipe import read_yaml_map
from tests.cluster.conftest import chain, fake_recipe, on_a_leash
from tests.cluster.golden import check_golden
from tests.train.conftest import workbench as workbench
from tests.train.leash import let
from tests.train.test_run import assert_same_run
from tests.waiting import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = sorted((REPOSITORY / "recipes/clusters").glob("htcondor*.yaml"))
# Names of submit commands that we write: HTCondor takes any other without a word. From its manual page condor_submit.
KNOWN = set(
    "accounting_group allowed_execute_duration batch_name checkpoint_exit_code container_image environment error "
    "executable gpus_maximum_capability gpus_minimum_capability gpus_minimum_memory initialdir job_lease_duration "
    "job_max_vacate_time log max_job_retirement_time max_retries nice_user output periodic_release "
    "preserve_relative_paths rank request_cpus request_disk request_gpus request_memory requirements "
    "retry_request_memory should_transfer_files transfer_checkpoint_files transfer_executable transfer_input_files "
    "transfer_output_files transfer_output_remaps universe want_graceful_removal when_to_transfer_output".split()
)


def rendered(profile: dict[str, Any], pipeline: dict[str, Any] | None = None) -> dict[str, str]:
    loaded = read_pipeline(pipeline or chain(), "chain.yaml", fake_recipe)
    return render(loaded, HTCondorProfile.read(profile, "profile"), "/work", "/work/runs/chain")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_golden_files(profile: Path) -> None:
    check_golden(profile.stem, rendered(read_yaml_map(profile)))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_keys_are_those_of_the_manual_and_the_four_that_keep_work_are_there(profile: Path) -> None:
    for name, content in rendered(read_yaml_map(profile)).items():
        if not name.endswith(".sub"):
            continue
        keys = re.findall(r"^(\+?\w+) =", content, flags=re.M)
        assert {key for key in keys if not key.startswith("+")} <= KNOWN
        assert len(keys) == len(set(keys)), "a key twice"
        assert content.count("queue") == 1 and content.endswith("queue 1\n")
        for line in ("checkpoint_exit_code = 85", "transfer_checkpoint_files = ckpt", "transfer_output_files = ckpt",
                     "when_to_transfer_output = ON_EXIT_OR_EVICT"):  # fmt: skip
            assert f"{line}\n" in content
        assert "periodic_release = member(" in content  # a bare `true` would free what a user holds


ADS = """
import json, sys, classad, htcondor
found = {}
for name, text in json.load(sys.stdin).items():
    job = next(htcondor.Submit(text).jobs(count=1))
    found[name] = str(job)
    found[name + " slots"] = [job.symmetricMatch(classad.ClassAd(slot)) for slot in SLOTS]
json.dump(found, sys.stdout)
"""


def slot(gpus: int, memory_mb: int = 40536, capability: float = 8.0, **more: Any) -> str:
    devices = [f"GPUs_GPU_{i}" for i in range(gpus)]
    values = {
        "MyType": '"Machine"', "TargetType": '"Job"', "Arch": '"X86_64"', "OpSys": '"LINUX"', "GPUs": gpus,
        "Cpus": 16, "Memory": 131072, "Disk": 10**9, "HasFileTransfer": "true", "HasJobTransferPlugin": "true",
        "FileSystemDomain": '"here"', "HasContainer": "true", "HasDockerURL": "true", "HasSIF": "true",
        "HasSandboxImage": "true", "HasWeka": "true", "HasJICLocalConfig": "true", "HasSelfCheckpointTransfers": "true",
        "CondorVersion": '"$CondorVersion: 24.0.24 2026-01-01 $"', "State": '"Unclaimed"', "Requirements": "START",
        "HasTransferInputRemaps": "true", "HasFileTransferPluginMethods": '"http,https,docker"', "START": "true",
        "AvailableGPUs": "{ " + ", ".join(devices) + " }",
    }  # fmt: skip
    for name in devices:
        values[name] = (
            f'[ Id = "{name}"; Capability = {capability}; GlobalMemoryMb = {memory_mb}; DeviceName = "A100" ]'
        )
    values |= more
    return "[" + "; ".join(f"{name} = {value}" for name, value in values.items()) + "]"


def ads(site: Path, files: dict[str, str], slots: list[str] = []) -> dict[str, Any]:  # noqa: B006
    """What the bindings make of submit files, in a process of its own: they hold global state."""
    code = ADS.replace("SLOTS", repr(slots))
    texts = {name: text for name, text in files.items() if name.endswith(".sub")}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(site), "CONDOR_CONFIG": "/dev/null"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def value(ad: str, name: str) -> str:
    match = re.search(rf"^\s*{name} = (.*)$", ad, flags=re.M)
    assert match is not None, f"{name} is not in the job's ad:\n{ad}"
    return match[1].rstrip("; ")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_the_bindings_make_jobs_of_every_file(profile: Path, htcondor_site: Path) -> None:
    found = ads(htcondor_site, rendered(read_yaml_map(profile)))
    for stage in ("sft", "dpo", "eval"):
        ad = found[f"{stage}.sub"]
        assert value(ad, "SuccessCheckpointExitCode") == "85"
        assert value(ad, "TransferCheckpoint") == value(ad, "TransferOutput") == '"ckpt"'
        assert value(ad, "WhenToTransferOutput") == '"ON_EXIT_OR_EVICT"'
        assert value(ad, "RequestMemory") == str(64 * 1024) and value(ad, "RequestCpus") == "8"
        assert value(ad, "RequestDisk") == str(60 * 1024**2)
        assert value(ad, "AllowedExecuteDuration") == "14400" and value(ad, "JobLeaseDuration") == "600"
        # In HTCondor's raw syntax: it's "me".
        quote = "'" * 4
        assert value(ad, "Environment") == f'"NAME=it{quote}s\' \'\\"me\\""'
    if profile.stem == "htcondor-gpu-lab":
        ad = found["sft.sub"]
        assert (value(ad, "JobRunTime"), value(ad, "CanCheckpoint"), value(ad, "GPUJobLength")) == (
            "24",
            "true",
            '"medium"',
        )
        assert value(ad, "MaxJobRetirementTime") == "0"
        assert value(ad, "PreserveRelativePaths") == "true"


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_example_finds_a_machine(profile: Path, htcondor_site: Path) -> None:
    """An attribute that our jobs lack, or a typing error in `requirements`, would make them wait for ever."""
    found = ads(htcondor_site, rendered(read_yaml_map(profile)), [slot(4), slot(4, Memory=1024)])
    for stage in ("sft", "dpo", "eval"):
        assert found[f"{stage}.sub slots"] == [True, False], stage


def test_elastic_and_fixed_requests_match_the_machines_they_should(htcondor_site: Path) -> None:
    machines = [slot(8), slot(4), slot(3), slot(2), slot(1), slot(0), slot(4, memory_mb=16384),
                slot(4, capability=7.0),                 slot(1, START="TARGET.RequestGPUs >= 4"),
                slot(4, START="TARGET.RequestGPUs >= 4")]  # fmt: skip
    for elastic, expected in ((True, "+++++-"), (False, "++----")):
        found = ads(htcondor_site, rendered({"elastic": elastic}), machines)["sft.sub slots"]
        assert found[:6] == [mark == "+" for mark in expected], found
        assert found[6:8] == [False, False], "too small or too old a GPU"
        assert found[8:] == [False, True], "a machine that was drained for 4 GPUs takes those that ask for 4"


@pytest.mark.parametrize(
    ("counts", "gpus", "expected"), [((1, 2, 4), 8, 4), ((1, 2, 4), 3, 2), ((2, 4), 2, 2), ((4,), 1, 4)]
)
def test_the_expression_asks_for_the_most_that_is_there(counts: tuple[int, ...], gpus: int, expected: int) -> None:
    def choose(condition: bool, a: int, b: int) -> int:
        return a if condition else b

    written = gpu_request(counts, elastic=True).replace("TARGET.GPUs", str(gpus))
    assert eval(written, {"ifThenElse": choose}) == expected


@pytest.mark.parametrize(
    ("profile", "changes", "sentence"),
    [
        ({"vacate_tim": 3}, {}, "unknown key 'vacate_tim'; did you mean 'vacate_time'"),
        ({"attributes": {"+X": 1}}, {}, "without the +"),
        ({"extra": ["queue 5"]}, {}, "no `key = value` line"),
        ({"transfer_executable": False}, {}, "needs shared_filesystem: true"),
        ({"max_gpus": 0}, {}, "gpus is 1, but the profile's max_gpus is 0"),
        ({"max_time": "1h"}, {}, "time is 14400 s, but the profile's max_time is 3600"),
        ({}, {"resources": {"nodes": 2}}, "runs on one machine"),
        ({}, {"stages": {"a": {"command": "x", "inputs": ["/elsewhere/data"]}}}, "does not lie below the working"),
        ({}, {"stages": {"a": {"command": "x", "inputs": ["../data"]}}}, "does not lie below the working"),
        ({}, {"stages": {"a": {"command": "x", "inputs": ["my data"]}}}, "cannot carry"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(
    profile: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ClusterError, match=re.escape(sentence)):
        rendered(profile, chain(**changes))


def test_paths_of_the_image_are_not_transferred() -> None:
    pipeline = chain(stages={"a": {"command": "x", "inputs": ["/models/base", "data/x/"]}})
    content = rendered({"present_on_machines": ["/models"]}, pipeline)["a.sub"]
    assert "transfer_input_files = data/x\n" in content


class Starter:
    """What a pool does with a job: a sandbox with the files it names, signals, and the way home of what it names."""

    def __init__(self, submit: str, home: Path):
        self.keys = dict(re.findall(r"^(\w+) = (.*)$", submit, flags=re.M))
        self.home, self.count, self.spool = home, 0, home / "spool"

    def start(self, home_dir: Path) -> subprocess.Popen[bytes]:
        """A new machine: a new folder, with the job's input and what an earlier one sent home."""
        self.count += 1
        self.sandbox = home_dir / f"dir_{self.count}"
        self.sandbox.mkdir()
        for name in self.keys["transfer_input_files"].split(", "):
            target = self.sandbox / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self.home / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        shutil.copy(self.keys["executable"], self.sandbox / "job.sh")
        if self.spool.exists():
            shutil.copytree(self.spool, self.sandbox, dirs_exist_ok=True)
        return self.run()

    def run(self) -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
               "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "10000"}  # fmt: skip
        with (self.home / "job.out").open("ab") as output:
            return subprocess.Popen(["./job.sh"], cwd=self.sandbox, env=env, stdout=output, stderr=output,
                                    start_new_session=True)  # fmt: skip

    def send_home(self, key: str, to: Path) -> None:
        for name in self.keys[key].split(", "):
            shutil.rmtree(to / name, ignore_errors=True)
            shutil.copytree(self.sandbox / name, to / name)

    def evict(self, process: subprocess.Popen[bytes], grace: float, end: int = signal.SIGTERM) -> None:
        process.send_signal(end)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.spool, ignore_errors=True) if end == signal.SIGTERM else None
        if end == signal.SIGTERM:
            self.send_home("transfer_output_files", self.spool)
        shutil.move(self.sandbox, self.sandbox.with_name(f"{self.sandbox.name}-gone"))


@pytest.mark.slow
def test_an_evicted_job_goes_on_elsewhere_from_what_it_sent_home(
    workbench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slice, a vacate and a power cut, each followed by another machine; the weights are a calm run's."""
    from mambalign.recipe import Recipe
    from mambalign.train.run import run

    monkeypatch.chdir(tmp_path)
    shutil.copytree(workbench / "model", "model")
    shutil.copytree(workbench / "sft", "data")
    values = dict(model_name_or_path="model", dataset_mixer={"data": 1.0}, output_dir="out/sft", max_length=128,
                  per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3, max_steps=60,
                  logging_steps=1, save_steps=3, use_cpu=True, disable_tqdm=True)  # fmt: skip
    run("sft", Recipe.from_dict(values, stage="sft"))
    shutil.move("out/sft", "calm")
    Path("sft.yaml").write_text(yaml.safe_dump(values))
    pipeline = read_pipeline({"stages": {"sft": {"recipe": "sft.yaml"}}, "resources": {"gpus": 0}}, "p", read_recipe)
    leash = tmp_path / "sft.leash"
    profile = HTCondorProfile.read({"python": str(on_a_leash(tmp_path))}, "profile")
    folder = tmp_path / "runs"
    folder.mkdir()
    for name, content in htcondor.render(pipeline, profile, str(tmp_path), str(folder)).items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    starter = Starter((folder / "sft.sub").read_text(), tmp_path)
    assert starter.keys["transfer_output_remaps"] == '"ckpt = out/sft"'
    machines = tmp_path / "machines"
    machines.mkdir()

    def reach(step: int, begin: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """The job somewhere between that step and the third behind it."""
        let(leash, step + 3)
        process = begin()
        lines = lambda: read_lines(starter.sandbox / "ckpt/metrics.jsonl")  # noqa: E731
        until(lambda: any(line["step"] >= step for line in lines()) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "job.out").read_text()[-3000:]
        return process

    process = reach(8, lambda: starter.start(machines))
    os.kill(process.pid, signal.SIGUSR1)  # what the launcher does to itself when a slice is over
    assert process.wait(PATIENCE) == int(starter.keys["checkpoint_exit_code"])
    starter.send_home("transfer_checkpoint_files", starter.spool)
    process = reach(20, starter.run)  # in the same place
    starter.evict(process, grace=PATIENCE)
    saved = newest_step(starter.spool / "ckpt")
    assert saved >= 18
    process = reach(saved + 5, lambda: starter.start(machines))
    starter.evict(process, grace=0, end=signal.SIGKILL)  # no transfer
    let(leash, 60)
    process = starter.start(machines)
    assert process.wait(PATIENCE) == 0, (tmp_path / "job.out").read_text()[-3000:]
    starts = [line for line in read_lines(starter.sandbox / "ckpt/attempts.jsonl") if line["event"] == "start"]
    assert [line["step"] >= at for line, at in zip(starts, (0, 6, saved), strict=True)] == [True] * 3
    assert starts[-1]["step"] == saved
    shutil.move(starter.sandbox / "ckpt", "out/sft")
    assert_same_run(tmp_path / "calm", tmp_path / "out/sft")
