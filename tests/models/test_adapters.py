"""Adapters on every module of a model: they train, merge, and are the same model to plain PEFT and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconMambaConfig, Mamba2Config, MambaConfig

from mambalign.models import FalconMambaForCausalLM, Mamba2ForCausalLM, MambaForCausalLM, mamba
from mambalign.models.adapters import AdapterOptions, Adapters, Audit, attach, merge, quantisation
from mambalign.models.checkpoint import load_model, save_model
from mambalign.models.lineage import load_adapter, merge_adapter, weights_hash
from mambalign.models.lora import layers_of
from mambalign.ops import Segments
from mambalign.recipe import Recipe, UserError

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
ALL = (*PROJECTIONS, "embeddings", "lm_head")
EARLIER = ("x_proj", "embeddings", "in_proj", "out_proj")
SMALL = ("A_log", "D", "dt_proj.bias", "conv1d", "norm")
IDS = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(1))


def write_base(folder: Path, kind: str = "mamba", tied: bool = True) -> Path:
    """A model in which everything matters: transformers' own start has x_proj and dt_proj do next to nothing."""
    config_class, model_class = {
        "mamba": (MambaConfig, MambaForCausalLM),
        "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
        "mamba2": (Mamba2Config, Mamba2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    heads = dict(num_heads=8, head_dim=4, n_groups=2, chunk_size=8) if kind == "mamba2" else {}
    model = model_class(
        config_class(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=3, tie_word_embeddings=tied, **heads
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.normal_(std=0.4 if kind == "mamba" else 0.2)
            elif "dt_proj.bias" in name:
                parameter.add_(3.0)
    return save_model(model, folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "mamba": write_base(folder / "mamba"),
        "untied": write_base(folder / "untied", tied=False),
        "falcon_mamba": write_base(folder / "falcon", "falcon_mamba", tied=False),
        "mamba2": write_base(folder / "mamba2", "mamba2"),
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / max(1.0, float(a.abs().max())))


def train(model: Any, steps: int = 8) -> list[float]:
    """Losses of a few steps on one batch; every trained tensor must have moved by the second."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    audit, losses = Audit(model.train()), []
    segments = Segments.from_lengths([11, 23])
    for step in range(steps):
        loss = model(input_ids=IDS.flatten()[None], labels=IDS.flatten()[None], segments=segments).loss
        optimizer.zero_grad()
        loss.backward()
        assert audit.check() is (step == 0), "something waits for ever, or nothing waited"
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapted(base: Path, **options: Any) -> tuple[Any, Adapters]:
    model = load_model(base)
    options = dict(r=3, alpha=5) | options
    return model, attach(model, AdapterOptions(**options), seed=0, base={"path": str(base)})


CASES: list[tuple[str, dict[str, Any]]] = [
    *(("mamba", dict(targets=(name,))) for name in ALL),
    ("mamba", dict(targets=("all-linear",))),
    ("mamba", dict(targets=EARLIER)),
    ("mamba", dict(targets=ALL)),
    ("mamba", dict(targets=("in_proj", "x_proj", "dt_proj", "embeddings", "lm_head"), use_rslora=True)),
    ("mamba", dict(targets=("dt_proj",), use_dora=True)),
    ("mamba", dict(targets=("in_proj", "x_proj", "embeddings", "lm_head"), use_dora=True, dropout=0.1)),
    ("mamba", dict(targets=ALL, use_dora=True)),
    ("mamba", dict(targets=("layers.1.mixer.x_proj", "in_proj"), full=SMALL)),
    ("mamba", dict(targets=("out_proj",), full=("lm_head", "D"), bias="all")),  # tied: both sides train as one
    ("mamba", dict(targets=("out_proj",), r=40)),  # a rank at which PEFT's LoKr keeps no two factors
    ("untied", dict(targets=EARLIER, full=("lm_head", "A_log"))),
    ("falcon_mamba", dict(targets=("all-linear",), full=SMALL[:3], bias="lora_only")),
    ("falcon_mamba", dict(targets=("dt_proj", "embeddings"), use_dora=True)),
    ("mamba2", dict(targets=("in_proj",), full=("A_log", "D", "dt_bias", "conv1d", "norm"))),
    ("mamba2", dict(targets=("out_proj",), use_dora=True)),
    ("mamba2", dict(targets=("all-linear", "embeddings", "lm_head"), use_rslora=True)),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(CASES)])
def test_it_trains_and_is_the_same_model_everywhere(
    kind: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    model, adapters = adapted(bases[kind], **options)
    untrained = load_model(bases[kind])
    assert gap(logits(model), logits(untrained)) < 1e-6  # an adapter starts as nothing
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    made = logits(model)
    assert gap(made, logits(untrained)) > 1e-3, "nothing to tell apart"
    adapters.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(bases[kind])
    assert gap(made, logits(peft.PeftModel.from_pretrained(plain, tmp_path))) < 1e-5
    assert gap(made, logits(AutoModelForCausalLM.from_pretrained(tmp_path))) < 1e-5  # finds the base by itself
    assert gap(made, logits(load_adapter(tmp_path)[0])) < 1e-5
    report = merge_adapter(tmp_path, tmp_path / "merged")
    assert report.max_abs_logit_difference < 1e-4
    assert gap(made, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))) < 1e-5
    assert gap(made, logits(merge(model))) < 1e-5
    assert not layers_of(model)


@pytest.mark.parametrize(("first", "full"), [(EARLIER, "A_log"), (PROJECTIONS, "embeddings")])
def test_a_second_run_lies_on_the_first_and_both_are_one_file(
    first: tuple[str, ...], full: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Other modules, another rank, state parameters here and there: still one adapter on the raw base."""
    base = bases["mamba"]
    model, adapters = adapted(base, targets=first, full=(full,))
    train(model)
    adapters.save(tmp_path)
    second, start = load_adapter(tmp_path)
    assert gap(logits(second), logits(model)) < 1e-5
    more = attach(second, AdapterOptions(r=2, targets=ALL, full=("D",)), seed=1, base={"path": str(base)}, start=start)
    assert gap(logits(second), logits(model)) < 1e-5
    kept = {n: p.clone() for n, p in second.named_parameters() if ".start" in n}
    train(second)
    assert kept and all(torch.equal(p, kept[n]) for n, p in second.named_parameters() if n in kept)
    (tmp_path / "second").mkdir()
    more.save(tmp_path / "second")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "second")
    assert gap(logits(plain), logits(second)) < 1e-5
    assert gap(logits(load_model(tmp_path / "second")), logits(second)) < 1e-5


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_float32_on_bfloat16_weights(use_dora: bool, bases: dict[str, Path]) -> None:
    model = load_model(bases["mamba"], dtype="bfloat16")
    before = logits(model)
    attach(model, AdapterOptions(targets=ALL, full=SMALL[:4], use_dora=use_dora), seed=0)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert model.get_parameter("backbone.layers.0.mixer.in_proj.base_layer.weight").dtype == torch.bfloat16
    assert gap(logits(model).float(), before.float()) < (2e-2 if use_dora else 1e-6)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.to(torch.bfloat16)
    assert model.get_parameter("backbone.layers.1.mixer.dt_proj.base_layer.bias").dtype == torch.float32


@pytest.mark.parametrize("how", ["selective", "reentrant"])
def test_recomputation_changes_no_gradient(how: str, bases: dict[str, Path]) -> None:
    """With dropout in the adapters, and with frozen embeddings under reentrant checkpoints."""
    grads: list[list[Tensor]] = []
    for recompute in (False, True):
        model, _ = adapted(bases["mamba"], targets=PROJECTIONS, dropout=0.3)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.1)
            if recompute and how == "selective":
                model.set_selective_recomputation()
            elif recompute:
                model.gradient_checkpointing_enable({"use_reentrant": True})
            ids, segments = IDS.flatten()[None], Segments.from_lengths([11, 23])
            model.train()(input_ids=ids, labels=ids, segments=segments).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 16
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_the_seed_alone_decides_the_first_values(bases: dict[str, Path]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = {n: p.clone() for n, p in adapted(bases["mamba"])[0].named_parameters()}
    torch.manual_seed(6)
    second = dict(adapted(bases["mamba"])[0].named_parameters())
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    torch.manual_seed(5)
    model = load_model(bases["mamba"])
    torch.set_rng_state(state)
    attach(model, AdapterOptions(), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_log_probs_under_an_adapted_head_are_the_heads(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of three rows, the last one short; gradients too."""
    monkeypatch.setattr(mamba, "CALLED_HEAD_ELEMENTS", 3 * 40)
    model, _ = adapted(bases["mamba"], targets=("lm_head", "in_proj"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    where, ids = torch.arange(10), IDS.flatten()[1:11]
    asked = dict(input_ids=IDS.flatten()[None], segments=Segments.from_lengths([34]))
    model.train()
    logps = model(**asked, target_positions=where, target_ids=ids).logps
    grads = torch.autograd.grad(logps.sum(), [p for p in model.parameters() if p.requires_grad])
    wanted = model(**asked).logits[0, :10].log_softmax(-1)[where, ids]
    expected = torch.autograd.grad(wanted.sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    none = torch.zeros(0, dtype=torch.long)
    assert model(**asked, target_positions=none, target_ids=none).logps.shape == (0,)


# ----------------------------------------------------------------------------------------------- adapters of others


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["in_proj", "x_proj", "embeddings"], use_rslora=True, rank_pattern={"x_proj": 2}),
        dict(target_modules=["in_proj", "x_proj"], use_dora=True, alpha_pattern={"layers.0.mixer.x_proj": 7}),
        dict(target_modules=["x_proj"], modules_to_save=["lm_head"], bias="all"),
    ],
)
def test_an_adapter_that_plain_peft_wrote(options: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["mamba"]), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    assert gap(logits(theirs), logits(load_adapter(tmp_path)[0])) < 1e-5
    assert gap(logits(theirs), logits(load_model(tmp_path))) < 1e-5


def test_a_broken_adapter_is_one_sentence(bases: dict[str, Path], tmp_path: Path) -> None:
    _, adapters = adapted(bases["mamba"], targets=("in_proj", "out_proj"), full=("D",))
    adapters.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.backbone.layers.0.mixer"

    def says(match: str, changes: dict[str, Any] | None = None, **edits: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | edits))
        kept = {k: v for k, v in (tensors | (changes or {})).items() if v is not None}
        save_file(kept, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=match):
            load_model(tmp_path)

    says("peft_type is 'IA3'", peft_type="IA3")
    says("names no base_model_name_or_path", base_model_name_or_path=None)
    says("is for a .*in_proj of .*trained on another model", {f"{layer}.in_proj.lokr_w2_b": torch.zeros(3, 8)})
    says("has .*layers.9.mixer.D, and the model no such", {f"{layer.replace('0', '9')}.D": torch.zeros(32)})
    says("left factor of", {f"{layer}.in_proj.lokr_w1": torch.ones(2, 2)})
    says("nothing that this version can read", {f"{layer}.in_proj.lokr_t2": torch.ones(2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cut off or damaged"):
        load_model(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no adapter"):
        merge_adapter(bases["mamba"], tmp_path / "new")
    with pytest.raises(UserError, match="not empty"):
        merge_adapter(tmp_path, bases["mamba"])


# ----------------------------------------------------------------------------------------------------------- hashes


def test_weights_are_known_by_what_they_are(bases: dict[str, Path], tmp_path: Path) -> None:
    """The same in both layouts and in a narrower type that holds them; not after a change of one number."""
    model = load_model(bases["mamba"]).to(torch.float16).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    known = weights_hash(save_model(model, tmp_path / "hf"))
    assert known == weights_hash(save_model(model, tmp_path / "ssm", layout="mamba-ssm"))
    assert known == weights_hash(save_model(model.half(), tmp_path / "half"))
    assert known != weights_hash(bases["mamba"])
    with torch.no_grad():
        model.get_parameter("backbone.layers.1.mixer.D")[3] += 2**-8
    assert known != weights_hash(save_model(model, tmp_path / "other"))


# ------------------------------------------------------------------------------------------------------------ QLoRA


def test_without_bitsandbytes_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    assert quantisation(Recipe(use_peft=True)) is None
    with pytest.raises(UserError, match=r"load_in_4bit: .*pip install 'mambalign\[quantization\]'"):
        quantisation(Recipe(use_peft=True, load_in_4bit=True))


@pytest.fixture
def four_bits() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = quantisation(Recipe(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True))
    assert isinstance(config, BitsAndBytesConfig)
    return config


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
def test_only_the_large_projections_are_quantised(
    layout: Any, bases: dict[str, Path], tmp_path: Path, four_bits: BitsAndBytesConfig
) -> None:
    path = save_model(load_model(bases["mamba"]), tmp_path / "model", layout=layout)
    model = load_model(path, quantization_config=four_bits)
    packed = {n.rsplit(".", 2)[1] for n, p in model.named_parameters() if not p.is_floating_point()}
    assert packed == {"in_proj", "out_proj"}
    assert 1e-3 < gap(logits(model), logits(load_model(path))) < 0.5


def test_adapters_train_on_4_bits_and_merge_into_the_full_weights(
    bases: dict[str, Path], tmp_path: Path, four_bits: BitsAndBytesConfig
) -> None:
    base = {"path": str(bases["mamba"])}
    model = load_model(bases["mamba"], quantization_config=four_bits)
    adapters = attach(model, AdapterOptions(targets=EARLIER, full=("A_log",)), seed=0, base=base)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.01
    with pytest.raises(UserError, match="cannot be merged into quantised"):
        merge(model)
    adapters.save(tmp_path)
    again, _ = load_adapter(tmp_path, quantization_config=four_bits)
    assert gap(logits(model), logits(again)) < 1e-5
    full = logits(load_model(tmp_path))
    assert gap(full, logits(load_adapter(tmp_path)[0])) < 1e-5
    assert gap(full, logits(model)) > 1e-3  # the quantisation error
    with pytest.raises(UserError, match=r"in_proj is kept in few bits"):
        attach(
            load_model(bases["mamba"], quantization_config=four_bits),
            AdapterOptions(targets=("x_proj",), full=("in_proj",)),
            seed=0,
        )
