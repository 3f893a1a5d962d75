"""River models in EleutherAI's lm-evaluation-harness, as its model ``river``.

Tokenization, chat templates, batching and stop sequences are those of its own ``hf`` model, which this one extends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.measure.subject_of import refuse_given

_LEAST = (0, 4, 13)
try:
    if tuple(int(part) for part in re.findall(r"\d+", version("lm_eval"))[:3]) < _LEAST:
        raise ImportError(f"lm_eval {version('lm_eval')} is too old")
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtra("lm_eval (0.4.13 or later, with transformers)", "lm-eval", "the harness") from error

__all__ = ["RiverLM", "command_line"]

_DEFAULT_LENGTH = 2048
# What the harness's tasks may ask of a generation, and `OnnxDecoder` does.
_SAMPLING = ("do_sample", "temperature", "top_p")


@register_model("river")
class RiverLM(HFLM):  # type: ignore[misc]
    """A model with an exit river: of a Hugging Face folder, compiled by torch, or an exported ONNX model.

    ``generate_until`` decodes as a user's program would. Log-likelihoods are read the way the text would be generated:
    the context in one pass, then token by token, each deciding where to exit; with exits off, or exact, in one pass, as
    ``hf`` reads.

    Args:
        pretrained: a folder or hub name, through ``torch.compile(backend="river")``.
        onnx: a river model, or a folder that `river-export` made; instead of ``pretrained``.
        tokenizer: a folder or hub name; None: the model's own folder.
        tau: the exit threshold; None: the default, or the exported model's own. 2: never exit.
        max_depth: leave after this many layers at the latest; 0: all river.
        exact: the river only drafts: tokens are the model's own.
        dtype: of a torch model: "float32", "bfloat16", "float16"; "auto": as it was saved.
        river: a folder that `save_river` wrote, for a torch model.
        max_length: most tokens of context and continuation; None: what the model's config says, or 2048.
        batch_size: a batch's tokens decide together where to exit, so that only 1 shows what one sequence gets. ONNX
            models take 1.
        max_batch_size, device: given by the harness; a torch model runs on the device.
        options: further fields of `RiverConfig`, for a torch model.

    Raises:
        ConfigError: an argument is unknown, missing, given twice, or not for this kind of model.
        InputError: there is no such model, or no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        onnx: str | None = None,
        tokenizer: str | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        exact: bool = False,
        dtype: str = "auto",
        river: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if (pretrained is None) == (onnx is None):
            raise ConfigError("pretrained", "give either pretrained=FOLDER or onnx=FILE, of --model_args")
        if exact and (tau is not None or max_depth is not None):
            raise ConfigError("exact", "a river that only drafts decides no exits; leave out tau and max_depth")
        settings = options if max_depth is None else options | {"max_depth": max_depth}
        self._river: _OnnxModel | _TorchModel
        if onnx is not None:
            refuse_given("is for a torch model; an exported one has its own", **options, river=river)
            if dtype != "auto" or str(batch_size) != "1":
                raise ConfigError("dtype" if dtype != "auto" else "batch_size", "is for a torch model")
            self._river = _OnnxModel(onnx, tokenizer, tau, max_depth, exact)
        else:
            self._river = _TorchModel(str(pretrained), tau, exact, dtype, river, device or "cpu", settings)
        words = tokenizer or (pretrained if pretrained is not None else self._river.folder)
        try:
            super().__init__(
                self._river.model,
                backend="causal",
                tokenizer=str(words),
                max_length=max_length,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{words}: no tokenizer there: {str(error).splitlines()[0]}") from error
        self._model = self._river.compiled
        self.pretrained = str(pretrained or onnx)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if not self._river.decides and isinstance(self._river, _TorchModel):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
        from tqdm import tqdm

        found = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood requests"):
            # The last token is scored and not read; what is too long loses its start.
            ids = np.array((context + continuation)[-(self.max_length + 1) :][:-1], np.int64)
            at_once = len(ids) - len(continuation) + 1 if self._river.decides else len(ids)
            logits = torch.from_numpy(np.concatenate(list(self._river.read(ids, at_once)))[-len(continuation) :])
            chances = torch.log_softmax(logits.float(), dim=-1)
            target = torch.tensor(continuation)
            likelihood = float(chances.gather(1, target[:, None]).sum())
            found.append((likelihood, bool((chances.argmax(-1) == target).all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if isinstance(self._river, _TorchModel):
            if self._river.exact and len(context) > 1:
                ends = _StopStrings(self.tokenizer, stop, context.shape[1])
                return self._exactly(context, max_length, ends, **generation_kwargs)
            made: torch.Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
            return made
        mask = generation_kwargs.pop("attention_mask")
        unknown = sorted(set(generation_kwargs) - set(_SAMPLING))
        if unknown:
            raise ConfigError("gen_kwargs", f"{', '.join(unknown)}: an ONNX model samples by {', '.join(_SAMPLING)}")
        greedy = not generation_kwargs.get("do_sample", generation_kwargs.get("temperature", 0.0) > 0)
        temperature = 0.0 if greedy else float(generation_kwargs.get("temperature", 1.0))
        prompt = context[0][mask[0].bool()].tolist()
        room, tokens = max_length - context.shape[1], []
        steps = self._river.stream(prompt, room, temperature, float(generation_kwargs.get("top_p", 1.0)))
        for token in steps:
            tokens.append(token)
            if any(word in self.tok_decode(tokens, skip_special_tokens=False) for word in stop):
                break
        return torch.cat([context, torch.tensor([tokens], dtype=context.dtype)], dim=1)

    def _exactly(
        self, context: torch.Tensor, max_length: int, ends: _StopStrings, **generation_kwargs: Any
    ) -> torch.Tensor:
        """As the harness's own model generates, with stop strings that keep no state."""
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)
            generation_kwargs["do_sample"] = False
        made: torch.Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=[ends],
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )
        return made

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: settings, and where tokens left the backbone."""
        return {"model_dtype": str(getattr(self._river.model, "dtype", "")), **self._river.told()}


class _StopStrings:
    """A stopping criterion of transformers that keeps nothing from call to call.

    Exact mode asks of one sequence after the other, and the harness's own criterion, which notes what has ended by its
    place in the batch, would end all of them with the first.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], start: int) -> None:
        self._tokenizer, self._strings, self._start = tokenizer, [text for text in strings if text], start
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._strings]
        # A text may be written in more tokens than the tokenizer would take for it.
        self._seen = 2 * max(lengths, default=0) + 2

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._seen :])
        return torch.tensor([any(one in text for one in self._strings) for text in texts], device=input_ids.device)


