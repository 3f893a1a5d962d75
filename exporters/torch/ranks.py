"""The processes over which a model is spread, and what they must do alike.

Each runs the same program, and a pass has collectives in every layer: a process that took another way than the others
would leave them waiting. So what could differ, by rounding or by what a user set in one process only, is the first
process's for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.torch import seam

__all__ = ["Ranks", "Spread", "ranks_of"]

_COLLECTIVES = ("_c10d_functional.", "c10d_functional.")


@dataclass(frozen=True)
class Ranks:
    """The processes of one group; every method is a collective, to be called by all of them in the same order."""

    group: Any
    device: torch.device

    @property
    def rank(self) -> int:
        return int(torch.distributed.get_rank(self.group))

    @property
    def size(self) -> int:
        return int(torch.distributed.get_world_size(self.group))

    def first(self, numbers: Sequence[float]) -> list[float]:
        """The first process's numbers, float64: as many as each has."""
        told = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, group=self.group, group_src=0)
        found: list[float] = told.tolist()
        return found

    def exits(
        self, layers: int, tau: float, limit: int | None, offsets: Sequence[float] | None
    ) -> tuple[float, int | None, tuple[float, ...]]:
        """The first process's exit settings.

        Args:
            layers: how many offsets there are.
        """
        given = math.inf if limit is None else float(limit)
        tau, given, *told = self.first([tau, given, *(offsets or [0.0] * layers)])
        return tau, None if given == math.inf else int(given), tuple(told)

    def agree(self, problem: RiverError | None, decisions: tuple[tuple[bool, bool], ...] | None) -> RiverError | None:
        """What keeps one of the processes, and so all of them, from running a graph with its river.

        Args:
            problem: of this process.
            decisions: which layers have a twin here, and after which of them a pass may leave; the processes must have
                found the same. None if there is a problem.
        """
        field = problem.field if isinstance(problem, ConfigError) else None
        told: list[Any] = [None] * self.size
        said = (None if problem is None else str(problem), field, decisions)
        torch.distributed.all_gather_object(told, said, group=self.group)
        for rank, (text, field, _) in enumerate(told):
            if text is None:
                continue
            if rank == self.rank:
                return problem
            why = f"{text.removeprefix(f'{field}: ')} (in process {rank} of {self.size})"
            return InputError(why) if field is None else ConfigError(field, why)
        if any(others != decisions for *_, others in told):
            return InputError("the processes over which the model is spread have different graphs")
        return None

    def failure(self, error: Exception) -> RiverError:
        """What to raise where a pass failed: the processes are out of step, and this one has to end."""
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return InputError(f"a pass failed in process {self.rank} of {self.size}, and all have to end: {why}")


@dataclass(frozen=True)
class Spread:
    """What a graph of a model that is spread over processes has to know beside its nodes.

    Fields:
        ranks: the processes.
        order: for each input of the graph which argument it is; None: they are the same.
        shards: names of the inputs that take the shard that this process holds of the argument.
    """

    ranks: Ranks
    order: tuple[int, ...] | None = None
    shards: frozenset[str] = frozenset()

    def arguments(self, given: Sequence[Any]) -> Sequence[Any]:
        """The arguments of a call by the graph's inputs; tensors that are spread still are."""
        return given if self.order is None else [given[place] for place in self.order]


def ranks_of(nodes: Iterable[fx.Node], values: Iterable[Any]) -> Ranks | None:
    """The processes with which a graph has collectives, or over which tensors are spread; None if there are none.

    Args:
        nodes: of the graph.
        values: its inputs, or other tensors.

    Raises:
        InputError: they are of several groups, so that it is not clear who must exit together.
    """
    values = list(values)
    groups = {name for node in nodes for name in _groups_of(node)}
    groups |= {name for value in values for name in seam.groups_of(value)}
    if not groups:
        return None
    if len(groups) > 1:
        raise InputError(f"the model is spread over several groups of processes ({', '.join(sorted(groups))})")
    devices = (value.device for value in values if isinstance(value, torch.nn.Parameter))
    return Ranks(seam.process_group(groups.pop()), next(devices, torch.device("cpu")))


def _groups_of(node: fx.Node) -> list[str]:
    """The group that a functional collective names."""
    if node.op != "call_function" or not str(node.target).startswith(_COLLECTIVES):
        return []
    target: Any = node.target
    names = [argument.name for argument in getattr(target, "default", target)._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [name] if isinstance(name := given.get("group_name"), str) else []
