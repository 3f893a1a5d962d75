"""Exact decoding in transformers' generate: what it returns with and without, for the same arguments."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, StaticCache

import river_compile
from river_compile.errors import ConfigError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.forms import is_steady
from river_compile.exporters.torch.linear import Dequantized
from river_compile.exporters.torch.timing import Forms
from river_compile.runtime import hf_exact
from river_compile.runtime.drafting import Costs, DraftLength
from river_compile.runtime.exact import Experience
from tests.families import VOCABULARY, random_model
from tests.torch_models import as_it_is, drafts_cost_nothing, gemma4_that_shares_keys, prompt

LAYERS = 3
DYNAMIC: dict[str, Any] = {}
STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def eager_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are not compiled, products are float, and drafts cost next to nothing: small models are all overhead."""
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    monkeypatch.setattr("river_compile.backend.lowering_for", lambda *_: Dequantized())
    drafts_cost_nothing(monkeypatch)
    torch.compiler.reset()


def _arguments(batch: int, **more: Any) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (batch, 7), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "do_sample": False, **more}


# gemma2's layers alternate with windows of 8 tokens.
@pytest.mark.parametrize(
    ("family", "cache", "batch"),
    [
        ("llama", DYNAMIC, 3),
        ("llama", STATIC, 1),
        pytest.param("gemma2", DYNAMIC, 1, marks=pytest.mark.slow),
        ("gemma2", STATIC, 3),
    ],
    ids=("llama-dynamic-3", "llama-static-1", "gemma2-dynamic-1", "gemma2-static-3"),
)
def test_generate_is_unchanged_but_for_the_passes(family: str, cache: dict[str, Any], batch: int) -> None:
    expected = random_model(family, LAYERS).generate(**_arguments(batch, **cache))
    model = torch.compile(random_model(family, LAYERS), backend="river", options={"exact": True, "bits": 4})
    assert torch.equal(model.generate(**_arguments(batch, **cache)), expected)
    stats = river_compile.stats(model)
    assert stats.exact["drafted"] > 10
    assert 0.2 < stats.acceptance <= 1
    assert 0 in stats.decode_depths
    assert set(stats.decode_depths) | set(stats.prefill_depths) == {0, LAYERS}


def test_three_graphs_serve_whatever_is_drafted_and_cut() -> None:
    """The prompt's, one of a row and one of several: caches that grew and caches that were cut look alike."""
    model = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    for new in (24, 31):
        model.generate(**_arguments(1) | {"max_new_tokens": new})
    stats = river_compile.stats(model)
    assert stats.exact["drafted"] > stats.exact["accepted"] > 0
    assert stats.graphs == 3


def test_it_can_be_asked_for_in_one_call() -> None:
    model = random_model("llama", LAYERS)
    expected = model.generate(**_arguments(1))
    model.forward = torch.compile(model.forward, backend="river", options={"tau": -1.0})
    assert not torch.equal(model.generate(**_arguments(1)), expected)
    found = model.generate(**_arguments(1), custom_generate=river_compile.exact, lookup=False)
    assert torch.equal(found, expected)
    assert river_compile.stats(model).exact["drafted"] > 0


def test_a_folder_of_the_form_that_transformers_loads_methods_from() -> None:
    folder = Path(__file__).parents[2] / "samples" / "exact_generate"
    model = random_model("llama", LAYERS)
    expected = model.generate(**_arguments(1))
    compiled = torch.compile(model, backend="river", options={"tau": -1.0})
    found = compiled.generate(**_arguments(1), custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(found, expected)
    assert river_compile.stats(compiled).exact["drafted"] > 0


def test_a_model_compiled_with_exact_never_exits_elsewhere() -> None:
    """Where transformers' generate calls the compiled module itself, nothing asks for drafts."""
    model = random_model("llama", LAYERS)
    expected = model.generate(**_arguments(1))
    model.compile(backend="river", options={"exact": True, "tau": -1.0})
    assert torch.equal(model.generate(**_arguments(1)), expected)
    assert set(river_compile.stats(model).decode_depths) == {LAYERS}
    assert torch.equal(model.generate(**_arguments(1), custom_generate=river_compile.exact), expected)
    assert river_compile.stats(model).exact["drafted"] > 0


def test_an_uncompiled_model_drafts_from_its_text() -> None:
    model = random_model("llama", LAYERS)
    expected = model.generate(**_arguments(1))
    assert torch.equal(model.generate(**_arguments(1), custom_generate=river_compile.exact), expected)


@pytest.mark.parametrize("batch", (1, 3))
def test_processors_criteria_and_outputs_are_as_in_plain_generation(batch: int) -> None:
    how = {"repetition_penalty": 1.2, "min_new_tokens": 3, "eos_token_id": 70, "pad_token_id": 0}
    outputs = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    expected = random_model("llama", LAYERS).generate(**_arguments(batch, **how, **outputs))
    model = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    found = model.generate(**_arguments(batch, **how, **outputs))
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(found.scores) == len(expected.logits)
    for name in ("logits", "scores") if batch == 1 else ():
        for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_conversation_goes_on_from_its_cache() -> None:
    arguments = _arguments(1)
    model = random_model("llama", LAYERS)
    compiled = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    texts = []
    for one in (model, compiled):
        cache, ids = DynamicCache(), arguments["input_ids"]
        for _ in range(3):
            mask = torch.ones_like(ids)
            ids = one.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False
            )
            ids = torch.cat([ids, torch.tensor([[5, 6]])], 1)
        texts.append(ids)
        lengths = cache.get_seq_length()
    assert torch.equal(*texts)
    assert lengths < texts[0].shape[1]


