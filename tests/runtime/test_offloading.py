"""Deep backbone layers in ONNX Runtime, left in their file: the same tokens, and their memory only while they run."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.runtime import OnnxDecoder
from river_compile.runtime.offloading import deep_weights
from tests.conftest import Exported
from tests.families import LAYERS
from tests.mapped_memory import only_where_told, resident

PROMPTS, NEW, STAY = [[5, 9, 17, 33]], 8, 2


@pytest.fixture(scope="module")
def river(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("offloading") / "model.river.onnx"
    export(exported("llama"), target, RiverConfig(tau=2.0, external_data=True))
    return target


def offloaded(river: Path) -> OnnxDecoder:
    return OnnxDecoder(river, threads=1, offload_after=STAY)


def address(decoder: OnnxDecoder) -> int:
    """Where the file is mapped."""
    assert decoder._deep is not None
    file = next(iter(decoder._deep._files.values()))
    return int(np.frombuffer(file, np.uint8).ctypes.data)


def test_the_weights_of_deep_layers_are_what_nothing_else_reads(river: Path) -> None:
    model = onnx.load(str(river), load_external_data=False)
    names = [{tensor.name for tensor in deep_weights(model, after)} for after in range(LAYERS + 1)]
    # Query, key, value and output; gate, up and down. Norms are the river's as well.
    assert [len(found) for found in names] == [7 * (LAYERS - after) for after in range(LAYERS + 1)]
    assert all(deeper < found for found, deeper in pairwise(names))


@pytest.mark.parametrize("depth", [0, 1, STAY, STAY + 1, LAYERS, None])
def test_every_depth_says_the_same(river: Path, depth: int | None) -> None:
    plain, decoder = OnnxDecoder(river, threads=1), offloaded(river)
    for tau in (2.0, 0.9):
        expected, found = (one.generate(PROMPTS, NEW, tau=tau, max_depth=depth) for one in (plain, decoder))
        assert found.tokens == expected.tokens
        assert found.exit_depths == expected.exit_depths
    assert (plain.offloaded_bytes, decoder.signature.slots) == (0, plain.signature.slots)


@only_where_told
def test_deep_weights_are_in_memory_while_a_pass_reads_them(river: Path) -> None:
    decoder = offloaded(river)
    assert decoder.offloaded_bytes > 0
    place = address(decoder)
    assert resident(place) == 0
    assert decoder._deep is not None
    drop, seen = decoder._deep.drop, []
    decoder._deep.drop = lambda: (seen.append(resident(place)), drop())[1]  # type: ignore[method-assign]
    decoder.generate(PROMPTS, NEW, max_depth=STAY)
    # Neither a prompt nor a token went deeper, so that nothing was read and nothing let go.
    assert not seen
    assert resident(place) == 0
    decoder.generate(PROMPTS, NEW)
    assert min(seen) >= decoder.offloaded_bytes
    assert resident(place) == 0


def test_exact_decoding_says_what_the_backbone_says(river: Path) -> None:
    expected = OnnxDecoder(river, threads=1).generate(PROMPTS, NEW)
    assert offloaded(river).generate(PROMPTS, NEW, exact=True).tokens == expected.tokens


def copied(river: Path, tmp_path: Path) -> Path:
    for name in (river.name, f"{river.name}.data"):
        shutil.copy(river.parent / name, tmp_path)
    return tmp_path / river.name


@only_where_told
def test_a_file_that_was_cut_is_an_error_before_the_pass(river: Path, tmp_path: Path) -> None:
    path = copied(river, tmp_path)
    decoder = offloaded(path)
    decoder.generate(PROMPTS, NEW)
    os.truncate(f"{path}.data", 4096)
    with pytest.raises(InputError, match=r"model.river.onnx.data was cut to 4096 of its"):
        decoder.generate(PROMPTS, NEW)
    with pytest.raises(InputError, match="external data is truncated"):
        offloaded(path)


def test_a_file_that_is_gone_or_another_is_read_on(river: Path, tmp_path: Path) -> None:
    path = copied(river, tmp_path)
    decoder = offloaded(path)
    expected = decoder.generate(PROMPTS, NEW).tokens
    data = Path(f"{path}.data")
    data.unlink()
    data.write_bytes(b"other")
    assert decoder.generate(PROMPTS, NEW).tokens == expected


def test_what_cannot_be_offloaded_is_one_clear_error(exported: Exported, river: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no river"):
        OnnxDecoder(exported("llama"), offload_after=2)
    for wrong in (-1, True):
        with pytest.raises(ConfigError, match="offload_after: must be a whole number"):
            OnnxDecoder(river, offload_after=wrong)
    whole = onnx.load(str(river))
    onnx.save(whole, str(tmp_path / "whole.onnx"))
    with pytest.raises(ConfigError, match="the weights lie within the model: export it with --external-data"):
        OnnxDecoder(tmp_path / "whole.onnx", offload_after=2)
