"""Run an exported river model with plain onnxruntime and numpy: nothing of river_compile is needed at run time.

    python samples/plain_onnxruntime.py MODEL.river.onnx 504 3575 282 4649 314

The numbers are token ids. A program written for the original model runs the river model unchanged; `river.tau` and
`river.exit_depth` are the only additions, and both may be left alone.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main(path: str, prompt: list[int], new_tokens: int = 16, tau: float = 0.95) -> list[int]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    # The one line that knows of a river; the program runs the original model as well.
    river = {value.name for value in session.get_overridable_initializers()} & {"river.tau"}
    past = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    tokens, new = list(prompt), list(prompt)
    for _ in range(new_tokens):
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens) - len(new), len(tokens))[None],
            "river.tau": np.array(tau, np.float32),
            **past,
        }
        feeds = {name: value for name, value in feeds.items() if name in inputs or name in river}
        result = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        past = {name: result[name.replace("past_key_values", "present")] for name in past}
        new = [int(result["logits"][0, -1].argmax())]
        tokens += new
        print(f"token {new[0]:6d}   exit depth {result.get('river.exit_depth', ['all'])[0]}")
    return tokens


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], [int(token) for token in sys.argv[2:]])
