"""What stands behind the pytest plugin's fixture. Imports no pytest."""
