"""The implementation of the pytest plugin's fixture. Imports no pytest.

Every run of pytest imports this module; only tests with the fixture import its submodules.
"""

from typing import Literal

Mode = Literal["record", "run", "real"]