def test_tokens_are_streamed_as_they_are_verified() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.ended = True

    model = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    streamer, other = Streamer(), Streamer()
    found = model.generate(**_arguments(1), streamer=streamer)[0].tolist()
    model.generate(**_arguments(1), custom_generate=functools.partial(river_compile.exact, streamer=other))
    for one in (streamer, other):
        assert [token for tokens in one.seen for token in tokens] == found
        assert one.ended
        assert any(len(new) > 1 for new in one.seen[1:])


def test_sampling_draws_by_torchs_generator() -> None:
    model = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    how = _arguments(1) | {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(**how))
    assert torch.equal(*found)
    assert not torch.equal(model.generate(**how), found[0])


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"num_beams": 2}, "exact: decodes greedily or by sampling, not by beam search"),
        ({"use_cache": False}, "exact: needs a KV cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "exact: has no output_hidden_states"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(how: dict[str, Any], line: str) -> None:
    model = torch.compile(random_model("llama", LAYERS), backend="river", options={"exact": True})
    with pytest.raises(ConfigError, match=line):
        model.generate(**_arguments(1, **how))


def test_a_cache_that_has_dropped_tokens_is_refused() -> None:
    model = random_model("gemma2", LAYERS)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(torch.randint(3, VOCABULARY, (1, 12)), past_key_values=cache)
    ids = torch.randint(3, VOCABULARY, (1, 14))
    with pytest.raises(ConfigError, match="has layers that drop what has left their window"):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4, custom_generate=river_compile.exact)


