"""Checkpoints: complete or invisible. See `store.py` for how a save goes and `manifest.py` for what is in a folder."""

from launch.checkpoint.finding import Found
from launch.checkpoint.store import CheckpointStore, Saved, checkpoint_bytes

__all__ = ["CheckpointStore", "Found", "Saved", "checkpoint_bytes"]
