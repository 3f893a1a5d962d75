"""The one settings object: every option of every entry point is a field of :class:`RiverConfig`."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from river_compile.errors import ConfigError

__all__ = ["ACTIVATIONS", "BITS", "FLOAT", "GROUP_SIZES", "KV_POLICIES", "NEVER", "PREFILLS", "RiverConfig"]

BITS = (4, 8)
FLOAT: Literal["float"] = "float"
GROUP_SIZES = (32, 64, 128)
ACTIVATIONS = ("float", "int8")
KV_POLICIES = ("share", "propagate", "mask", "recompute", "monotone")
LAYOUTS = ("tool", "triton")
PREFILLS = ("auto", "river", "backbone")
NEVER = 2.0
"""A ``tau`` that no similarity reaches: exits are off."""


@dataclass(frozen=True)
class RiverConfig:
    """How a decoder is given its exit river. Immutable and valid by construction.

    Raises:
        ConfigError: a field has a value it cannot have; the error names the field.

    Fields:
        tau: exit threshold on the state transition similarity, in [-1, 1]; a value above 1 means "never exit". Paper,
            section 3: 0.5 for Llama, 0.8 to 0.9 for Phi and Ministral.
        max_depth: hard limit on the exit depth (backbone layers per forward pass); None is no limit, 0 all river.
        min_depth: backbone layers that every forward pass runs before similarity may make it exit.
        tau_offsets: what to add to ``tau`` after each decoder layer, one number a layer; an offset of 3 means that no
            token exits there. Empty: all 0, but an exported model has room to set them at run time (the overridable
            ``river.tau_offsets``). None: one threshold for all layers, and no such room.
        calibration: a threshold with its evidence, as `river_compile.calibrate` writes it: the file, or its JSON text.
            It sets ``tau``, ``min_depth`` and ``tau_offsets``, and goes into an exported model's metadata whole.
        exit_every: an exit decision after every K-th layer only.
        keep_layers: indices of decoder layers that get no river twin; negative ones count from the end.
        bits: bits of a river weight.
        bits_for: ``(pattern, bits)`` pairs, the first match wins over ``bits``; a pattern is a shell glob on a linear
            layer's qualified name (``model.layers.3.mlp.down_proj``) or a decoder layer's (``layers.3``); "float"
            leaves the weight as it is.
        head_bits: bits of the LM head that a token takes after its exit; "float": it takes the backbone's (paper,
            section 3). A model that torch compiles with ``exact`` drafts with 8 bits then.
        group_size: input channels that share one scale and zero point.
        activations: what a river product computes with on a CPU: "int8" quantizes activations on the fly, a small loss
            beside that of the weights, and takes a third of the time; "float" is the model's own type (the paper's
            W4A16), and slow with 8-bit weights. A GPU quantizes no activations: give it "float", since "int8" has a
            float16 model's products compute in float32. A bfloat16 model computes in bfloat16 either way.
        quantizer: the name of the algorithm that chooses scales and zero points.
        kv_policy: what becomes of the K and V of skipped layers: "share", the river; the others (propagate, mask,
            recompute, monotone) exist in `river_compile.reference` alone, to be compared with.
        extra_output: whether an exported model has the output ``river.exit_depth``.
        external_data: whether exported weights go into one file beside the model; None: where the model's
            are, or when over 1 GB.
        dump_dir: a folder that gets the graph after each pass in a readable form.
        prefill: whether torch.compile lets a prompt exit, all its tokens at one depth: "river", "backbone" (it runs
            every layer), or "auto" (river only for prompts so short that its products are faster there).
        saved_river: a folder of `river_compile.save_river`: torch.compile takes its weights and its quantizer.
        autotune: whether torch.compile, on a CPU, times the forms of each product on this machine, takes the fastest,
            and closes exits where the river's products are no faster than the backbone's; what was timed is kept for
            later processes. False: torch's own products for the backbone, its 4-bit kernel for the river.
        strict: raise where a compiled model would fall back to the plain backend.
        cuda_graphs: whether torch.compile, on CUDA, runs decode passes as CUDA graphs, one a backbone layer and one for
            the river after each exit depth; they need a static cache and masks of one size. Off by default: it has not
            been run on a GPU yet.
        exact: generation is exact unless it is told otherwise: the river only drafts, and the backbone verifies, so the
            tokens are the backbone's. ``tau`` and ``max_depth`` then shape the drafts.
        lookup: in exact mode, whether tokens of the text itself are drafts where an n-gram repeats.
        offload_after: torch.compile, on a CPU, keeps the backbone weights of decoder layers from this one on in a file,
            and in memory only while a pass runs them; river, norms, embeddings, head and the layers before stay. None:
            all stay.
        offload_memory: the same, by the bytes that the decoder layers may keep: as many as fit stay.
        offload_folder: where that file lies; the system's folder for temporary files if None.
    """

    tau: float = 0.9
    max_depth: int | None = None
    min_depth: int = 1
    tau_offsets: tuple[float, ...] | None = None
    calibration: str | Path | None = None
    exit_every: int = 1
    keep_layers: tuple[int, ...] = ()
    bits: int = 4
    bits_for: tuple[tuple[str, int | Literal["float"]], ...] = ()
    head_bits: int | Literal["float"] = FLOAT
    group_size: int = 32
    activations: str = "int8"
    quantizer: str = "rtn"
    kv_policy: str = "share"
    extra_output: bool = True
    external_data: bool | None = None
    dump_dir: Path | None = None
    prefill: str = "auto"
    saved_river: str | Path | None = None
    autotune: bool = True
    strict: bool = False
    cuda_graphs: bool = False
    exact: bool = False
    lookup: bool = True
    offload_after: int | None = None
    offload_memory: int | None = None
    offload_folder: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_layers", tuple(self.keep_layers))
        object.__setattr__(self, "bits_for", tuple((str(p), b) for p, b in self.bits_for))
        if self.dump_dir is not None:
            object.__setattr__(self, "dump_dir", Path(self.dump_dir))
        if self.calibration is not None:
            self._take_calibration()
        self._check_numbers()
        self._check_bits()
        if self.group_size not in GROUP_SIZES:
            raise ConfigError("group_size", f"must be one of {GROUP_SIZES}, not {self.group_size!r}")
        named = {"activations": ACTIVATIONS, "prefill": PREFILLS, "kv_policy": KV_POLICIES}
        for field, names in named.items():
            if (value := getattr(self, field)) not in names:
                raise ConfigError(field, f"must be one of {', '.join(names)}, not {value!r}")
        for field in ("autotune", "cuda_graphs", "exact", "lookup"):
            if not isinstance(value := getattr(self, field), bool):
                raise ConfigError(field, f"must be True or False, not {value!r}")
        if not isinstance(self.quantizer, str) or not self.quantizer:
            raise ConfigError("quantizer", f"must be a name, not {self.quantizer!r}")
        if self.tau_offsets is not None:
            object.__setattr__(self, "tau_offsets", tuple(map(float, self.tau_offsets)))
            if any(map(math.isnan, self.tau_offsets)):
                raise ConfigError("tau_offsets", "must be numbers, one a decoder layer")

    def _take_calibration(self) -> None:
        """Set the thresholds of the calibration, which is kept as its JSON text."""
        text = str(self.calibration)
        if not text.lstrip().startswith("{"):
            try:
                text = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("calibration", f"{text}: cannot be read") from error
        try:
            found = json.loads(text)
            taken = {
                "tau": float(found["tau"]),
                "min_depth": int(found["min_depth"]),
                "tau_offsets": None if found["tau_offsets"] is None else tuple(map(float, found["tau_offsets"])),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("calibration", "not a calibration, as river-calibrate writes it") from error
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in taken.items():
            if getattr(self, name) not in (value, defaults[name]):
                raise ConfigError("calibration", f"it sets {name}; give one of the two")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "calibration", json.dumps(found, sort_keys=True))

    def _check_bits(self) -> None:
        if self.bits not in BITS:
            raise ConfigError("bits", f"must be one of {BITS}, not {self.bits!r}")
        for pattern, bits in self.bits_for:
            if bits not in (*BITS, FLOAT):
                raise ConfigError("bits_for", f"{pattern}={bits!r}: bits must be one of {BITS} or {FLOAT!r}")
        if self.head_bits not in (*BITS, FLOAT):
            raise ConfigError("head_bits", f"must be one of {BITS} or {FLOAT!r}, not {self.head_bits!r}")

    def _check_numbers(self) -> None:
        if not isinstance(self.tau, (int, float)) or isinstance(self.tau, bool) or not math.isfinite(self.tau):
            raise ConfigError("tau", f"must be a finite number, not {self.tau!r}")
        if self.tau < -1:
            raise ConfigError("tau", f"must lie in [-1, 1], or above 1 for 'never exit', not {self.tau!r}")
        counts = {"min_depth": (self.min_depth, 0), "exit_every": (self.exit_every, 1)}
        for field in ("max_depth", "offload_after", "offload_memory"):
            if getattr(self, field) is not None:
                counts[field] = (getattr(self, field), 0)
        for field, (value, least) in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(field, f"must be a whole number, {least} or more, not {value!r}")
        if None not in (self.offload_after, self.offload_memory):
            raise ConfigError("offload_memory", "offload_after says how many layers stay; give one of the two")
        for index in self.keep_layers:
            if not isinstance(index, int) or isinstance(index, bool):
                raise ConfigError("keep_layers", f"must be layer indices, not {index!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> RiverConfig:
        """The config of a dict of options, as ``torch.compile(options=...)`` passes them.

        Raises:
            ConfigError: an option is no field of this class, or its value is wrong.
        """
        options = dict(options or {})
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(name, f"no such option; there are {', '.join(sorted(known))}")
        return cls(**options)

    @property
    def offloads(self) -> bool:
        """Whether deep layers are to be offloaded."""
        return self.offload_after is not None or self.offload_memory is not None

    def bits_of(self, *names: str) -> int | None:
        """Bits of a linear layer's river weights, by any of the names it goes by; None: it stays in its float type."""
        for pattern, bits in self.bits_for:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return bits if isinstance(bits, int) else None
        return self.bits

    def tau_offset(self, layer: int) -> float:
        """What to add to ``tau`` for the exit decision after a decoder layer, counted from 0."""
        return self.tau_offsets[layer] if self.tau_offsets else 0.0

    def kept(self, layers: int) -> frozenset[int]:
        """The indices in ``keep_layers`` for a stack of ``layers`` decoder layers, all counted from the front.

        Raises:
            ConfigError: an index lies outside the stack.
        """
        for index in self.keep_layers:
            if not -layers <= index < layers:
                raise ConfigError("keep_layers", f"{index} is no layer of a stack of {layers}")
        return frozenset(index % layers for index in self.keep_layers)

    def exit_points(self, layers: int) -> tuple[int, ...]:
        """Depths (number of backbone layers run) after which similarity may decide to exit."""
        first = max(self.min_depth, 1)
        return tuple(depth for depth in range(first, layers) if depth % self.exit_every == 0)

    def to_json(self) -> str:
        """This config as one line of JSON, as it is written into what is exported; without a calibration's evidence."""
        fields = dataclasses.asdict(self)
        fields["dump_dir"] = fields["calibration"] = fields["saved_river"] = fields["offload_folder"] = None
        return json.dumps(fields, sort_keys=True)