def command_line() -> None:
    """Run the harness's own command on ``sys.argv``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


class _TorchModel:
    """A compiled model: ``model`` is the original, ``compiled`` what runs."""

    def __init__(
        self,
        pretrained: str,
        tau: float | None,
        exact: bool,
        dtype: str,
        river: str | None,
        device: str,
        options: Mapping[str, Any],
    ) -> None:
        from river_compile.pretrained import from_pretrained

        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError("dtype", f"{dtype!r} is no type of torch")
        kind = None if dtype == "auto" else getattr(torch, dtype)
        config = RiverConfig.from_options(options)
        self.decides = not exact and ((config.tau if tau is None else tau) <= 1 or config.max_depth is not None)
        # Where exits decide, a graph that got no river would pass the original's results for the river's.
        options = {"strict": self.decides} | dict(options)
        self.compiled = from_pretrained(
            pretrained, tau=tau, exact=exact, dtype=kind, device=device, river=river, options=options, warm_up=False
        )
        self.model = self.compiled._orig_mod
        self.folder = Path(pretrained)
        self.exact = exact

    def read(self, ids: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
        """Logits, float32 [tokens, vocabulary], of a first pass and of one pass for each token after it."""
        cache: dict[str, Any] = {}
        tokens = torch.from_numpy(ids[None]).to(self.model.device)
        with torch.no_grad():
            for first, last in ((0, at_once), *((place, place + 1) for place in range(at_once, len(ids)))):
                part = tokens[:, first:last]
                output = self.compiled(input_ids=part, use_cache=True, **cache)
                cache = {cache_argument(self.model): output.past_key_values}
                yield output.logits[0].float().cpu().numpy()

    def told(self) -> dict[str, Any]:
        from river_compile.compiled import stats

        found = stats(self.compiled)
        told: dict[str, Any] = {"river_layers": found.river_layers, "river_fallbacks": dict(found.fallbacks)}
        if found.decode_depths:
            told["mean_exit_depth"] = round(found.mean_exit_depth, 3)
        if found.exact.get("drafted"):
            told["acceptance"] = round(found.acceptance, 3)
        return told


class _OnnxModel:
    """An exported model; ``model`` looks to the harness like one of transformers as far as it asks."""

    def __init__(self, file: str, tokenizer: str | None, tau: float | None, max_depth: int | None, exact: bool) -> None:
        from river_compile.exporters.onnx.folder import river_in
        from river_compile.runtime import OnnxDecoder

        path = river_in(Path(file)) if Path(file).is_dir() else Path(file)
        self.folder = path.parent
        self._decoder = OnnxDecoder(path)
        if not self._decoder.has_river and (tau is not None or max_depth is not None or exact):
            raise ConfigError("onnx", f"{file} has no river: make it with 'river export', or leave out tau and exact")
        self._tau, self._max_depth = tau, max_depth
        self._exact = exact or (tau is None and max_depth is None and self._decoder.defaults.exact)
        own = float(self._decoder.exported_config.get("tau", NEVER))
        forced = max_depth is not None or self._decoder.exported_config.get("max_depth") is not None
        self.decides = self._decoder.has_river and not self._exact and ((own if tau is None else tau) <= 1 or forced)
        config = _config_of(Path(tokenizer or self.folder))
        self.model = self.compiled = SimpleNamespace(config=config, device=torch.device("cpu"), dtype="onnx")
        self._depths: list[int] = []
        self._drafts = [0, 0]

    def read(self, ids: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
        state = self._decoder.start(1)
        for part in (ids[:at_once], *ids[at_once:].reshape(-1, 1)):
            if self._exact:
                # A tau that no similarity reaches leaves the file's own depth limit and offsets as they are.
                logits, depth = self._decoder.backbone(part[None], state)
            else:
                logits, depth = self._decoder.forward(part[None], state, tau=self._tau, max_depth=self._max_depth)
            self._depths += [] if depth is None or len(part) > 1 else [depth]
            yield logits[0]

    def stream(self, prompt: list[int], room: int, temperature: float, top_p: float) -> Iterator[int]:
        for step in self._decoder.stream(
            [prompt],
            room,
            tau=self._tau,
            max_depth=self._max_depth,
            temperature=temperature,
            top_p=top_p,
            exact=self._exact,
        ):
            self._depths += [] if step.exit_depth is None or self._exact else [step.exit_depth]
            self._drafts[0] += step.accepted
            self._drafts[1] += step.drafted
            yield from step.tokens[0]

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = {"river_layers": self._decoder.layers}
        if self._depths:
            told["mean_exit_depth"] = round(float(np.mean(self._depths)), 3)
        if self._drafts[1]:
            told["acceptance"] = round(self._drafts[0] / self._drafts[1], 3)
        return told


def _config_of(folder: Path) -> Any:
    """The Hugging Face config beside a tokenizer, or one that says nothing: GenAI's folders have none."""
    from transformers import AutoConfig

    if not folder.is_dir() or (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(str(folder))
    return SimpleNamespace(model_type="onnx", max_position_embeddings=_DEFAULT_LENGTH)
