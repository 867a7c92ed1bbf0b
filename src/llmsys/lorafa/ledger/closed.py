"""What an inner block keeps, as formulas: bytes over (batch x length x D) by origin.

    phi = F/D    kappa = kv heads / heads    eta = heads/D    rho = r/D    w = 2 bytes in bf16, 4 in fp32

a = 4 where adapters are in fp32, else w. Fused attention, no mask, all linear layers adapted, no dropout in the model.
LLaMA in bf16, a row a function below:

                        norm          attention             MLP          adapter                        dropout
    full                8 + 4         4 + 4k + 4eta + 2     6phi + 2 + 2phi
    peft LoRA, fp32     8             4 + 4k + 4eta         6phi         24 + 4phi + 28rho              24 + 4phi
    peft LoRA, bf16     8             4 + 4k + 4eta         6phi         4 + 2phi + 14rho               12 + 2phi
    peft LoRA-FA, bf16  8             4 + 4k + 4eta         6phi         14rho                          12 + 2phi
    ours, none          4             4 + 4k + 4eta         4phi         14rho                          0
    ours, mlp           4             4 + 4k + 4eta         0            14rho                          0
    ours, attn+mlp      4             0                     0            14rho                          0
    ours, block         2 (the input alone)

and 8/D for the two fp32 numbers a row of the norms. Dropout as a CPU has it: the mask in the dtype of its input; and
with it no two adapters read the same tensor (LoRA in bf16: 12 + 2phi in place of 4 + 2phi). Why each tensor is kept:

    norm       eager RMSNorm: the fp32 copy of x (4 each; in fp32 x itself); trained weights: the normalised x (w each).
               Ours: x in its own dtype, which is the residual stream, and rstd
    attention  SDPA's kernel: q, k, v, its output, and the log-sum-exp of each row in fp32 (4 eta)
    MLP        silu keeps its input, the product both factors: 3 w phi. Ours computes silu and product again: 2 w phi
    full       dW = dy^T x keeps x: the normed x of attention and of the MLP (w each), the input of `down` (w phi); that
               of `o` is attention's output
    adapter    dA = dz^T x keeps the adapter's own copy of x, cast to its dtype: one for each module where dtypes differ
               (6a + a phi), else only what nothing else keeps; dB = dy^T z keeps z: r numbers of a row and module

Sources: LoRA-FA (arXiv 2308.03303, section 3.2) for the adapters; autograd's derivative formulas, written out in
`llmsys.cost.tape`, for the others; `blocks/llama.py` and `blocks/bert.py` for ours.
"""

from __future__ import annotations

from llmsys import schema
from llmsys.lorafa.ledger.columns import Column

Coefficients = dict[str, float]


def coefficients(
    model: schema.Transformer, train: schema.Train, column: Column, block: str = ""
) -> Coefficients | None:
    """By origin, of an inner block (T5: of the stack that `block` is in). None where there is no formula: for what
    torch.compile keeps, and for T5 in full, whose trained position bias leaves a CPU no fused kernel."""
    if column.compiled or (model.family == "t5" and column.name == "full"):
        return None
    shape = Shape(model, column)
    if model.family == "t5":
        return t5(shape, train, decoder=block.startswith("decoder"))
    if column.ours:
        return ours(shape)
    return {"llama": llama, "bert": bert, "roberta": bert}[model.family](shape)


class Shape:
    """The numbers that the formulas are of."""

    def __init__(self, model: schema.Transformer, column: Column) -> None:
        method = column.method
        self.family, self.kind, self.policy, self.d = model.family, method.kind, column.policy, model.hidden_size
        self.w = 2 if model.dtype == "bf16" else 4
        self.phi = model.intermediate_size / self.d
        self.kappa = model.num_kv_heads / model.num_heads
        self.eta = model.num_heads / self.d
        adapter = method if isinstance(method, schema.Adapter) else None
        self.rho = adapter.r / self.d if adapter else 0.0
        self.a = 4 if adapter and adapter.dtype == "fp32" else self.w
        self.dropout = adapter is not None and adapter.dropout > 0
        self.ours = column.ours
        self.shared = isinstance(method, schema.LoRA) and method.share_a

    @property
    def attention(self) -> float:
        """q, k, v, out, and the log-sum-exp."""
        return self.w * (2 + 2 * self.kappa) + 4 * self.eta


