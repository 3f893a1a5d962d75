"""What shapes a river besides its settings: texts, and a budget of bits or of fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.measure.fidelity import Document, TextTokenizer, shipped_texts, tokenize
from river_compile.reports import write_report

if TYPE_CHECKING:
    import onnx

__all__ = ["Tuning"]

_MAX_TOKENS = 512

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tuning:
    """Texts for activation-aware quantizers and for sensitivity, and how to spend bits.

    Fields:
        tokenizer: the model's.
        texts: None: the tuning texts that come with the package. They should be none that a threshold is calibrated on,
            and none that figures are reported on.
        avg_bits: mean bits of a river weight, scales and zero points not counted; None: as the config says.
        max_kl: KL(backbone || all river) a token, in nats, that may be expected; None: as the config says.
        sensitivity: a file that keeps the measured sensitivity; read if it is there.
        tokens: how many tokens sensitivity is measured on.

    Raises:
        ConfigError: both budgets are given.
    """

    tokenizer: TextTokenizer
    texts: Sequence[Document] | None = None
    avg_bits: float | None = None
    max_kl: float | None = None
    sensitivity: Path | None = None
    tokens: int = 256

    def __post_init__(self) -> None:
        if self.avg_bits is not None and self.max_kl is not None:
            raise ConfigError("avg_bits", "give avg_bits or max_kl, not both")

    @property
    def drafts(self) -> Mapping[str, Any] | None:
        """Nothing is measured of drafts."""
        return None

    @property
    def speeds(self) -> Mapping[str, Any] | None:
        """Nothing is measured of forms."""
        return None

    def ids(self, model: onnx.ModelProto) -> list[np.ndarray]:
        """Token ids of the texts, int64 [tokens] each.

        Raises:
            InputError: a text is too short, or the tokenizer is another model's.
        """
        shapes = [value.type.tensor_type.shape.dim for value in model.graph.output if value.name == "logits"]
        return self.ids_for(shapes[0][-1].dim_value if shapes and len(shapes[0]) else 0)

    def ids_for(self, vocabulary: int) -> list[np.ndarray]:
        """Token ids of the texts for a model of that vocabulary, int64 [tokens] each; 0 if it is not known.

        Raises: as `ids`.
        """
        documents = shipped_texts("tuning") if self.texts is None else self.texts
        pieces = tokenize(documents, self.tokenizer, vocabulary or self.tokenizer.vocabulary, _MAX_TOKENS)
        return [piece.ids for piece in pieces]

    def applied(self, model: Path, ids: Sequence[np.ndarray], config: RiverConfig, progress: Progress) -> RiverConfig:
        """The config with bits for each linear layer, if there is a budget. Patterns of the config itself go first.

        Args:
            model: the plain ONNX file.
            ids: of the tuning texts.

        Raises:
            ConfigError: the budget is out of reach.
            InputError: model or texts cannot be used, or the sensitivity file is another model's.
        """
        if self.avg_bits is None and self.max_kl is None and self.sensitivity is None:
            return config
        from river_compile.measure.sensitivity import Sensitivity, choose_bits, measure_sensitivity

        if self.sensitivity is not None and self.sensitivity.exists():
            measured = Sensitivity.load(self.sensitivity)
            measured.check(config)
        else:
            measured = measure_sensitivity(model, config, ids, tokens=self.tokens, progress=progress)
            if self.sensitivity is not None:
                write_report(self.sensitivity, measured.to_json() + "\n")
        if self.avg_bits is None and self.max_kl is None:
            return config
        chosen = choose_bits(measured, avg_bits=self.avg_bits, max_kl=self.max_kl)
        head_bits = config.head_bits
        if measured.head is not None and measured.head.name in chosen:
            head_bits = chosen.pop(measured.head.name)
        planned = tuple((name, bits) for name, bits in chosen.items() if bits != config.bits)
        return replace(config, bits_for=(*config.bits_for, *planned), head_bits=head_bits)
