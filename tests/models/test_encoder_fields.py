"""Every field of config.json that shapes an encoder, out of range: refused by name; and what says another shape."""

import typing

import pytest

from jaxinfer import CheckpointError
from jaxinfer.models.registry import ENCODERS, encoder_types, parse_config
from jaxinfer.models.tasks import CLASSIFY, EMBED, with_task
from tests.models.families import encoders
from tests.models.field_draws import own_fields
from tests.models.field_values import INERT
from tests.models.test_config_fields import BAD_VALUES, kind_of
from tests.refusals import line

CLASSES = {name.removesuffix("Model"): entry.model_type for name, entry in ENCODERS.items()}
# Of training, and of heads for words.
UNREAD = {
    *INERT,
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "embedding_dropout"),
    *("mlp_dropout", "qa_dropout", "seq_classif_dropout", "pooler_dropout", "summary_last_dropout"),
    *("initializer_cutoff_factor", "decoder_bias", "deterministic_flash_attn", "legacy", "mask_token_id"),
    *("sparse_prediction", "sparse_pred_ignore_index", "cls_token_id", "tie_word_embeddings", "sinusoidal_pos_embds"),
}
READ = {"is_decoder"}  # whatever decoders do
LEGAL = (("max_relative_positions", -1), ("pos_att_type", []))


def good(model_type, task, **change):
    """A configuration of it."""
    (name,) = (name for name, known in CLASSES.items() if known == model_type)
    config = f"{name.replace('New', 'Gte')}Config"
    fields = next(variant.fields for variant in encoders().values() if variant.config == config)
    data = {"model_type": model_type, "architectures": [f"{name}ForSequenceClassification"], **fields} | change
    if task == EMBED:
        data["architectures"] = [f"{name}Model"]
    return with_task({name: value for name, value in data.items() if value is not ...}, task), config


@pytest.mark.parametrize("model_type", encoder_types())
def test_fields_out_of_range(model_type):
    transformers = pytest.importorskip("transformers")
    data, config = good(model_type, CLASSIFY)
    parse_config(data)
    for field in own_fields(getattr(transformers, config)):
        if field.name in UNREAD - READ:
            continue
        kind = str if typing.get_origin(field.type) is typing.Literal else kind_of(field)
        for value in BAD_VALUES[kind]:
            if (field.name, value) in LEGAL:
                continue
            with pytest.raises(ValueError, match=rf"{field.name}\b") as caught:
                parse_config(good(model_type, CLASSIFY, **{field.name: value})[0])
            assert "\n" not in str(caught.value), (field.name, value)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("bert", {"is_decoder": True}),
        ("bert", {"add_cross_attention": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"hidden_size": 33}),
        ("roberta", {"max_position_embeddings": 10}),  # of which 10 are those of padding
        ("distilbert", {"dim": 33}),
        ("albert", {"num_hidden_groups": 4}),  # of three layers
        ("deberta-v2", {"conv_kernel_size": 3}),
        ("deberta-v2", {"norm_rel_ebd": "batch_norm"}),
        ("deberta-v2", {"embedding_size": 16}),
        ("deberta-v2", {"pooler_hidden_size": 16}),
        ("deberta-v2", {"attention_head_size": 4}),
        ("deberta-v2", {"pos_att_type": ["p2p"]}),
        ("mpnet", {"relative_attention_num_buckets": 31}),
        ("nomic_bert", {"prenorm": True}),
        ("nomic_bert", {"activation_function": "gelu"}),
        ("nomic_bert", {"num_experts": 8}),
        ("nomic_bert", {"rotary_scaling_factor": 2}),
        ("new", {"pack_qkv": False}),
        ("new", {"layer_norm_type": "rms_norm"}),
        ("new", {"logn_attention_scale": True}),
    ],
)
def test_other_shapes_are_refused_by_name(model_type, fields):
    (name,) = fields
    data, _ = good(model_type, EMBED, **fields)
    assert f"{name} is " in line(lambda: parse_config(data), CheckpointError)


def test_defaults_are_those_of_transformers():
    """Of a config.json that says no more than its type: the sizes of the models that are known by it."""
    for model_type in encoder_types():
        _, config = parse_config(with_task({"model_type": model_type}, EMBED))
        transformers = pytest.importorskip("transformers")
        (name,) = (name for name, known in CLASSES.items() if known == model_type)
        theirs = getattr(transformers, f"{name.replace('New', 'Gte')}Config")()
        assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) == (
            theirs.vocab_size,
            theirs.hidden_size,
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
        )


def test_the_ntk_of_the_hub():
    """What the first and the last frequency become: https://kexue.fm/archives/9706."""
    said = {"rope_scaling": {"type": "ntk", "factor": 2.0}, "rope_theta": 500.0, "rope_parameters": ...}
    _, plain = parse_config(good("new", EMBED, rope_theta=500.0, rope_parameters=...)[0])
    _, config = parse_config(good("new", EMBED, **said)[0])
    ratios = plain.ropes[0].inv_freq() / config.ropes[0].inv_freq()
    dim = plain.head_dim
    assert ratios == pytest.approx([2 ** ((i + 2) / dim) for i in range(0, dim, 2)], rel=1e-5)
    assert config.max_context == plain.max_context == 256
