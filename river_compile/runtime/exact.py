"""Exact decoding: the river drafts, the backbone verifies, and what comes out is the backbone's.

A round drafts tokens by the river into a copy of the state, then runs the last token and the drafts through the
backbone in one pass, which writes their K and V at the same addresses, and forgets what was rejected. So the cache
holds the backbone's own keys and values, and errors do not add up. Where the numbers are so coarse that the rounding of
passes of several rows could turn greedy choices all the same, nothing is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from river_compile.runtime.drafting import Costs, DraftLength
from river_compile.runtime.lookup import Lookup
from river_compile.runtime.sampling import Choice
from river_compile.runtime.steps import Step
from river_compile.runtime.verification import Verdict, verify_greedy, verify_sampled

if TYPE_CHECKING:
    from river_compile.runtime.protocol import Passes, State

__all__ = ["Drafting", "Experience", "exact_steps"]

_MEASURED_ROWS, _REPEATS = (3, 5), 3
# Kernels of attention take keys in blocks of 16 and more, and round otherwise where a block is begun: so many places
# have the beginning of one among them.
_COARSE_PLACES = 20
# Twice for the two tokens of a margin, twice more since a few rows are a small sample.
_TIE_SAFETY = 4.0


@dataclass(frozen=True)
class Drafting:
    """How drafts are made.

    Fields:
        tau, max_depth: exit settings of a draft; a ``max_depth`` of 0 is all river.
        lookup: whether tokens of the text itself are drafts where an n-gram repeats.
        most: drafts in a round at most.
        river: whether there is a river to ask; without one only the text drafts.
        keep_logits: whether steps carry the backbone's logits.
    """

    tau: float | None = None
    max_depth: int | None = 0
    lookup: bool = True
    most: int = 12
    river: bool = True
    keep_logits: bool = False


@dataclass
class Experience:
    """What a decoder has learnt of itself, kept from one generation to the next.

    Fields:
        tie: margin between two choices below which a pass of several rows decides nothing, in logits; None: not
            measured yet.
        lengths: by batch size and whether exits shape the drafts.
    """

    tie: float | None = None
    lengths: dict[tuple[int, bool], DraftLength] = field(default_factory=dict)


@dataclass
class _Sequence:
    """A sequence under way: its place in the result, its tokens (the last one not read yet), and how many it may still
    get; 0 where it has ended."""

    place: int
    tokens: list[int]
    left: int
    lookup: Lookup | None


def exact_steps(
    passes: Passes,
    state: State,
    first: Sequence[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafting: Drafting,
    choice: Choice,
    experience: Experience,
) -> Iterator[Step]:
    """Yield one step a round until every sequence has stopped.

    Args:
        passes: runs the model.
        state: has read the prompts, and nothing else.
        first: the token chosen after each prompt; it was handed out already.
        max_new_tokens: of each sequence, ``first`` not counted.
        choice: how tokens are chosen, and when a sequence ends.
        experience: read, and added to.
    """
    sequences = [
        _Sequence(place, [*prompt, token], max_new_tokens, Lookup([*prompt, token]) if drafting.lookup else None)
        for place, (prompt, token) in enumerate(zip(prompts, first, strict=True))
    ]
    for sequence in sequences:
        sequence.left = 0 if choice.ends(sequence.tokens, sequence.place) else sequence.left
    if not any(sequence.left for sequence in sequences):
        return
    sequences = _go_on(passes, state, sequences, [0] * len(sequences))
    length = _length(passes, state, sequences, drafting, experience, max_new_tokens)
    length.begin()
    # Sequences that accept different numbers move in the cache, and attention over other slots rounds otherwise.
    if passes.coarse and choice.greedy and (experience.tie or len(sequences) > 1):
        drafting = replace(drafting, river=False, lookup=False)
        for sequence in sequences:
            sequence.lookup = None
    decided = True
    while any(sequence.left for sequence in sequences):
        started = passes.clock()
        # After a near tie the undecided sequences want a pass of one row.
        drafts = _draft(passes, state, sequences, length, drafting, choice) if decided else _Drafts.none(sequences)
        verifying = passes.clock()
        verdicts, logits, depth = _verify(passes, state, sequences, drafts, choice, experience.tie or 0.0)
        seconds = passes.clock() - verifying
        decided = all(verdict.following is not None for verdict in verdicts)
        made = _take(sequences, drafts, verdicts, choice, len(first))
        kept = _logits_by_place(sequences, logits, made) if drafting.keep_logits else None
        # An undecided token is read once more, alone.
        read = [verdict.accepted + (verdict.following is not None) for verdict in verdicts]
        sequences = _go_on(passes, state, sequences, [1 + drafts.width - count for count in read])
        ended = passes.clock()
        length.costs.learn_pass(1 + drafts.width, seconds)
        accepted = np.array([verdict.accepted for verdict in verdicts])
        length.learn(accepted, drafts.counts, drafts.confidences, from_text=drafts.from_text)
        yield Step(
            tokens=made,
            exit_depth=depth,
            seconds=ended - started,
            drafted=int(drafts.counts.sum()),
            accepted=int(accepted.sum()),
            looked_up=int(drafts.counts.sum()) if drafts.from_text else 0,
            near_ties=sum(verdict.following is None for verdict in verdicts),
            draft_seconds=verifying - started,
            verify_seconds=seconds,
            logits=kept,
        )


def _logits_by_place(
    sequences: Sequence[_Sequence], logits: np.ndarray, made: Sequence[Sequence[int]]
) -> tuple[np.ndarray, ...]:
    found = [logits[0, :0]] * len(made)
    for row, sequence in enumerate(sequences):
        found[sequence.place] = logits[row, : len(made[sequence.place])]
    return tuple(found)


def _go_on(passes: Passes, state: State, sequences: Sequence[_Sequence], forget: Sequence[int]) -> list[_Sequence]:
    """Cut what was rejected off the cache, and sequences that have ended; all of them stay where all have ended."""
    alive = [sequence.left > 0 for sequence in sequences]
    if not any(alive):
        return list(sequences)
    kept = [row for row in range(len(sequences)) if alive[row] or passes.fixed_batch]
    for row in kept:
        if not alive[row]:
            # It has to stay and is of no use any more: it takes one slot.
            state.mask[row, : state.mask.shape[1] - forget[row] - 1] = 0
    if not all(alive) or any(forget):
        passes.cut(state, [forget[row] for row in kept], kept)
    return [sequences[row] for row in kept]


@dataclass
class _Drafts:
    """Drafts of all sequences, filled up to one width; what each was drawn from, and how sure the drafter was."""

    tokens: np.ndarray
    counts: np.ndarray
    confidences: np.ndarray
    proposals: list[list[np.ndarray | None]]
    from_text: bool = False

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    @classmethod
    def none(cls, sequences: Sequence[_Sequence]) -> _Drafts:
        count = len(sequences)
        return cls(np.zeros((count, 0), np.int64), np.zeros(count, int), np.zeros((count, 0)), [[] for _ in sequences])


def _draft(
    passes: Passes,
    state: State,
    sequences: Sequence[_Sequence],
    length: DraftLength,
    drafting: Drafting,
    choice: Choice,
) -> _Drafts:
    room = max(sequence.left for sequence in sequences) - 1
    if (slots := passes.room(state)) is not None:
        room = min(room, slots - 1)
    found = _from_text(sequences, length, drafting, room)
    if found is not None or not drafting.river:
        return found or _Drafts.none(sequences)
    count = len(sequences)
    mark = passes.mark(state)
    survival = np.ones(count)
    ids = np.array([sequence.tokens[-1:] for sequence in sequences])
    tokens = np.zeros((count, 0), np.int64)
    confidences: list[np.ndarray] = []
    proposals: list[list[np.ndarray | None]] = [[] for _ in sequences]
    while length.pays(survival, len(confidences), room):
        started = passes.clock()
        logits, _ = passes.forward(ids, state, None, drafting.tau, drafting.max_depth)
        sure = np.zeros(count)
        ids = np.zeros((count, 1), np.int64)
        for row, sequence in enumerate(sequences):
            scores = choice.scores([*sequence.tokens, *tokens[row].tolist()], logits[row, -1], sequence.place)
            ids[row, 0], sure[row], proposal = _propose(scores, choice)
            proposals[row].append(proposal)
        tokens = np.concatenate([tokens, ids], 1)
        confidences.append(sure)
        survival = survival * length.survival(sure)
        length.costs.learn_draft(passes.clock() - started)
    passes.back(state, mark)
    if not confidences:
        return _Drafts.none(sequences)
    counts = np.array([min(len(confidences), max(sequence.left - 1, 0)) for sequence in sequences])
    return _Drafts(tokens, counts, np.stack(confidences, 1), proposals)


def _propose(scores: np.ndarray, choice: Choice) -> tuple[int, float, np.ndarray | None]:
    """A draft, how sure the drafter is of it, and what it was drawn from."""
    if choice.greedy:
        return int(scores.argmax()), float(1 / np.exp(scores - scores.max()).sum()), None
    proposal = choice.distribution(scores)
    return choice.draw(proposal), float(proposal.max()), proposal


def _from_text(sequences: Sequence[_Sequence], length: DraftLength, drafting: Drafting, room: int) -> _Drafts | None:
    """Drafts by lookup; None where no text repeats, or the river's drafts are better."""
    found = [sequence.lookup.find(drafting.most) if sequence.lookup else [] for sequence in sequences]
    shortest = min(map(len, found))
    width = length.text_drafts(max(map(len, found)), room) if shortest or not drafting.river else 0
    if not width:
        return None
    tokens = np.zeros((len(sequences), width), np.int64)
    counts = np.zeros(len(sequences), int)
    for row, (sequence, match) in enumerate(zip(sequences, found, strict=True)):
        counts[row] = min(len(match), width, max(sequence.left - 1, 0))
        tokens[row, : counts[row]] = match[: counts[row]]
    proposals: list[list[np.ndarray | None]] = [[None] * width for _ in sequences]
    return _Drafts(tokens, counts, np.ones(tokens.shape), proposals, from_text=True)


