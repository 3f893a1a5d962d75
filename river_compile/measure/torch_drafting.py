"""A river made for drafting in PyTorch: of several rivers the one whose exact decoding is fastest on this machine."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.backend import RiverBackend
from river_compile.compiled import TUNED, river_bits, to_be_tuned
from river_compile.config import NEVER, RiverConfig
from river_compile.errors import InputError
from river_compile.exact_generate import exact
from river_compile.exporters.quantizers import quantizer, without_texts
from river_compile.exporters.torch.stack import is_linear
from river_compile.exporters.torch.tuning import tune_weights
from river_compile.exporters.torch.weights import Store
from river_compile.measure.draft_points import (
    MOST,
    NEW_TOKENS,
    DraftPlan,
    DraftPoint,
    always,
    candidates,
    draft_point,
    prompts_of,
    shares_by_place,
    tuning_could_pay,
)
from river_compile.measure.sensitivity import divergence, starts
from river_compile.passes.quantizer import ActivationAware, fitting_group
from river_compile.runtime.exact import Experience
from river_compile.runtime.steps import Step

__all__ = ["tune_exact"]

Progress = Callable[[str, int, int], None]

_SENSITIVITY_TOKENS = 256
_ALONE = (1, True)


def tune_exact(
    model: torch.nn.Module,
    ids: Sequence[np.ndarray | torch.Tensor],
    config: RiverConfig | None = None,
    *,
    progress: Progress = lambda step, done, total: None,
) -> DraftPlan:
    """Compile a model with several rivers, decode on from texts exactly with each, and choose the fastest.

    They differ in bits: 4 everywhere, 8 for the kinds of linear layer whose 4 bits cost most, and 8 everywhere; where
    it could pay, GPTQ is tried as well (its weights are kept, as `tune` keeps them). Exact and plain decoding take
    turns, text by text. All rivers, six at most, stay in memory meanwhile: all together about as many bytes as
    the model's layers have in float32. In the end torch forgets what it has compiled, of other models too: it is
    compiled anew when it is next called.

    Args:
        model: a causal language model of transformers in eval mode; one compiled already is run as the original.
        ids: token ids of texts, int64 [tokens] each, of at least 64: none that a figure is reported on. Six of them are
            decoded on from; GPTQ reads all.
        config: what all rivers have in common. Bits given for patterns stay; the LM head has 8 bits where it is float.
        progress: is told the step, what is done and how much there is.

    Returns:
        The plan: compile with ``options=plan.options``; its ``points`` are what was measured.

    Raises:
        InputError: the model cannot be used, or decodes plainly whatever drafts; or the texts are too short.
    """
    config, model = config or RiverConfig(), to_be_tuned(model)
    texts = [np.asarray(text) for text in ids]
    roles = _roles_by_cost(model, config, texts, progress)
    found = candidates(config, roles, without_texts(config.quantizer), head=True)
    try:
        tried = _Tried(model, prompts_of(texts), progress)
        for candidate in found:
            tried.add(candidate)
        if tuning_could_pay(tried.points):
            for candidate in _tuned(model, texts, found[:2], progress):
                tried.add(candidate)
    finally:
        torch.compiler.reset()
    best = max(range(len(tried.points)), key=lambda index: tried.points[index].measured or 0.0)
    return DraftPlan(tried.configs[best], tuple(tried.points), best)


def _tuned(
    model: torch.nn.Module, texts: Sequence[np.ndarray], configs: Sequence[RiverConfig], progress: Progress
) -> Iterator[RiverConfig]:
    """Settings with GPTQ, each when its weights are there; a weight is quantized once for a number of bits."""
    chosen = quantizer("gptq")
    assert isinstance(chosen, ActivationAware)
    there: set[tuple[int, int]] = set()
    for config in configs:
        wanted = river_bits(model, config)
        missing: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary(
            {parameter: bits for parameter, bits in wanted.items() if (id(parameter), bits) not in there}
        )
        tune_weights(TUNED, model, missing, config.group_size, texts, chosen, progress)
        there |= {(id(parameter), bits) for parameter, bits in missing.items()}
        yield replace(config, quantizer=chosen.name)


class _Tried:
    """The rivers tried so far, each compiled, beside the model decoding plainly."""

    def __init__(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], progress: Progress) -> None:
        self._model, self._progress = model, progress
        self._prompts = [torch.tensor([prompt]) for prompt in prompts]
        self._plain = torch.compile(model, backend=RiverBackend(RiverConfig(tau=NEVER)))
        self.configs: list[RiverConfig] = []
        self.points: list[DraftPoint] = []

    def add(self, config: RiverConfig) -> None:
        """Compile a river and measure it."""
        config = replace(config, exact=True)
        self._progress("try rivers as drafters", len(self.configs), len(self.configs) + 1)
        compiled = torch.compile(self._model, backend=RiverBackend(config, store=Store(TUNED)))
        self.configs.append(config)
        self.points.append(self._measured(compiled, config))

    def _measured(self, compiled: Any, config: RiverConfig) -> DraftPoint:
        experience = Experience()
        self._exactly(compiled, self._prompts[0], experience, lookup=False)
        self._plainly(self._prompts[0])
        steps: list[Step] = []
        for prompt in self._prompts:
            drafting = replace(always(MOST), tie=experience.tie)
            self._exactly(compiled, prompt, drafting, lookup=False, on_step=steps.append)
        if not any(step.drafted for step in steps):
            raise InputError("nothing is drafted with this model here: the warning of its first generation says why")
        ratios, differing = [], 0
        for prompt in self._prompts:
            expected, plain = self._plainly(prompt)
            made, seconds = self._exactly(compiled, prompt, experience)
            ratios.append(plain / seconds)
            differing += int((expected != made).sum())
        point = draft_point(
            config, _mean_bits(self._model, config), shares_by_place(steps), experience.lengths[_ALONE].costs
        )
        return replace(point, measured=round(statistics.median(ratios), 3), differing=differing)

    def _exactly(
        self, compiled: Any, prompt: torch.Tensor, experience: Experience, **settings: Any
    ) -> tuple[torch.Tensor, float]:
        return _generate(compiled, prompt, functools.partial(exact, experience=experience, **settings))

    def _plainly(self, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
        return _generate(self._plain, prompt, None)


def _generate(compiled: Any, prompt: torch.Tensor, method: Callable[..., Any] | None) -> tuple[torch.Tensor, float]:
    """The tokens written after a prompt, greedily, and the seconds that it took."""
    prompt = prompt.to(compiled.device)
    started = time.perf_counter()
    made = compiled.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        custom_generate=method,
    )
    return made[0, prompt.shape[1] :], time.perf_counter() - started


def _mean_bits(model: torch.nn.Module, config: RiverConfig) -> float:
    weights = [
        (parameter.numel(), bits) for parameter, bits in river_bits(model, config).items() if parameter.dim() > 1
    ]
    return sum(count * bits for count, bits in weights) / sum(count for count, _ in weights)


def _roles_by_cost(
    model: torch.nn.Module, config: RiverConfig, texts: Sequence[np.ndarray], progress: Progress
) -> list[str]:
    """The kinds of linear layer by the last part of their names, those first whose 4 bits cost most KL for a weight."""
    ids = torch.from_numpy(starts(texts, _SENSITIVITY_TOKENS)).to(next(model.parameters()).device)
    wanted = river_bits(model, replace(config, bits=4))
    roles: dict[str, list[tuple[str, torch.nn.Module]]] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module.weight in wanted:
            roles.setdefault(name.rpartition(".")[2], []).append((name, module))
    with torch.no_grad():
        reference = _logits(model, ids, {})
        costs: dict[str, float] = {}
        for number, (role, members) in enumerate(roles.items()):
            progress("measure kinds of layers", number, len(roles))
            changed = {f"{name}.weight": _rounded(module, config) for name, module in members}
            cost = divergence(reference, _logits(model, ids, changed))
            costs[role] = cost / sum(weight.numel() for weight in changed.values())
    progress("measure kinds of layers", len(roles), len(roles))
    return sorted(costs, key=lambda role: -costs[role])


def _logits(model: torch.nn.Module, ids: torch.Tensor, changed: dict[str, torch.Tensor]) -> np.ndarray:
    outputs: Any = functional_call(model, changed, (), {"input_ids": ids, "use_cache": False})
    return np.asarray(outputs.logits.float().cpu().numpy())


def _rounded(module: Any, config: RiverConfig) -> torch.Tensor:
    """The weight of a linear layer as 4 bits stand for it; the weight itself where no group size fits."""
    weight = module.weight
    matrix = weight.T if isinstance(module, torch.nn.Linear) else weight
    group = fitting_group(matrix.shape[0], config.group_size)
    if group is None:
        return weight  # type: ignore[no-any-return]
    rounded = quantizer("rtn").quantize(matrix.float().cpu().numpy(), 4, group).dequantize()
    result = rounded.T if isinstance(module, torch.nn.Linear) else rounded
    return torch.from_numpy(result.copy()).to(weight.device, weight.dtype)
