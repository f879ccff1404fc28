"""`tandem doctor`: will the stack run on this machine, and if not, what has to change?

`gather.py` collects the facts once; each query has a deadline. The checks in `checks/` are pure functions from facts to
a finding. A fact that could not be gathered is an `Unknown` with the reason, and each check that needs it says so.
"""

from __future__ import annotations

from .command import doctor

__all__ = ["doctor"]