def _verify(
    passes: Passes, state: State, sequences: Sequence[_Sequence], drafts: _Drafts, choice: Choice, tie: float
) -> tuple[list[Verdict], np.ndarray, int | None]:
    last = np.array([sequence.tokens[-1:] for sequence in sequences])
    logits, depth = passes.backbone(np.concatenate([last, drafts.tokens], 1), state)
    verdicts = []
    for row, (sequence, count) in enumerate(zip(sequences, drafts.counts, strict=True)):
        if not sequence.left:
            verdicts.append(Verdict(0, sequence.tokens[-1]))
            continue
        proposed = drafts.tokens[row, :count].tolist()

        def scores(place: int, row: int = row, proposed: list[int] = proposed, one: _Sequence = sequence) -> np.ndarray:
            return choice.scores([*one.tokens, *proposed[:place]], logits[row, place], one.place)

        if choice.greedy:
            verdicts.append(verify_greedy(proposed, scores, tie if drafts.width else 0.0))
        else:
            verdicts.append(verify_sampled(proposed, drafts.proposals[row][:count], scores, choice))
    return verdicts, logits, depth


def _take(
    sequences: Sequence[_Sequence], drafts: _Drafts, verdicts: Sequence[Verdict], choice: Choice, places: int
) -> tuple[tuple[int, ...], ...]:
    """Add the new tokens to their sequences; all that each place of the result gets."""
    made: list[tuple[int, ...]] = [()] * places
    for row, (sequence, verdict) in enumerate(zip(sequences, verdicts, strict=True)):
        if not sequence.left:
            continue
        new = drafts.tokens[row, : verdict.accepted].tolist()
        if verdict.following is not None:
            new.append(verdict.following)
        taken = 0
        while taken < len(new) and sequence.left:
            sequence.tokens.append(new[taken])
            taken += 1
            sequence.left = 0 if choice.ends(sequence.tokens, sequence.place) else sequence.left - 1
        if sequence.lookup is not None:
            sequence.lookup.extend(new[:taken])
        made[sequence.place] = tuple(new[:taken])
    return tuple(made)


