"""Runtimes behind one small protocol, each imported only where it is installed, by a worker of its environment.

An engine module has ``load(model, threads, capacity, **settings)``: a model's path, threads to compute with, and tokens
that a sequence may have. What it returns has three methods:

    decode(prompt, tokens) -> (tokens, seconds): greedy; so many tokens, and the wall time from the first to the last.
    choices(ids, prompt) -> tokens: the greedy choice after the first ``prompt`` ids, and after each further one.
    note() -> str: what is worth knowing of what was decoded, in a few words.
"""
