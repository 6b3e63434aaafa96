"""What the head for classes is: data, which says so without JAX."""

from __future__ import annotations

from dataclasses import dataclass

LAST_BUT_PADDING = "last but padding"


@dataclass(frozen=True)
class ClassifierConfig:
    """`out(norm(activation(dense(pooled))))`.

    num_labels: classes.
    pooling: of hidden states, a name in POOLINGS; or LAST_BUT_PADDING: the last token that is not `padding_id`.
    late: it is logits that are pooled, those of all tokens.
    activation: after `dense`, a name in ACTIVATIONS.
    dense, norm, out: names in checkpoints; "": there is none.
    dense_bias, norm_bias, out_bias: which of them have one.
    norm_eps: of the norm.
    padding_id: a token's id; None: no token is padding.
    rows: ids of tokens whose rows of the head for words `out` is, in place of one of its own; none: it has its own.
    tied: that head is the embedding table, where checkpoints have no other.
    difference: there is one logit, of the second of two rows less that of the first.
    """

    num_labels: int
    pooling: str = "cls"
    late: bool = False
    activation: str = "tanh"
    dense: str = ""
    norm: str = ""
    out: str = "classifier"
    dense_bias: bool = True
    norm_bias: bool = True
    out_bias: bool = True
    norm_eps: float = 1e-5
    padding_id: int | None = None
    rows: tuple[int, ...] = ()
    tied: bool = False
    difference: bool = False
