"""What holds for the tests of every folder."""

import os

# In a process of pytest-xdist COLUMNS is 80; the commands in tests print as into a pipe, unbroken.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COLUMNS", None)
