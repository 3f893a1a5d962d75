"""Text to tokens and back: stop strings, pieces of characters, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.errors import ConfigError, InputError
from river_compile.serve.words import StopStrings, Words
from tests.words import save_word_tokenizer


@given(
    st.lists(st.text("abc", max_size=3), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_string_however_it_comes_in_pieces(
    pieces: list[str], strings: list[str]
) -> None:
    stops, told = StopStrings(strings), ""
    for piece in pieces:
        told += stops.add(piece)
        if stops.found:
            break
    else:
        told += stops.rest()
    read = ""
    for piece in pieces:
        read += piece
        if any(string in read for string in strings):
            break
    places = [read.find(string) for string in strings if string in read]
    assert told == (read[: min(places)] if places else read)
    assert stops.found == bool(places)


def test_what_cannot_begin_a_stop_string_is_told_at_once() -> None:
    stops = StopStrings(["abc"])
    assert [stops.add(piece) for piece in ("xa", "b", "d", "ab")] == ["x", "", "abd", ""]
    assert stops.rest() == "ab"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_only_whole_characters_are_told(bytes_tokenizer: Path) -> None:
    words = Words(bytes_tokenizer)
    pieces = words.pieces()
    told = [pieces.add(token) for token in words.encode("aü€𝄞.")]
    assert [piece for piece in told if piece] == ["a", "ü", "€", "𝄞", "."]
    assert told[1:3] == ["", "ü"]


def test_an_answer_goes_on_behind_its_prompt(tmp_path: Path) -> None:
    words = Words(save_word_tokenizer(tmp_path))
    assert words.pieces().add(5) == "w5"
    assert words.pieces([3, 4]).add(5) == " w5"


def test_half_a_surrogate_pair_is_no_text(bytes_tokenizer: Path) -> None:
    words = Words(bytes_tokenizer)
    with pytest.raises(ConfigError, match="surrogate"):
        words.encode("a\ud83d")
    with pytest.raises(ConfigError, match="surrogate"):
        words.chat([{"role": "user", "content": "\udc00"}])


def test_messages_follow_the_template_and_what_it_refuses_is_refused(tmp_path: Path) -> None:
    words = Words(save_word_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="no chat template"):
        words.chat([{"role": "user", "content": "w5"}])
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "w9 {{ message.content }} {% endfor %}{% if add_generation_prompt %}w10{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    words = Words(tmp_path)
    assert words.chat([{"role": "user", "content": "w5 w6"}]) == [9, 5, 6, 10]
    with pytest.raises(ConfigError, match="no system"):
        words.chat([{"role": "system", "content": "w5"}])


def test_what_ends_an_answer_and_how_much_is_read_is_told_by_the_folder(tmp_path: Path) -> None:
    folder = save_word_tokenizer(tmp_path, eos_token="w2")
    assert Words(folder).stop_tokens == {2} and Words(folder).context is None
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    assert Words(folder).stop_tokens == {2, 7} and Words(folder).context == 64
    with pytest.raises(InputError, match="no tokenizer"):
        Words(tmp_path / "nothing")
