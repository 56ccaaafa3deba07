"""MemoryModel: bytes that a rank holds at the turn from forward to backward, when a window's activations are alive."""

from functools import cached_property
from itertools import pairwise

from hetermoe_cli.cost.curves import Cost
from hetermoe_cli.cost.device import STATE_BYTES, DeviceCost, ExpertRows
from hetermoe_cli.spec.layout import Span
from hetermoe_cli.spec.model import ModelConfig, logit_tokens
from hetermoe_cli.spec.plan import Memory
from hetermoe_cli.spec.profile import BYTES_PER_ELEMENT
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

_WIDE_BYTES = 4  # what gradients of fp16 and bf16 are added up in
_NARROW_NORM = 8  # times its input: what the backward of a norm in fp16 or bf16 has at once on a CPU


class MemoryModel:
    """Bytes of one model and training spec. Each part is linear in what a device holds, so that the MILP can use it as
    it is. Tensors are named as in runtime/modules/stage.py."""

    model: ModelConfig
    train: TrainSpec
    row_bytes: int  # of a token's row
    groups: int = 1  # that train side by side, as far as is known, and share out their states if this one does

    def rows_per_expert(self, sequences: float) -> float:
        """Rows that each expert gets from `sequences` sequences under a balanced router."""
        return sequences * self.train.sequence_length * self.model.top_k / self.model.experts

    def head_cost(self, device: DeviceCost, sequences: float) -> Cost:
        """Last combine, final norm, head and loss for `sequences` sequences."""
        return device.head(sequences * self.train.sequence_length)

    def attention_cost(self, device: DeviceCost, sequences: float, layer: int) -> Cost:
        """Attention stage of `layer` for `sequences` sequences; the first one runs the dense layers too."""
        attention = device.attention(sequences)
        if layer or not self.model.dense_layers:
            return attention
        return Cost(*(own + dense for own, dense in zip(attention, self.dense_cost(device, sequences), strict=True)))

    def dense_cost(self, device: DeviceCost, sequences: float) -> Cost:
        """All dense layers together."""
        if device.dense is None:
            return Cost(0.0, 0.0, 0.0)
        return Cost(*(self.model.dense_layers * value for value in device.dense(sequences)))

    def attending_seconds(self, device: DeviceCost, sequences: float) -> float:
        """All attention stages and the head, forward and backward, nothing computed again."""
        stages = self.model.layers * sum(device.attention(sequences)[:2]) + sum(self.dense_cost(device, sequences)[:2])
        return stages + sum(self.head_cost(device, sequences)[:2])

    def state_share(self, schedule: ScheduleChoice, holders: int) -> float:
        """Of experts that `holders` ranks of a group hold, what each of them steps, with masters and moments."""
        return 1 / (holders * self.groups) if schedule.shares_states else 1.0

    def dense_share(self, schedule: ScheduleChoice, attending: int) -> float:
        """The same of the dense part, of which a fully sharded one is shared out within its group."""
        return 1 / attending if schedule.dense_state == "full" else self.state_share(schedule, attending)

    def dense_of(self, span: Span | None) -> int:
        """Dense parameters of a pipeline stage; of the whole model without one."""
        if span is None:
            return self.model.dense_parameters
        return sum([self.segment_parameters(layer) for layer in range(span.first, span.end + span.has_head)])

    @property
    def head_parameters(self) -> int:
        """Of norm and head."""
        return self.segment_parameters(self.model.layers)

    def dense_state_bytes(
        self, schedule: ScheduleChoice, attending: int, span: Span | None = None
    ) -> tuple[float, float, float]:
        """Bytes (weights, gradients, optimizer) of the dense part on each of `attending` ranks.

        Of a fully sharded one the segment at work and the next are whole (schedule/gathers.py), and so are the
        gradients of the one at work while those before it are scattered. A narrow rank's share of the weights is its
        masters.
        """
        state, dense, sizes = schedule.dense_state, self.dense_of(span), STATE_BYTES[self.train.precision]
        weights, gradients, optimizer = (dense * size for size in sizes)
        if state != "full" or attending == 1:
            return weights, gradients, optimizer * self.dense_share(schedule, attending)
        whole = self._largest_neighbours
        own = weights / attending if sizes[0] >= _WIDE_BYTES else 0.0
        return own + whole * sizes[0], gradients / attending + whole * sizes[1], optimizer / attending

    @cached_property
    def _largest_neighbours(self) -> int:
        """Parameters of the largest segment and its neighbour."""
        segments = [self.segment_parameters(layer) for layer in range(self.model.layers + 1)]
        return max(map(sum, pairwise(segments)))

    def segment_parameters(self, layer: int) -> int:
        """Shared dense parameters whose gradients the layer's last backward completes; model.layers: the head's."""
        model = self.model
        embedding = model.hidden_size * model.vocab_size
        if layer == model.layers:
            return model.edge_parameters - embedding
        return model.attention_layer_parameters if layer else model.first_stage_parameters + embedding

    def expert_activation_bytes(self, device: DeviceCost, rows: float, schedule: ScheduleChoice) -> float:
        """Kept from forward to backward by one expert on `rows` rows of one micro-batch: what autograd saved with the
        rows themselves, only these, or nothing. Its outputs are sent and dropped."""
        if schedule.sends_again:
            return 0.0
        return rows * self.row_bytes if schedule.recompute_experts else device.expert(rows).saved_bytes

    def border_bytes(self, sequences: float, tensors: int) -> float:
        """So many tensors of a micro-batch's tokens, [T, H] each."""
        return tensors * sequences * self.train.sequence_length * self.row_bytes

    def attention_activation_bytes(self, device: DeviceCost, sequences: int, recompute: bool) -> float:
        """Kept by one attention stage for one micro-batch: with recompute only what it reads, else what autograd saved
        with that."""
        return self.border_bytes(sequences, 1) if recompute else device.attention(sequences).saved_bytes

    def attention_kept_bytes(
        self, device: DeviceCost, sequences: int, recompute: bool, span: Span | None = None
    ) -> float:
        """Kept by an attending device for one micro-batch, all its layers together.

        To this comes the gradient of what the head read, or of what a pipeline stage gave away, which waits for the
        last stage. What dense layers save is kept unless they are computed again.
        """
        each, first = self.attention_activation_bytes(device, sequences, recompute), not span or not span.first
        dense = self.dense_cost(device, sequences).saved_bytes if first and not recompute else 0.0
        layers = len(span.layers) if span else self.model.layers
        return layers * each + dense + self.border_bytes(sequences, 1)

    def transient_bytes(
        self, device: DeviceCost, sequences: int, schedule: ScheduleChoice, span: Span | None = None
    ) -> float:
        """Largest working set of a single attention or head task of an attending device, beside what is kept.

        Attention: what is saved when the first stage runs again. Where gradients are narrower than fp32, those of the
        part at work are in fp32 beside (`Gradients.fold`). Where rows are sent again, stages that ran for that wait for
        their gradients, those of a whole window of one layer. Only the first pipeline stage has dense layers, and only
        the last one the head.
        """
        if not sequences:
            return 0.0
        layer = span.first if span else 0
        largest = self.model.attention_layer_parameters if layer else self.model.first_stage_parameters
        stage = float(self._narrow(device) * _WIDE_BYTES * largest)
        again = max(0.0, self.attention_cost(device, sequences, layer).saved_bytes - self.border_bytes(sequences, 1))
        if schedule.recompute_attention:
            stage += again
        head = 0.0 if span and not span.has_head else self.head_transient_bytes(device, sequences)
        return max(head, stage) + schedule.sends_again * schedule.window * again

    def head_transient_bytes(self, device: DeviceCost, sequences: float) -> float:
        """Working set of the head's task: what it saves without its inputs, the gradient of its matrix, and the norm of
        its inputs, that one's gradient, and logits of some tokens, or the norm's own backward."""
        inputs = self.border_bytes(sequences, 1)
        matrix, narrow = self.model.hidden_size * self.model.vocab_size, self._narrow(device)
        # of the matrix: its new gradient, and in fp32 that and the sum of those before
        head = float(matrix * (self._element_bytes(device) + narrow * 2 * _WIDE_BYTES))
        head += max(0.0, self.head_cost(device, sequences).saved_bytes - inputs)
        norm = _NARROW_NORM if device.on_cpu and narrow else 2  # model/layers/norm.py
        return head + max(norm * inputs, 2 * inputs + self._logit_bytes(device, sequences))

    def expert_transient_bytes(self, device: DeviceCost, rows: float, schedule: ScheduleChoice) -> float:
        """Working set of one expert of a layer's backward, beside what is kept, for its `rows`; all that a rank holds
        of the layer are at work together. fp32 gradients as in `transient_bytes`.

        On a CPU: what is saved when it runs again, the activation, and the gradients of gate and up.
        Else what is saved when it runs again, or after that is used up its gradient, which autograd stacks with those
        of the other experts of the layer: two thirds of it (gate_up) exist twice for a moment.
        """
        saved, size, narrow = device.expert(rows).saved_bytes, self.model.expert_parameters, self._narrow(device)
        kept, wide = self.expert_activation_bytes(device, rows, schedule), narrow * _WIDE_BYTES * size
        if device.on_cpu:
            return wide + max(saved, kept) - kept + rows * self.activation_row_bytes(device)
        stacked = self._element_bytes(device) * (1 if narrow else 5 / 3) + narrow * 2 / 3 * _WIDE_BYTES
        return wide + max(saved, kept, stacked * size) - kept

    def activation_row_bytes(self, device: DeviceCost) -> float:
        """Of a row at work in an expert's backward, on a CPU; elsewhere in `expert_task_bytes`."""
        return float(device.on_cpu * 3 * self.model.ffn_size * self._element_bytes(device))

    def expert_task_bytes(self, device: DeviceCost, rows: float) -> float:
        """What a rank that holds experts needs once, however many. On a CPU a narrow gradient of gate_up and its fp32
        copy, which are added to the layer's (`Groups.to_weight`); else what the task of a single expert on `rows`
        computes and drops, about as much as it saves."""
        if not device.on_cpu:
            return device.expert(rows).saved_bytes
        both = self._element_bytes(device) + _WIDE_BYTES
        return self._narrow(device) * 2 / 3 * both * self.model.expert_parameters

    def _logit_bytes(self, device: DeviceCost, sequences: float) -> float:
        """Of as many tokens as have them at a time (model/kernels/head_loss.py): as they come, and probabilities in
        fp32 or wider, for which narrow ones are made wide first (but for fp16 on CUDA)."""
        tokens = min(sequences * self.train.sequence_length, logit_tokens(self.model.vocab_size))
        element, copies = self._element_bytes(device), 1 + self._narrow(device)
        return tokens * self.model.vocab_size * (element + copies * max(element, _WIDE_BYTES))

    def _element_bytes(self, device: DeviceCost) -> int:
        return BYTES_PER_ELEMENT[self.train.precision_of(device.type)]

    def _narrow(self, device: DeviceCost) -> bool:
        return self._element_bytes(device) < _WIDE_BYTES

    def buffer_bytes(
        self, sequences_per_micro_batch: int, sequences: int, hosted_share: float, schedule: ScheduleChoice
    ) -> float:
        """Messages in flight: rows of the own tokens each way, and rows for a share of all experts. A host's working
        set is one of them; the gradients of a whole window may wait for it, as heads are done before experts. Where
        they bring rows with them, they count where they come from as well. Woven passes have messages of two windows.
        """
        waiting = (1 + schedule.sends_again) * schedule.window
        own = waiting if schedule.sends_again else 1
        rows = (1 + own) * sequences + (1 + waiting) * hosted_share * sequences_per_micro_batch
        rows *= 2 if schedule.passes == "woven" else 1
        return rows * self.train.sequence_length * self.model.top_k * self.row_bytes

    def memory(
        self,
        device: DeviceCost,
        *,
        sequences: int,
        sequences_per_micro_batch: int,
        schedule: ScheduleChoice,
        hosted: list[int],
        replicated: list[int],
        rows: ExpertRows | None = None,
        attending: int = 1,
        stepped: float,
        windows: float,
        on_shift: float = 1.0,
        span: Span | None = None,
        head: float | None = None,
    ) -> Memory:
        """Bytes of one rank under a balanced router, or where its experts get `rows`.

        `hosted` and `replicated`: experts per layer. `attending`: ranks of the group that do, for a sharded dense part.
        `stepped`: parameters whose masters and moments the rank holds. `windows`: those alive at once. `on_shift`: of
        a window's micro-batches, the share that it attends to. `span`: where it holds a pipeline stage only. `head`:
        of how many sequences it computes the head, where ranks have other tokens there than they attend to.
        """
        held = sum(hosted) + (sum(replicated) if sequences else 0)
        dense = self.dense_state_bytes(schedule, attending, span) if sequences else (0.0, 0.0, 0.0)
        sizes = STATE_BYTES[self.train.precision]
        held_parameters = held * self.model.expert_parameters + (self.head_parameters if head else 0)
        weights, gradients = (held_parameters * sizes[kind] + dense[kind] for kind in (0, 1))
        expected, own = self.rows_per_expert(sequences_per_micro_batch), self.rows_per_expert(sequences)
        if rows:
            each = [*rows.hosted, *rows.replicated]
            kept = sum(self.expert_activation_bytes(device, count, schedule) for count in each)
            largest = max((self.expert_task_bytes(device, count) for count in each), default=0.0)
            share = rows.largest_share
            busiest = share * self.model.experts * expected / max([1, *hosted])
        else:
            kept = sum(hosted) * self.expert_activation_bytes(device, expected, schedule)
            kept += sum(replicated) * self.expert_activation_bytes(device, own, schedule)  # no rows where none attends
            largest = self.expert_task_bytes(device, expected) * bool(held)
            share, busiest = max(hosted, default=0) / self.model.experts, expected
        if sequences:
            kept += on_shift * self.attention_kept_bytes(device, sequences, schedule.recompute_attention, span)
        peak = self.transient_bytes(device, sequences, schedule, span)
        peak = max(peak, self.head_transient_bytes(device, head) if head else 0.0) + largest
        peak += max(hosted, default=0) * self.expert_transient_bytes(device, busiest, schedule)
        if sequences:  # as if the layer with most copies were the one that hosts most: linear in both
            peak += max(replicated, default=0) * self.expert_transient_bytes(device, own, schedule)
        buffers = self.buffer_bytes(sequences_per_micro_batch, sequences, share, schedule)
        if span:  # hidden states and gradients of two windows, to and from each stage beside; woven, three may wait
            waiting = 3 if schedule.passes == "woven" else 2
            buffers += self.border_bytes(sequences, 2 * waiting * span.neighbours * schedule.window)
        if head is not None:  # hidden states of a window on their way to the head, and their gradients
            buffers += self.border_bytes(sequences * (not span or not span.ahead) + head, 2 * schedule.window)
        return Memory(
            weights_bytes=int(weights),
            gradients_bytes=int(gradients),
            optimizer_bytes=int(stepped * sizes[2]),
            activations_bytes=int(windows * schedule.window * kept + peak),
            buffers_bytes=int(buffers),
            framework_bytes=device.framework_bytes,
            capacity_bytes=device.memory_bytes,
        )
