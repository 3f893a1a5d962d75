"""Fidelity's measures against their definitions, and the texts that they are taken on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from river_compile.errors import ConfigError, InputError
from river_compile.measure.fidelity import (
    KINDS,
    SPLITS,
    Document,
    TextTokenizer,
    bootstrap,
    compare,
    load_texts,
    load_tokenizer,
    pearson,
    shipped_texts,
    tokenize,
    vector_cosines,
)

BYTES = TextTokenizer(lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), 256)


def _logits(seed: int, tokens: int = 7, vocabulary: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, vocabulary)).astype(np.float32) * 3


def test_a_model_agrees_with_itself() -> None:
    logits = _logits(0)
    found = compare(logits, logits, np.arange(7))
    assert found.top1.all()
    assert (found.top5 == 1).all()
    assert (found.kl == 0).all()
    np.testing.assert_array_equal(found.nll, found.nll_backbone)


def test_divergence_and_likelihood_are_what_torch_says() -> None:
    backbone, model, ids = _logits(1), _logits(2), np.array([3, 1, 4, 1, 5, 9, 2])
    found = compare(backbone, model, ids)
    reference, other = (torch.log_softmax(torch.from_numpy(rows).double(), -1) for rows in (backbone, model))
    divergence = torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(found.kl, divergence.numpy(), rtol=1e-9)
    loss = torch.nn.functional.nll_loss(other[:-1], torch.from_numpy(ids[1:]), reduction="none")
    np.testing.assert_allclose(found.nll, loss.numpy(), rtol=1e-9)
    assert found.nll.shape == (6,)


def test_top_counts_agreement_token_by_token() -> None:
    backbone = np.array([[9, 8, 7, 6, 5, 0, 0, 0], [9, 8, 7, 6, 5, 0, 0, 0]], np.float32)
    model = np.array([[9, 8, 0, 0, 0, 5, 6, 7], [0, 9, 8, 7, 6, 5, 0, 0]], np.float32)
    found = compare(backbone, model, np.array([0, 1]))
    assert found.top1.tolist() == [True, False]
    np.testing.assert_allclose(found.top5, [2 / 5, 4 / 5])


def test_logits_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="different shapes"):
        compare(_logits(0), _logits(0, vocabulary=39), np.arange(7))
    with pytest.raises(InputError, match="the least is 2"):
        compare(_logits(0, tokens=1), _logits(0, tokens=1), np.arange(1))


def test_cosines_are_per_head_and_do_not_see_length() -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 5, 8))
    np.testing.assert_allclose(vector_cosines(vectors, 3 * vectors), np.ones(5))
    half = vectors.copy()
    half[1] *= -1
    np.testing.assert_allclose(vector_cosines(vectors, half), np.zeros(5), atol=1e-12)


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=50)
    second = first + rng.normal(size=50)
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert np.isnan(pearson(first, np.ones(50)))


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 draws of 30 documents whose tokens go together; a 90% interval must cover in about 90% of them."""
    rng = np.random.default_rng(0)
    covered = 0
    for draw in range(200):
        documents = [rng.normal(0.3 + rng.normal(0, 0.2), 0.1, size=rng.integers(5, 40)) for _ in range(30)]
        found = bootstrap(documents, confidence=0.9, resamples=400, seed=draw)
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.3 <= found.high
    assert 160 <= covered <= 194


def test_the_bootstrap_weighs_tokens_and_transforms_the_mean() -> None:
    documents = [np.array([1.0, 1.0, 1.0]), np.array([5.0])]
    assert bootstrap(documents).value == pytest.approx(2.0)
    assert bootstrap(documents, np.exp).value == pytest.approx(np.exp(2.0))
    with pytest.raises(ConfigError, match="confidence"):
        bootstrap(documents, confidence=1.0)
    with pytest.raises(InputError, match="no tokens"):
        bootstrap([np.array([])])


