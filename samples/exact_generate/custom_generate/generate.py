"""`model.generate(..., custom_generate="samples/exact_generate", trust_remote_code=True)`: exact decoding.

A folder in the form that transformers loads generation methods from; push it to a hub, and its name does as well. The
model drafts with its river if it is compiled by `torch.compile(model, backend="river")`, and from its own text if not.
"""

import river_compile


def generate(model, **arguments):
    """What `model.generate(**arguments)` returns, token for token when greedy."""
    return model.generate(**arguments, custom_generate=river_compile.exact)
