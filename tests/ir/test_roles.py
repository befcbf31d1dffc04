import pytest

from mixq_compile.ir.roles import ROLES, role_of

NAMES = {
    "q": [
        "model.layers.0.self_attn.q_proj",
        "bert.encoder.layer.3.attention.self.query",
        "vit.encoder.layer.0.attention.attention.query",
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "distilbert.transformer.layer.0.attention.q_lin",
    ],
    "k": [
        "model.decoder.layers.0.encoder_attn.k_proj",
        "bert.encoder.layer.3.attention.self.key",
        "encoder.block.0.layer.0.SelfAttention.k",
    ],
    "v": [
        "model.layers.31.self_attn.v_proj",
        "bert.encoder.layer.3.attention.self.value",
        "encoder.block.0.layer.0.SelfAttention.v",
    ],
    "qkv": [
        "model.layers.0.self_attn.qkv_proj",
        "transformer.h.0.self_attention.query_key_value",
        "gpt_neox.layers.0.attention.query_key_value",
        "transformer.h.0.attn.c_attn",
        "deberta.encoder.layer.0.attention.self.in_proj",
    ],
    "o": [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.dense",
        "transformer.h.0.self_attention.dense",
        "gpt_neox.layers.0.attention.dense",
        "transformer.h.0.attn.c_proj",
        "model.decoder.layers.0.self_attn.out_proj",
        "bert.encoder.layer.3.attention.output.dense",
        "encoder.block.0.layer.0.SelfAttention.o",
        "distilbert.transformer.layer.0.attention.out_lin",
    ],
    "gate": ["model.layers.0.mlp.gate_proj", "encoder.block.0.layer.1.DenseReluDense.wi_0"],
    "up": [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.fc1",
        "model.decoder.layers.0.fc1",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.dense_h_to_4h",
        "bert.encoder.layer.3.intermediate.dense",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "distilbert.transformer.layer.0.ffn.lin1",
    ],
    "gate_up": ["model.layers.0.mlp.gate_up_proj"],
    "down": [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.fc2",
        "model.decoder.layers.0.fc2",
        "transformer.h.0.mlp.c_proj",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
        "bert.encoder.layer.3.output.dense",
        "encoder.block.0.layer.1.DenseReluDense.wo",
    ],
    "lm_head": [
        "lm_head",
        "embed_out",
        "proj_out",
        "cls.predictions.decoder",
        "roberta.lm_head.decoder",
        "model.output",
        "head",
        "classifier",
        "score",
        "heads.head",
        "classifier.6",
        "classifier.out_proj",
        "transformer.output_layer",
    ],
    "router": [
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.router",
        "model.layers.0.mlp.shared_expert_gate",
    ],
    "other": [
        "pooler.dense",
        "single_transformer_blocks.7.proj_out",
        "transformer_blocks.0.attn.output",
        "mid_block.attentions.0.proj_out",
        "blocks.3.head",
        "classifier.dense",
        "mamba.in_proj",
        "0",
        "1.2",
        "",
    ],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in NAMES.items() for name in names])
def test_a_role_is_read_off_the_name(role: str, name: str) -> None:
    assert role_of(name) == role


def test_every_role_has_an_example() -> None:
    assert set(NAMES) == set(ROLES)


def test_mixtrals_experts_are_told_from_their_router() -> None:
    expert = "model.layers.0.block_sparse_moe.experts.3"
    assert [role_of(f"{expert}.{name}") for name in ("w1", "w2", "w3")] == ["gate", "down", "up"]


@pytest.mark.parametrize(("features", "role"), [((8, 64), "router"), ((256, 64), "gate"), ((64, 64), "gate")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate", "blocks.1.ffn.wg"])
def test_a_gate_with_an_output_for_each_input_is_no_router(name, features, role) -> None:
    assert role_of(name, features) == role
