"""From what `evaluate` takes as a model to the subject that reads with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.measure.compiled_subject import DTYPES, CompiledSubject
from river_compile.measure.fidelity import TextTokenizer
from river_compile.measure.subjects import OnnxSubject, Subject
from river_compile.measure.tuning import Tuning

__all__ = ["refuse_given", "subject_of"]


def subject_of(
    model: Any,
    threads: int | None,
    config: RiverConfig | None,
    dtype: str | None,
    capacity: int,
    tokenizer: TextTokenizer,
    progress: Callable[[str, int, int], None],
) -> Subject:
    """The subject of what `evaluate` takes as a model; its arguments are described there.

    Args:
        capacity: tokens of the longest document.

    Raises:
        ConfigError: a setting is given that this kind of model has not.
        InputError, MissingExtra: as the subject that is made.
    """
    named = isinstance(model, (str, Path))
    if named and not Path(model).is_dir():
        refuse_given("is of a Hugging Face model; an exported river model has its own", config=config, dtype=dtype)
        return OnnxSubject(model, threads)
    if not named and hasattr(model, "read"):
        refuse_given("is not for a subject, which has its own", config=config, dtype=dtype, threads=threads)
        return model  # type: ignore[no-any-return]
    refuse_given("is ONNX Runtime's; torch takes OMP_NUM_THREADS", threads=threads)
    if named:
        subject = CompiledSubject.load(Path(model), config, dtype=dtype or DTYPES[0], capacity=capacity)
        subject.tune(Tuning(tokenizer), progress)
        return subject
    refuse_given("is for a folder; a module has its own", dtype=dtype)
    return CompiledSubject(model, config, capacity=capacity)


def refuse_given(why: str, **given: object) -> None:
    """
    Raises:
        ConfigError: one of the settings is given.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(name, why)
