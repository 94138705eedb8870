"""The core: damage, adapters, loss, teacher signal and training, and what every stage shares.

`recovery` imports neither `datagen`, `eval` nor `launch`.
"""

from recovery.environment import prepare

prepare()
