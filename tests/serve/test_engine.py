"""The engine: tokens are those of the decoder by itself, whoever else is served; slots and places are freed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.runtime import OnnxDecoder
from river_compile.serve.engine import Busy, Engine
from river_compile.serve.metrics import Metrics
from river_compile.serve.settings import GenerationRequest, ServeSettings
from river_compile.serve.stream import Event, Stream
from tests.families import LAYERS, VOCABULARY
from tests.serve.served import CONTEXT, comes_to_rest, expected, settings
from tests.signatures import VARIANTS

PROMPTS = [(5, 9, 17, 33), (7,), (3, 4, 5, 6, 7, 8, 9), (11, 12), (40, 41, 42), (90,) * 30]
# What a request may ask for, and what the decoder does by itself when it is told the same.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({"exact": True, "temperature": 0}, {"exact": True}),
    "exact, sampled": ({"exact": True, "temperature": 0.9, "seed": 3}, {"tau": 2.0, "temperature": 0.9, "seed": 3}),
    "no exits": ({"exact": False, "tau": 2.0, "temperature": 0}, {"tau": 2.0}),
    "exits": ({"exact": False, "tau": 0.99, "temperature": 0}, {"tau": 0.99}),
    "exits, sampled": (
        {"exact": False, "tau": 0.99, "temperature": 0.7, "top_p": 0.8, "seed": 11},
        {"tau": 0.99, "temperature": 0.7, "top_p": 0.8, "seed": 11},
    ),
}


class Reader:
    """Reads what an engine tells of one stream."""

    def __init__(self, engine: Engine, prompt: tuple[int, ...], new: int = 20, **fields: Any) -> None:
        self.events: Queue[Event] = Queue()
        self.stream: Stream = engine.submit(GenerationRequest(prompt, new, **fields), self.events.put)

    def all(self) -> tuple[list[int], Event]:
        """All tokens, and the last event."""
        tokens: list[int] = []
        while True:
            event = self.events.get(timeout=60)
            tokens += [token.id for token in event.tokens]
            if event.reason or event.error:
                return tokens, event


def engine_of(decoder: OnnxDecoder, given: ServeSettings, **arguments: Any) -> Engine:
    metrics = Metrics("0", LAYERS)
    return Engine(decoder, given, metrics, vocabulary=VOCABULARY, context=CONTEXT, **arguments)


@pytest.fixture(scope="module")
def engine(model: Path, tokenizer: Path) -> Iterator[Engine]:
    made = engine_of(OnnxDecoder(model, threads=1), settings(model, tokenizer))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_decoders_whoever_else_is_served(engine: Engine, model: Path, kind: str) -> None:
    """Six streams of one kind for four slots, of different lengths, so that they join and leave."""
    asked, alone = KINDS[kind]
    lengths = (25, 9, 30, 4, 17, 12)
    readers = [Reader(engine, prompt, new, **asked) for prompt, new in zip(PROMPTS, lengths, strict=True)]
    for reader, prompt, new in zip(readers, PROMPTS, lengths, strict=True):
        tokens, last = reader.all()
        assert tokens == expected(model, prompt, new, **alone)
        assert last.reason == "length"


def test_all_kinds_are_served_at_once(engine: Engine, model: Path) -> None:
    readers = {kind: Reader(engine, PROMPTS[2], **asked) for kind, (asked, _) in KINDS.items()}
    for kind, reader in readers.items():
        assert reader.all()[0] == expected(model, PROMPTS[2], 20, **KINDS[kind][1])


def test_streams_share_passes(model: Path, tokenizer: Path) -> None:
    class Counted(OnnxDecoder):
        rows: list[int]

        def backbone(self, ids: np.ndarray, state: Any, mask: Any = None, *, last_only: bool = False) -> Any:
            self.rows.append(len(ids))
            return super().backbone(ids, state, mask, last_only=last_only)

    decoder = Counted(model, threads=1)
    decoder.rows = []
    engine = engine_of(decoder, settings(model, tokenizer))
    readers = [Reader(engine, prompt, 20, exact=True, seed=1) for prompt in PROMPTS[:4]]
    decoder.rows.clear()
    engine.start()
    for reader in readers:
        reader.all()
    engine.stop()
    # One prompt is read between two tokens, so that the first stream is ahead of the fourth by three.
    assert decoder.rows == [1, 1, 1, 2, 1, 3, 1, *[4] * 16, 3, 2, 1]


def test_a_stop_token_ends_a_stream_and_is_not_told(model: Path, tokenizer: Path) -> None:
    whole = expected(model, PROMPTS[0], 20, tau=2.0)
    stop = whole[6]
    for exact in (True, False):
        engine = engine_of(OnnxDecoder(model, threads=1), settings(model, tokenizer), stop_tokens=[stop])
        engine.start()
        tokens, last = Reader(engine, PROMPTS[0], exact=exact, tau=2.0, temperature=0).all()
        engine.stop()
        assert tokens == whole[: whole.index(stop)] and last.reason == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_stream_frees_its_slot_at_once(engine: Engine, model: Path, kind: str) -> None:
    asked, alone = KINDS[kind]
    readers = [Reader(engine, prompt, CONTEXT - 40, **asked) for prompt in PROMPTS[:3]]
    kept = Reader(engine, PROMPTS[3], 40, **asked)
    for reader in readers:
        reader.events.get(timeout=60)
        engine.cancel(reader.stream)
    assert kept.all()[0] == expected(model, PROMPTS[3], 40, **alone)
    assert Reader(engine, PROMPTS[0], 1, **asked).all()[1].reason == "length"
    assert comes_to_rest(engine)
    for reader in readers:
        assert reader.stream.made < 40


def test_a_request_beyond_the_queue_is_refused_and_one_that_leaves_it_makes_room(model: Path, tokenizer: Path) -> None:
    engine = engine_of(OnnxDecoder(model, threads=1), settings(model, tokenizer, slots=1, queue=2))
    readers = [Reader(engine, PROMPTS[0], 100, seed=index) for index in range(3)]
    with pytest.raises(Busy) as refused:
        Reader(engine, PROMPTS[0])
    assert refused.value.retry_after == 4
    engine.start()
    readers[0].events.get(timeout=60)
    engine.cancel(readers[1].stream)
    readers[2].all()
    assert readers[1].events.empty()
    engine.stop()


@pytest.mark.parametrize("length", (1, 30), ids=("of a prompt", "of a group"))
def test_a_pass_that_fails_ends_its_streams_alone(model: Path, tokenizer: Path, length: int) -> None:
    class Failing(OnnxDecoder):
        ready = False

        def backbone(self, ids: np.ndarray, state: Any, mask: Any = None, *, last_only: bool = False) -> Any:
            if self.ready and state.mask.shape[1] == length - 1:
                raise MemoryError("no room")
            return super().backbone(ids, state, mask, last_only=last_only)

    decoder = Failing(model, threads=1)
    engine = engine_of(decoder, settings(model, tokenizer))
    decoder.ready = True
    engine.start()
    good = Reader(engine, PROMPTS[0], 40, exact=False, seed=1)
    bad = Reader(engine, (99,), 40, exact=True, seed=1)
    tokens, last = bad.all()
    assert last.error == "the model failed: MemoryError" and len(tokens) == length - 1
    assert len(good.all()[0]) == 40
    assert comes_to_rest(engine) and engine.alive
    engine.stop()


def test_a_model_whose_cache_cannot_be_joined_serves_streams_in_turn(
    exported: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    """Each in a state of its own: one of a fixed length here."""
    original, made = tmp_path / "model.onnx", tmp_path / "m.onnx"
    onnx.save(VARIANTS["static"](onnx.load(exported("llama"))), original)
    export(original, made, RiverConfig(tau=0.99, bits=8))
    decoder = OnnxDecoder(made, threads=1)
    assert not decoder.joins
    engine = engine_of(decoder, settings(made, tokenizer))
    engine.start()
    for asked, alone in KINDS.values():
        readers = [Reader(engine, prompt, 9, **asked) for prompt in PROMPTS[:3]]
        assert [reader.all()[0] for reader in readers] == [expected(made, p, 9, **alone) for p in PROMPTS[:3]]
    engine.stop()


def test_a_server_that_stops_says_so_to_those_who_wait(model: Path, tokenizer: Path) -> None:
    engine = engine_of(OnnxDecoder(model, threads=1), settings(model, tokenizer, slots=1))
    readers = [Reader(engine, PROMPTS[0], CONTEXT - 10, seed=1) for _ in range(3)]
    engine.start()
    readers[0].events.get(timeout=60)
    engine.stop()
    assert [reader.all()[1].error for reader in readers] == ["the server is stopping"] * 3


@pytest.mark.parametrize(
    ("request_", "field"),
    (
        (GenerationRequest((), 5), "prompt"),
        (GenerationRequest((VOCABULARY,), 5), "prompt"),
        (GenerationRequest((-1,), 5), "prompt"),
        (GenerationRequest((5,) * 190, 11), "max_tokens"),
        (GenerationRequest((5,), 5, tau=float("nan")), "tau"),
    ),
)
def test_what_cannot_be_is_refused_before_it_waits(engine: Engine, request_: GenerationRequest, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        engine.submit(request_, lambda event: None)
    assert refused.value.field == field


def test_probabilities_are_those_of_the_backbone(engine: Engine, model: Path) -> None:
    decoder = OnnxDecoder(model, threads=1)
    reader = Reader(engine, PROMPTS[0], 6, exact=True, temperature=0, logprobs=3)
    told = []
    while len(told) < 6:
        told += reader.events.get(timeout=60).tokens
    state, ids = decoder.start(1), np.array([PROMPTS[0]])
    for token in told:
        logits = decoder.backbone(ids, state)[0][0, -1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logprobs)[:3].tolist()
        assert [one for one, _ in token.alternatives] == best and token.id == best[0]
        np.testing.assert_allclose([logprob for _, logprob in token.alternatives], logprobs[best], atol=1e-4)
        assert token.logprob == token.alternatives[0][1]
        ids = np.array([[token.id]])
    with pytest.raises(Empty):
        reader.events.get(timeout=0.05)
