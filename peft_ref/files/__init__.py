"""HF's files: adapter folders, their configuration and their tensors, read and written without torch."""
