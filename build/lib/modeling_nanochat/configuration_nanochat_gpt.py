"""The shape of a nanochat network, for every era of upstream's checkpoints, in one configuration.

What tells the eras apart (value embeddings, gates, windows, rotary base and rounding, smear, backout) is a field each,
so a saved `config.json` describes its network without a version number; `from_depth` fills the fields from a table.
The price is that a few fields only make sense together: `validate_architecture` says so before any weight exists.
"""

from dataclasses import fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# What upstream changed over time, from https://github.com/karpathy/nanochat; a row holds for the later eras too until
# one of them changes it. The window is `seen positions before the query` as a function of the context length.
ERAS: dict[str, dict] = {
    "launch": {
        "use_residual_scalars": False,
        "use_value_embeddings": False,
        "window_pattern": "L",
        "window": lambda context: context // 2,
    },
    "lambdas": {"use_residual_scalars": True, "window_pattern": "SSSL"},
    "seed": {"use_value_embeddings": True},
    "softcap20": {"final_logit_softcapping": 20.0},
    "autoresearch1": {
        "final_logit_softcapping": 15.0,
        "value_gate_channels": 12,
        "value_gate_scale": 3.0,
        "query_key_scale": 1.15,
        "rope_theta": 100_000.0,
        "bfloat16_rotary_tables": False,
        "window": lambda context: -(-context // 384) * 128,  # a third of the context, up to a multiple of 128
    },
    "head": {
        "query_key_scale": 1.2,
        "window": lambda context: -(-context // 512) * 128,  # a quarter, up to a multiple of 128
        "smear_channels": 24,
        "use_backout": True,
        "init_scheme": "head",
    },
}

# How fresh weights are drawn, by the `init_scheme` that a saved configuration names. Of the scalars: the first layer's
# value, and how much less the last layer's is.
INIT_SCHEMES: dict[str, dict] = {
    "seed": {
        "embedding_std": 1.0,
        "up_factor": 1.0,  # on the bound of the other matrices
        "gate_high": 0.0,  # gates are uniform from 0 to this
        "resid_lambdas": (1.0, 0.0),
        "x0_lambdas": (0.1, 0.0),
    },
    "head": {
        "embedding_std": 0.8,
        "up_factor": 0.4,
        "gate_high": 0.02,
        "resid_lambdas": (1.15, 0.10),
        "x0_lambdas": (0.20, 0.15),
    },
}


def era_settings(era: str) -> dict:
    """Everything the table says of an era, with what it inherits from the ones before.

    Raises:
        ValueError: if the era is not in the table.
    """
    if era not in ERAS:
        raise ValueError(f"era is {era!r}, expected one of {list(ERAS)}")
    settings = {}
    for name, changes in ERAS.items():
        settings |= changes
        if name == era:
            return settings


def layer_types_from_pattern(window_pattern: str, num_hidden_layers: int, smear: bool = False) -> list[str]:
    """Tiles a pattern of `S` (sliding window) and `L` (full attention) over the layers; the last layer is always full.

    A network with smear keeps one embedding of state beside layer 0's keys and values: its layer 0 is a hybrid layer,
    the name under which the Transformers caches hold such state.
    """
    pattern = window_pattern.upper()
    if not pattern or set(pattern) - {"S", "L"}:
        raise ValueError(f"window_pattern is {window_pattern!r}, expected a string of the letters S and L")
    kinds = [pattern[i % len(pattern)] for i in range(num_hidden_layers - 1)] + ["L"]
    layer_types = ["sliding_attention" if kind == "S" else "full_attention" for kind in kinds]
    if smear:
        layer_types[0] = "hybrid_sliding" if kinds[0] == "S" else "hybrid"
    return layer_types


@strict
class NanoChatGPTConfig(PreTrainedConfig):
    r"""Configuration of a nanochat network; the defaults are depth 12 of the seed era (2026-02-01).

    Args:
        vocab_size: rows of the token embedding, of each value embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP; 4 x hidden_size if None.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; as many as those if None.
        head_dim: width of a head; hidden_size / num_attention_heads if None.
        max_position_embeddings: the context length the network was trained with.
        layer_types: `full_attention` or `sliding_attention` for each layer (`hybrid`, `hybrid_sliding` for layer 0 of
            a network with smear); the pattern SSSL with a full last layer if None.
        sliding_window: positions a query of a sliding layer sees, itself included; half the context and itself if None.
        rope_parameters: Transformers' rotary settings (`rope_theta`, `rope_type`).
        bfloat16_rotary_tables: round cosines and sines to bfloat16 in any dtype, as upstream did until 2026-03.
        rms_norm_eps: None is the machine epsilon of the dtype; Transformers' own `nanochat` class uses 1e-6.
        final_logit_softcapping: logits become cap * tanh(logits / cap); up to 64.
        query_key_scale: factor on queries and keys after their normalisation.
        use_residual_scalars: learnt weights of the stream and of the first embedding at the entry of each block.
        use_value_embeddings: gated token lookups added to the values of every other layer, the last one included.
        value_gate_channels: channels of the attention's input that the gate reads.
        value_gate_scale: the gate is this times a sigmoid.
        smear_channels: channels the smear gate reads (each embedding takes in some of the previous one); 0 is no smear.
        use_backout: subtract some of the middle layer's output before the last norm.
        init_scheme: how fresh weights are drawn, a row of `INIT_SCHEMES`: "seed" or "head".

    Source: https://github.com/karpathy/nanochat (the network), arXiv 2410.17897 (value embeddings).
    """

    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (a field of the parent class)
    default_theta = 10_000.0

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    bfloat16_rotary_tables: bool = True
    rms_norm_eps: float | None = None
    final_logit_softcapping: float = 15.0
    query_key_scale: float = 1.0
    use_residual_scalars: bool = True
    use_value_embeddings: bool = True
    value_gate_channels: int = 32
    value_gate_scale: float = 2.0
    smear_channels: int = 0
    use_backout: bool = False
    init_scheme: str = "seed"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self._refuse_misspelt_fields(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) or a head_dim beside it"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = layer_types_from_pattern("SSSL", self.num_hidden_layers, self.smear_channels > 0)
        if self.sliding_window is None and any("sliding" in kind for kind in self.layer_types):
            self.sliding_window = self.max_position_embeddings // 2 + 1
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        self.validate_architecture()  # the strict dataclass calls it too, but wraps what it raises

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How ranks share the layers: each has some of the heads and of the MLP's width, and whole embeddings."""
        plan = {f"layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {"layers.*.self_attn.o_proj": "rowwise"}
        plan |= {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
        if self.use_value_embeddings:
            plan |= {"layers.*.self_attn.value_gate": "colwise", "value_embeddings.*": "replicated_with_grad_allreduce"}
        return plan

    def _refuse_misspelt_fields(self, kwargs: dict) -> None:
        """The parent keeps any keyword as an attribute: a misspelt field would be ignored without a word."""
        known = [field.name for field in fields(self)]
        for name in kwargs:
            if name in ("era", "window_pattern"):
                raise ValueError(f"{name}={kwargs[name]!r} is not a field of the configuration, expected from_depth")
            if close := get_close_matches(name, known, n=1, cutoff=0.85):
                raise ValueError(f"{name}={kwargs[name]!r} is not a field of the configuration, expected {close[0]}")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int = 32768,
        head_dim: int = 128,
        aspect_ratio: int = 64,
        max_position_embeddings: int = 2048,
        era: str = "seed",
        window_pattern: str | None = None,
        **overrides,
    ) -> "NanoChatGPTConfig":
        """The network that one dial gives: `depth` layers, depth * aspect_ratio wide (up to a multiple of `head_dim`).

        Args:
            depth: number of layers.
            aspect_ratio: width of a layer's depth; upstream's is 64.
            era: a row of `ERAS`.
            window_pattern: letters S and L, tiled over the layers; the era's own if None.
            overrides: any field of the configuration.

        Raises:
            ValueError: for a depth below 1, an unknown era or pattern, or fields that contradict each other.
        """
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1")
        if head_dim < 2:
            raise ValueError(f"head_dim is {head_dim}, expected an even number of at least 2")
        settings = era_settings(era)
        window = settings.pop("window")
        pattern = window_pattern or settings.pop("window_pattern")
        settings.pop("window_pattern", None)
        if aspect_ratio < 1:
            raise ValueError(f"aspect_ratio is {aspect_ratio}, expected at least 1 (upstream's is 64)")
        heads = -(-depth * aspect_ratio // head_dim)
        smear = overrides.get("smear_channels", settings.get("smear_channels", 0)) > 0
        layer_types = layer_types_from_pattern(pattern, depth, smear)
        if any("sliding" in kind for kind in layer_types):
            settings["sliding_window"] = window(max_position_embeddings) + 1  # the query sees itself too
        shape = {
            "vocab_size": vocab_size,
            "hidden_size": heads * head_dim,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "layer_types": layer_types,
        }
        return cls(**(shape | settings | overrides))

    def has_value_embedding(self, layer_idx: int) -> bool:
        """Every other layer looks value embeddings up, counted so that the last layer does."""
        return self.use_value_embeddings and layer_idx % 2 == (self.num_hidden_layers - 1) % 2

    def validate_architecture(self):
        """Fields that contradict each other or the network: ValueError with the value and the choice."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number (rotary pairs)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, expected a divisor of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        for name, channels in (
            ("value_gate_channels", self.value_gate_channels if self.use_value_embeddings else 1),
            ("smear_channels", self.smear_channels or 1),
        ):
            if not 1 <= channels <= self.hidden_size:
                raise ValueError(f"{name} is {channels}, expected 1 to hidden_size ({self.hidden_size})")
        if not 0 < self.final_logit_softcapping <= 64:  # the loss takes exp(logit) in float32 as it is
            raise ValueError(f"final_logit_softcapping is {self.final_logit_softcapping}, expected above 0, up to 64")
        if self.init_scheme not in INIT_SCHEMES:
            raise ValueError(f"init_scheme is {self.init_scheme!r}, expected {' or '.join(map(repr, INIT_SCHEMES))}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is True, expected False: embedding and head have their own weights")
        if self.smear_channels and not self.use_residual_scalars:
            raise ValueError("smear_channels needs use_residual_scalars=True, which holds the smear's weight")
        if self.use_backout and not self.use_residual_scalars:
            raise ValueError("use_backout needs use_residual_scalars=True, which holds the backout's weight")
        self._validate_windows()

    def _validate_windows(self):
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, expected {self.num_hidden_layers}")
        hybrid = ("hybrid", "hybrid_sliding")
        for i, kind in enumerate(self.layer_types):
            allowed = hybrid if i == 0 and self.smear_channels else ("full_attention", "sliding_attention")
            if kind not in allowed:
                raise ValueError(
                    f"layer_types[{i}] is {kind!r}, expected one of {allowed} (smear_channels is {self.smear_channels})"
                )
        if any("sliding" in kind for kind in self.layer_types) and (self.sliding_window or 0) < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, expected at least 1 for the sliding layers")
