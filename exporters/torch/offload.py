"""Weights in memory-mapped files: they are in memory while they are used, and no longer.

A mapping is shared with its file. So what is written to a weight is the file's, and stays when its pages go.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError

__all__ = [
    "Extent",
    "WeightsFile",
    "check",
    "find",
    "first_offloaded",
    "give_back",
    "is_supported",
    "join",
    "let_go",
    "move",
    "offload",
    "write",
]

_LINE = 64
"""Bytes that every weight begins at a multiple of."""
_AROUND = 1 << 21
"""The most bytes before and after what was read that the system may have mapped at once."""


class WeightsFile(mmap.mmap):
    """A file of weights, mapped whole, for as long as a tensor lies in it.

    It has no name in its folder: nobody else can change it, and nothing is left behind however the process ends.

    Fields:
        address: where it begins in memory.
        noted: the last seen samples of weights, by their places in the file.
    """

    address: int
    noted: dict[int, torch.Tensor]

    @classmethod
    def map(cls, file: IO[bytes], size: int) -> WeightsFile:
        """Map ``size`` bytes of a file, to be read and written."""
        made = cls(file.fileno(), size)
        made.address, made.noted = torch.frombuffer(made, dtype=torch.uint8).data_ptr(), {}
        _files.add(made)
        return made

    def check(self) -> None:
        """Whether all of it can be read: to read behind a file's end would kill the process.

        Raises:
            InputError: the file was cut.
        """
        if (size := self.size()) < len(self):
            raise InputError(
                f"the file of offloaded weights was cut to {size} of its {len(self)} bytes: load the model anew"
            )

    def tensor(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weight that begins at a byte of the file."""
        with torch.inference_mode(False):
            return torch.frombuffer(self, dtype=dtype, count=torch.Size(shape).numel(), offset=place).view(shape)


_files: weakref.WeakSet[WeightsFile] = weakref.WeakSet()
"""All that are mapped: whether memory belongs to a file is asked of tensors whose history nobody knows."""


@dataclass(frozen=True)
class Extent:
    """Bytes of a file of weights."""

    file: WeightsFile
    start: int
    stop: int

    def prefetch(self) -> None:
        """Have them read from the disk while others compute."""
        self._advise(mmap.MADV_WILLNEED, self.start, self.stop)

    def drop(self) -> None:
        """Let their memory go; the next use reads them again."""
        self._advise(mmap.MADV_DONTNEED, self.start - _AROUND, self.stop + _AROUND)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        first = max(start, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.madvise(advice, first, min(stop, len(self.file)) - first)


def is_supported() -> bool:
    """Whether this system tells what to read ahead and what to let go."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MADV_WILLNEED")


def find(tensor: torch.Tensor) -> Extent | None:
    """Where a tensor lies, if in a file of weights."""
    if not _files or tensor.device.type != "cpu":
        return None
    address = tensor.data_ptr()
    for file in list(_files):
        if file.address <= address < file.address + len(file):
            return Extent(file, address - file.address, address - file.address + tensor.nbytes)
    return None


def join(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes in as few extents as there are, those between neighbours included."""
    joined: list[Extent] = []
    for extent in sorted(extents, key=lambda one: (one.file.address, one.start)):
        last = joined[-1] if joined else None
        if last is not None and last.file is extent.file and extent.start - last.stop < mmap.PAGESIZE:
            joined[-1] = Extent(last.file, last.start, max(last.stop, extent.stop))
        else:
            joined.append(extent)
    return joined


def check(tensors: Iterable[torch.Tensor]) -> None:
    """Whether the files of those tensors that lie in some are whole.

    Raises:
        InputError: one was cut.
    """
    for extent in join(extent for tensor in tensors if (extent := find(tensor)) is not None):
        extent.file.check()


def let_go(tensors: Iterable[torch.Tensor]) -> None:
    """Let go the memory of those tensors that lie in files."""
    for extent in join(extent for tensor in tensors if (extent := find(tensor)) is not None):
        extent.drop()


def offload(
    config: RiverConfig, layers: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int], notes: dict[str, None]
) -> int:
    """Move the weights of deep layers into a file, as a config says.

    Args:
        layers: of each layer the parameters that may be moved.
        sizes: bytes of all parameters of each layer, to fill ``offload_memory`` with.
        notes: gets a line where nothing can be done.

    Returns:
        Bytes moved; 0 where they have been before.

    Raises:
        ConfigError: there is no room, or the folder cannot be written.
    """
    first = first_offloaded(config, sizes)
    if first >= len(layers):
        return 0
    if not is_supported() or any(one.device.type != "cpu" for layer in layers for one in layer):
        notes[
            "offloading has no effect: only weights on a CPU, under an operating system with madvise, are offloaded"
        ] = None
        return 0
    folder = None if config.offload_folder is None else Path(config.offload_folder)
    moved = move(layers[first:], folder)
    if moved and is_in_memory(used := folder_for(folder)):
        notes[f"offloading saves nothing: files in {used} are kept in memory; give another offload_folder"] = None
    return moved


