"""``python -m springhead`` is the command ``springhead``."""

from springhead.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
