"""``python -m river_compile``: the command `river`."""

from __future__ import annotations

from river_compile.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m river_compile")
