"""Adapters and whole checkpoints, streamed: merge, verify, inspect. No model is built, and no file is held in memory.

merge      plan: what is to be written      planning <- gathering <- sources, base, layout
           what a change is                 changes, steps, lowrank, products, exact, arithmetic, ways, remade, pieces
           how it is written                engine <- job, work, copying, output, blas; summary and telling say it
           how it is written elsewhere      cluster, moving
verify     verifying <- exactly (what a tensor has to be), suspecting (which mistake it is)
inspect    inspecting, inspecting_base, fitting (does it fit a base), scales, spectrum, folding, elsewhere (what would not load there)
"""
