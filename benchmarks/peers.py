"""The peer: transformers' Mixtral, and Llama where our model is dense, of our active size.

Same widths, heads, blocks, vocabulary, windows of tokens, balance loss, gradient clipping and AdamW
(fused). Their gated feed-forward layer has three matrices to our two, so that its size is two thirds of
ours and a token meets as many weights in both. Theirs drops no token; ours drops what is above an
expert's capacity, and reports it.
"""

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from variants import Model, Variant

from mup_moe.model.inventory import ModelShape
from mup_moe.training.batches import Batches
from mup_moe.training.request import TrainingRequest


def peer_model(variant: Variant, request: TrainingRequest, vocabulary: int) -> nn.Module:
    """Mixtral or Llama of the request's active size, in float32."""
    import transformers

    shape = ModelShape.of(request.cell, request.model, vocabulary)
    size, rest = divmod(2 * shape.expert_size, 3)
    assert rest == 0, f"a feed-forward size of {shape.expert_size} has no gated layer of equal size"
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": size,
        "num_hidden_layers": request.model.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": request.model.activation,
        "max_position_embeddings": request.model.sequence,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if shape.dense:
        dense = transformers.LlamaConfig(**common)
        return transformers.LlamaForCausalLM._from_config(dense, attn_implementation=variant.attention)
    mixture = transformers.MixtralConfig(
        **common,
        num_local_experts=shape.total_experts,
        num_experts_per_tok=shape.active_experts,
        output_router_logits=True,
        router_aux_loss_coef=request.model.balance_loss,
    )
    return transformers.MixtralForCausalLM._from_config(
        mixture, attn_implementation=variant.attention, experts_implementation=variant.experts_implementation
    )


def build_peer(variant: Variant, request: TrainingRequest, tokens: np.ndarray, vocabulary: int) -> Model:
    """A peer that trains as its own users would have it."""
    warnings.simplefilter("ignore")
    device, training = torch.device(variant.device), request.training
    torch.manual_seed(0)
    model = peer_model(variant, request, vocabulary).to(device).train()
    if variant.precision == "bfloat16-weights":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-3,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        fused=True,
    )
    batches = Batches(tokens, training.batch_size, request.model.sequence)
    steps = itertools.count()

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.precision == "bfloat16"):
            # Targets are shifted already; without `labels` no loss is computed.
            loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        return loss

    if variant.step != "eager":
        loss_of = torch.compile(loss_of)

    def run(count: int) -> None:
        for _ in range(count):
            windows = batches.training(request.cell.seed, next(steps)).to(device)
            optimizer.zero_grad()
            loss_of(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()).backward()
            if training.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()

    return Model(run, training.batch_size * request.model.sequence, **sizes(model, request))


def sizes(model: nn.Module, request: TrainingRequest) -> dict[str, int]:
    """Parameters, active parameters and training FLOPs per token, counted as `model_size` does."""
    config: Any = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    active = {name: p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters()}
    matmul = sum(active[name] for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name)
    attention = 12 * request.model.blocks * request.cell.width * request.model.sequence
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": round(sum(active.values())),
        "flops_per_token": round(6 * matmul + attention),
    }
