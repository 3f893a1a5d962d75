"""The one place that touches what torch does not promise to keep: Inductor on a piece, and Dynamo's symbolic sizes.

`make test-versions` runs it with the oldest torch that pyproject.toml allows and with the newest. Where something is
missing, the error says what.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from river_compile.errors import RiverError
from river_compile.exporters.machine import cpu_name

__all__ = [
    "UnsupportedTorch",
    "as_it_is_now",
    "cache_folder",
    "compile_piece",
    "compile_whole",
    "define_operator",
    "describe_machine",
    "describe_modes",
    "describe_symbol",
    "dynamo_error",
    "groups_of",
    "guards_since",
    "holds",
    "many_graphs",
    "module_wrapper",
    "of_any_length",
    "process_group",
    "shard_of",
    "skip_frames",
]


_WORTH_A_CORE = 4096
"""Numbers that a loop of a piece must have for each core that it is spread over."""
GRAPHS = 64
"""How many graphs of one function a generation may compile."""
_PACKAGE = f"{__name__.partition('.')[0]}."


class UnsupportedTorch(RiverError):
    """This torch lacks a private interface that the backend needs."""

    def __init__(self, what: str) -> None:
        super().__init__(f"torch {torch.__version__} lacks {what}, which this release of river-compile needs")


def compile_piece(
    module: fx.GraphModule, values: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one piece of the graph that Dynamo is compiling now.

    Args:
        module: takes ``values``, returns a tuple; it is consumed.
        values: fake tensors and symbolic sizes of the ambient trace, or real tensors.

    Raises:
        UnsupportedTorch: Inductor has no standalone compiler here.
    """
    compiler = getattr(torch._inductor, "standalone_compile", None)
    if compiler is None:
        raise UnsupportedTorch("torch._inductor.standalone_compile")
    fake_mode = ambient_fake_mode()
    examples = [
        fake_mode.from_tensor(value, static_shapes=True)
        if isinstance(value, torch.Tensor) and not isinstance(shard_of(value), torch._subclasses.FakeTensor)
        else value
        for value in values
    ]
    patches = {**_cacheable(module), **_fusible(module, examples), **(options or {})}
    called_from_c = _called_from_c(examples)
    compile_with = functools.partial(_compile, compiler, module, examples)
    try:
        try:
            artifact = compile_with(called_from_c | patches)
        except Exception:
            if not called_from_c:
                raise
            artifact = compile_with(patches)
    except Exception as error:
        if not _is_wrong_source(error):
            raise
        warnings.warn(
            f"a piece of the model runs uncompiled: Inductor of torch {torch.__version__} writes C++ for it that does "
            "not compile",
            stacklevel=2,
        )
        return module
    # The artifact's own call only hands the arguments on.
    return getattr(artifact, "_compiled_fn", artifact)  # type: ignore[no-any-return]


def _compile(
    compiler: Callable[..., Any], module: fx.GraphModule, examples: Sequence[Any], patches: dict[str, Any]
) -> Any:
    with warnings.catch_warnings():
        # What a river is in a float16 model: torch's 4-bit kernel is fast in bfloat16 alone.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")
        return compiler(module, examples, dynamic_shapes="from_tracing_context", options={"config_patches": patches})


def _is_wrong_source(error: Exception) -> bool:
    """Whether Inductor wrote C++ that does not compile: that of torch 2.11, where it makes the mask of a growing cache,
    checks an index before it declares it."""
    inner = getattr(error, "inner_exception", error)
    return "CppCompileError" in {kind.__name__ for kind in type(inner).__mro__}


def _cacheable(module: fx.GraphModule) -> dict[str, Any]:
    """The setting that lets a graph with functions of this package into the cache on disk, as long as their source is
    what it was; without it nothing but Inductor's own part is found again by the next process."""
    known = getattr(torch._inductor.config, "unsafe_marked_cacheable_functions", None)
    if known is None:
        return {}
    own = {
        f"{node.target.__module__}.{node.target.__name__}": _digest_of(node.target.__module__)
        for node in module.graph.nodes
        if node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith(_PACKAGE)
    }
    return {"unsafe_marked_cacheable_functions": {**known, **own}} if own else {}


def _fusible(module: fx.GraphModule, values: Sequence[Any]) -> dict[str, Any]:
    """The setting without which Inductor fuses what reads flex attention into its template, and stops where a CPU's
    template takes nothing in: a product that is written as a sum, as the river's may be."""
    flexible = any(
        node.op == "call_function" and getattr(node.target, "__name__", "") == "flex_attention"
        for node in module.graph.nodes
    )
    on_cpu = any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in values)
    return {"epilogue_fusion": False} if flexible and on_cpu else {}


def _called_from_c(values: Sequence[Any]) -> dict[str, Any]:
    """The settings by which Inductor writes what calls a CPU's kernels in C++ as well, since in Python that takes a
    tenth of a small model's pass; and keeps the norms and sums of a single row on one core."""
    on_cpu = all(value.device.type == "cpu" for value in values if isinstance(value, torch.Tensor))
    return {"cpp_wrapper": True, "cpp.min_chunk_size": _WORTH_A_CORE} if on_cpu else {}


@functools.cache
def _digest_of(module: str) -> str:
    return hashlib.sha256(inspect.getsource(sys.modules[module]).encode()).hexdigest()


