"""River-LLM (arXiv 2604.18396) as a compiler pass: seamless early exit for decoder-only language models."""

from river_compile.config import RiverConfig
from river_compile.errors import RiverError

__all__ = ["RiverConfig", "RiverError", "__version__"]
__version__ = "0.1.0"