@pytest.mark.parametrize("window", (4, 64))
def test_a_window_that_only_the_cache_keeps_is_refused_where_it_is_left(window: int) -> None:
    """Moshi's masks know no window: verification would see what plain decoding has dropped."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "ffn_dim": 64}
    config = hf.MoshiConfig(vocab_size=VOCABULARY, sliding_window=window, max_position_embeddings=128, **sizes)
    model = hf.MoshiForCausalLM(config).eval()
    how = {"input_ids": prompt(1, 7), "max_new_tokens": 16, "do_sample": False}
    if window < 7 + 16:
        with pytest.raises(ConfigError, match="exact: the model leaves its window to the cache alone"):
            model.generate(custom_generate=river_compile.exact, **how)
    else:
        assert torch.equal(model.generate(custom_generate=river_compile.exact, **how), model.generate(**how))


@pytest.mark.parametrize("family", ("gemma2", "gemma3"))
def test_a_window_that_the_model_masks_by_may_be_left(family: str) -> None:
    model = random_model(family, LAYERS)
    assert model.config.sliding_window < 12 + 24
    how = {"input_ids": prompt(1, 12), "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(custom_generate=river_compile.exact, **how), model.generate(**how))


@pytest.mark.skipif(not hasattr(hf, "Gemma4TextConfig"), reason="an older transformers")
@pytest.mark.parametrize("cache", (DYNAMIC, STATIC), ids=("dynamic", "static"))
def test_layers_that_read_the_keys_of_others_keep_nothing(cache: dict[str, Any]) -> None:
    model = gemma4_that_shares_keys()
    how = {"input_ids": prompt(1, 12), "max_new_tokens": 24, "do_sample": False, **cache}
    assert torch.equal(model.generate(custom_generate=river_compile.exact, **how), model.generate(**how))


def test_a_model_that_takes_one_token_a_pass_says_so() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 2}
    model = hf.ProphetNetForCausalLM(
        hf.ProphetNetConfig(vocab_size=VOCABULARY, is_encoder_decoder=False, **sizes)
    ).eval()
    exact = functools.partial(river_compile.exact, experience=Experience())
    with pytest.raises(ConfigError, match="exact: verifies several tokens in a pass, which the model refuses"):
        model.generate(prompt(1, 12), custom_generate=exact, max_new_tokens=16, min_new_tokens=16, do_sample=False)


def _steady(monkeypatch: pytest.MonkeyPatch, weight_first: float) -> None:
    """Products with the weight first take this time, and others 1."""
    seconds = {"linear": 1.0, "loop": 1.0, "weight": weight_first}
    few = {name: seconds[name] for name in ("linear", "weight")}
    monkeypatch.setattr(Forms, "of_float", lambda self, kind, weights: seconds if kind.rows == 1 else few)
    monkeypatch.setattr(Forms, "are_steady", lambda *_: True)
    monkeypatch.setattr(Costs, "learn_pass", lambda *_: None)
    lengths = {(count, True): DraftLength(Costs(1e-6, {1: 1.0, 9: 1.1}), 8) for count in (1, 3)}
    experience = Experience(None, lengths)
    monkeypatch.setattr("river_compile.exact_generate._experience_of", lambda model: experience)


def test_a_model_compiled_twice_drafts_as_each_time_asked() -> None:
    """The settings are those of the compiled module, not those that the model within was compiled with last."""
    model = random_model("llama", LAYERS)
    plain = torch.compile(model, backend="river", options={"tau": 2.0})
    exact = torch.compile(model, backend="river", options={"exact": True})
    expected = plain.generate(**_arguments(1))
    for compiled in (exact, plain, exact):
        assert torch.equal(compiled.generate(**_arguments(1)), expected)
    assert 0 in river_compile.stats(exact).decode_depths
    assert set(river_compile.stats(plain).decode_depths) == {LAYERS}
    assert not river_compile.stats(plain).exact


@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_in_bfloat16_rows_beside_each_other_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a near tie comes up, since a pass of several tokens is that of one to the last bit; attention too, which
    takes 16 keys at a time and rounds otherwise over 33 keys, some of them masked, than over 29."""
    # Weights of 32 outputs are steady on fewer machines.
    model = random_model(family, LAYERS, num_key_value_heads=4).to(torch.bfloat16)
    if not all(is_steady(weight) for weight in model.parameters() if weight.dim() == 2):
        pytest.skip("this CPU's products of a row depend on the rows beside it")
    _steady(monkeypatch, 1.0)
    ids = prompt(1, 28)
    arguments = _arguments(1, input_ids=ids, attention_mask=torch.ones_like(ids))
    plain = torch.compile(model, backend="river", options={"tau": 2.0}).generate(**arguments)
    compiled = torch.compile(model, backend="river", options={"exact": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(compiled.generate(**arguments), plain)
    stats = river_compile.stats(compiled)
    assert stats.exact["drafted"] > 0
    assert stats.exact["near_ties"] == 0


@pytest.mark.parametrize("cache", [pytest.param(DYNAMIC, marks=pytest.mark.slow), STATIC], ids=("dynamic", "static"))
def test_batches_in_bfloat16_are_decoded_plainly(cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the sequences ends early; the others go on in a batch of as many."""
    _steady(monkeypatch, 9.0)
    model = random_model("llama", LAYERS).to(torch.bfloat16)
    plain_model = torch.compile(model, backend="river", options={"tau": 2.0})
    first = plain_model.generate(**_arguments(3, **cache))[0, 7:].tolist()
    ends = {"eos_token_id": first[4], "pad_token_id": 0}
    plain = plain_model.generate(**_arguments(3, **cache, **ends))
    compiled = torch.compile(model, backend="river", options={"exact": True})
    with pytest.warns(UserWarning, match="decoded plainly"):
        assert torch.equal(compiled.generate(**_arguments(3, **cache, **ends)), plain)
    assert river_compile.stats(compiled).exact["drafted"] == 0


def test_where_they_would_change_tokens_it_decodes_plainly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _steady(monkeypatch, 9.0)
    # Rows that come out otherwise beside others, whatever this machine's library does.
    passes = hf_exact.HfPasses.backbone

    def rounded(self: hf_exact.HfPasses, ids: Any, state: Any, mask: Any = None) -> Any:
        logits, depth = passes(self, ids, state, mask)
        return logits * (1.0 if ids.shape[1] == 1 else 1.01), depth

    monkeypatch.setattr(hf_exact.HfPasses, "backbone", rounded)
    model = random_model("llama", LAYERS).to(torch.bfloat16)
    plain = torch.compile(model, backend="river", options={"tau": 2.0}).generate(**_arguments(1))
    compiled = torch.compile(model, backend="river", options={"exact": True})
    with pytest.warns(UserWarning, match="decoded plainly: in torch.bfloat16") as told:
        for _ in range(2):
            assert torch.equal(compiled.generate(**_arguments(1)), plain)
    assert len([one for one in told if "decoded plainly" in str(one.message)]) == 1
    assert river_compile.stats(compiled).exact["drafted"] == 0
