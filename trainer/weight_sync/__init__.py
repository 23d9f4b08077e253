"""New weights to the running engines: one interface, by process-group broadcast or through disk."""

from polyturn.trainer.weight_sync.publisher import SyncReport, WeightPublisher, WeightSyncError

__all__ = ["SyncReport", "WeightPublisher", "WeightSyncError"]
