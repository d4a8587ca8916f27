"""To be imported before torch: OpenMP reads its settings when torch loads it.

OpenMP's waiting threads spin. Beside other work on the same cores they take the time of those
that compute: a step can then take 50 times as long. They now spin only shortly before they sleep,
unless the user has chosen otherwise (measured in docs/speed.md).
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
