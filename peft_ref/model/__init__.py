"""Adapters on a model graph, as a value that every operation leaves as it was.

adapted      the value: what a weight is now, what is still to be applied at a module
attaching    add, update, delete               switching   activate, enable, disable, set_trainable, rescaled
merging      merge, unmerge, unload            storing     load, attach, save, state_dict; `lazy` tensors
running      a layer, a batch of mixed rows    status      counts, HF's printed line, layer_status, model_status
swapping     hotswap, padded                   ties        what becomes of a weight's second name
combine      HF's add_weighted_adapter of LoRA, `combine_ia3` of IA3, over `pruning`; `exact` is the sum of the deltas
converting   an adapter of any method as a LoRA, one of a changed weight as a plain LoRA
parameters   adapters of target_parameters, and `blocks` those on MultiheadAttention: not on an Adapted, on the graph itself

    model = add(adapt(graph), "default", config, rng)
    model = merge(activate(load(model, folder, "other"), "other"))
    model.weight("layers.0.q.weight"),  model.active("layers.0.q")
"""

from peft_ref.model.adapted import Adapted, Attached, Merged, adapt
from peft_ref.model.attaching import add, delete, update
from peft_ref.model.combine import add_weighted, bernoulli
from peft_ref.model.combine_ia3 import add_weighted_ia3
from peft_ref.model.converting import Conversion, as_lora, converted, plain
from peft_ref.model.exact import Deviation, add_exact, deviations
from peft_ref.model.merging import merge, merge_and_unload, unload, unmerge
from peft_ref.model.running import BASE, forward, forward_rows, run_rows
from peft_ref.model.status import Count, LayerStatus, ModelStatus, count, layer_status, model_status
from peft_ref.model.storing import adapter_file, attach, load, save, state_dict
from peft_ref.model.swapping import hotswap, padded
from peft_ref.model.switching import activate, disable, enable, rescaled, set_trainable
from peft_ref.model.ties import Ties

__all__ = [
    "BASE",
    "Adapted",
    "Attached",
    "Conversion",
    "Count",
    "Deviation",
    "LayerStatus",
    "Merged",
    "ModelStatus",
    "Ties",
    "activate",
    "adapt",
    "adapter_file",
    "add",
    "add_exact",
    "add_weighted",
    "add_weighted_ia3",
    "as_lora",
    "attach",
    "bernoulli",
    "converted",
    "count",
    "delete",
    "deviations",
    "disable",
    "enable",
    "forward",
    "forward_rows",
    "hotswap",
    "layer_status",
    "load",
    "merge",
    "merge_and_unload",
    "model_status",
    "padded",
    "plain",
    "rescaled",
    "run_rows",
    "save",
    "set_trainable",
    "state_dict",
    "unload",
    "unmerge",
    "update",
]