def _length(
    passes: Passes,
    state: State,
    sequences: Sequence[_Sequence],
    drafting: Drafting,
    experience: Experience,
    room: int,
) -> DraftLength:
    """The rule for the draft length, with the costs measured on the first use of a batch size.

    Args:
        room: how many tokens the cache certainly takes.
    """
    key = (len(sequences), drafting.max_depth == 0)
    if experience.tie is None or key not in experience.lengths:
        alone = passes.coarse and len(sequences) == 1
        places = range(min(_COARSE_PLACES if alone else max(_MEASURED_ROWS), room))
        tokens = [[sequence.tokens[place % len(sequence.tokens)] for place in places] for sequence in sequences]
        tie, costs = _measure(passes, state, np.array(tokens), drafting)
        experience.tie = max(tie, experience.tie or 0.0)
        experience.lengths.setdefault(key, DraftLength(costs, drafting.most))
    return experience.lengths[key]


def _measure(passes: Passes, state: State, ids: np.ndarray, drafting: Drafting) -> tuple[float, Costs]:
    """How differently passes of several rows and of one round, and what passes cost; the state stays.

    Args:
        ids: tokens to read, int64 [sequences, places].

    Returns:
        The margin within which two choices cannot be told apart by a pass of several rows, and the costs.
    """
    mark = passes.mark(state)
    costs, alone, rows = Costs(), [], []
    for token in ids.T:
        started = passes.clock()
        rows.append(passes.backbone(token[:, None], state)[0][:, -1])
        alone.append(passes.clock() - started)
    passes.back(state, mark)
    costs.rows[1] = min(alone)
    expected, differing = np.stack(rows, 1), 0.0
    for count in sorted({min(count, ids.shape[1]) for count in _MEASURED_ROWS}):
        (together, _), costs.rows[count] = _timed(passes, state, partial(passes.backbone, ids[:, :count], state))
        differing = max(differing, float(np.abs(expected[:, :count] - together).max()))
    most = max(_MEASURED_ROWS)
    if ids.shape[1] > most:
        for start in range(0, ids.shape[1], most):
            span = slice(start, start + most)
            together = passes.backbone(ids[:, span], state)[0]
            differing = max(differing, float(np.abs(expected[:, span] - together).max()))
        passes.back(state, mark)
    if drafting.river:
        draft = partial(passes.forward, ids[:, :1], state, None, drafting.tau, drafting.max_depth)
        _, costs.draft = _timed(passes, state, draft)
    return _TIE_SAFETY * differing, costs


def _timed(passes: Passes, state: State, run: Callable[[], Any]) -> tuple[Any, float]:
    """What a pass gives, and its seconds: the least of several, that no other process had a share in. The first of a
    kind, which allocates or compiles, does not count. The state stays."""
    mark, seconds = passes.mark(state), []
    for _ in range(_REPEATS):
        started = passes.clock()
        result = run()
        seconds.append(passes.clock() - started)
        passes.back(state, mark)
    return result, min(seconds[1:])
