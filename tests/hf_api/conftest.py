import pytest

pytest.importorskip("torch", reason="the extra `hf` is not installed")
pytest.importorskip("peft", reason="the extra `hf` is not installed")
