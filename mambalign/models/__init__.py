"""Mamba-1, Falcon-Mamba and Mamba-2: the transformers classes, made exact on packed and forked sequences."""

from mambalign.models.mamba import FalconMambaForCausalLM, MambaForCausalLM
from mambalign.models.mamba2 import Mamba2ForCausalLM

__all__ = ["FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"]
