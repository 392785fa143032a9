"""``python -m ditopt`` is the ``ditopt`` command."""

from __future__ import annotations

from ditopt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
