"""The peers: transformers' Mixtral (Llama for dense models) with our number of active parameters, and nanoGPT-mup.

They have our widths, heads, blocks, vocabulary, windows of tokens, balance loss, gradient clipping and AdamW (fused).
Their gated feed-forward layer has three matrices and ours has two, so theirs has two thirds of our size, and a token
meets as many weights in both. Theirs drops no tokens; ours drops those above an expert's capacity, and reports it.

nanoGPT-mup (EleutherAI) is what one would use to sweep learning rates of a dense GPT under muP. Its code is not copied
here: `NanoGPT` is a model built from its description at our sizes, trained with the loop of its description.
"""

import itertools
import math
import re
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from variants import NANO, Model, Variant

from mup_moe.model.inventory import ModelShape
from mup_moe.training.batches import Batches
from mup_moe.training.request import TrainingRequest

# Matrices that are looked up, not multiplied.
_LOOKUP = re.compile("embed_tokens|wte|wpe")


def peer_model(variant: Variant, request: TrainingRequest, vocabulary: int) -> nn.Module:
    """Returns a Mixtral or Llama with the request's number of active parameters, in float32."""
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
    """Returns a peer that trains the way its own users would train it."""
    warnings.simplefilter("ignore")
    device, training = torch.device(variant.device), request.training
    torch.manual_seed(0)
    of_system = nano_gpt if variant.system == NANO else peer_model
    model = of_system(variant, request, vocabulary).to(device).train()
    if variant.precision == "bfloat16-weights":
        model = model.to(torch.bfloat16)
    groups = model.groups() if isinstance(model, NanoGPT) else [{"params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(
        groups,
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
            if isinstance(model, NanoGPT):
                return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            # The targets are already shifted, but without `labels` no loss is computed.
            loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        return loss

    if variant.step != "eager":
        loss_of = torch.compile(loss_of)

    def run(count: int) -> None:
        for _ in range(count):
            windows = batches.training(request.cell.seed, next(steps)).to(device)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * group.get("lr_scale", 1.0)
            optimizer.zero_grad()
            loss_of(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()).backward()
            if training.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()

    return Model(run, training.batch_size * request.model.sequence, **sizes(model, request))


# ---------------------------------------------------------------- nanoGPT-mup


class _NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, sequence, width = x_BSD.shape
        heads = (batch, sequence, self.heads, width // self.heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.c_attn(self.ln_1(x_BSD)).split(width, dim=2))
        # muP: attention scales with 1/head_size.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-1])
        x_BSD = x_BSD + self.c_proj(mixed.transpose(1, 2).reshape(batch, sequence, width))
        return x_BSD + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x_BSD))))


class NanoGPT(nn.Module):
    """A GPT with learned positions, LayerNorm and GELU under muP, with groups of learning rates and scaled logits.

    Axes: B sequences, S positions, D width, V vocabulary.
    """

    config = None

    def __init__(self, shape: ModelShape, request: TrainingRequest, vocabulary: int) -> None:
        super().__init__()
        width, blocks = shape.width, request.model.blocks
        self.multiplier = width / request.model.base_width
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(request.model.sequence, width)
        self.h = nn.ModuleList(_NanoBlock(width, shape.heads, shape.expert_size) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                hidden = name.startswith("h.")
                into_residual = 2 * blocks if name.endswith("proj.weight") else 1
                std = 0.02 / math.sqrt((self.multiplier if hidden else 1) * into_residual)
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Returns logits [B, S, V]."""
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSD = self.wte(tokens_BS) + self.wpe(positions_S)
        for block in self.h:
            x_BSD = block(x_BSD)
        logits_BSV: Tensor = self.lm_head(self.ln_f(x_BSD)) / self.multiplier
        return logits_BSV

    def groups(self) -> list[dict[str, Any]]:
        """Returns hidden matrices, whose learning rate falls with width; other matrices; gains, without decay."""
        of = dict(self.named_parameters())
        hidden = [p for name, p in of.items() if p.dim() == 2 and name.startswith("h.")]
        others = [p for name, p in of.items() if p.dim() == 2 and not name.startswith("h.")]
        return [
            {"params": hidden, "lr_scale": 1 / self.multiplier},
            {"params": others},
            {"params": [p for p in of.values() if p.dim() < 2], "weight_decay": 0.0},
        ]


def nano_gpt(_: Variant, request: TrainingRequest, vocabulary: int) -> NanoGPT:
    """Returns nanoGPT-mup's model at the request's size."""
    return NanoGPT(ModelShape.of(request.cell, request.model, vocabulary), request, vocabulary)


def sizes(model: nn.Module, request: TrainingRequest) -> dict[str, int]:
    """Returns parameters, active parameters and training FLOPs per token, counted like `model_size`."""
    config: Any = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    active = {name: p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters()}
    matmul = sum(active[name] for name, p in model.named_parameters() if p.dim() > 1 and not _LOOKUP.search(name))
    attention = 12 * request.model.blocks * request.cell.width * request.model.sequence
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": round(sum(active.values())),
        "flops_per_token": round(6 * matmul + attention),
    }