def llama(s: Shape) -> Coefficients:
    """transformers' block: RMSNorm, attention, RMSNorm, SwiGLU."""
    trained = s.kind == "full"
    found = {
        "norm": 2 * (4 + 4 / s.d) + 2 * s.w * trained,
        "attention": s.attention + s.w * trained,
        "mlp": 3 * s.w * s.phi + (s.w + s.w * s.phi) * trained,
    }
    return found if trained else {**found, **_peft(s, reads=6 + s.phi, layers=7, unshared=2 + s.phi)}


def bert(s: Shape) -> Coefficients:
    """transformers' block: attention, LayerNorm of the sum, GELU's MLP, LayerNorm of the sum. LayerNorm keeps its input
    and mean and 1/std, in its own dtype on a CPU."""
    trained = s.kind == "full"
    found = {
        "norm": 2 * (s.w + 2 * s.w / s.d),
        "attention": s.attention + s.w * trained,
        "mlp": s.w * s.phi + (s.w + s.w * s.phi) * trained,
    }
    return found if trained else {**found, **_peft(s, reads=5 + s.phi, layers=6, unshared=2 + s.phi)}


def t5(s: Shape, train: schema.Train, *, decoder: bool) -> Coefficients:
    """A block of either stack, over the stack's own length; lambda = source / target length for keys and values across.

    Its norm keeps x and, where x is narrower, the fp32 copy; ReLU its output, which is the input of `wo`; SDPA its copy
    of the position bias, H L^2 numbers for the whole batch: w eta L / B (transformers 5.17 makes none in an encoder
    without a mask). Ours: x; the bias once for all blocks; of ReLU a bit an element, or its input where a trained A
    reads its output.
    """
    length, across = (train.target_length, train.length / train.target_length) if decoder else (train.length, 0.0)
    norms = 3 if decoder else 2
    attention = s.attention + decoder * (s.w * (2 + 2 * across) + 4 * s.eta)
    layers = 8 + 2 * across if decoder else 6
    if not s.ours:
        found = {
            "norm": norms * (4 + s.w * (s.w < 4) + 4 / s.d),
            "attention": attention + s.w * s.eta * length / train.micro_batch,
            "mlp": s.w * s.phi,
        }
        return {**found, **_peft(s, reads=layers - 1 + s.phi, layers=layers, unshared=norms)}
    if s.policy == "block":
        return {"input": float(s.w)}
    if s.shared:
        layers = 6 + across if decoder else 4
    kept = s.w * s.phi if s.kind == "lora" else s.phi / 8
    return {
        "norm": norms * (s.w + 4 / s.d),
        "attention": attention if s.policy != "attn+mlp" else 0.0,
        "mlp": kept if s.policy == "none" else 0.0,
        "adapter": layers * s.w * s.rho,
    }


def _peft(s: Shape, *, reads: float, layers: float, unshared: float) -> Coefficients:
    """Of peft's adapters on `layers` modules, which read `reads` D numbers a row: all of them copies where adapters are
    wider than the model or have dropout, else only the `unshared` ones, which nothing but adapters keeps."""
    own = unshared if s.a == s.w and not s.dropout else reads
    found = {"adapter": layers * s.a * s.rho + s.a * own * (s.kind == "lora_peft")}
    if s.dropout:
        found["dropout"] = s.a * reads
    return found


def ours(s: Shape) -> Coefficients:
    """Our blocks of LLaMA and BERT. A trained A keeps nothing that is not kept already, but for BERT's block input,
    which no norm of its own block reads; dropout keeps a seed."""
    if s.policy == "block":
        return {"input": float(s.w)}
    is_llama = s.family == "llama"
    gates = 2 if is_llama else 1
    modules = 4 if s.shared else 5 + gates
    found = {
        "norm": 2 * (s.w + 4 / s.d) if is_llama else 2 * (s.w + 2 * s.w / s.d),
        "attention": s.attention if s.policy != "attn+mlp" else 0.0,
        "mlp": gates * s.w * s.phi if s.policy == "none" else 0.0,
        "adapter": modules * s.w * s.rho,
    }
    if not is_llama and s.kind == "lora":
        found["adapter"] += s.w
    elif not is_llama and s.policy == "attn+mlp":
        found["attention"] = float(s.w)
    return found
