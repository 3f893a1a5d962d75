"""A reference runtime in torch that runs every KV policy on the same layers, to measure them against each other."""

from river_compile.reference.decoder import ReferenceDecoder, ReferenceState
from river_compile.reference.policies import POLICIES

__all__ = ["POLICIES", "ReferenceDecoder", "ReferenceState"]
