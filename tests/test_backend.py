"""``torch.compile(model, backend="river")`` as a user meets it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import river_compile
from river_compile import RiverBackend, RiverConfig, RiverError
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.linear import Dequantized
from tests.families import LAYERS, random_model
from tests.torch_models import as_it_is, assert_same, play, prompt

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend found by its name, its pieces not compiled: what is tested is all around them."""
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    monkeypatch.setattr(seam, "compile_whole", as_it_is)


def quick(model: Any, **options: Any) -> tuple[Any, RiverBackend]:
    """A compiled model whose pieces run as they are, with dequantized products: fast to compile, exact."""
    backend = RiverBackend(RiverConfig(**options), lowering=Dequantized(), compiler=as_it_is)
    return torch.compile(model, backend=backend), backend


def test_the_name_is_enough_and_generate_runs_the_compiled_model() -> None:
    counters["aot_autograd"].clear()
    assert "river" in torch.compiler.list_backends()
    model = random_model("llama", 2)
    compiled = torch.compile(model, backend="river", options={"tau": 2.0})
    expected = model.generate(prompt(1, 4), **GREEDY)
    assert torch.equal(compiled.generate(prompt(1, 4), **GREEDY), expected)
    stats = river_compile.stats(compiled)
    assert stats.layers == stats.river_layers == 2
    assert stats.decode_depths == {2: 5}
    assert stats.backbone_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert 0 < stats.river_bytes < stats.replaced_bytes / 4
    assert not stats.fallbacks
    assert "2 of 2 decoder layers" in str(stats)
    # Prefix, backbone layer, river layer, suffix: four for each graph at most, whatever the number of layers; and the
    # next process finds each of them on disk.
    assert stats.artifacts <= 4 * stats.graphs
    assert counters["aot_autograd"]["total"] >= stats.artifacts
    assert not counters["aot_autograd"]["autograd_cache_bypass"]
    # The model within is as it was.
    assert model._compiled_call_impl is None


def test_the_forward_method_can_be_compiled_instead(without_inductor: None) -> None:
    model = random_model("llama", 2)
    expected = model.generate(prompt(1, 4), **GREEDY)
    model.forward = torch.compile(model.forward, backend="river", options={"tau": 2.0, "min_depth": 2})
    assert torch.equal(model.generate(prompt(1, 4), **GREEDY), expected)
    assert river_compile.stats(model).decode_depths == {2: 5}


def test_other_backends_keep_their_generate() -> None:
    model = random_model("llama", 2)
    assert torch.compile(model, backend="eager").generate.__func__ is type(model).generate


@pytest.mark.parametrize(
    ("options", "field"),
    [({"taw": 0.9}, "taw"), ({"tau": "high"}, "tau"), ({"bits": 5}, "bits"), ({"prefill": "maybe"}, "prefill")],
)
def test_a_wrong_option_is_one_clear_error_that_names_it(options: dict[str, Any], field: str) -> None:
    compiled = torch.compile(random_model("llama", 2), backend="river", options=options)
    with pytest.raises(ConfigError, match=f"^{field}: ") as caught:
        play(compiled._orig_mod, compiled, prompt(1, 3), 0, "dynamic")
    assert caught.value.field == field


def test_tau_and_depth_change_without_compiling_anew() -> None:
    model = random_model("llama")
    compiled, backend = quick(model, tau=2.0)
    play(model, compiled, prompt(1, 3), 3, "static")
    graphs = counters["stats"]["unique_graphs"]
    river_compile.set_tau(compiled, -1.0)
    play(model, compiled, prompt(1, 3), 3, "static")
    assert backend.stats().decode_depths == {1: 3, LAYERS: 3}
    river_compile.set_tau(compiled, 2.0)
    river_compile.set_max_depth(compiled, 2)
    play(model, compiled, prompt(1, 3), 3, "static")
    assert backend.stats().decode_depths == {1: 3, 2: 3, LAYERS: 3}
    assert backend.stats().mean_exit_depth == (1 + 2 + LAYERS) / 3
    assert counters["stats"]["unique_graphs"] == graphs
    river_compile.reset_stats(compiled)
    assert backend.stats().decode_depths == {}
    with pytest.raises(ConfigError, match="tau"):
        river_compile.set_tau(compiled, float("nan"))
    with pytest.raises(InputError, match="not compiled"):
        river_compile.set_tau(random_model("llama", 2), 0.5)


