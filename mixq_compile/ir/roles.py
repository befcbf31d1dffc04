"""What a linear is in its network, from its name alone."""

from __future__ import annotations

import functools
import re

Q, K, V, QKV, O = "q", "k", "v", "qkv", "o"  # noqa: E741
GATE, UP, GATE_UP, DOWN = "gate", "up", "gate_up", "down"
LM_HEAD, ROUTER, OTHER = "lm_head", "router", "other"

ROLES = (Q, K, V, QKV, O, GATE, UP, GATE_UP, DOWN, LM_HEAD, ROUTER, OTHER)
"""Every role: attention in and out, the feed-forward's parts, the output head, a router, the rest."""

_ATTENTION = r"(attn|attention|mixer)\w*(\.self|\.output)?"
_RULES: tuple[tuple[str, str], ...] = (
    (LM_HEAD, r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|predictions\.decoder|vocab_projector)"),
    (ROUTER, r"(.*\.)?(router|router\.\w+|gate|shared_expert_gate|wg)"),
    (QKV, r".*\b(qkv|qkv_proj|query_key_value|c_attn|wqkv)"),
    (QKV, rf".*{_ATTENTION}\.in_proj"),
    (Q, r".*\b(q|query|q_proj|q_lin|wq)"),
    (K, r".*\b(k|key|k_proj|k_lin|wk)"),
    (V, r".*\b(v|value|v_proj|v_lin|wv)"),
    (O, rf".*{_ATTENTION}\.(o|o_proj|out_proj|out_lin|c_proj|dense|wo|proj|out|to_out\.0)"),
    (GATE_UP, r".*\b(gate_up_proj|gate_and_up_proj|w13)"),
    (GATE, r".*\b(gate_proj|wi_0|w1)"),
    (UP, r".*\b(up_proj|wi_1|wi|w3|fc1|fc_in|c_fc|lin1|linear1|dense_h_to_4h|intermediate[._]dense)"),
    (DOWN, r".*\b(down_proj|wo|w2|fc2|fc_out|lin2|linear2|dense_4h_to_h|output[._]dense)"),
    (DOWN, r".*\b(mlp|ffn|feed_forward)\.c_proj"),
)
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _RULES)


@functools.lru_cache(maxsize=65536)
def role_of(fqn: str) -> str:
    """The role of a linear, such as `down` for `model.layers.3.mlp.down_proj`; `other` if unknown."""
    tail = ".".join(fqn.split(".")[-4:]).lower()
    for role, pattern in _COMPILED:
        if pattern.fullmatch(tail):
            return role
    return OTHER