def first_offloaded(config: RiverConfig, sizes: Sequence[int]) -> int:
    """The first layer whose weights are offloaded; all layers if none is to be."""
    if config.offload_after is not None:
        return min(config.offload_after, len(sizes))
    memory = config.offload_memory
    return len(sizes) if memory is None else sum(total <= memory for total in accumulate(sizes))


def move(layers: Sequence[Sequence[torch.Tensor]], folder: Path | None) -> int:
    """Put weights into a file: the parameters stay the same objects, and their data lie in the file.

    What cannot be moved stays: what lies on another device or in a file already, what is not contiguous, what shares
    its memory with another of these.

    Args:
        layers: parameters by the layer that uses them; the weights of one lie side by side.
        folder: where the file lies; see `folder_for`.

    Returns:
        Bytes moved.

    Raises:
        ConfigError: there is no room, or the folder cannot be written.
    """
    at = Counter(parameter.data_ptr() for layer in layers for parameter in layer)
    wanted = [[one for one in layer if _fits(one) and at[one.data_ptr()] == 1] for layer in layers]
    parameters = [parameter for layer in wanted for parameter in layer]
    if not parameters:
        return 0
    file, places = write(((parameter.detach() for parameter in layer) for layer in wanted), folder)
    for parameter, place in zip(parameters, places, strict=True):
        parameter.data = file.tensor(place, parameter.shape, parameter.dtype)
    give_back()
    return sum(parameter.nbytes for parameter in parameters)


def give_back() -> None:
    """Have the C library give back what was freed: glibc keeps blocks of up to 32 MB, which most weights are."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _fits(parameter: torch.Tensor) -> bool:
    plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
    if not plain or parameter.device.type != "cpu" or parameter.layout != torch.strided or parameter.is_inference():
        return False
    return parameter.numel() > 0 and parameter.is_contiguous() and find(parameter) is None


def write(layers: Iterable[Iterable[torch.Tensor]], folder: Path | None) -> tuple[WeightsFile, list[int]]:
    """A new file of some tensors, and where each begins in it. Each layer begins a page of its own.

    Args:
        layers: contiguous tensors on the CPU, taken one at a time.

    Raises:
        ConfigError: there is no room, or the folder cannot be written.
    """
    places = []
    folder = folder_for(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for layer in layers:
                file.seek(-file.tell() % mmap.PAGESIZE, os.SEEK_CUR)
                for tensor in layer:
                    file.seek(-file.tell() % _LINE, os.SEEK_CUR)
                    places.append(file.tell())
                    # Written, not mapped and copied to: a full disk is an error here, and a fatal signal there.
                    file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            return WeightsFile.map(file, file.tell()), places
    except OSError as error:
        raise ConfigError("offload_folder", f"{folder}: {error.strerror or error}") from error


def folder_for(folder: Path | None) -> Path:
    """The folder for a file of weights: the one that is asked for, or the system's for temporary files; where that is
    kept in memory, the one for those that may be large."""
    if folder is not None:
        return folder
    usual, large = Path(tempfile.gettempdir()), Path("/var/tmp")
    return large if is_in_memory(usual) and large.is_dir() else usual


def is_in_memory(folder: Path) -> bool:
    """Whether files in a folder are kept in memory; False where the system does not tell."""
    try:
        device = os.stat(folder).st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in mounts}
    return kinds.get(f"{os.major(device)}:{os.minor(device)}") in ("tmpfs", "ramfs")
