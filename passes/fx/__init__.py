"""The passes for FX graphs."""
