"""The engine of a replica: one thread that owns the decoder, and a slot for each stream.

Iteration-level scheduling: between two tokens streams are let go, one waiting request is read, and then each group of
streams makes one pass. Streams whose tokens do not depend on their neighbours share passes; those with early exits are
decided for a whole pass at once, and so make one each, in turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import ConfigError, RiverError
from river_compile.runtime.decoder import Decoder
from river_compile.runtime.exact import Drafting
from river_compile.runtime.steps import Step
from river_compile.serve.groups import ExactGroup, Group, PlainGroup
from river_compile.serve.metrics import Metrics
from river_compile.serve.settings import GenerationRequest, ServeSettings
from river_compile.serve.stream import Event, Stream
from river_compile.serve.ties import AloneInTies, Pass, measured_tie

__all__ = ["Busy", "Engine"]

# A cosine is at most 1, but for rounding.
_NO_EXIT = 1.01
_LOG = logging.getLogger(__name__)


class Busy(RiverError):
    """The queue is full. ``retry_after``: seconds after which to ask again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("all slots are taken and the queue is full: try again later")
        self.retry_after = retry_after


class Engine:
    """Decodes streams of one decoder, in a thread of its own.

    Args:
        decoder: no other thread may use it.
        vocabulary: tokens that the model tells apart.
        context: tokens of prompt and answer together.
        stop_tokens: end a stream.

    Raises:
        ConfigError: the settings ask for exits of a model that has no river.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: ServeSettings,
        metrics: Metrics,
        *,
        vocabulary: int,
        context: int,
        stop_tokens: Collection[int] = (),
    ) -> None:
        self.context, self.vocabulary = context, vocabulary
        self._decoder, self._settings, self._metrics = decoder, settings, metrics
        self._stop_tokens = frozenset(stop_tokens)
        self._check_tau(settings.tau)
        tie = measured_tie(decoder, vocabulary)
        self._passes = AloneInTies(decoder, tie)
        experience = decoder.experience
        if decoder.joins:
            experience.tie = max(tie, experience.tie or 0.0)
        self._groups: dict[object, Group] = {}
        self._waiting: deque[Stream] = deque()
        self._active = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="river-engine", daemon=True)
        metrics.slots.set(settings.slots)
        metrics.active.set_function(lambda: self.load[0])
        metrics.queue_length.set_function(lambda: self.load[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all streams and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Streams with a slot, and requests that wait for one."""
        with self._wake:
            return self._active, len(self._waiting)

    def check(self, request: GenerationRequest) -> None:
        """
        Raises:
            ConfigError: the request asks for what the model cannot do.
        """
        tokens, wanted = len(request.prompt), request.max_tokens
        if not tokens:
            raise ConfigError("prompt", "needs at least one token")
        if not all(0 <= token < self.vocabulary for token in request.prompt):
            raise ConfigError("prompt", f"has tokens that are none of the model's {self.vocabulary}")
        if tokens + wanted > self.context:
            raise ConfigError(
                "max_tokens", f"prompt ({tokens}) and answer ({wanted}) exceed the context of {self.context} tokens"
            )
        self._check_tau(request.tau)

    def submit(self, request: GenerationRequest, emit: Callable[[Event], None]) -> Stream:
        """Let a request wait for a slot.

        Args:
            emit: is told each event, by the engine's thread; it must not wait for anything.

        Raises:
            ConfigError: see `check`.
            Busy: too many wait already.
        """
        self.check(request)
        stream = Stream(request, self._stop_tokens, emit)
        with self._wake:
            if self._stopping or self._active + len(self._waiting) >= self._settings.slots + self._settings.queue:
                self._metrics.ended("refused")
                raise Busy(1 + len(self._waiting) // self._settings.slots)
            self._waiting.append(stream)
            self._wake.notify()
        return stream

    def cancel(self, stream: Stream, outcome: str = "cancelled") -> None:
        """Free a stream's slot, or its place in the queue, before its next token; nothing if it has ended.

        Args:
            outcome: what it counts as in the metrics.
        """
        if stream.reason is not None or stream.cancelled:
            return
        with self._wake:
            stream.outcome, stream.cancelled = outcome, True
            self._wake.notify()

    def _check_tau(self, tau: float | None) -> None:
        if tau is None:
            return
        RiverConfig(tau=tau)
        if not self._decoder.has_river:
            raise ConfigError("tau", "this model has no river")

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._groups or self._waiting):
                    self._wake.wait()
                if self._stopping:
                    break
            self._let_go()
            stream = self._next()
            if stream is not None:
                self._admit(stream)
            for key in list(self._groups):
                self._step(key)
        for stream in (*self._waiting, *(stream for group in self._groups.values() for stream in group.streams)):
            stream.fail("the server is stopping")

    def _let_go(self) -> None:
        with self._wake:
            for stream in [stream for stream in self._waiting if stream.cancelled]:
                self._waiting.remove(stream)
                self._metrics.ended(stream.outcome)
        for key in list(self._groups):
            self._settle(key)

    def _next(self) -> Stream | None:
        with self._wake:
            if not self._waiting or self._active >= self._settings.slots:
                return None
            self._active += 1
            return self._waiting.popleft()

    def _admit(self, stream: Stream) -> None:
        """Read a prompt, and let the stream join its group."""
        request = stream.request
        try:
            key, group, run = self._place(stream)
            state = self._decoder.start(1)
            logits, _ = run(np.array([request.prompt], np.int64), state, last_only=True)
            self._metrics.prompt_tokens.inc(len(request.prompt))
            stream.take([stream.sampling.choose(logits[0, -1])], logits[0, -1:])
            self._metrics.first_token.observe(time.perf_counter() - stream.submitted)
            self._metrics.generated_tokens.inc()
            if stream.reason is None:
                group.add(stream, state)
                self._groups[key] = group
            else:
                self._ended(stream)
        except Exception as error:
            self._failed([stream], error)

    def _place(self, stream: Stream) -> tuple[object, Group, Pass]:
        """The group a stream belongs to, by a key, and the pass that reads its prompt."""
        request, decoder = stream.request, self._decoder
        given = request.exact if request.exact is not None else self._settings.exact
        exact = decoder.defaults.exact if given is None else given
        tau = request.tau if request.tau is not None else self._settings.tau
        own = decoder.exported_config.get("tau", 0.0) if tau is None else tau
        greedy = request.temperature == 0
        alone: object = stream
        if exact:
            # Drafts take random numbers too, as many as the clock tells: what is to be repeatable goes without.
            drafted = decoder.verifies and (greedy or request.seed is None)
            key: object = ("exact", greedy) if drafted else "backbone"
            run: Pass = decoder.backbone
        elif not decoder.has_river or own >= _NO_EXIT:
            key, run = "no exits", partial(decoder.forward, tau=NEVER if decoder.has_river else None)
        else:
            key, run = alone, partial(decoder.forward, tau=tau)
        if not decoder.joins:
            key = (key, stream)
        if key in self._groups:
            return key, self._groups[key], run
        if exact and drafted:
            return key, self._exact_group(greedy), run
        return key, PlainGroup(self._passes, run if key is alone else partial(self._passes.decided, run)), run

    def _exact_group(self, greedy: bool) -> Group:
        tau = self._settings.tau
        drafting = Drafting(
            tau, 0 if tau is None else None, self._decoder.defaults.lookup, river=self._decoder.has_river
        )
        return ExactGroup(self._passes, drafting, self._decoder.experience, greedy=greedy)

    def _step(self, key: object) -> None:
        group = self._groups[key]
        streams = list(group.streams)
        try:
            step = group.step()
            self._told(step, len(streams), exact=isinstance(group, ExactGroup))
        except Exception as error:
            self._failed(streams, error)
            del self._groups[key]
            return
        self._settle(key)

    def _settle(self, key: object) -> None:
        group = self._groups[key]
        before = list(group.streams)
        group.settle()
        for stream in before:
            if stream not in group.streams:
                self._ended(stream)
        if not group.streams:
            del self._groups[key]

    def _told(self, step: Step, streams: int, *, exact: bool) -> None:
        metrics, made = self._metrics, sum(map(len, step.tokens))
        metrics.rows.observe(streams)
        metrics.generated_tokens.inc(made)
        metrics.drafted.inc(step.drafted)
        metrics.accepted.inc(step.accepted)
        if not exact and step.exit_depth is not None:
            for _ in range(made):
                metrics.exit_depth.observe(step.exit_depth)

    def _ended(self, stream: Stream) -> None:
        self._metrics.ended(stream.reason or stream.outcome)
        if stream.reason is not None:
            self._metrics.whole.observe(time.perf_counter() - stream.submitted)
        with self._wake:
            self._active -= 1

    def _failed(self, streams: Collection[Stream], error: Exception) -> None:
        _LOG.error("a pass failed", exc_info=error)
        for stream in streams:
            self._metrics.ended("failed")
            stream.fail(f"the model failed: {type(error).__name__}")
        with self._wake:
            self._active -= len(streams)
