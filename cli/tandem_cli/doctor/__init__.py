"""`tandem doctor`: will the stack run on this machine, and if not, what has to change?

Facts are gathered once, each with a deadline (`gather.py`); what follows from them is decided by pure functions
(`checks/`). A fact that could not be had is `Unknown` with the reason, and the checks that need it say so.
"""

from __future__ import annotations

from .command import doctor

__all__ = ["doctor"]
