"""The judge: cases, ports, bounds, named mistakes, verdicts."""
