"""The smallest settings under which a network still learns something."""

from __future__ import annotations

from geostream.settings import TrainSettings

TINY = TrainSettings().changed(
    model="test_convnext",
    tile_size=32,
    view_height=32,
    view_width=64,
    epochs=4,
    batch_size=4,
    learning_rate=2e-3,
    schedule="one-cycle",
    rotate_probability=0.0,
    flip_probability=0.5,
    hue_jitter=0.0,
    jpeg_probability=0.0,
    blur_probability=0.0,
    dropout_probability=0.0,
    neighbours=4,
    first_mining=1,
    mine_every=2,
    mining_lag=0,  # to start a process takes longer than these runs
    evaluate_every=2,
    resident_shards=2,
    threads=1,
)
