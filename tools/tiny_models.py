"""A tiny model with random weights for every causal language model of the installed transformers.

`tiny(model_type)` takes the defaults of the type's configuration class, replaces each size that it
knows by a small one, adds what the table `EXTRAS` holds for the type, and draws the weights. Nothing
is downloaded. Run as a script it builds all of them (or those named as arguments) and prints what
happened.

All of the models are causal but those of `cpmant` (a prefix that sees all of itself) and `xlnet`
(its order is an argument of the forward).
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN = 32
HEADS = 4
HEAD = HIDDEN // HEADS
VOCABULARY = 96
POSITIONS = 64
STD = 0.2
SECONDS = 40

_GROUPS: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size n_embd d_model dim_model_base embedding_size word_embed_proj_dim emb_dim"
        " embedding_dim lru_width attention_hidden_size backbone_hidden_size input_embedding_size"
        " output_embedding_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
        " num_decoder_attention_heads num_encoder_attention_heads attention_heads"
        " swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts"
        " num_local_experts n_routed_experts moe_num_experts conv_kernel_size",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"
        " num_encoder_layers num_blocks num_experts_per_tok num_experts_per_token moe_topk moe_k"
        " linear_num_key_heads index_n_heads num_expert_group n_group index_topk",
    ),
    (
        1,
        "topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers"
        " first_k_dense_replace num_dense_layers",
    ),
    (
        HEAD,
        "head_dim swa_head_dim kv_channels d_head dim_head attention_head_dim attention_head_size"
        " linear_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim"
        " index_head_dim query_pre_attn_scalar state_size ssm_state_size mamba_d_state mamba_d_head"
        " mamba_head_dim mamba_headdim mamba_n_heads mamba_num_heads n_mamba_heads chunk_size"
        " mamba_chunk_size d_rel hidden_size_per_layer_input laurel_rank",
    ),
    (
        4,
        "qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank sliding_window sliding_window_size"
        " attention_window_size window_size",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank o_lora_rank adapter_rank router_hidden_size gated_norm_rank"
        " hc_lowrank",
    ),
    (24, "moe_intermediate_size expert_ffn_hidden_size"),
    (
        40,
        "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff"
        " d_inner feed_forward_size dense_intermediate_size intermediate_size_mlp block_ffn_dim",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input shape_vocab_size"
        " pronunciation_vocab_size unpadded_vocab_size",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length"
        " max_target_positions max_source_positions model_max_length",
    ),
)
SIZES: dict[str, int] = {name: size for size, names in _GROUPS for name in names.split()}
"""The small value of every size field that is shrunk for all types alike."""

_DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
)
LAYERS = _DEPTHS.split()
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8}

EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA_2},
    "big_bird": {"attention_type": "original_full"},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "per_layer_config": {
            2: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "q_lora_rank": 16,
                "kv_lora_rank": 8,
                "head_dim": 12,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "v_head_dim": HEAD,
            },
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 48,
        "num_kv_shared_layers": 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **_MAMBA_2},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": HEAD},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"image_size": 56, "crop_size": 56},
        "audio_config": {
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": HIDDEN,
            "depthwise_separable_out_channel": HIDDEN,
            "bias_max_distance": 16,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD},
}
"""Fields that one type needs beyond the general rules."""

KEPT = ("A_log", "dt_bias", "A_logs")
"""Parameters whose own initialisation has to stay: decay rates and time steps of state-space layers."""


def causal_types() -> list[str]:
    """Return the model types that have a causal language model class, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _is_int(value: Any) -> bool:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _depth(defaults: Mapping[str, Any]) -> int:
    """Return the default number of layers, or 0 where no field says it."""
    for name in LAYERS:
        if _is_int(defaults.get(name)):
            return defaults[name]
    return 0


def _sources(per_layer: Mapping[str, Sequence[Any]], deep: int) -> list[int]:
    """Return which of the default layers the small model's layers are taken after.

    Two of them where all layers are alike, else four that show as many kinds of layer as four can.
    """
    chosen: list[int] = []
    for layer in range(deep):
        kind = [values[layer] for values in per_layer.values()]
        known = [[values[other] for values in per_layer.values()] for other in chosen]
        if any(all(k[i] != kind[i] for k in known) for i in range(len(kind))):
            chosen.append(layer)
    if len(chosen) < 2:
        return list(range(min(deep, 2)))
    return sorted(chosen[:4]) if len(chosen) > 2 else chosen * 2


def _token(name: str, value: Any) -> Any:
    """Return a token id (or a list of them) that lies inside the small vocabulary."""
    if isinstance(value, (list, tuple)):
        return [_token(name, value[0])] if value else value
    if name in TOKENS:
        return TOKENS[name]
    return value if value < VOCABULARY - 32 else VOCABULARY - 32 + value % 31


def _small(name: str, value: Any, usual: Any = None) -> Any:
    """Return a small value for a field; twice as much where a layer's is larger than the usual one."""
    if name not in SIZES or not isinstance(value, (int, float)) or isinstance(value, bool):
        return value
    return min(value, SIZES[name] * (2 if isinstance(usual, int) and value > usual else 1))


