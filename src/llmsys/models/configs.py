"""The schema's shape of a model in transformers' own words, family by family.

Ids: padding is what the attention mask says, so a pad id matters in two places only. BERT and RoBERTa give its
embedding no gradient, and T5's decoder begins with it. Of a published model it is the one of its vocabulary (0; RoBERTa
1). The byte tokenizer has 256: under it ids 0 and 1 are bytes of the text.
"""

from __future__ import annotations

from typing import Any

from llmsys import schema
from llmsys.data.tokenizer import Bytes

ROBERTA_OFFSET = 2
"""RoBERTa counts positions from 2: 0 is never used, 1 is that of padding. Its table is longer than its input by 2."""


def pad_id(cfg: schema.Transformer) -> int:
    """The id of padding: see the module's docstring."""
    if cfg.tokenizer == "bytes" and cfg.vocab_size > Bytes.pad_id:
        return Bytes.pad_id
    return 1 if cfg.family == "roberta" else 0


def llama(cfg: schema.Transformer, attention: str) -> Any:
    """LlamaConfig: no bias, SiLU, rotary positions."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        max_position_embeddings=cfg.max_length,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tie_embeddings,
        attention_dropout=cfg.dropout,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation=attention,
    )


def gpt2(cfg: schema.Transformer, attention: str) -> Any:
    """GPT2Config; `dropout` is that of embeddings, sub-layers and attention alike."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=cfg.vocab_size,
        n_embd=cfg.hidden_size,
        n_inner=cfg.intermediate_size,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_positions=cfg.max_length,
        layer_norm_epsilon=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings,
        resid_pdrop=cfg.dropout,
        embd_pdrop=cfg.dropout,
        attn_pdrop=cfg.dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation=attention,
    )


def bert(cfg: schema.Transformer, attention: str) -> Any:
    """BertConfig; `dropout` is that of embeddings, sub-layers, attention and head alike."""
    from transformers import BertConfig

    return BertConfig(**_encoder(cfg, attention), max_position_embeddings=cfg.max_length, pad_token_id=pad_id(cfg))


def roberta(cfg: schema.Transformer, attention: str) -> Any:
    """RobertaConfig. Its `pad_token_id` is where positions begin, whatever the tokenizer pads with."""
    from transformers import RobertaConfig

    return RobertaConfig(
        **_encoder(cfg, attention),
        max_position_embeddings=cfg.max_length + ROBERTA_OFFSET,
        type_vocab_size=1,
        pad_token_id=ROBERTA_OFFSET - 1,
    )


def _encoder(cfg: schema.Transformer, attention: str) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.dropout,
        "use_cache": False,
        "attn_implementation": attention,
    }


def t5(cfg: schema.Transformer, attention: str) -> Any:
    """T5Config of the first T5: ReLU, tied embeddings. The decoder begins with the pad id, as T5 was trained."""
    from transformers import T5Config

    if not cfg.tie_embeddings:
        raise ValueError("model.tie_embeddings=false: T5 has one table of embeddings; it must be true")
    return T5Config(
        vocab_size=cfg.vocab_size,
        d_model=cfg.hidden_size,
        d_kv=cfg.hidden_size // cfg.num_heads,
        d_ff=cfg.intermediate_size,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        layer_norm_epsilon=cfg.norm_eps,
        dropout_rate=cfg.dropout,
        pad_token_id=pad_id(cfg),
        decoder_start_token_id=pad_id(cfg),
        eos_token_id=Bytes().eos_id if pad_id(cfg) == Bytes.pad_id else 1,
        use_cache=False,
        attn_implementation=attention,
    )


def stem_width(cfg: schema.ConvNet) -> int:
    """Channels of a ResNet's stem: as many as the first stage's 3x3 convolutions have, 64 in the published ones."""
    return cfg.widths[0] // (4 if cfg.block == "bottleneck" else 1)


def resnet(cfg: schema.ConvNet) -> Any:
    """ResNetConfig of the blocks; the stem is the model's business."""
    from transformers import ResNetConfig

    return ResNetConfig(
        num_channels=cfg.channels,
        embedding_size=stem_width(cfg),
        hidden_sizes=list(cfg.widths),
        depths=list(cfg.depths),
        layer_type=cfg.block,
    )
