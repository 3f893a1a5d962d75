"""Generate text with an exported river model.

python samples/generate.py MODEL.river.onnx TOKENIZER_FOLDER "prompt" [tau]
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

from river_compile.runtime import OnnxDecoder, Step


def main(model: str, tokenizer_folder: str, prompt: str, tau: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    decoder = OnnxDecoder(model)

    def show(step: Step) -> None:
        if step.tokens[0]:
            print(tokenizer.decode(step.tokens[0]), end="", flush=True)

    result = decoder.generate(
        [tokenizer(prompt)["input_ids"]],
        max_new_tokens=48,
        tau=None if tau is None else float(tau),
        stop_tokens=[tokenizer.eos_token_id],
        on_step=show,
    )
    print(
        f"\n\n{result.tokens_per_second:.1f} tokens/s, "
        f"mean exit depth {result.mean_exit_depth:.1f} of {decoder.layers} layers"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
