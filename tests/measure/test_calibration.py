"""Calibration from end to end: what is chosen, what evidence is kept, and how an export takes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile import RiverConfig, calibrate, export
from river_compile.errors import ConfigError, InputError
from river_compile.measure.calibratable import OnnxCalibratable
from river_compile.measure.calibration import Calibration, Thresholds
from river_compile.measure.fidelity import Document, TextTokenizer
from river_compile.measure.plots import draw_calibration
from river_compile.measure.risk import hoeffding_bentkus
from river_compile.runtime import OnnxDecoder
from tests.families import LAYERS, VOCABULARY, random_model

TOKENIZER = TextTokenizer(lambda text: [int(word) for word in text.split()], str, VOCABULARY)
TAUS = (0.9, 0.8, 0.7, 0.6)


def _texts(count: int, length: int = 27) -> list[Document]:
    rng = np.random.default_rng(5)
    return [
        Document(f"text {i}", "numbers", " ".join(map(str, rng.integers(3, VOCABULARY, length)))) for i in range(count)
    ]


class Scripted:
    """A subject that disagrees with its backbone on a known share of tokens at each threshold."""

    name, layers, vocabulary, min_depth, has_offsets = "scripted", 8, VOCABULARY, 1, True

    def __init__(self, share: Callable[[Thresholds], float]) -> None:
        self.share = share
        self.asked: list[Thresholds] = []

    def fingerprint(self) -> str:
        return "scripted"

    def read(self, ids: np.ndarray, thresholds: Thresholds | None, prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        logits = np.zeros((len(ids), VOCABULARY), np.float32)
        logits[:, 0] = 5
        if thresholds is None:
            return logits, np.full(len(ids), self.layers)
        self.asked.append(thresholds)
        counted = len(ids) - prompt_tokens + 1
        wrong = round(self.share(thresholds) * counted)
        logits[len(ids) - wrong :, 1] = 9
        logits[: prompt_tokens - 1, 1] = 9  # these do not count
        open_layers = [offset <= 1 for offset in thresholds.offsets or (0.0,) * self.layers]
        first = open_layers.index(True) + 1 if any(open_layers) else self.layers
        return logits, np.full(len(ids), max(first, round(self.layers * thresholds.tau)))


def _risky(thresholds: Thresholds) -> float:
    return {0.9: 0.0, 0.8: 0.05, 0.7: 0.2, 0.6: 0.0}[thresholds.tau]


def test_the_fastest_threshold_before_the_first_failure_is_chosen() -> None:
    subject = Scripted(_risky)
    found = calibrate(subject, _texts(200), TOKENIZER, max_risk=0.15, taus=(0.6, 0.9, 0.7, 0.8))
    assert found.certified
    assert found.tau == 0.8
    assert [tested.tau for tested in found.curve] == [0.9, 0.8, 0.7]
    assert [tested.risk for tested in found.curve] == pytest.approx([0.0, 0.05, 0.2])
    assert found.nearest_miss == found.curve[-1]
    assert found.p_value == pytest.approx(float(hoeffding_bentkus(np.array(0.05), 200, 0.15)))
    assert {asked.tau for asked in subject.asked} == {0.9, 0.8, 0.7}, "0.6 lies beyond a failure and is never read"
    assert "tau 0.8: risk at most 0.15 with 95% confidence" in found.verdict()


def test_where_nothing_is_certified_it_never_exits_and_names_the_nearest_miss() -> None:
    found = calibrate(Scripted(lambda _: 0.3), _texts(200), TOKENIZER, max_risk=0.1, taus=TAUS)
    assert not found.certified
    assert not found.exits
    assert found.tau == 2.0
    assert found.tau_offsets is None
    assert found.nearest_miss is not None
    assert found.nearest_miss.tau == 0.9
    assert found.verdict().startswith("never exit: no threshold has a risk at most 0.1")
    assert "the nearest, tau 0.9, has a measured risk of 0.3000" in found.verdict()


def test_too_few_documents_are_told_with_the_number_needed_and_nothing_is_read() -> None:
    subject = Scripted(lambda _: 0.0)
    found = calibrate(subject, _texts(148), TOKENIZER, max_risk=0.02, taus=TAUS)
    assert subject.asked == []
    assert not found.exits
    assert found.verdict() == (
        "never exit: risk at most 0.02 with 95% confidence takes at least 149 documents even with no loss at all, "
        "and there are 148"
    )
    assert calibrate(Scripted(lambda _: 0.0), _texts(149), TOKENIZER, max_risk=0.02, taus=TAUS).tau == 0.6


def test_clipped_kl_is_a_loss_between_0_and_1() -> None:
    found = calibrate(Scripted(lambda _: 0.5), _texts(40), TOKENIZER, max_risk=0.9, loss="kl", kl_clip=0.5, taus=(0.9,))
    assert found.curve[0].risk == pytest.approx(0.5), "half of the tokens lie beyond the clip, the others lose nothing"


def test_thresholds_by_layer_are_chosen_on_documents_that_are_not_tested_on() -> None:
    """Shallow exits are wrong here: closing the first half of the stack is what lets the threshold fall."""

    def share(thresholds: Thresholds) -> float:
        offsets = thresholds.offsets or (0.0,) * 8
        return 0.0 if offsets[3] > 1 else 0.5

    subject = Scripted(share)
    plain = calibrate(Scripted(share), _texts(100), TOKENIZER, max_risk=0.1, taus=TAUS)
    found = calibrate(subject, _texts(100), TOKENIZER, max_risk=0.1, taus=TAUS, by_layer=True)
    assert not plain.exits
    assert found.certified
    assert found.tau_offsets is not None
    assert found.tau_offsets[:4] == (3.0,) * 4
    assert found.tau_offsets[4] < 1
    assert (found.documents, found.explored_documents) == (75, 25)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    subject = Scripted(_risky)
    stop_at = 50

    def interrupt(step: str, done: int, total: int) -> None:
        if len(subject.asked) == stop_at:
            raise KeyboardInterrupt

    texts = _texts(100)
    with pytest.raises(KeyboardInterrupt):
        calibrate(subject, texts, TOKENIZER, max_risk=0.15, taus=TAUS, cache=tmp_path, progress=interrupt)
    again = Scripted(_risky)
    found = calibrate(again, texts, TOKENIZER, max_risk=0.15, taus=TAUS, cache=tmp_path)
    assert len(again.asked) == 300 - stop_at
    assert found == calibrate(Scripted(_risky), texts, TOKENIZER, max_risk=0.15, taus=TAUS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_risk": 0.0}, "max_risk: must lie in"),
        ({"confidence": 1.0}, "confidence: must lie in"),
        ({"loss": "bleu"}, "loss: 'bleu' is none of"),
        ({"kl_clip": 0.0}, "kl_clip: must be above 0"),
        ({"taus": ()}, "tau: name thresholds"),
        ({"taus": (1.5,)}, "tau: name thresholds"),
        ({"max_tokens": 8}, "max_tokens: must be more than the prompt's 8"),
        ({"prompt_tokens": 0}, "prompt_tokens: must be 1 or more"),
    ],
)
def test_bad_settings_are_one_clear_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(Scripted(_risky), _texts(3), TOKENIZER, **wrong)  # type: ignore[arg-type]


def test_bad_texts_are_one_clear_line(tmp_path: Path) -> None:
    for name, text, message in (
        ("empty.txt", " ", "the text is empty"),
        ("short.txt", "7", "1 tokens are too few"),
        ("prompt.txt", "7 " * 8, "8 tokens are no more than the prompt's 8"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            calibrate(Scripted(_risky), [tmp_path / name], TOKENIZER)
    with pytest.raises(InputError, match="do not belong together"):
        calibrate(Scripted(_risky), _texts(1), dataclasses.replace(TOKENIZER, vocabulary=64))


# ---- with a real model


@pytest.fixture(scope="module")
def river(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "model.river.onnx"
    export(exported("llama"), path, RiverConfig(tau=0.5, tau_offsets=()))
    return path


@pytest.fixture(scope="module")
def calibration(river: Path) -> Calibration:
    """Loose enough for a random model to be certified."""
    return calibrate(river, _texts(30, 10), TOKENIZER, max_risk=0.9, taus=(0.9, 0.5, 0.0), prompt_tokens=4)


def test_the_losses_are_those_of_decoding_after_a_prompt(river: Path, calibration: Calibration) -> None:
    decoder = OnnxDecoder(river)
    losses = []
    for document in _texts(30, 10):
        ids = np.array(TOKENIZER.encode(document.text))
        expected = decoder.forward(ids[None], decoder.start(1), tau=2.0)[0][0].argmax(-1)
        state = decoder.start(1)
        found = [decoder.forward(ids[None, :4], state, tau=0.5)[0][0, -1].argmax()]
        found += [decoder.forward(token, state, tau=0.5)[0][0, 0].argmax() for token in ids[4:].reshape(-1, 1, 1)]
        losses.append(np.mean(np.array(found) != expected[3:]))
    tested = next(tested for tested in calibration.curve if tested.tau == 0.5)
    assert tested.risk == pytest.approx(np.mean(losses))
    assert tested.p_value == pytest.approx(float(hoeffding_bentkus(np.mean(losses), 30, 0.9)))


def test_an_export_takes_the_threshold_and_carries_the_evidence(
    calibration: Calibration, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    assert calibration.exits
    calibration.save(tmp_path / "calibration.json")
    target = tmp_path / "calibrated.onnx"
    export(exported("llama"), target, RiverConfig(calibration=tmp_path / "calibration.json"))
    model = onnx.load(target)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["river.calibration"]) == json.loads(calibration.to_json())
    tau = next(t for t in model.graph.initializer if t.name == "river.tau")
    assert float(onnx.numpy_helper.to_array(tau)) == pytest.approx(calibration.tau)
    assert json.loads(metadata["river.config"])["tau"] == calibration.tau


def test_evidence_is_of_the_river_and_not_of_its_thresholds(exported: Callable[[str], Path], tmp_path: Path) -> None:
    prints = []
    for number, config in enumerate(
        (
            RiverConfig(),
            RiverConfig(tau=0.3, min_depth=2, tau_offsets=(), extra_output=False, external_data=True),
            RiverConfig(bits=8),
            RiverConfig(exit_every=2),
            RiverConfig(activations="float"),
        )
    ):
        path = tmp_path / f"{number}.onnx"
        export(exported("llama"), path, config)
        prints.append(OnnxCalibratable(path).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_an_export_of_another_river_refuses_the_evidence(
    calibration: Calibration, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    config = RiverConfig(calibration=calibration.to_json(), group_size=64)
    with pytest.raises(ConfigError, match="calibration: it was made with another model or river"):
        export(exported("llama"), tmp_path / "other.onnx", config)
    assert not (tmp_path / "other.onnx").exists()


def test_the_config_takes_a_calibration_and_nothing_beside_it(calibration: Calibration) -> None:
    config = RiverConfig.from_options({"calibration": calibration.to_json()})
    assert config.tau == calibration.tau
    assert dataclasses.replace(config, bits=8).tau == calibration.tau
    assert json.loads(config.to_json())["calibration"] is None
    with pytest.raises(ConfigError, match="calibration: it sets tau; give one of the two"):
        RiverConfig(calibration=calibration.to_json(), tau=0.123)
    with pytest.raises(ConfigError, match="calibration: not a calibration"):
        RiverConfig(calibration="{}")
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        RiverConfig(calibration="nowhere.json")


def test_calibrated_offsets_are_in_the_export(
    calibration: Calibration, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    layered = dataclasses.replace(calibration, tau_offsets=(3.0, 0.25, 0.0, 0.0), tau=-1.0)
    export(exported("llama"), tmp_path / "layered.onnx", RiverConfig(calibration=layered.to_json()))
    decoder = OnnxDecoder(tmp_path / "layered.onnx")
    assert decoder.forward(np.array([[5]]), decoder.start(1))[1] == 2


def test_a_hugging_face_decoder_is_calibrated_in_the_reference_runtime() -> None:
    found = calibrate(random_model("llama"), _texts(12, 6), TOKENIZER, max_risk=0.9, taus=(0.9,), prompt_tokens=3)
    assert found.layers == LAYERS
    assert found.documents == 12
    assert len(found.curve) == 1


def test_what_is_no_river_model_is_one_clear_line(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no river model"):
        OnnxCalibratable(exported("llama"))
    export(exported("llama"), tmp_path / "limited.onnx", RiverConfig(max_depth=2))
    with pytest.raises(InputError, match="its exit depth is limited by max_depth"):
        OnnxCalibratable(tmp_path / "limited.onnx")
    with pytest.raises(InputError, match="no such file"):
        calibrate(tmp_path / "none.onnx", _texts(3), TOKENIZER)


def test_one_threshold_for_all_layers_has_no_room_for_more(exported: Callable[[str], Path], tmp_path: Path) -> None:
    export(exported("llama"), tmp_path / "plain.onnx", RiverConfig())
    with pytest.raises(ConfigError, match="by_layer: the model has one threshold for all layers"):
        calibrate(tmp_path / "plain.onnx", _texts(3), TOKENIZER, by_layer=True)


def test_the_plot_is_drawn(calibration: Calibration, tmp_path: Path) -> None:
    draw_calibration(calibration, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
