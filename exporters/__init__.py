"""One file a destination: what a rewritten graph is lowered to."""
