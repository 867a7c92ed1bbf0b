"""What `config.json` of published models calls the schema's fields, family by family. Imports no torch."""

from __future__ import annotations

from typing import Any

_ENCODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
}
FIELDS = {
    "llama": {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    "bert": {**_ENCODER, "max_position_embeddings": "max_length"},
    "roberta": _ENCODER,
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_head": "num_heads",
        "n_positions": "max_length",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    "t5": {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "num_heads": "num_heads",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    "resnet": {"depths": "depths", "hidden_sizes": "widths", "layer_type": "block", "num_channels": "channels"},
    "vgg": {},
}
"""config.json -> the schema's field that must agree."""

FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": 2},
    "roberta": {"hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": 1, "pad_token_id": 1},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "t5": {
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "is_encoder_decoder": True,
    },
    "resnet": {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
    "vgg": {},
}
"""config.json -> the one value that the family as built here has; `model_type` is its name."""
