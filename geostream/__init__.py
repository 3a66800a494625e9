"""Hard-negative training of cross-view retrieval models, streamed from object storage.

The tree shows the data flow: ``store`` and ``layout`` hold what is on the object store, ``streaming``
turns an epoch plan into batches, ``mining`` turns embeddings into the next plan, ``training`` is the loop.
"""

__version__ = "0.1.0"
