"""What is trained, and the gradient of its loss.

    L = sum over micro-batches k of  (n_k / N) loss_k     N = sum n_k,  n_k the number of labels that loss_k is the mean over
      + AdaLoRA's penalty, once

So a step over micro-batches is the step over all of them as one batch, whatever the padding. CPT's labels are those that its prompt leaves,
its own and the answers', and its loss is a weighted sum over their number, so the same n_k are right for it.

HF      Trainer hands N on as num_items_in_batch, counted before PEFT puts a prompt in front. Then the first token has something before it
        that predicts it, and its loss is in the sum, but not in Trainer's N; here it is in both, as where the model takes the mean itself.
        AdaLoRA's penalty is added by every forward, so HF counts it once for each micro-batch. CPT loses N and takes its own mean,
        which Trainer then does not divide: there a step is over the sum of the micro-batches' means, as many times too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, final

from peft_ref.arrays import Array, namespace
from peft_ref.attending import AttentionAdapter, AttentionMethod, add_params
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.methods.adalora import AdaLoRA
from peft_ref.methods.monteclora import MonteCLoRA
from peft_ref.nn import Decoder, Gradients, Inputs, Model, Net, OutputGradient
from peft_ref.nn.loss import IGNORED
from peft_ref.nn.prompted import with_prompt, with_prompt_vjp
from peft_ref.prompts import Context, Prompt, Tensors
from peft_ref.stack import Adapter, Drawn, Drops

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Trainable(NamedTuple):
    """All that is trained, or its gradient: a tree as the optimisers take it."""

    adapters: Mapping[str, Any] = NOTHING  # the name of a module, or of an attention block -> the method's Params
    weights: Mapping[str, Array] = NOTHING  # of the base model, by parameter name: biases, modules_to_save
    prompt: Tensors = NOTHING
    shared: Mapping[str, Array] = NOTHING  # what the adapters' layers share, by key: it is trained once, and their Params have None for it


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    inputs: Inputs
    dropout: Mapping[str, Drops] = field(default_factory=dict)  # module name -> the mask or the noise of its adapter
    context: Context | None = None  # of a prompt: the examples' tasks, an encoder's masks


class RowDrops(NamedTuple):
    """How often a row of a delta drops out, and a whole delta; whether the rows that stay are divided by how many that is."""

    rank: float
    module: float
    scaled: bool


class Found(NamedTuple):
    loss: Array
    gradients: Trainable


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A model, and how what is trained acts on it."""

    model: Model
    net: Net  # frozen
    methods: Mapping[str, WeightMethod[Any]] = field(default_factory=dict)  # by module
    attention: Mapping[str, AttentionMethod[Any]] = field(default_factory=dict)  # by attention block
    mirrored: Mapping[str, str] = field(default_factory=dict)  # modules whose factors are those of another one, transposed
    following: Mapping[str, str] = field(default_factory=dict)  # modules whose trained tokens are those of another one, and trained with it
    references: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by module and field, which key of `shared` it refers to
    prompt: Prompt | None = None
    task_type: str = "CAUSAL_LM"
    penalty: AdaLoRA | None = None  # the method that adds one
    row_drops: RowDrops | None = None

    def net_at(self, p: Trainable, dropout: Mapping[str, Drops] = NOTHING) -> Net:
        """The network with these numbers."""
        if unknown := sorted(dropout.keys() - self.methods.keys()):
            raise KeyMismatchError(f"a dropout mask for {unknown[0]!r}, where there is no adapter.\n  There are {', '.join(self.methods)}.")
        whole = self.whole(p)
        adapters = {name: (Adapter(method, whole[name], dropout.get(name)),) for name, method in self.methods.items()}
        attention = {name: AttentionAdapter(method, p.adapters[name]) for name, method in self.attention.items()}
        weights = {**self.net.weights, **p.weights}
        return replace(self.net, weights=weights, adapters=adapters, attention=attention, trainable=frozenset(p.weights))

    def projected(self, p: Trainable) -> Trainable:
        """These numbers as a prompt leaves them that was made of them: what a step starts from."""
        return p if self.prompt is None else p._replace(prompt=self.prompt.projected(p.prompt))

    def left_by_noise(self, params: Trainable, at: Trainable, batch: Batch) -> Trainable:
        """`params` with what a draw leaves behind in them, made of those that it acted on: MonteCLoRA's last variances and weights."""
        adapters = dict(params.adapters)
        for name, drawn in batch.dropout.items():
            if isinstance(method := self.methods[name], MonteCLoRA) and isinstance(drawn, Drawn):
                acted = method.noisy(at.adapters[name], drawn.noise)
                adapters[name] = adapters[name]._replace(variances=acted.variances, w=acted.w)
        return params._replace(adapters=adapters)

    def whole(self, p: Trainable) -> dict[str, Any]:
        """Every module's parameters with what they share."""
        given = {name: {which: p.shared[key] for which, key in self.references.get(name, {}).items()} for name in p.adapters}
        whole = {name: params._replace(**given[name]) if given[name] else params for name, params in p.adapters.items()}
        return {**whole, **{name: whole[other] for name, other in self.following.items()}}

    def penalised(self, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """Those that AdaLoRA's penalty and allocator are about: not tokens that are trained beside them."""
        return {name: params for name, params in adapters.items() if isinstance(self.methods.get(name), AdaLoRA)}

    def _apart(self, adapters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
        """Gradients of the modules, those of what they share added up."""
        rest, sums = dict(adapters), dict[str, Array]()
        for name, other in self.following.items():
            if (d := rest.pop(name, None)) is not None:
                rest[other] = add_params(rest[other], d) if rest.get(other) is not None else d
        for name, references in self.references.items():
            for which, key in references.items() if name in rest else ():
                if (d := getattr(rest[name], which)) is not None:
                    sums[key] = sums[key] + d if key in sums else d
                rest[name] = rest[name]._replace(**{which: None})
        return rest, sums

    def inputs_at(self, p: Trainable, batch: Batch) -> Inputs:
        """What the model receives: the batch's inputs, behind the prompt."""
        if self.prompt is None:
            return batch.inputs
        rows = self.prompt.prompt(p.prompt, context_of(batch))
        return with_prompt(self.model, self.net_at(p), self.prompt, rows, batch.inputs, self.task_type)

    def loss(self, p: Trainable, batches: Sequence[Batch]) -> Array:
        """L above."""
        counts, every = self._counts(p, batches), []
        for batch, (inputs, share) in zip(batches, counts, strict=True):
            if share:
                every.append(share * self._loss_of(self.model.forward(self.net_at(p, batch.dropout), inputs).loss))
        if self.penalty is not None:
            every.append(self.penalty.orthogonality(self.penalised(p.adapters)))
        return sum(every[1:], every[0])

    def loss_vjp(self, p: Trainable, batches: Sequence[Batch]) -> Found:
        """The loss and its gradient. What has none, a bias that no module uses, has None."""
        losses: list[Array] = []
        net_gradients, prompt = Gradients(), dict[str, Array]()
        for batch, (inputs, share) in zip(batches, self._counts(p, batches), strict=True):
            if not share:
                continue
            net = self.net_at(p, batch.dropout)
            got = self.model.vjp(net, inputs, OutputGradient(loss=share))
            losses.append(share * self._loss_of(got.output.loss))
            net_gradients = net_gradients + got.net
            if self.prompt is not None:
                ctx = context_of(batch)
                rows = self.prompt.prompt(p.prompt, ctx)
                back = with_prompt_vjp(self.model, net, self.prompt, rows, batch.inputs, self.task_type, got)
                net_gradients = net_gradients + back.net
                for name, d in self.prompt.prompt_vjp(p.prompt, ctx, back.prompt).items():
                    prompt[name] = prompt[name] + d if name in prompt else d
        adapters = {name: params[0] for name, params in net_gradients.adapters.items()}
        if self.penalty is not None:
            losses.append(self.penalty.orthogonality(self.penalised(p.adapters)))
            more = self.penalty.orthogonality_vjp(self.penalised(p.adapters), 1.0)
            adapters |= {name: add_params(adapters[name], d) if name in adapters else d for name, d in more.items()}
        adapters, sums = self._apart(adapters)
        gradients = Trainable(
            adapters={name: adapters.get(name) for name in p.adapters},
            weights={name: net_gradients.weights.get(name) for name in p.weights},
            prompt={name: None if self.prompt is None or name in self.prompt.held else prompt.get(name) for name in p.prompt},
            shared={key: sums.get(key) for key in p.shared},
        )
        return Found(sum(losses[1:], losses[0]), gradients)

    def _counts(self, p: Trainable, batches: Sequence[Batch]) -> list[tuple[Inputs, float]]:
        """What the model receives of every micro-batch, and its share of the loss."""
        given = [self.inputs_at(p, batch) for batch in batches]
        counts = [counted(self.model, inputs) for inputs in given]
        if not sum(counts):
            raise ConfigError("no label of the batch counts (all are -100, or there is none), so there is no loss.")
        return [(inputs, n / sum(counts)) for inputs, n in zip(given, counts, strict=True)]

    def _loss_of(self, loss: Array | None) -> Array:
        if loss is None:
            raise ConfigError(f"{type(self.model).__name__} returned no loss: the inputs need labels, or start and end positions.")
        return loss


def counted(model: Model, inputs: Inputs) -> int:
    """How many labels the model's loss is the mean over. Of question answering the examples are counted, in or out of reach."""
    labels = inputs.labels
    if labels is None:
        return 0 if inputs.start_positions is None else int(inputs.start_positions.shape[0])
    xp = namespace(labels)
    if not xp.isdtype(labels.dtype, "integral"):
        return math.prod(labels.shape)
    seen = labels[:, 1:] if isinstance(model, Decoder) else labels
    return int(xp.sum(xp.astype(seen != IGNORED, xp.int64)))


def context_of(batch: Batch) -> Context:
    given = batch.inputs.input_ids if batch.inputs.inputs_embeds is None else batch.inputs.inputs_embeds
    if batch.context is not None or given is None:
        return batch.context or Context(batch=0)
    return Context(batch=int(given.shape[0]))
