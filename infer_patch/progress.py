"""How long work tells where it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what comes next
