"""The ops that know about sequence boundaries, and nothing else does."""

from mambalign.ops.causal_conv1d import causal_conv1d
from mambalign.ops.embedding import embedding
from mambalign.ops.gated_rms_norm import gated_rms_norm
from mambalign.ops.halves import halves
from mambalign.ops.rms_norm import add_rms_norm, rms_norm
from mambalign.ops.segments import Segments
from mambalign.ops.selective_scan import selective_scan
from mambalign.ops.ssd import ssd
from mambalign.ops.token_logps import token_logps

__all__ = [
    "Segments",
    "add_rms_norm",
    "causal_conv1d",
    "embedding",
    "gated_rms_norm",
    "halves",
    "rms_norm",
    "selective_scan",
    "ssd",
    "token_logps",
]
