"""What stands behind the pytest plugin's fixture. Imports no pytest.

Each run of pytest imports this module; tests with the fixture import the others.
"""

from typing import Literal

Mode = Literal["record", "run", "real"]
