"""The lens: HookedTransformer and what belongs to it, over unmodified models."""

from ..models.factored_matrix import FactoredMatrix
from . import patching
from .activation_cache import ActivationCache
from .analysis import (
    LogitAttribution,
    LogitLens,
    PromptTest,
    direct_logit_attribution,
    logit_lens,
    test_prompt,
)
from .attribution import EdgeAttribution, attribution_patch, edge_attribution_patch
from .cache import KeyValueCache
from .config import HookedTransformerConfig
from .evals import IOIDataset, induction_loss, ioi_eval
from .functions import (
    Slice,
    composition_scores,
    compute_head_attention_similarity_score,
    get_corner,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    lm_accuracy,
    lm_cross_entropy_loss,
    remove_batch_dim,
    sample_logits,
    to_numpy,
)
from .head_detector import detect_head
from .hooked_transformer import HookedTransformer, Output
from .hooks import HookPoint
from .model_context import ModelContext, StandardModelContext, StubModelContext
from .names import get_act_name
from .path_patching import path_patch
from .processing import process
from .svd_interpreter import SVDInterpreter

__all__ = [
    "ActivationCache",
    "EdgeAttribution",
    "FactoredMatrix",
    "HookPoint",
    "HookedTransformer",
    "HookedTransformerConfig",
    "IOIDataset",
    "KeyValueCache",
    "LogitAttribution",
    "LogitLens",
    "ModelContext",
    "Output",
    "PromptTest",
    "SVDInterpreter",
    "Slice",
    "StandardModelContext",
    "StubModelContext",
    "attribution_patch",
    "composition_scores",
    "compute_head_attention_similarity_score",
    "detect_head",
    "direct_logit_attribution",
    "edge_attribution_patch",
    "get_act_name",
    "get_corner",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
    "induction_loss",
    "ioi_eval",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "logit_lens",
    "patching",
    "path_patch",
    "process",
    "remove_batch_dim",
    "sample_logits",
    "test_prompt",
    "to_numpy",
]
