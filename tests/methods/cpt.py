"""CPT, as the tests need to know it."""

from __future__ import annotations

from tests.methods.facts import Facts

FACTS = Facts(no_derivative=lambda gradient, several: True)  # its gradients are scaled, and are not those of its projection
