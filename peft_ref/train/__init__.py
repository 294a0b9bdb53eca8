"""Training adapters and prompts, with nothing but an array library.

learner    what is trained, its loss and the loss's gradient       step    one step: from a state to the next
begin      from a model and a configuration, and back to a file       dropout    masks drawn by a generator
run        a whole training on a row of tokens (`data`)               checkpoint what it leaves on disk, and goes on from
session    all of it from files; `tiny`, a model to try it on: what `peft-ref train` does

    training = start(model, graph, config, np.random.default_rng(0))
    state = begin(recipe, training.params)
    state, loss, norm = step(training.learner, recipe, state, [Batch(inputs=Inputs(input_ids=ids, labels=ids))])
    save_adapter("adapter", file_of(training, state))
"""

from peft_ref.train.begin import Training, file_of, learner_of, net_of, prompt_learner, put_back, start
from peft_ref.train.learner import Batch, Found, Learner, Trainable, counted
from peft_ref.train.step import Recipe, State, Stepped, begin, step

__all__ = [
    "Batch",
    "Found",
    "Learner",
    "Recipe",
    "State",
    "Stepped",
    "Trainable",
    "Training",
    "begin",
    "counted",
    "file_of",
    "learner_of",
    "net_of",
    "prompt_learner",
    "put_back",
    "start",
    "step",
]
