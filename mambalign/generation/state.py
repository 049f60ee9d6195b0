"""What a recurrent model knows of a text: a few small tensors a layer, whatever the text's length.

A `State` can be handed back to the engine, forked, and kept on disk; reading the text again gives the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambalign.recipe import UserError

SAMPLE = 4096  # bytes of every parameter that a fingerprint reads
FORMAT = "mambalign-state-1"


@dataclass(frozen=True)
class LayerState:
    """Of all L layers. conv: the last W - 1 inputs of the convolution, oldest first, `[L, channels, W - 1]`, in the
    weights' dtype. ssm: the recurrence's state, `[L, D, N]` or Mamba-2's `[L, H, P, N]`, fp32 (fp64 for fp64 models).
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True)
class State(LayerState):
    """A model's state behind `tokens`.

    tokens: every id from the beginning of the text on. fingerprint: of the model and its precision (see `fingerprint`).

    Example:
        >>> state.save("talk.safetensors")                     # doctest: +SKIP
        >>> Request((7, 8), Sampling(), State.load("talk.safetensors", engine.fingerprint))  # doctest: +SKIP
    """

    tokens: tuple[int, ...] = ()
    fingerprint: str = ""

    def save(self, path: str | os.PathLike[str], about: dict[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all; dtypes as they are. about: texts to keep with it.

        The file has a tensor a layer, `conv.0`, `ssm.0`, `conv.1` ..., and `tokens`.

        Raises:
            UserError: the file cannot be written.
        """
        file = Path(path).expanduser()
        tensors = {f"conv.{i}": t for i, t in enumerate(self.conv)} | {f"ssm.{i}": t for i, t in enumerate(self.ssm)}
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        tensors["tokens"] = torch.tensor(self.tokens, dtype=torch.int64)
        beside = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside, {**(about or {}), "format": FORMAT, "model": self.fingerprint})
            os.replace(beside, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror or error})") from error
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str, device: str | torch.device | None = None) -> State:
        """Read what `save` wrote, for the model with this `fingerprint`.

        Raises:
            UserError: no such file, no state in it, or that of another model or precision.
        """
        file = Path(path).expanduser()
        about = cls.about(file)
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about["model"] != fingerprint:
            raise UserError(f"{file}: {_ANOTHER}")
        conv, ssm = (
            torch.stack([tensors[f"{kind}.{i}"] for i in range(len(tensors) // 2)]).to(device or "cpu")
            for kind in ("conv", "ssm")
        )
        return cls(conv, ssm, tuple(tensors["tokens"].tolist()), fingerprint)

    @staticmethod
    def about(path: str | os.PathLike[str]) -> dict[str, str]:
        """The texts in a saved file, "format" and "model" (the fingerprint) among them.

        Raises:
            UserError: no such file, or no state in it.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"there is no saved state {file}")
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no saved state: {error}") from error
        if about.get("format") != FORMAT:
            raise UserError(f"{file} holds no state of ours (format {about.get('format')!r})")
        return dict(about)

    def check(self, fingerprint: str) -> None:
        """UserError where the state is of another model than this."""
        if self.fingerprint != fingerprint:
            raise UserError(f"state: {_ANOTHER}")


class Cache:
    """What the models' mixers ask of a transformers cache, with all layers in one tensor; for one forward pass.

    transformers' own makes, fills and marks two tensors a layer, from which states would be collected layer by layer.
    `states`: what each row of the pass continues, None for a text's beginning.
    """

    def __init__(self, layers: int, states: Sequence[LayerState | None], device: torch.device):
        self.count, self.rows, self.known = layers, len(states), False
        self.layers: list[_CachedLayer] = []
        self._windows: dict[int, Tensor] = {}  # given, but not yet their states
        for row, state in enumerate(states):
            if state is None:
                continue
            if not self.known:
                conv, ssm = state.conv[0], state.ssm[0]
                self._make((*conv.shape[:-1], conv.shape[-1] + 1), conv.dtype, ssm.shape, ssm.dtype, device)
                self.known = True
            self.conv[:, row, :, 1:].copy_(state.conv)
            self.ssm[:, row].copy_(state.ssm)

    def _make(
        self, conv: Sequence[int], conv_dtype: torch.dtype, ssm: Sequence[int], ssm_dtype: torch.dtype, device: Any
    ) -> None:
        # A text's beginning is a state of zeros.
        self.conv = torch.zeros(self.count, self.rows, *conv, dtype=conv_dtype, device=device)
        self.ssm = torch.zeros(self.count, self.rows, *ssm, dtype=ssm_dtype, device=device)
        self.layers = [_CachedLayer([c], [s]) for c, s in zip(self.conv.unbind(), self.ssm.unbind(), strict=True)]

    def state(self, row: int) -> LayerState:
        """Behind the pass; a view, which keeps those of all rows alive."""
        return LayerState(self.conv[:, row, :, 1:], self.ssm[:, row])

    # ------------------------------------------------------------------------------------------- what mixers call

    def has_previous_state(self, layer: int) -> bool:
        return self.known

    def update_conv_state(self, window: Tensor, layer: int, **_: Any) -> None:
        """window: `[rows, channels, W]`, whose oldest column is never read."""
        self._windows[layer] = window

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        if not self.layers:
            window = self._windows[layer]
            self._make(window.shape[1:], window.dtype, state.shape[1:], state.dtype, state.device)
        self.conv[layer].copy_(self._windows.pop(layer))
        self.ssm[layer].copy_(state)


@dataclass(frozen=True)
class _CachedLayer:
    """As transformers names them."""

    conv_states: list[Tensor]
    recurrent_states: list[Tensor]


_ANOTHER = (
    "the state was made by another model, or by this one in another precision, and means nothing here; load the model "
    "and dtype that made it, or read the text again without a state"
)


def fingerprint(model: Any) -> str:
    """Which model this is, in which precision: its sizes, and of every parameter name, dtype and a sample of the bits.

    A sample, so that a large model is not read as a whole; training changes every parameter everywhere.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() * flat.element_size() // SAMPLE)
        digest.update(flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
