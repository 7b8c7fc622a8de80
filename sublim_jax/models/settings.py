"""The architecture of a decoder: what differs between families."""

from dataclasses import dataclass

from sublim_jax.errors import UserError
from sublim_jax.models.attention import Scoring
from sublim_jax.models.lora import EVERY_LINEAR, Lora
from sublim_jax.models.rope import Rotary


@dataclass(frozen=True)
class Settings:
    """The architecture of a decoder. `windows` and `rotary_of` have one entry a layer."""

    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    mlp_width: int
    activation: str
    rotaries: tuple[Rotary, ...] = ()
    rotary_of: tuple[int, ...] = ()  # which of `rotaries` each layer uses
    windows: tuple[int, ...] = ()  # how many keys back a layer sees, itself included; 0: all
    positions: int = 0  # learned positions (GPT-2); 0: none
    norm: str = "rms"  # or layer, with mean and bias
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the norm's weights (Gemma: 1)
    pre_norm: bool = True
    post_norm: bool = False  # of the outputs of attention and MLP, before they are added
    head_norm: str = ""  # of queries and keys: "head", each head alone (Qwen3); "all" heads together (OLMo 2)
    gated: bool = True  # MLP: down(act(gate) * up), or down(act(up))
    parallel: bool = False  # attention and MLP read the same input (GPT-NeoX)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    score_scale: float = 0.0  # of queries times keys; 0: head_size ** -0.5
    score_cap: float = 0.0  # cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    tied: bool = True  # the unembedding is the embedding
    lora: Lora | None = None  # adapters beside the layers' kernels

    @property
    def turns_by_length(self) -> bool:
        """Whether the rotation of a position depends on the final length of its text."""
        return any(table.until for table in self.rotaries)

    def check_length(self, length: int, what: str) -> None:
        """Raises UserError for a text with more tokens than there are learned positions."""
        if self.positions and length > self.positions:
            raise UserError(f"{what} has {length} tokens, and the model has {self.positions} learned positions")

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.score_scale or self.head_size**-0.5, self.score_cap, self.windows)

    def adapter(self, module: str) -> Lora | None:
        """The adapters of a linear layer, if it has any."""
        return self.lora if self.lora and module in (self.lora.modules or EVERY_LINEAR) else None
