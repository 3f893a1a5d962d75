"""How often an exported river and its backbone choose the same token, on a few texts: seconds at an export's end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from river_compile.config import NEVER, RiverConfig
from river_compile.measure.fidelity import Document, TextTokenizer, shipped_texts, spread, tokenize
from river_compile.reports import Agreement

if TYPE_CHECKING:
    from river_compile.runtime import OnnxDecoder

__all__ = ["AgreementTexts"]

_PROMPT = 8
_ENOUGH = 0.95
_STRICTER = 0.99

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AgreementTexts:
    """Texts that a new river is put to the test on; for `river_compile.export`.

    Fields:
        tokenizer: the model's.
        texts: None: held-out texts that come with the package.
        documents, tokens: so many texts at most, evenly spread, and the first so many tokens of each.
        seconds: no further text is begun after that.
    """

    tokenizer: TextTokenizer
    texts: Sequence[Document] | None = None
    documents: int = 9
    tokens: int = 32
    seconds: float = 20.0

    def measured(self, model: Path, config: RiverConfig, progress: Progress) -> Agreement:
        """What the river model of a file agrees in with its own backbone, teacher-forced: the start of each text is
        read in one pass, as a prompt is, the rest token by token, at the model's default threshold.

        Raises:
            InputError: the model cannot be run, or the tokenizer is another model's.
        """
        from river_compile.runtime import OnnxDecoder

        decoder = OnnxDecoder(model)
        pieces = self._pieces(decoder.vocabulary, decoder.signature.room)
        prompt = _PROMPT + self.tokenizer.lead
        started = time.perf_counter()
        backbones, agrees, depths = [], [], []
        for number, ids in enumerate(pieces):
            progress("measure agreement", number, len(pieces))
            backbones.append(_choices(decoder, ids, prompt, NEVER, decoder.layers)[0])
            chosen, exits = _choices(decoder, ids, prompt)
            agrees.append(chosen == backbones[-1])
            depths += exits
            if time.perf_counter() - started > self.seconds:
                break
        top1, stricter = float(np.concatenate(agrees).mean()), None
        if top1 < _ENOUGH and config.tau < _STRICTER and time.perf_counter() - started < self.seconds / 2:
            again = [_choices(decoder, ids, prompt, _STRICTER)[0] for ids in pieces]
            stricter = float(np.mean(np.concatenate(again) == np.concatenate(backbones)))
        progress("measure agreement", len(pieces), len(pieces))
        return Agreement(
            top1=round(top1, 4),
            tokens=sum(map(len, agrees)),
            documents=len(agrees),
            tau=config.tau,
            exit_depth=round(float(np.mean(depths)), 2) if depths else None,
            advice=None if top1 >= _ENOUGH else _advice(stricter, config),
        )

    def _pieces(self, vocabulary: int, room: int | None) -> list[np.ndarray]:
        documents = shipped_texts("heldout") if self.texts is None else self.texts
        whole = spread(tokenize(documents, self.tokenizer, vocabulary), self.documents)
        return [document.ids[: self.tokens + self.tokenizer.lead][:room] for document in whole]


def _choices(
    decoder: OnnxDecoder, ids: np.ndarray, prompt: int, tau: float | None = None, max_depth: int | None = None
) -> tuple[np.ndarray, list[int]]:
    """The token chosen after the prompt and after each token behind it, and the depths at which those exited."""
    state = decoder.start(decoder.signature.batch or 1)
    chosen, depths = [], []
    for number, part in enumerate([ids[:prompt], *ids[prompt:].reshape(-1, 1)]):
        batch = np.repeat(part[None], decoder.signature.batch or 1, axis=0)
        logits, depth = decoder.forward(batch, state, tau=tau, max_depth=max_depth)
        chosen.append(int(logits[0, -1].argmax()))
        if number and depth is not None:
            depths.append(depth)
    return np.array(chosen), depths


def _advice(stricter: float | None, config: RiverConfig) -> str:
    """What brings a river nearer to its backbone, by what it has not got yet."""
    ways = []
    if config.calibration is None:
        known = f" ({_STRICTER:g}: {stricter:.1%})" if stricter is not None else ""
        ways += [f"a higher tau{known}", "a threshold of river-calibrate"]
    if config.bits < 8:
        ways.append("8 bits (--bits 8, or --bits-for '*down_proj*=8' and the like)")
    if config.quantizer == "rtn":
        ways.append("another quantizer (--quantizer lsq, or gptq)")
    return f"below {_ENOUGH:.0%}; what helps: {', '.join(ways) or 'fewer layers in the river (--keep-layers)'}"
