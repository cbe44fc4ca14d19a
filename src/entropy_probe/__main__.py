"""``python -m entropy_probe``."""

from __future__ import annotations

from entropy_probe.cli import main

if __name__ == "__main__":
    main()
