"""Mamba-1 and Falcon-Mamba: the transformers classes, made exact on packed and forked sequences."""

from mambalign.models.mamba import FalconMambaForCausalLM, MambaForCausalLM

__all__ = ["FalconMambaForCausalLM", "MambaForCausalLM"]