def test_min_depth_and_exit_every_say_where_a_token_may_exit() -> None:
    model = random_model("llama")
    compiled, backend = quick(model, tau=-1.0, min_depth=2)
    play(model, compiled, prompt(1, 3), 2, "static")
    assert backend.stats().decode_depths == {2: 2}
    torch.compiler.reset()
    compiled, backend = quick(model, tau=-1.0, exit_every=3)
    play(model, compiled, prompt(1, 3), 2, "static")
    assert backend.stats().decode_depths == {3: 2}


def test_layers_can_have_thresholds_of_their_own_and_a_calibration_sets_them() -> None:
    model = random_model("llama")
    offsets = (3.0, 3.0, 0.0, 0.0)
    evidence = json.dumps({"tau": -1.0, "min_depth": 1, "tau_offsets": offsets})
    for options in ({"tau": -1.0, "tau_offsets": offsets}, {"calibration": evidence}):
        torch.compiler.reset()
        compiled, backend = quick(model, **options)
        play(model, compiled, prompt(1, 3), 2, "static")
        assert backend.stats().decode_depths == {3: 2}


@pytest.mark.parametrize(
    ("options", "field"), [({"tau_offsets": (0.0,)}, "tau_offsets"), ({"kv_policy": "mask"}, "kv_policy")]
)
def test_what_does_not_fit_the_model_or_the_backend_is_one_clear_error(options: dict[str, Any], field: str) -> None:
    compiled, _ = quick(random_model("llama"), **options)
    with pytest.raises(ConfigError, match=f"^{field}: "):
        play(compiled._orig_mod, compiled, prompt(1, 3), 0, "dynamic")


def test_a_kept_layer_runs_on_the_backbone_after_the_exit() -> None:
    model = random_model("llama")
    compiled, backend = quick(model, tau=-1.0, keep_layers=(-1,))
    play(model, compiled, prompt(1, 3), 2, "static")
    assert backend.stats().decode_depths == {2: 2}
    assert "backbone only, asked for: layers 3" in backend.stats().notes


@pytest.mark.parametrize(
    ("prefill", "length", "depths"),
    [
        ("auto", 3, {1: 1}),
        ("auto", 9, {2: 1}),
        ("river", 9, {1: 1}),
        ("backbone", 3, {2: 1}),
    ],
)
def test_a_prompt_exits_where_it_is_told_to(prefill: str, length: int, depths: dict[int, int]) -> None:
    class FourRows(Dequantized):
        max_rows = 4

    model = random_model("llama", 2)
    backend = RiverBackend(RiverConfig(tau=-1.0, prefill=prefill), lowering=FourRows(), compiler=as_it_is)
    play(model, torch.compile(model, backend=backend), prompt(1, length), 1, "dynamic")
    assert backend.stats().prefill_depths == depths
    assert backend.stats().decode_depths == {1: 1}


