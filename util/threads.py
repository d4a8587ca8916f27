"""To be imported before torch: OpenMP reads its settings when torch loads it.

OpenMP's waiting threads spin. When other work shares the cores, spinning threads take time from
those that compute, and a step can take many times as long. Now they spin only briefly before they
sleep, unless the user has chosen otherwise (`python -m benchmarks.whole_run` measures it).
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
