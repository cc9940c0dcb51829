"""LanguageModel: one pipeline stage of a decoder-only model, from token ids to the summed loss.

Shapes: b sequences, s tokens each, h hidden size, v padded vocabulary. Activations are
sequence-first, [s, b, h]; [s/tp, b, h] under sequence parallelism. Under context parallelism s is
this rank's part of the sequence (`parallel.context_parallel`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.document_segments import DocumentSegments
from models.router_health import RouterHealth
from parallel.layers import vocab_parallel_linear_cross_entropy
from parallel.megatron import (
    ColumnParallelLinear,
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    ProcessGroupCollection,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)


class LossOutput(NamedTuple):
    """What the last stage gives for training: see `pretrain.loss` for the scalar made of it."""

    loss_sum: Tensor  # scalar with gradient: sum over valid tokens, in nats
    per_token_loss: Tensor  # [b, s] fp32, detached; masked tokens carry their loss too


class OutputProjection(ColumnParallelLinear):
    """Holds the output projection; calling it gives the weight, `shared` where that is not None.

    A call, and not a look at the attribute: overlapped parameter gathering waits for a parameter in
    a hook of the module's call, and would otherwise hand out what the last step has not updated.
    """

    def forward(self, shared: Tensor | None) -> Tensor:
        return self.weight if shared is None else shared


class LanguageModel(LanguageModule):
    """Embedding (first stage), transformer layers, and output layer with loss (last stage).

    The output projection and the cross-entropy are one operation over chunks of tokens
    (`parallel.layers.vocab_parallel_linear_cross_entropy`), so logits of a whole micro-batch never
    exist in training.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: TransformerBlockSubmodules,
        *,
        padded_vocab_size: int,
        share_embeddings_and_output_weights: bool,
        pre_process: bool,
        post_process: bool,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
        router_health: RouterHealth | None = None,
    ) -> None:
        super().__init__(config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.router_health = router_health  # what the routers of this chunk report to
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocab_size,
                max_sequence_length=0,  # positions are applied in attention
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config,
            spec=layers,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = OutputProjection(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's schedules with what the previous stage sent."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        documents: Tensor | None = None,
        reset_positions: bool = False,
        *,
        language_ids: Tensor | None = None,
        logits_at: int = -1,
    ) -> Tensor | LossOutput:
        """tokens, labels, loss_mask [b, s]; documents [b, s] int32, on the host, on every stage;
        language_ids [b], which routers count by.

        With documents no token attends to a document other than its own, and with reset_positions
        positions count from each document's first token in the sequence.

        Returns hidden states [s, b, h] on every stage but the last; there, a `LossOutput` when
        labels are given, else the logits of each sequence's token at `logits_at` [b, v] (fp32).

        Raises ValueError for documents under context parallelism.
        """
        if self.router_health is not None:
            self.router_health.language_ids = language_ids
            self.router_health.loss_mask = loss_mask
        segments = None
        if documents is not None:
            if self.config.context_parallel_size > 1:
                raise ValueError(
                    f"data.packing.reset_attention=true needs parallel.context_parallel_size=1, "
                    f"not {self.config.context_parallel_size}: a document that lies on several "
                    "ranks cannot be told from its neighbours yet"
                )
            segments = DocumentSegments(documents, reset_positions=reset_positions)
        hidden = self.embedding(tokens, position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=segments)
        if not self.post_process:
            return hidden
        hidden = self._gather_for_vocabulary(hidden)
        if labels is None:
            return self._logits(hidden[logits_at])
        assert loss_mask is not None
        return self._loss(hidden, labels, loss_mask)

    def output_weight(self) -> Tensor:
        """This rank's vocabulary shard of the output projection: [v/tp, h]."""
        shared = self.share_embeddings_and_output_weights and self.pre_process
        return self.output_layer(self.shared_embedding_or_output_weight() if shared else None)

    def _gather_for_vocabulary(self, hidden: Tensor) -> Tensor:
        """Every rank needs every token before the vocabulary-parallel projection: [s, b, h]."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def _loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> LossOutput:
        loss_sum, per_token = vocab_parallel_linear_cross_entropy(
            hidden.flatten(0, 1),
            self.output_weight(),
            labels.t().flatten(),
            loss_mask.t().flatten(),
            tp_group=self.tp_group,
            accumulate_in_forward=self.training,  # the schedules differentiate loss_sum as it is
        )
        return LossOutput(loss_sum, per_token.unflatten(0, hidden.shape[:2]).t())

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.output_weight())
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group).float()
