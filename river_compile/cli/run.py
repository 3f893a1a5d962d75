"""`river-run`: generate text with an engine, or with an exported ONNX model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from river_compile.cli.console import river_command
from river_compile.cli.options import json_option, tokenizer_option
from river_compile.errors import ConfigError

if TYPE_CHECKING:
    from river_compile.runtime import Decoder, Step

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-run model.engine --info                                    what the engine takes and gives; needs no GPU
  river-run model.engine --tokenizer path --prompt "Once upon a time"
  river-run model.engine --tokenizer path --prompt Hello --tau 0.95 --jit-cache model.jit
  river-run model.river.onnx --tokenizer path --prompt Hello       the same in ONNX Runtime, on the CPU
  river-run out_dir --prompt Hello                                 a folder of river-export's, with its tokenizer
  river-run model.river.onnx --tokenizer path --prompt Hello --exact     the original model's own tokens, faster
"""


@river_command("river-run", _EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path))
@tokenizer_option()
@click.option("--prompt", "-p", multiple=True, help="Text to continue; several make a batch.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--tau", type=float, help="Exit threshold, instead of the model's own.")
@click.option("--max-depth", type=int, help="Exit depth limit, instead of the model's own; 0: all river.")
@click.option(
    "--exact/--no-exact",
    default=None,
    help="The river only drafts and the backbone verifies: the backbone's own tokens, faster.  [default: as exported]",
)
@click.option("--lookup/--no-lookup", default=None, help="Draft from the text itself where it repeats, with --exact.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the smallest set of this mass.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--jit-cache", type=click.Path(path_type=Path), help="File that keeps kernels compiled at first use.")
@click.option(
    "--info",
    is_flag=True,
    help="Show what the model tells of itself, an engine checked against its side file, and stop.",
)
@json_option("Print tokens, exit depths and timings as JSON.")
def main(
    model: Path,
    tokenizer: str | None,
    prompt: tuple[str, ...],
    max_new_tokens: int,
    tau: float | None,
    max_depth: int | None,
    exact: bool | None,
    lookup: bool | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    jit_cache: Path | None,
    info: bool,
    as_json: bool,
) -> None:
    """Generate text with a TensorRT engine (on a GPU), or with an exported ONNX model (on the CPU).

    MODEL is an engine that `river-export --target tensorrt` built, with its side file beside it, an .onnx file, or a
    folder that `river-export` made, which has its tokenizer with it.
    """
    if model.is_dir():
        from river_compile.exporters.onnx.folder import river_in

        model, tokenizer = river_in(model), tokenizer or str(model)
    if info and model.suffix == ".onnx":
        from river_compile.runtime import OnnxDecoder

        click.echo(json.dumps(OnnxDecoder(model).metadata, indent=2))
        return
    if info:
        from river_compile.exporters.tensorrt.engine import EngineInfo

        click.echo(EngineInfo.load(model).to_json())
        return
    if tokenizer is None or not prompt:
        raise click.UsageError("say what to continue: --tokenizer FOLDER and --prompt TEXT")
    from river_compile.measure.fidelity import hub_tokenizer

    words = hub_tokenizer(tokenizer)
    prompts = [words(text)["input_ids"] for text in prompt]
    _check(model, prompts, max_new_tokens)
    decoder = _decoder(model, jit_cache)
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)

    def show(step: Step) -> None:
        if len(prompts) == 1 and step.tokens[0]:
            console.print(words.decode(step.tokens[0]), end="", markup=False)

    result = decoder.generate(
        prompts,
        max_new_tokens,
        tau=tau,
        max_depth=max_depth,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=[] if words.eos_token_id is None else [words.eos_token_id],
        seed=seed,
        exact=exact,
        lookup=lookup,
        on_step=show,
    )
    if hasattr(decoder, "save"):
        decoder.save()
    texts = [words.decode(tokens) for tokens in result.tokens]
    if as_json:
        seconds = [step.seconds for step in result.steps]
        depths = [step.exit_depth for step in result.steps]
        drafts = {"drafted": result.drafted, "acceptance": result.acceptance if result.drafted else None}
        made = {"texts": texts, "tokens": result.tokens, "exit_depths": depths, "seconds": seconds}
        click.echo(json.dumps(made | drafts))
        return
    if len(prompts) > 1:
        for text in texts:
            console.print(f"- {text}", markup=False)
    how = f"mean exit depth {result.mean_exit_depth:.1f}" if result.exit_depths else "no river"
    if result.drafted:
        how = f"exact: {result.acceptance:.0%} of {result.drafted} drafts accepted, {result.near_ties} near ties"
    console.print(f"\n{result.tokens_per_second:.1f} tokens/s a sequence, {how}")


def _check(model: Path, prompts: list[list[int]], new_tokens: int) -> None:
    """Refuse what the engine cannot do before it is loaded."""
    if any(not tokens for tokens in prompts):
        raise ConfigError("prompts", "each needs at least one token")
    if model.suffix != ".onnx":
        from river_compile.exporters.tensorrt.engine import EngineInfo

        EngineInfo.load(model).check_request(len(prompts), max(map(len, prompts)) + new_tokens - 1)


def _decoder(model: Path, jit_cache: Path | None) -> Decoder:
    if model.suffix == ".onnx":
        from river_compile.runtime import OnnxDecoder

        return OnnxDecoder(model)
    from river_compile.runtime import TensorRTDecoder

    return TensorRTDecoder(model, jit_cache)
