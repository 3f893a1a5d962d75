"""What fidelity is: how close a model's predictions and KV cache are to its backbone's, on text, with intervals.

Pure numpy. All measures are teacher-forced: both models read the same tokens, and only their predictions are compared.
Documents are the unit of sampling: tokens of one document are not independent, so intervals resample documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.errors import ConfigError, InputError, MissingExtra

__all__ = [
    "KINDS",
    "SPLITS",
    "Document",
    "Interval",
    "TextTokenizer",
    "TokenFidelity",
    "TokenizedDocument",
    "bootstrap",
    "check_lengths",
    "chosen_texts",
    "compare",
    "decoded_documents",
    "hub_tokenizer",
    "load_texts",
    "load_tokenizer",
    "pearson",
    "shipped_texts",
    "spread",
    "tokenize",
    "vector_cosines",
]

KINDS = ("prose", "code", "mathematics")
SPLITS = ("tuning", "calibration", "heldout")

_TOP = 5
_LEAST_TOKENS = 2
# A model's vocabulary is often padded beyond its tokenizer's, by a few percent at most.
_PADDED_SHARE = 0.9
_REQUEST = "Write a text."
_SAMPLE = "river"


@dataclass(frozen=True)
class Document:
    """A text to be read by a model: its name, its kind ("prose", "code", "mathematics", or the file's name)."""

    id: str
    kind: str
    text: str


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids, int64 [tokens]."""

    id: str
    kind: str
    ids: np.ndarray


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as the evaluator needs it: text to ids, ids to text, and the number of its tokens.

    Fields:
        front, back: what ``encode`` puts before and behind every text, such as a BOS token or a chat template.
        template: whether that is a chat template.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocabulary: int
    front: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    template: bool = False

    @property
    def lead(self) -> int:
        """Tokens of a chat template before the text: a prompt of so many more than were asked for."""
        return len(self.front) if self.template else 0


@dataclass(frozen=True)
class TokenFidelity:
    """A model against its backbone on one document, token by token.

    Fields:
        top1: whether both choose the same next token, bool [tokens].
        top5: share of the backbone's five likeliest next tokens among the model's five, float [tokens].
        kl: KL divergence of the model from the backbone, KL(backbone || model), in nats, float [tokens].
        nll_backbone, nll: negative log likelihood of the text's next token, in nats, float [tokens - 1].
    """

    top1: np.ndarray
    top5: np.ndarray
    kl: np.ndarray
    nll_backbone: np.ndarray
    nll: np.ndarray


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def load_texts(sources: Iterable[str | Path]) -> list[Document]:
    """Documents from files: a text file is one document, a JSONL file one a line (field ``text`` or ``prompt``, or the
    line is itself a string; ``id`` and ``kind`` are optional).

    Raises:
        InputError: a file is missing, empty, or not UTF-8; a line is no JSON or has neither field; a text is empty.
    """
    documents: list[Document] = []
    for source in map(Path, sources):
        documents += (
            _jsonl(source) if source.suffix == ".jsonl" else [Document(source.name, source.stem, _read(source))]
        )
    if not documents:
        raise InputError("no texts: name at least one text file or JSONL file")
    for document in documents:
        if not document.text.strip():
            raise InputError(f"{document.id}: the text is empty")
    return documents


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def _jsonl(path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg})") from error
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {"text": entry}
        text = fields.get("text", fields.get("prompt"))
        if not isinstance(text, str):
            raise InputError(f"{path}:{number}: no text in field 'text' or 'prompt'")
        kind = fields.get("kind", path.name.split(".")[0])
        documents.append(Document(str(fields.get("id", f"{path.name}:{number}")), str(kind), text))
    if not documents:
        raise InputError(f"{path}: the file is empty")
    return documents


def chosen_texts(texts: Sequence[str | Path] | Sequence[Document] | None, split: str) -> list[Document]:
    """What a caller names as texts, documents or files of them; None: the shipped texts of a split.

    Raises: as `load_texts`.
    """
    if texts is None:
        return shipped_texts(split)
    documents = [text for text in texts if isinstance(text, Document)]
    return documents or load_texts(text for text in texts if not isinstance(text, Document))


def check_lengths(prompt_tokens: int, max_tokens: int) -> None:
    """Raises ConfigError where a document of ``max_tokens`` has nothing to decode after its prompt, or no prompt."""
    if prompt_tokens < 1:
        raise ConfigError("prompt_tokens", f"must be 1 or more, not {prompt_tokens}")
    if max_tokens <= prompt_tokens:
        raise ConfigError("max_tokens", f"must be more than the prompt's {prompt_tokens}, not {max_tokens}")


def spread(documents: list[TokenizedDocument], count: int | None) -> list[TokenizedDocument]:
    """``count`` of the documents, evenly from the first to the last; all if None.

    Raises:
        ConfigError: the count is less than 1.
    """
    if count is None or count >= len(documents):
        return documents
    if count < 1:
        raise ConfigError("max_documents", f"must be 1 or more, not {count}")
    return [documents[index] for index in np.linspace(0, len(documents) - 1, count).round().astype(int)]


def decoded_documents(
    texts: Sequence[str | Path] | Sequence[Document] | None,
    split: str,
    tokenizer: TextTokenizer,
    vocabulary: int,
    *,
    prompt_tokens: int,
    max_tokens: int,
    count: int | None,
    skip_short: bool,
) -> list[TokenizedDocument]:
    """The first ``max_tokens`` of each document, of which ``prompt_tokens`` are read at once and the others decoded.

    Args:
        skip_short: leave out documents with nothing to decode, instead of refusing them.

    Requires: `check_lengths` has passed.

    Raises: as `chosen_texts`, `tokenize` and `spread`.
        InputError: a document has nothing to decode, or all of them.
    """
    whole = tokenize(chosen_texts(texts, split), tokenizer, vocabulary)
    long = [document for document in whole if len(document.ids) > prompt_tokens]
    if not skip_short and len(long) < len(whole):
        short = next(document for document in whole if len(document.ids) <= prompt_tokens)
        raise InputError(f"{short.id}: {len(short.ids)} tokens are no more than the prompt's {prompt_tokens}")
    if not long:
        raise InputError(f"no text has more tokens than the prompt's {prompt_tokens}")
    return [TokenizedDocument(found.id, found.kind, found.ids[:max_tokens]) for found in spread(long, count)]


def shipped_texts(split: str, kinds: Sequence[str] = KINDS) -> list[Document]:
    """The texts that come with this package (licences: ``texts/NOTICE.txt``).

    Args:
        split: "tuning" for what shapes the river (quantizers, bit plans), "calibration" for exit thresholds, "heldout"
            for reported figures. A threshold calibrated on texts that shaped the river would look better than it is.

    Raises:
        ConfigError: there is no such split or kind.
    """
    if split not in SPLITS:
        raise ConfigError("split", f"{split!r} is none of {', '.join(SPLITS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError("kinds", f"{kind!r} is none of {', '.join(KINDS)}")
    folder = resources.files("river_compile.measure") / "texts"
    with resources.as_file(folder) as path:
        return load_texts(path / f"{kind}.{split}.jsonl" for kind in kinds)


def load_tokenizer(folder: str | Path, *, chat: bool = False) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder (or hub name), as far as measures need it.

    Args:
        chat: make each text the assistant's turn, by the tokenizer's chat template.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: there is no tokenizer, or it has no chat template that could be used.
    """
    tokenizer = hub_tokenizer(folder)

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(text: str) -> list[int]:
        return [*front, *plain(text), *back] if chat else list(tokenizer(text, verbose=False)["input_ids"])

    front, back = _turn(tokenizer, folder, plain) if chat else _added(tokenizer(_SAMPLE)["input_ids"], plain(_SAMPLE))
    return TextTokenizer(
        encode, lambda ids: str(tokenizer.decode(list(ids))), len(tokenizer), tuple(front), tuple(back), chat
    )


def hub_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder (or hub name), as transformers has it.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: there is no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading a tokenizer") from error
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no tokenizer: {' '.join(str(error).split())[:200]}") from error


def _added(whole: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and behind the plain tokens of a text."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _turn(tokenizer: Any, folder: str | Path, plain: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """What a chat template puts before and behind the assistant's turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{folder}: the tokenizer has no chat template; read the texts as they are, without --chat")
    turns = [{"role": "user", "content": _REQUEST}, {"role": "assistant", "content": _SAMPLE}]
    try:
        before, found, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_SAMPLE)
    except Exception as error:
        raise InputError(f"{folder}: its chat template fails: {' '.join(str(error).split())[:200]}") from error
    if not found:
        raise InputError(f"{folder}: its chat template leaves out what the assistant says")
    return plain(before), plain(behind)


def tokenize(
    documents: Sequence[Document], tokenizer: TextTokenizer, vocabulary: int, max_tokens: int | None = None
) -> list[TokenizedDocument]:
    """Documents as token ids; one of more than ``max_tokens`` tokens becomes consecutive pieces, named ``id#2`` etc.

    Every piece begins and ends as the tokenizer has a text begin and end: a model that expects a BOS token predicts
    badly without.

    Args:
        vocabulary: the size of the model's vocabulary.

    Raises:
        InputError: the tokenizer is another model's; a document has fewer than two tokens.
        ConfigError: ``max_tokens`` leaves no room for two tokens of the text.
    """
    least = _LEAST_TOKENS + len(tokenizer.front) + len(tokenizer.back)
    if max_tokens is not None and max_tokens < least:
        raise ConfigError("max_tokens", f"must be {least} or more, not {max_tokens}")
    if not _PADDED_SHARE * vocabulary <= tokenizer.vocabulary <= vocabulary:
        raise InputError(
            f"the tokenizer has {tokenizer.vocabulary} tokens and the model {vocabulary}: they do not belong together"
        )
    pieces = []
    for document in documents:
        ids = np.asarray(tokenizer.encode(document.text), np.int64)
        if len(ids) < _LEAST_TOKENS:
            raise InputError(f"{document.id}: {len(ids)} tokens are too few; the least is {_LEAST_TOKENS}")
        if ids.max() >= vocabulary:
            raise InputError(f"{document.id}: token {ids.max()} is beyond the model's vocabulary of {vocabulary}")
        for number, part in enumerate(_pieces(ids, tokenizer, max_tokens), 1):
            name = document.id if number == 1 else f"{document.id}#{number}"
            pieces.append(TokenizedDocument(name, document.kind, part))
    return pieces


def _pieces(ids: np.ndarray, tokenizer: TextTokenizer, max_tokens: int | None) -> list[np.ndarray]:
    if max_tokens is None or len(ids) <= max_tokens:
        return [ids]
    front, back = np.array(tokenizer.front, np.int64), np.array(tokenizer.back, np.int64)
    text = ids[len(front) : len(ids) - len(back)]
    room = max_tokens - len(front) - len(back)
    parts = [text[start : start + room] for start in range(0, len(text), room)]
    # A tail of one token predicts nothing that could be scored.
    return [np.concatenate([front, part, back]) for part in parts if len(part) >= _LEAST_TOKENS]


def compare(backbone: np.ndarray, model: np.ndarray, ids: np.ndarray) -> TokenFidelity:
    """Compare two models' logits on the same tokens.

    Args:
        backbone, model: logits, float [tokens, vocabulary]; row t predicts token t + 1.
        ids: the tokens that were read, int64 [tokens].

    Raises:
        InputError: the shapes do not belong together, or there are fewer than two tokens.
    """
    if backbone.shape != model.shape:
        raise InputError(f"logits of different shapes: {backbone.shape} and {model.shape} (another model's tokenizer?)")
    if backbone.ndim != 2 or len(ids) != len(backbone) or len(ids) < _LEAST_TOKENS:
        raise InputError(f"logits {backbone.shape} do not belong to {len(ids)} tokens; the least is {_LEAST_TOKENS}")
    reference, other = _log_softmax(backbone), _log_softmax(model)
    top = min(_TOP, reference.shape[1])
    likeliest = [np.argpartition(-rows, top - 1, axis=1)[:, :top] for rows in (reference, other)]
    shared = (likeliest[0][:, :, None] == likeliest[1][:, None, :]).any(axis=2).mean(axis=1)
    following = ids[1:, None]
    return TokenFidelity(
        top1=reference.argmax(1) == other.argmax(1),
        top5=shared,
        kl=np.maximum((np.exp(reference) * (reference - other)).sum(axis=1), 0.0),
        nll_backbone=-np.take_along_axis(reference[:-1], following, 1)[:, 0],
        nll=-np.take_along_axis(other[:-1], following, 1)[:, 0],
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def vector_cosines(backbone: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Cosine of each head's K or V vectors, averaged over heads: float [heads, tokens, width] -> float [tokens]."""
    reference, other = backbone.astype(np.float64), model.astype(np.float64)
    lengths = np.linalg.norm(reference, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.asarray(((reference * other).sum(axis=-1) / np.maximum(lengths, 1e-30)).mean(axis=0))


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation coefficient; NaN where one of the two does not vary."""
    centred = [values - values.mean() for values in (first.astype(np.float64), second.astype(np.float64))]
    spread = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / spread if spread > 0 else float("nan")


def bootstrap(
    documents: Sequence[np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over all tokens of all documents, with a percentile bootstrap interval that resamples documents.

    Args:
        documents: for each document its tokens' values.
        transform: applied to the mean: ``np.exp`` makes a perplexity of negative log likelihoods.
        confidence: in (0, 1).

    Raises:
        ConfigError: ``confidence`` lies outside (0, 1).
        InputError: there is no value.
    """
    if not 0 < confidence < 1:
        raise ConfigError("confidence", f"must lie in (0, 1), not {confidence}")
    sums = np.array([values.sum(dtype=np.float64) for values in documents])
    counts = np.array([values.size for values in documents], np.float64)
    if not counts.sum():
        raise InputError("no tokens to average over")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / np.maximum(counts[drawn].sum(axis=1), 1)
    low, high = np.quantile(transform(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(transform(np.array(sums.sum() / counts.sum()))), float(low), float(high))
