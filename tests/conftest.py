"""The models of the tests are small: a second thread costs more than it brings."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start too