@pytest.mark.parametrize("part", [0.5, 1.5], ids=["a faster river", "a slower river"])
def test_where_the_river_is_no_faster_no_similarity_makes_a_pass_exit(
    part: float, without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short prompt runs in the river only where that pays; what a caller forces is done all the same."""
    monkeypatch.setattr("river_compile.backend.river_time", lambda *_: part)
    model = random_model("llama", 2)
    backend = RiverBackend(RiverConfig(tau=-1.0))
    compiled = torch.compile(model, backend=backend)
    play(model, compiled, prompt(1, 9), 2, "static")
    depth = 1 if part < 1 else 2
    stats = backend.stats()
    assert (stats.prefill_depths, stats.decode_depths) == ({depth: 1}, {depth: 2})
    closed = (
        "exits are closed in passes of 1 rows: the river's products take 1.50 times as long as the backbone's there"
    )
    assert (closed in stats.notes) == (part >= 1)
    backend.max_depth = 0
    play(model, compiled, prompt(1, 9), 2, "static")
    assert backend.stats().decode_depths[0] == 2


@pytest.mark.parametrize(("autotune", "timed"), [(True, {"linear", "loop", "int4"}), (False, set())])
def test_products_are_timed_unless_a_fixed_table_is_asked_for(
    autotune: bool, timed: set[str], without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("river_compile.exporters.torch.timing.SMALL", 0)
    monkeypatch.setattr("river_compile.exporters.torch.few_rows.SMALL", 0)
    monkeypatch.setattr("river_compile.exporters.torch.paying.SMALL", 0)
    model = random_model("llama", 2)
    compiled = torch.compile(model, backend="river", options={"tau": 2.0, "autotune": autotune})
    play(model, compiled, prompt(1, 9), 2, "static")
    stats = river_compile.stats(compiled)
    assert {form for choice in stats.choices for form in choice.seconds} == timed
    assert all(choice.taken in choice.seconds for choice in stats.choices)
    assert ("kinds of products timed" in str(stats)) == autotune


def nothing_cached(model: Any, compiled: Any) -> None:
    with torch.no_grad():
        compiled(prompt(1, 3), use_cache=False)


def with_gradients(model: Any, compiled: Any) -> None:
    compiled(prompt(1, 3), use_cache=True).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


def in_training(model: Any, compiled: Any) -> None:
    model.train()
    with_gradients(model, compiled)


@pytest.mark.parametrize(
    ("use", "why"),
    [(nothing_cached, "no KV cache"), (with_gradients, "gradients are wanted"), (in_training, "gradients are wanted")],
)
def test_what_cannot_have_a_river_is_plain_inductor_and_says_so_once(use: Any, why: str) -> None:
    model = random_model("llama", 2)
    compiled, backend = quick(model)
    with pytest.warns(UserWarning, match=f"no exit river, compiled by plain Inductor: .*{why}") as caught:
        use(model, compiled)
    assert len([w for w in caught if "no exit river" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model, compiled)
    assert [why in reason for reason in backend.stats().fallbacks] == [True]


def test_a_module_that_is_no_decoder_falls_back_with_the_right_result(without_inductor: None) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with pytest.warns(UserWarning, match="no KV cache"), torch.no_grad():
        found = torch.compile(module, backend="river")(torch.ones(2, 8))
    torch.testing.assert_close(found, module(torch.ones(2, 8)))


@pytest.mark.parametrize("use", [nothing_cached, with_gradients])
def test_strict_makes_a_fallback_an_error(use: Any) -> None:
    model = random_model("llama", 2)
    compiled, _ = quick(model, strict=True)
    with pytest.raises(RiverError):
        use(model, compiled)


def test_weights_frozen_into_the_graph_fall_back_and_say_what_froze_them() -> None:
    model = random_model("llama", 2)
    compiled, backend = quick(model)
    why = r"frozen into the graph \(torch\._inductor\.config\.freezing is on\)"
    with torch._inductor.config.patch(freezing=True), pytest.warns(UserWarning, match=why):
        play(model, compiled, prompt(1, 3), 0, "dynamic")
    assert backend.stats().graphs == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:no exit river")
def test_a_model_with_flex_attention_has_a_river() -> None:
    """Each of its layers holds a graph of its own, that of the mask; what is around the decoder are other graphs."""
    model = random_model("llama", 2)
    expected = play(model, model, prompt(1, 3), 1, "dynamic")
    model.set_attn_implementation("flex_attention")
    compiled, backend = quick(model, tau=2.0)
    assert_same(play(model, compiled, prompt(1, 3), 1, "dynamic"), expected)
    assert backend.stats().river_layers == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:no exit river")
@pytest.mark.parametrize("depth", [None, 0])
def test_inductor_compiles_flex_attention_and_the_product_that_reads_it(depth: int | None) -> None:
    """Its template for a CPU takes in nothing that comes after, which the river's products are when written as sums."""
    model = random_model("llama", 2)
    model.set_attn_implementation("flex_attention")
    compiled = torch.compile(model, backend=RiverBackend(RiverConfig(tau=2.0, max_depth=depth)))
    found = play(model, compiled, prompt(1, 3), 2, "dynamic")
    if depth is None:
        for ours, theirs in zip(found, play(model, model, prompt(1, 3), 2, "dynamic"), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert all(logits.isfinite().all() for logits in found)


def test_what_has_no_weights_is_no_model_that_lacks_a_river(recwarn: pytest.WarningsRecorder) -> None:
    backend = RiverBackend(RiverConfig(strict=True), compiler=as_it_is)
    found = torch.compile(lambda mask: mask.cumsum(-1) - 1, backend=backend)(torch.ones(2, 3))
    assert found.tolist() == [[0.0, 1.0, 2.0]] * 2
    assert not recwarn.list


def test_experts_stay_as_they_are_and_stats_say_so() -> None:
    model = random_model("mixtral", 2)
    compiled, backend = quick(model, tau=2.0)
    play(model, compiled, prompt(1, 3), 1, "dynamic")
    why = "most weights are in no linear layer (a mixture of experts?) and stay as they are"
    assert f"{why}: layers 0-1" in backend.stats().notes


def test_layers_whose_widths_no_group_divides_fall_back() -> None:
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    compiled, backend = quick(model)
    with pytest.warns(UserWarning, match="no decoder layer can be given a river twin"):
        found = play(model, compiled, prompt(1, 3), 1, "dynamic")
    for ours, theirs in zip(found, play(model, model, prompt(1, 3), 1, "dynamic"), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert backend.stats().river_layers == 0


FORMS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beam search": {**GREEDY, "num_beams": 3},
    "static cache": {**GREEDY, "cache_implementation": "static"},
}


@pytest.mark.parametrize(
    ("form", "batch"),
    [
        *(("greedy", batch) for batch in (1, 3)),
        *(("static cache", batch) for batch in (1, 3)),
        ("sampling", 3),
        ("beam search", 3),
        *(pytest.param(form, 1, marks=pytest.mark.slow) for form in ("sampling", "beam search")),
    ],
)
def test_generate_is_as_ever_with_exits_off(form: str, batch: int) -> None:
    model = random_model("llama", 2)
    ids = prompt(batch, 5)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3] = 0
    torch.manual_seed(0)
    expected = model.generate(ids, attention_mask=mask, **FORMS[form])
    compiled, backend = quick(model, tau=2.0)
    torch.manual_seed(0)
    assert torch.equal(compiled.generate(ids, attention_mask=mask, **FORMS[form]), expected)
    assert not backend.stats().fallbacks
    river_compile.set_tau(compiled, -1.0)
    assert compiled.generate(ids, attention_mask=mask, **FORMS[form]).shape == expected.shape
    assert 1 in backend.stats().decode_depths


def test_a_chat_of_several_turns_on_one_cache() -> None:
    from transformers import DynamicCache

    model = random_model("llama", 2)
    compiled, backend = quick(model, tau=2.0)
    said = []
    for runner in (model, compiled):
        cache, conversation = DynamicCache(config=model.config), torch.zeros(1, 0, dtype=torch.int64)
        for turn, length in enumerate((4, 7, 3)):
            conversation = torch.cat([conversation, prompt(1, length, seed=turn)], 1)
            conversation = runner.generate(conversation, **{cache_argument(model): cache}, **GREEDY)
        said.append(conversation)
    assert torch.equal(*said)
    assert not backend.stats().fallbacks


@pytest.mark.parametrize(
    ("reference", "compiler"), [("eager", as_it_is), pytest.param("inductor", None, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_no_more_graphs_and_no_more_breaks_than_without_a_river(cache: str, reference: str, compiler: Any) -> None:
    """Prompts of four lengths, one batch of two, and a cache that grows."""
    found = []
    for kind in (reference, "river"):
        torch.compiler.reset()
        counters.clear()
        model = random_model("llama", 2)
        backend: Any = kind
        if kind == "river":
            backend = RiverBackend(RiverConfig(tau=0.5), lowering=Dequantized(), compiler=compiler)
        compiled = torch.compile(model, backend=backend)
        for batch, length in ((1, 4), (1, 6), (1, 9), (2, 5)):
            play(model, compiled, prompt(batch, length), 2, cache)
        found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    plain, river = found
    assert plain[0] > 0
    assert river == plain
    assert plain[1] == 0


def test_weights_are_held_once_for_several_compiled_models(without_inductor: None) -> None:
    model = random_model("llama", 2)
    one = torch.compile(model, backend="river", options={"tau": 0.5})
    play(model, one, prompt(1, 3), 1, "dynamic")
    size = river_compile.stats(one).river_bytes
    torch.compiler.reset()
    two = torch.compile(model, backend="river", options={"tau": 0.7})
    play(model, two, prompt(1, 3), 1, "static")
    assert river_compile.stats(two).river_bytes == size
    assert (river_compile.stats(one).graphs, river_compile.stats(two).graphs) == (2, 2)


def test_the_graphs_can_be_dumped(tmp_path: Path) -> None:
    model = random_model("llama", 2)
    compiled, _ = quick(model, dump_dir=tmp_path)
    play(model, compiled, prompt(1, 3), 1, "dynamic")
    text = (tmp_path / "graph_1.txt").read_text()
    assert "# river of layer 1" in text
