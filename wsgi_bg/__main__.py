"""``python -m wsgi_bg`` is ``wsgi-bg``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
