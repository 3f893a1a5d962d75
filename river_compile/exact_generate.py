"""Exact decoding within transformers' ``generate``: the river drafts, the backbone verifies."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from river_compile.compiled import config_of, known_states
from river_compile.config import RiverConfig
from river_compile.exporters.torch import generate, seam
from river_compile.exporters.torch.forms import SHORT
from river_compile.exporters.torch.ranks import ranks_of
from river_compile.exporters.torch.state import State, forced_exits
from river_compile.runtime.exact import Drafting, Experience
from river_compile.runtime.steps import Step

__all__ = ["exact"]


def exact(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    streamer: Any = None,
    lookup: bool | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    experience: Experience | None = None,
    **model_arguments: Any,
) -> Any:
    """Exact decoding, for ``model.generate(..., custom_generate=river_compile.exact)``.

    The river drafts, and the backbone verifies: greedy tokens are the backbone's, sampled ones are distributed as the
    backbone's. A model that is not compiled with this backend, or has no river, drafts from the text itself alone.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_arguments: as ``generate`` gives
            them.
        streamer: gets tokens as they are verified; ``generate`` itself does not hand its own on, so give it by
            ``functools.partial``. With ``options={"exact": True}`` it is handed on.
        lookup: whether tokens of the text are drafts where it repeats; None: as the config says.
        on_step: is told each round: tokens made, drafted and accepted, seconds of draft and of verification.
        experience: what is known of passes and acceptance here; None: what the model has learnt since it was compiled.

    Raises:
        ConfigError: beam search, no KV cache, or a cache that cannot be cut back.
    """
    from river_compile.runtime.hf_exact import generate_exactly

    model_arguments.pop("synced_gpus", None)
    under_way = generate.under_way()
    compiled = model if under_way is None else under_way
    states = known_states(compiled)
    config = states[-1].config if states else config_of(compiled)
    tau, max_depth = (states[-1].tau, states[-1].max_depth) if states else (config.tau, config.max_depth)
    shaped = max_depth is not None or tau != RiverConfig.tau
    wants_logits = generation_config.output_logits or generation_config.output_scores

    # Known when the first passes have run, and looked up once: it reads all parameters' names.
    compiled_with = functools.cache(lambda: known_states(compiled)[-1:])

    def learnt() -> Experience:
        return _experience_of(compiled) if experience is None else experience

    def note(step: Step) -> None:
        on_step(step)
        for state in compiled_with():
            state.exact["rounds"] += 1
            state.exact["drafted"] += step.drafted
            state.exact["accepted"] += step.accepted
            state.exact["near_ties"] += step.near_ties
            state.exact["drafting"] += round(1e3 * step.draft_seconds)
            state.exact["verifying"] += round(1e3 * step.verify_seconds)

    # Draft lengths follow what passes cost; processes that run one model draft as the first one's clock says.
    ranks = functools.cache(
        lambda: next((s.ranks for s in compiled_with() if s.ranks), None) or ranks_of((), model.parameters())
    )

    def clock() -> float:
        now, them = time.perf_counter(), ranks()
        return now if them is None else them.first([now])[0]

    drafting = Drafting(
        tau=tau if shaped else None,
        max_depth=max_depth if shaped else 0,
        lookup=config.lookup if lookup is None else lookup,
        keep_logits=bool(wants_logits and generation_config.return_dict_in_generate),
    )
    with seam.many_graphs():
        made = generate_exactly(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_arguments,
            exits=forced_exits,
            has_river=lambda: any(state.river_layers for state in known_states(compiled)),
            experience=learnt,
            drafting=drafting,
            streamer=streamer,
            on_step=note,
            clock=clock,
        )
    if not generation_config.do_sample:
        _tell_if_plain(compiled, len(input_ids), learnt())
    return made


def _tell_if_plain(model: torch.nn.Module, batch: int, experience: Experience) -> None:
    """Say it once where nothing was drafted, since the tokens could not be promised."""
    dtype = getattr(model, "dtype", torch.float32)
    if dtype not in SHORT or (batch == 1 and not experience.tie):
        return
    why = f"decoded plainly: in {dtype} passes of several tokens round otherwise than passes of one here"
    if not experience.tie:
        why = f"decoded plainly: in {dtype} the sequences of a batch would move against each other, and round otherwise"
    for state in known_states(model)[-1:]:
        if why not in state.notes:
            state.notes[why] = None
            warnings.warn(f"exact: {why}", stacklevel=3)


_experiences: MutableMapping[State, Experience] = weakref.WeakKeyDictionary()


def _experience_of(model: torch.nn.Module) -> Experience:
    states = known_states(model)
    return _experiences.setdefault(states[-1], Experience()) if states else Experience()
