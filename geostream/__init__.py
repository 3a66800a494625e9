"""Hard-negative training of cross-view retrieval models, streamed from object storage.

The tree shows the data flow: ``store`` and ``layout`` hold what is on the object store, ``streaming``
turns an epoch plan into batches, ``mining`` turns embeddings into the next plan, ``training`` is the loop.
"""

import os

# Read by OpenMP when torch is first imported. Its threads otherwise spin while they wait: beside a loader thread and a
# local server on the same cores, a training step was seen to take several times its CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
