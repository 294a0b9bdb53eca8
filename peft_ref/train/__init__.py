"""Training adapters and prompts, with nothing but an array library.

learner    what is trained, its loss and the loss's gradient       step    one step: from a state to the next
begin      from a model and a configuration, and back to a file
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
