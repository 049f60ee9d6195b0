"""One token of many sequences on a CPU: `decode_step.cpp`, all of a model's step in one call.

The structures are those of the source, member by member; a pointer is `tensor.data_ptr()`, and whoever fills one in
keeps the tensor. There is nothing here to differentiate: the definition of a step is the model's forward pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from mambalign.ops import native

SOURCE = Path(__file__).with_name("decode_step.cpp")
MACROS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("BF16",)}  # by dtype of the weights
BLOCK = 16  # channels: a multiple of the lanes of a vector on any processor


def _members(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Product(Structure):
    _fields_ = _members(c_void_p, "w bias")


class Layer(Structure):
    _fields_ = [
        ("norm", c_void_p),
        *_members(Product, "in_proj x_proj out_proj"),
        *_members(c_void_p, "dt_weight dt_bias taps conv_bias A D window state"),
    ]


class Model(Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *_members(c_void_p, "norm embedding"),
        ("head", Product),
        *_members(c_void_p, "hidden normed u z y low logits"),
        *_members(c_int64, "num_layers hidden_size wide_hidden channels wide states taps rank vocabulary threads"),
        *_members(c_double, "eps low_eps"),
    ]


def compiled(dtype: torch.dtype) -> Callable[[Any, int, int], None]:
    """`step(pointer to a Model, address of int64 tokens, rows)` for weights of `dtype`.

    Raises:
        native.Unavailable: there is no compiler (that works) here.
    """
    step: Any = native.library(SOURCE, MACROS[dtype]).step
    step.argtypes, step.restype = (ctypes.POINTER(Model), c_void_p, c_int64), None
    return step
