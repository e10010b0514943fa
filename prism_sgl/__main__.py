"""``python -m prism_sgl``, also installed as ``prism-sgl``."""

from __future__ import annotations

import sys

from prism_sgl.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
