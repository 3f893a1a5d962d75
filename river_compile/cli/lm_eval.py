"""`river-lm-eval`: EleutherAI's harness with the model ``river``."""

from __future__ import annotations

import sys

import click

from river_compile.cli.console import river_command

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-lm-eval --model river --model_args pretrained=FOLDER,tau=0.95 --tasks gsm8k,humaneval
  river-lm-eval --model river --model_args onnx=model.river.onnx,tokenizer=FOLDER,exact=True --tasks gsm8k
  river-lm-eval run --help                          the harness's own options
"""


@river_command("river-lm-eval", _EXAMPLES)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def main(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Evaluate a river model on the tasks of EleutherAI's lm-evaluation-harness.

    All ARGUMENTS are those of the command lm_eval, which this one runs: the harness looks for no models outside of
    itself, so they have to be there when it starts. Fields of --model_args: pretrained or onnx, tokenizer, tau,
    max_depth, exact, dtype, river, max_length, batch_size, and, for PyTorch, the other options of a river (quantizer,
    bits, head_bits, min_depth, ...).
    """
    from river_compile.measure import harness

    if not arguments:
        raise click.UsageError("say what to evaluate: --model river --model_args ... --tasks ...")
    sys.argv = ["lm_eval", *arguments]
    harness.command_line()


main.context_settings.update(ignore_unknown_options=True)
