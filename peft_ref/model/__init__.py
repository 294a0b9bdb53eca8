"""Adapters on a model graph, as a value that every operation leaves as it was.

adapted      the value: what a weight is now, what is still to be applied at a module
attaching    add, update, delete              switching   activate, enable, disable, set_trainable, rescaled
merging      merge, unmerge, unload           storing     load, attach, save, state_dict
running      one layer, and batches of rows   status      counts, HF's printed line, layer_status, model_status
hotswap      one adapter for another          combine     HF's add_weighted_adapter, and the exact sum

    model = add(adapt(graph), "default", config, rng)
    model = merge(activate(load(model, folder, "other"), "other"))
    model.weight("layers.0.q.weight"),  model.active("layers.0.q")
"""
