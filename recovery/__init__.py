"""The core: damage, adapters, loss, teacher signal and training, and what every stage shares.

`recovery` imports neither `datagen`, `eval` nor `launch`.
"""

import os

# Read by OpenMP when torch is loaded. Threads that spin between operations cost a busy machine a factor of ten (small
# operations, many barriers); threads that sleep cost an idle one a few percent.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
