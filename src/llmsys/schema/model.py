"""A model's published shape, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of

FAMILIES = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",
    "bert": "classification",
    "roberta": "classification",
    "t5": "seq2seq",
    "resnet": "images",
    "vgg": "images",
}
"""Family -> its objective: what the family is trained for here."""

CONVNETS = ("resnet", "vgg")
DTYPES = ("fp32", "bf16")
ATTENTION = ("eager", "sdpa", "flash_attention_2")
QUANT = ("none", "int8", "nf4")


@dataclass(kw_only=True)
class Model:
    """What every model's settings have; `Transformer` and `ConvNet` add the shape.

    `weights`: `random`, a local folder, a Hugging Face hub id, `package:<module>` (a pip package that carries a
    `model` folder), or `run:<exp>` (the weights that experiment's run left).
    `quant`: the frozen linear layers of the blocks in bitsandbytes' 8-bit integers or 4-bit NormalFloat.
    """

    kind: str = "transformer"
    name: str = "scratch"
    family: str = "llama"
    weights: str = "random"
    dtype: str = "fp32"
    dropout: float = 0.0
    quant: str = "none"

    def __post_init__(self) -> None:
        one_of("model.family", self.family, tuple(FAMILIES))
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.quant", self.quant, QUANT)
        if (self.family in CONVNETS) != (self.kind == "convnet"):
            fitting = [family for family in FAMILIES if (family in CONVNETS) == (self.kind == "convnet")]
            raise ValueError(f"model.family={self.family}: with model.kind={self.kind} it is {' or '.join(fitting)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: must lie in [0, 1)")

    @property
    def objective(self) -> str:
        """`causal_lm`, `classification`, `seq2seq` or `images`."""
        return FAMILIES[self.family]


@dataclass(kw_only=True)
class Transformer(Model):
    """A transformer's shape. T5: `num_layers` blocks in the encoder and as many in the decoder.

    `tokenizer`: `bytes` (byte level, no file needed) or `weights` (the one that lies beside the weights).
    `pooling` of a classifier: `mean` over the tokens with a linear layer (as sentence encoders are trained), or `cls`,
    the family's own head on the first token, as BERT and RoBERTa were published.
    `config`: a Hugging Face `config.json`, or its folder, which gives all of the shape: see `llmsys.shape_file`.
    `head_dim` (0: hidden_size / num_heads), `qkv_bias` and `qk_norm` are what Qwen's LLaMAs have; such a model is
    predicted and not built.
    """

    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    max_length: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    tokenizer: str = "bytes"
    attention: str = "sdpa"
    pooling: str = "mean"
    config: str | None = None
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.attention", self.attention, ATTENTION)
        one_of("model.tokenizer", self.tokenizer, ("bytes", "weights"))
        one_of("model.pooling", self.pooling, ("mean", "cls"))
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            at_least(f"model.{key}", getattr(self, key), 1)
        at_least("model.head_dim", self.head_dim, 0)
        if self.hidden_size % self.num_heads and not self.head_dim:
            raise ValueError(f"model.hidden_size={self.hidden_size}: must be a multiple of num_heads={self.num_heads}")
        if self.family != "llama" and (self.head_dim or self.qkv_bias or self.qk_norm):
            raise ValueError(f"model.head_dim, model.qkv_bias, model.qk_norm: are for family=llama, not {self.family}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")

    @property
    def head_width(self) -> int:
        """Of one head of attention."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def plain(self) -> bool:
        """Whether the family as built here has this shape."""
        return self.head_width * self.num_heads == self.hidden_size and not (self.qkv_bias or self.qk_norm)


@dataclass(kw_only=True)
class ConvNet(Model):
    """A residual network (`resnet`) or a plain stack of 3x3 convolutions (`vgg`), for square images.

    `depths` and `widths`: blocks (vgg: convolutions) and output channels of each stage. `block`: `basic` (two 3x3),
    `bottleneck` (1x1, 3x3, 1x1; `widths` are then the wide ends) or `plain` (vgg). `stem`: `imagenet` (7x7 of stride 2
    and a pooling) or `cifar` (one 3x3).
    """

    depths: list[int] = field(default_factory=lambda: [1, 1])
    widths: list[int] = field(default_factory=lambda: [16, 32])
    block: str = "basic"
    stem: str = "cifar"
    image_size: int = 32
    channels: int = 3
    num_classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.block", self.block, ("plain",) if self.family == "vgg" else ("basic", "bottleneck"))
        one_of("model.stem", self.stem, ("cifar", "imagenet"))
        if len(self.depths) != len(self.widths) or not self.depths or min([*self.depths, *self.widths]) < 1:
            raise ValueError(f"model.depths={self.depths}: needs one positive number for each of widths={self.widths}")
        for key in ("image_size", "channels", "num_classes"):
            at_least(f"model.{key}", getattr(self, key), 1)
