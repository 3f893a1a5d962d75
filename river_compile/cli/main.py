"""`river`: all commands under one name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

import click

from river_compile.version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "export": ("export", "Give an ONNX or Hugging Face model a river; write what a runtime loads."),
    "run": ("run", "Generate text with an exported model."),
    "eval": ("evaluate", "Measure what exits cost and what they bring."),
    "calibrate": ("calibrate", "Find the lowest threshold that keeps a promise of fidelity."),
    "compare": ("compare", "Compare what can become of the keys and values of skipped layers."),
    "plan": ("plan", "Predict sizes and speed from a config alone."),
    "lm-eval": ("lm_eval", "Evaluate on the tasks of EleutherAI's harness."),
    "serve": ("serve", "Serve an exported model by OpenAI's API, on Ray Serve."),
    "bench": ("bench", "Time a model beside itself with a river, in PyTorch or ONNX Runtime."),
}
"""Name of a command -> its module in this folder, and a line about it."""

_EXAMPLES = """\b
Examples:
  river export model.onnx -o model.river.onnx
  river run model.river.onnx --tokenizer path/to/hf_model --prompt "Once upon a time"
  river eval path/to/hf_model --html report.html

\b
Each command also stands alone: `river export` is `river-export`.
Completion of commands and options in a shell:
  eval "$(_RIVER_COMPLETE=bash_source river)"     # zsh_source, fish_source likewise
"""


class _Commands(click.Group):
    """Commands that are imported when they are asked for: help and completion wait for none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"river_compile.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # A shell that completes what was mistyped is told nothing.
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            click.echo(f"error: no command {args[0]!r}; {hint}", err=True)
            raise click.exceptions.Exit(2)
        return super().resolve_command(ctx, args)


@click.command(
    cls=_Commands, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True
)
@click.version_option(__version__, prog_name="river")
def main() -> None:
    """Seamless early exit for decoder-only language models: export, run and measure a model with an exit river."""
