"""``python -m wsgi_bg`` runs the command ``wsgi-bg``."""

from __future__ import annotations

import sys

from wsgi_bg._serving.cli import main

sys.exit(main())
