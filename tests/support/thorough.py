"""Whether tests run that show with a further variant what another test shows already (the marker `thorough`)."""

from __future__ import annotations

import os

THOROUGH = bool(os.environ.get("TANDEM_THOROUGH"))
