"""``python -m wsgi_bg`` runs the command ``wsgi-bg``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
