"""The real standby, with a waiting worker where a host device would fork: how a card's workers come to be."""

from __future__ import annotations

import sys

from prism_sgl.engine.standby import main

if __name__ == "__main__":
    sys.argv += ["--waiting", "1"]  # the last one counts
    main()