def test_texts_are_read_from_text_and_jsonl_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One text.")
    lines = [json.dumps({"id": "x", "kind": "code", "text": "pass"}), json.dumps({"prompt": "Say"}), '"bare"']
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    assert load_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == [
        Document("a.txt", "a", "One text."),
        Document("x", "code", "pass"),
        Document("b.jsonl:2", "b", "Say"),
        Document("b.jsonl:3", "b", "bare"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "the text is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"{", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"words": 1}', "a.jsonl:1: no text"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_bad_text_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_texts([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_no_texts_is_an_error() -> None:
    with pytest.raises(InputError, match="no texts"):
        load_texts([])


def test_long_documents_become_pieces() -> None:
    pieces = tokenize([Document("d", "k", "abcdefghi")], BYTES, 256, max_tokens=4)
    assert [(piece.id, piece.ids.tolist()) for piece in pieces] == [("d", list(b"abcd")), ("d#2", list(b"efgh"))]


def test_every_piece_begins_and_ends_as_the_tokenizer_has_a_text_begin_and_end() -> None:
    framed = TextTokenizer(lambda text: [1, 2, *text.encode(), 3], str, 256, (1, 2), (3,))
    pieces = tokenize([Document("d", "k", "abcdefghi")], framed, 256, max_tokens=6)
    assert [piece.ids.tolist() for piece in pieces] == [[1, 2, *part, 3] for part in (b"abc", b"def", b"ghi")]
    whole = tokenize([Document("d", "k", "abc")], framed, 256, max_tokens=6)
    assert [piece.ids.tolist() for piece in whole] == [[1, 2, *b"abc", 3]]
    with pytest.raises(ConfigError, match="max_tokens: must be 5 or more, not 4"):
        tokenize([Document("d", "k", "abcdefghi")], framed, 256, max_tokens=4)


_TEMPLATE = "w90{% for turn in messages %} {{ turn.role }} {{ turn.content }} w91{% endfor %}"


@pytest.mark.parametrize("added", [((), ()), (("w1",), ()), (("w1", "w3"), ("w2",))])
def test_what_a_tokenizer_adds_is_found(tmp_path: Path, added: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    front, back = (tuple(int(word[1:]) for word in words) for words in added)
    found = load_tokenizer(_words(tmp_path, *added))
    assert (found.front, found.back, found.lead) == (front, back, 0)
    assert found.encode("w7 w8") == [*front, 7, 8, *back]


def test_a_chat_template_makes_each_text_the_assistants_turn(tmp_path: Path) -> None:
    folder = _words(tmp_path, ("w1",), ("w2",), _TEMPLATE)
    found = load_tokenizer(folder, chat=True)
    text = found.encode("w7 w8")
    assert text == [*found.front, 7, 8, 91]
    assert text[0] == 90 and found.back == (91,) and found.lead == len(found.front) > 2
    pieces = tokenize([Document("d", "k", "w7 w8 w9 w10")], found, 128, max_tokens=len(text))
    assert [piece.ids.tolist() for piece in pieces] == [[*found.front, *part, 91] for part in ([7, 8], [9, 10])]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "its chat template fails: roles must alternate"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_one_clear_line(tmp_path: Path, template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(_words(tmp_path, template=template), chat=True)
    assert "\n" not in str(caught.value)


def _words(folder: Path, front: tuple[str, ...] = (), back: tuple[str, ...] = (), template: str | None = None) -> Path:
    """A tokenizer of 128 words that frames every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if front or back:
        special = [(word, int(word[1:])) for word in {*front, *back}]
        words.post_processor = processors.TemplateProcessing([*front, "$A", *back], special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template).save_pretrained(folder)
    return folder


def test_a_text_too_short_or_a_foreign_tokenizer_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="d: 1 tokens are too few"):
        tokenize([Document("d", "k", "a")], BYTES, 256)
    with pytest.raises(InputError, match="do not belong together"):
        tokenize([Document("d", "k", "abc")], BYTES, 128)
    with pytest.raises(InputError, match="do not belong together"):
        tokenize([Document("d", "k", "abc")], BYTES, 49152)
    with pytest.raises(ConfigError, match="max_tokens"):
        tokenize([Document("d", "k", "abc")], BYTES, 256, max_tokens=1)


def test_shipped_texts_are_many_and_no_text_is_in_two_splits() -> None:
    texts = {split: shipped_texts(split) for split in SPLITS}
    assert len(texts["calibration"]) >= 150
    assert len(texts["heldout"]) >= 30
    everything = [document.text for documents in texts.values() for document in documents]
    assert len(set(everything)) == len(everything)
    ids = [document.id for documents in texts.values() for document in documents]
    assert len(set(ids)) == len(ids)
    assert {document.kind for document in texts["heldout"]} == set(KINDS)
    with pytest.raises(ConfigError, match="split"):
        shipped_texts("test")
