"""Adapters and whole checkpoints, streamed: merge, verify, inspect. No model is built, and no file is held in memory."""
