"""Pipelines: order, references, and everything that is refused in a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mambalign.cluster import slurm
from mambalign.cluster.keys import ClusterError, clock, mebibytes, seconds, size, span
from mambalign.cluster.pipeline import Pipeline, read_pipeline
from mambalign.cluster.slurm import SlurmProfile
from mambalign.recipe import read_yaml_map
from tests.cluster.conftest import chain, fake_recipe
from tests.cluster.golden import check_golden

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = sorted((REPOSITORY / "recipes/clusters").glob("slurm*.yaml"))


def read(**changes: Any) -> Pipeline:
    return read_pipeline(chain(**changes), "chain.yaml", fake_recipe)


SFT, DPO = {"recipe": "sft/r.yaml"}, {"recipe": "dpo/r.yaml", "model": "sft"}


def test_stages_are_resolved_in_an_order_that_can_run() -> None:
    loaded = read()
    assert [stage.name for stage in loaded.stages] == ["sft", "dpo", "eval"]
    sft, dpo, judge = loaded.stages
    assert (sft.needs, dpo.needs, judge.needs) == ((), ("sft",), ("dpo",))
    assert judge.shell == "judge out/dpo --out out/eval" and judge.inputs == ("out/dpo",)
    assert "out/sft" in dpo.inputs and dpo.resources.memory == 64 * 1024
    assert sft.gpu_counts == (1, 2, 4) and judge.gpu_counts == (1,)
    assert loaded.notes == ("stage sft will not use 3 devices: its batch does not divide",
                            "stage dpo will not use 3 devices: its batch does not divide")  # fmt: skip


def test_a_stage_needs_the_one_whose_result_its_recipe_starts_from() -> None:
    loaded = read(
        stages={"sft": SFT, "dpo": {"recipe": "dpo/r.yaml", "overrides": {"model_name_or_path": "./out/sft"}}}
    )
    assert loaded.stage("dpo").needs == ("sft",)
    swapped = read(stages={"dpo": DPO, "sft": SFT})  # `model: sft` says enough
    assert [stage.name for stage in swapped.stages] == ["sft", "dpo"]


def test_a_dpo_on_the_base_model_beside_an_sft_is_noticed() -> None:
    loaded = read(stages={"sft": SFT, "dpo": {"recipe": "dpo/r.yaml"}}, resources={"gpus": 1})
    assert loaded.notes == (
        "stage dpo starts from hub/base, not from what sft makes; if that is not meant, say `model: sft`",
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": {}}, "stages is missing"),
        ({"stages": [{"name": "sft"}]}, "it must be a map"),
        ({"stagse": {}}, "unknown key 'stagse'; did you mean 'stages'"),
        ({"name": "a b"}, "must be letters, digits"),
        ({"stages": {"a/b": SFT}}, "must be letters, digits"),
        ({"stages": {"sft": {"recipe": "nowhere.yaml"}}}, "stage sft: recipe nowhere.yaml does not exist"),
        ({"stages": {"sft": {}}}, "recipe is missing"),
        ({"stages": {"x": {}}}, "say what it is, `kind:`"),
        ({"stages": {"x": {"kind": "sfd", "recipe": "r"}}}, "one of cpt, sft"),
        ({"stages": {"x": {"kind": "command"}}}, "command is missing"),
        ({"stages": {"sft": SFT | {"command": "x"}}}, "recipe means nothing for a command stage"),
        ({"stages": {"sft": SFT | {"ressources": {}}}}, "did you mean 'resources'"),
        ({"stages": {"sft": SFT | {"resources": {"gpu": 1}}}}, "unknown key 'gpu'; did you mean 'gpus'"),
        ({"stages": {"dpo": {"recipe": "dpo/r.yaml", "overrides": {"model_name_or_path": "out/sft"}}, "sft": SFT}},
         "stage dpo starts from out/sft, the result of sft, but comes before it"),
        ({"stages": {"sft": SFT | {"needs": ["dpo"]}, "dpo": DPO}}, "in a circle: sft -> dpo -> sft"),
        ({"stages": {"sft": SFT | {"needs": ["dpo"]},
                     "dpo": {"recipe": "dpo/r.yaml", "overrides": {"model_name_or_path": "out/sft"}}}},
         "stage dpo starts from out/sft, the result of sft, but comes before it"),
        ({"stages": {"a": {"command": "x", "needs": ["b"]}, "b": {"command": "y", "needs": ["a"]},
                     "c": {"command": "z", "needs": ["a"]}}}, "in a circle: a -> b -> a"),
        ({"stages": {"sft": SFT | {"needs": ["sft"]}}}, "stage sft needs itself"),
        ({"stages": {"sft": SFT, "x": {"command": "y", "needs": ["stf"]}}}, "'stf', which is no stage; did you mean"),
        ({"stages": {"sft": SFT, "x": {"command": "y ${stf.output_dir}"}}}, "'stf', which is no stage; did you mean"),
        ({"stages": {"sft": SFT, "x": {"command": "y ${sft.folder}"}}}, "a stage has only an output_dir"),
        ({"stages": {"a": {"command": "x"}, "b": {"command": "${a.output_dir}"}}}, "has no output_dir; give it one"),
        ({"stages": {"sft": SFT, "two": {"kind": "sft", "recipe": "r", "output_dir": "out/./sft/"}}},
         "stages sft and two both write out/./sft/"),
        ({"stages": {"sft": SFT | {"output_dir": "hub/base"}}}, "would overwrite the model it starts from"),
        ({"resources": {"gpus": "4-1"}}, "a range from the smaller to the larger, 1-4"),
        ({"resources": {"gpus": -1}}, "a number, or a range"),
        ({"resources": {"gpus": 3}}, "global_batch_size 16 is not a multiple of 2 x 3"),
        ({"resources": {"memory": "lots"}}, "a size such as 64GB"),
        ({"resources": {"time": "soon"}}, "a time such as 45m"),
        ({"resources": {"time": "1h", "slice": "2h"}}, "slice (7200 s) is longer than time (3600 s)"),
        ({"resources": {"cpus": 0}}, "cpus is 0"),
        ({"resources": {"nodes": 0}}, "nodes is 0"),
        ({"resources": {"gpus": "1-2", "nodes": "1-2"}}, "both ranges"),
        ({"stages": {"sft": {"recipe": "sft/accumulating.yaml"}}}, "set global_batch_size in the recipe"),
        ({"stages": {"x": {"command": "y", "resources": {"nodes": 2}}}}, "runs on one machine"),
        ({"stages": {"merge": {"model": "hub/base"}}}, "merge needs `model:`"),
        ({"env": {"A-B": 1}}, "no name of an environment variable"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(sentence)):
        read(**changes)


def test_a_stage_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("stages:\n  sft: {recipe: a}\n  sft: {recipe: b}\n")
    with pytest.raises(ValueError, match="line 3: key 'sft' is given twice"):
        read_yaml_map(tmp_path / "p.yaml", "pipeline")


def test_times_and_sizes_are_those_that_schedulers_read() -> None:
    assert [clock(seconds(text)) for text in ("90", "4h", "1-12:00:00", "47h")] == [
        "0:01:30",
        "4:00:00",
        "1-12:00:00",
        "1-23:00:00",
    ]
    assert [size(mebibytes(text), "B") for text in ("64GB", "20000", "1TB")] == ["64GB", "20000MB", "1024GB"]
    assert span("2") == (2, 2)
    for parse, wrong in ((seconds, 0), (seconds, True), (seconds, "4:70:00"), (mebibytes, "0GB"), (mebibytes, False)):
        with pytest.raises(ValueError):
            parse(wrong)


# --------------------------------------------------------------------------------------------------------------- Slurm


def rendered(profile: dict[str, Any], **changes: Any) -> dict[str, str]:
    return slurm.render(read(**changes), SlurmProfile.read(profile, "profile"), "/work", "/work/runs/chain")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_golden_batch_scripts(profile: Path) -> None:
    check_golden(profile.stem, rendered(read_yaml_map(profile)))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_the_scripts_are_shell(profile: Path) -> None:
    for name, content in rendered(read_yaml_map(profile)).items():
        if not name.endswith(".yaml"):
            done = subprocess.run(["bash", "-n"], input=content, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"


def test_options_come_before_the_first_command_and_carry_the_request() -> None:
    lines = rendered({"gpu_type": "a100", "qos": "cheap"}, resources={"gpus": 2, "nodes": "1-4", "time": "4h",
                     "slice": "30m", "cpus": 8}, stages={"sft": SFT})["sft.sbatch"].splitlines()  # fmt: skip
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(options)] == [f"#SBATCH --{option}" for option in options]
    for option in ("gpus-per-node=a100:2", "nodes=1-4", "time=4:00:00", "time-min=0:30:00", "qos=cheap", "requeue",
                   "signal=B:USR1@120", "open-mode=append", "cpus-per-task=8"):  # fmt: skip
        assert option in options
    assert "for n in 1 2 4; do" in "\n".join(lines)  # on 3 nodes the batch would not divide


@pytest.mark.parametrize(
    ("profile", "changes", "sentence"),
    [
        ({"acount": "x"}, {}, "unknown key 'acount'; did you mean 'account'"),
        ({"scheduler": "htcondor"}, {}, "one of slurm"),
        ({"container": {"runtime": "docker"}}, {}, "one of apptainer"),
        ({"container": {"runtime": "pyxis"}}, {}, "image is missing"),
        ({"max_gpus_per_node": 2}, {}, "gpus is 4, but the profile's max_gpus_per_node is 2"),
        ({"max_time": "1h"}, {}, "time is 14400, but the profile's max_time is 3600"),
        ({"account": "my account"}, {}, "cannot carry"),
        ({"save_lead": "10m"}, {"resources": {"time": "5m"}}, "well above the profile's save_lead"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(profile: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(sentence)):
        rendered(profile, **changes)


def test_a_dry_run_needs_neither_torch_nor_a_scheduler(tmp_path: Path) -> None:
    """As on a login node: torch and what stands on it cannot be imported, PATH holds nothing."""
    (tmp_path / "r.yaml").write_text("model_name_or_path: a/b\ndataset_mixer: {c/d: 1.0}\noutput_dir: o\n")
    (tmp_path / "p.yaml").write_text("stages:\n  sft: {recipe: r.yaml}\n  x: {command: 'echo ${sft.output_dir}'}\n")
    code = """
import sys
for name in ("torch", "transformers", "datasets", "numpy"):
    sys.modules[name] = None
from mambalign.cli import app
app(["submit", "p.yaml", "--to", sys.argv[1], "--dry-run"])
"""
    for to, shown in (
        ("slurm", "#SBATCH --requeue"),
        ("htcondor", "checkpoint_exit_code = 85"),
        ("local", "mambalign run"),
    ):
        done = subprocess.run([sys.executable, "-c", code, to], cwd=tmp_path, capture_output=True, text=True,
                              env={"PYTHONPATH": str(REPOSITORY), "PATH": ""})  # fmt: skip
        assert done.returncode == 0 and shown in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "p.yaml"}