def small_fields(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return small values for the fields of a configuration whose defaults are given.

    A field that is None stays None and a size that is already smaller stays. A list with an entry for
    each layer is shortened to one in which every kind of layer occurs.
    """
    fields: dict[str, Any] = {}
    deep = _depth(defaults)
    overrides = {int(k): v for k, v in (defaults.get("per_layer_config") or {}).items()}
    per_layer = {
        k: v for k, v in defaults.items() if isinstance(v, (list, tuple)) and len(v) == deep > 1
    }
    sources = _sources({**per_layer, "": [overrides.get(i) for i in range(deep)]}, deep)
    for name, value in defaults.items():
        if name.endswith(("_token_id", "_token_index")):
            if _is_int(value) or isinstance(value, (list, tuple)):
                fields[name] = _token(name, value)
        elif name in per_layer:
            fields[name] = [_small(name, value[i]) for i in sources]
        elif name in LAYERS and _is_int(value):
            fields[name] = len(sources)
        elif name == "per_layer_config" and overrides:
            fields[name] = {
                new: {k: _small(k, v, defaults.get(k)) for k, v in overrides[old].items()}
                for new, old in enumerate(sources)
                if old in overrides
            }
        else:
            fields[name] = _small(name, value)
    if "is_decoder" in defaults:
        fields["is_decoder"] = True
    for ours, theirs in (
        ("num_key_value_heads", "num_attention_heads"),
        ("num_kv_heads", "num_attention_heads"),
        ("swa_num_key_value_heads", "swa_num_attention_heads"),
        ("num_query_groups", "num_attention_heads"),
    ):
        value = defaults.get(ours)
        if _is_int(value):
            fields[ours] = HEADS if value == defaults.get(theirs) else min(value, 2)
    if _is_int(defaults.get("qk_rope_head_dim")):
        rope, nope = defaults["qk_rope_head_dim"], defaults.get("qk_nope_head_dim") or 0
        small = fields["qk_rope_head_dim"], fields.get("qk_nope_head_dim", 0)
        if "qk_head_dim" in defaults:
            fields["qk_head_dim"] = sum(small)
        if defaults.get("head_dim") == rope:
            fields["head_dim"] = small[0]
        elif defaults.get("head_dim") == rope + nope:
            fields["head_dim"] = sum(small)
    return {k: v for k, v in fields.items() if v is not defaults.get(k) and v != defaults.get(k)}


def _shrunk(config_class: type[PreTrainedConfig], extras: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a small configuration of a class, the configurations nested in it shrunk as well."""
    extras = {**EXTRAS.get(config_class.model_type, {}), **extras}
    defaults = config_class()
    fields = small_fields(defaults.to_dict())
    for name in defaults.sub_configs:
        nested = getattr(defaults, name, None)
        if nested is not None:
            fields[name] = _shrunk(type(nested), extras.pop(name, {}))
    return config_class(**{**fields, **extras})


def tiny_config(model_type: str) -> tuple[type[nn.Module], PreTrainedConfig]:
    """Return the class of a type's model and a small configuration for it.

    Where the configuration holds that of a text model, and the text model has a class of its own in
    the mapping, the class and the configuration are those of the text model.
    """
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config_class = CONFIG_MAPPING[model_type]
    if model_type.endswith("_assistant"):
        raise ValueError(
            f"{model_class.__name__} runs on the states of another model, not on token ids"
        )
    part = "decoder" if model_type.startswith("musicgen") else "text_config"
    if part not in config_class.sub_configs:
        return model_class, _shrunk(config_class, {})
    nested = type(getattr(config_class(), part))
    if model_class.config_class is not config_class:
        return model_class, _shrunk(nested, {})
    for known in causal_types():
        if CONFIG_MAPPING[known] is nested:
            return tiny_config(known)
    return model_class, _shrunk(config_class, {})


def _draw(model: nn.Module) -> None:
    """Draw the matrices with a standard deviation of `STD`, and also the biases that are zero."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in KEPT:
            continue
        bias = name.endswith("bias") and not parameter.any()
        if parameter.dim() >= 2 or bias:
            parameter.normal_(0.0, STD if parameter.dim() >= 2 else STD / 2)


def tiny(model_type: str, seed: int = 0) -> nn.Module:
    """Return a tiny float32 model of a type in evaluation mode, its weights drawn from the seed."""
    model_class, config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).to(device="cpu", dtype=torch.float32)
        _draw(model)
    return model.eval()


def _late(*_: Any) -> None:
    """End a build that takes too long."""
    raise TimeoutError(f"more than {SECONDS} s")


def _attempt(model_type: str) -> tuple[bool, str]:
    """Build a type and run it on five token ids; return whether that worked and a line that says so."""
    start = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        model = tiny(model_type)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 9, 17, 33, 40]])).logits
        if not logits.isfinite().all():
            raise ValueError("logits that are not finite")
    except Exception as error:
        reason = " ".join(str(error).split())
        return False, f"{model_type}: {type(error).__name__}: {reason[:300]}"
    finally:
        signal.alarm(0)
    count = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    shape = tuple(logits.shape)
    return True, f"{model_type}: ok ({type(model).__name__}, {count:,}, {seconds:.2f} s, {shape})"


def main(names: Sequence[str]) -> int:
    """Try the named types, or all of them, and print a line for each and a count."""
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    results = []
    for name in names or causal_types():
        results.append(_attempt(name))
        print(results[-1][1], flush=True)
    works = sum(ok for ok, _ in results)
    print(f"{works} of {len(results)} types build and run")
    return 0 if works == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