def compile_whole(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph from Dynamo as ``backend="inductor"`` does."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, list(inputs))
    return compiled  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:
        raise UnsupportedTorch("torch._inductor.runtime.cache_dir_utils.cache_dir") from None
    return Path(cache_dir())


def describe_machine() -> str:
    """The CPU and the torch that measurements hold for."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    level = torch.backends.cpu.get_cpu_capability()
    return repr((torch.__version__, cpu_name(), level, sorted(map(str, capabilities.items()))))


_library: list[Any] = []


def define_operator(schema: str, function: Callable[..., torch.Tensor], shape: Callable[..., torch.Tensor]) -> None:
    """Define an operator of this package that a compiler calls as it is: what it does depends on the sizes at hand.

    Args:
        schema: as ``torch.library.define`` takes it; the operator is ``torch.ops.river_compile.<name>``.
        function: computes a new tensor of operands it does not change, on any device.
        shape: an empty tensor like the result.
    """
    if not _library:
        _library.append(torch.library.Library("river_compile", "FRAGMENT"))  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    _library[0].define(schema)
    _library[0].impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"river_compile::{name}", shape, lib=_library[0])


def dynamo_error() -> type[Exception]:
    """What Dynamo raises to start its analysis anew, among others; not for a backend to catch.

    Raises:
        UnsupportedTorch: there is no such class here.
    """
    found = getattr(torch._dynamo.exc, "TorchDynamoException", None)
    if found is None:
        raise UnsupportedTorch("torch._dynamo.exc.TorchDynamoException")
    return found  # type: ignore[no-any-return]


def module_wrapper() -> type:
    """The class of what ``torch.compile(module)`` returns.

    Raises:
        UnsupportedTorch: there is no such class here.
    """
    try:
        from torch._dynamo.eval_frame import OptimizedModule
    except ImportError:
        raise UnsupportedTorch("torch._dynamo.eval_frame.OptimizedModule") from None
    return OptimizedModule


def skip_frames(*functions: Callable[..., Any]) -> None:
    """Let Dynamo pass over these functions' own frames, and compile what they call.

    Raises:
        UnsupportedTorch: torch cannot be told so here.
    """
    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip is None:
        raise UnsupportedTorch("torch._dynamo.eval_frame.skip_code")
    for function in functions:
        skip(function.__code__)


def ambient_fake_mode() -> Any:
    """The fake mode of the compilation that is under way.

    Raises:
        UnsupportedTorch: there is none.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise UnsupportedTorch("a tracing context in the backend")
    return context.fake_mode


def as_it_is_now(value: Any) -> Any:
    """A fake value such that a compiler binds what it stands for by now.

    A symbolic number that was found equal to another one since shows the other to whoever looks at it, but as an
    operand Inductor would bind the symbol that it was made with.
    """
    if not isinstance(value, torch.SymInt):
        return value
    now = value.node.expr
    if now == value.node._expr:
        return value
    return value.node.shape_env.create_symintnode(now, hint=value.node.hint)


@contextmanager
def many_graphs() -> Iterator[None]:
    """Lets Dynamo compile as many graphs of one function as a generation needs.

    A prompt, passes of one row and of several, a cache that grows and one that was cut, and all that once more where a
    module is compiled twice: more than the 8 that it compiles by itself. What comes after, it runs uncompiled.
    """
    config = torch._dynamo.config
    with _lock:
        _limits.append(config.recompile_limit)
        config.recompile_limit = max(GRAPHS, config.recompile_limit)
    try:
        yield
    finally:
        with _lock:
            # The first is what it was before any; the others saw it raised.
            before = _limits.pop()
            if not _limits:
                config.recompile_limit = before


_lock = threading.Lock()
_limits: list[int] = []


def describe_symbol(symbol: Any) -> str:
    """What the compilation that is under way knows of a symbolic size."""
    return str(ambient_fake_mode().shape_env.var_to_range.get(symbol))


def describe_modes() -> str:
    """What changes the meaning of a graph from outside: Dynamo compiles it anew when one of these changes."""
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return repr((modes, autocast))


@contextmanager
def guards_since() -> Iterator[list[Any]]:
    """Collects the guards on symbolic sizes that are added in the body: sympy expressions."""
    environment = ambient_fake_mode().shape_env
    added: list[Any] = []
    before = len(environment.guards) if environment is not None else 0
    yield added
    if environment is not None:
        added += [guard.expr for guard in environment.guards[before:]]


def holds(expression: Any) -> bool:
    """Whether a guard holds for the sizes at hand; if so it is added to the compilation that is under way."""
    return bool(ambient_fake_mode().shape_env.evaluate_expr(expression))


def of_any_length(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, marked: what Dynamo compiles for it takes it at any length of its first dimension.

    Raises:
        UnsupportedTorch: there is no such mark here.
    """
    mark = getattr(torch._dynamo, "maybe_mark_dynamic", None)
    if mark is None:
        raise UnsupportedTorch("torch._dynamo.maybe_mark_dynamic")
    mark(tensor, 0)
    return tensor


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is spread over several; the tensor itself if it is not.

    Not by ``to_local``, which makes a new tensor each time.
    """
    return getattr(tensor, "_local_tensor", tensor)


def groups_of(value: Any) -> list[str]:
    """The names of the groups of processes over which a value is spread; none if it is not a tensor that is."""
    mesh = getattr(value, "device_mesh", None)
    return [] if mesh is None else [group.group_name for group in mesh.get_all_groups()]


def process_group(name: str) -> Any:
    """The group of processes that a collective in a graph names.

    Raises:
        UnsupportedTorch: it cannot be looked up here.
    """
    from torch.distributed import distributed_c10d

    resolve = getattr(distributed_c10d, "_resolve_process_group", None)
    if resolve is None:
        raise UnsupportedTorch("torch.distributed.distributed_c10d._resolve_process_group")
    return resolve(name)
