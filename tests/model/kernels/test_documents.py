"""Packed documents: a packed sequence gives what its documents give one by one, and no more is computed or seen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from builders import make_model
from hetermoe_cli.model.kernels.causal import attend, has_flash
from hetermoe_cli.model.kernels.documents import find_documents
from hetermoe_cli.model.transformer import Transformer, initialise, named_tensors

torch.set_num_threads(1)
END, CPU = 0, torch.device("cpu")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # twice what kernels are off, or more
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=12, attention_heads=4, kv_heads=2, head_size=4)


def make(document_end: int | None) -> Transformer:
    model = Transformer(MODEL, document_end=document_end).double()
    initialise(model, MODEL, 0)
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            tensor.mul_(5.0 if tensor.dim() > 1 else 1.0)  # sharp attention, a decisive gate
    return model


def packed(*lengths: int, sequences: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and targets of documents of these lengths, their last token END."""
    total = sum(lengths)
    tokens = torch.randint(1, 256, (sequences * total + 1,), generator=torch.Generator().manual_seed(total))
    tokens[torch.tensor(lengths * sequences).cumsum(0) - 1] = END
    return tokens[:-1].view(sequences, total), tokens[1:].view(sequences, total)


def logits(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """[B * S, vocabulary]."""
    seen: list[Tensor] = []
    handle = model.dense.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(tokens, targets)
    handle.remove()
    return model.dense.head(seen[0]).flatten(0, 1)  # type: ignore[no-any-return]


def test_documents_by_hand() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 8], [0, 0, 9, 9, 0]])
    found = find_documents(tokens, END, CPU)
    assert found.lengths == [3, 2, 1, 1, 3]
    assert found.borders.tolist() == [0, 3, 5, 6, 7, 10]
    assert found.borders.dtype == torch.int32
    assert found.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_every_token_is_in_one_document(rows: list[list[int]]) -> None:
    found = find_documents(torch.tensor(rows), END, CPU)
    assert sum(found.lengths) == 6 * len(rows)
    assert found.borders.diff().tolist() == found.lengths
    for row, places in zip(rows, found.positions.tolist(), strict=True):
        position = 0
        for token, place in zip(row, places, strict=True):
            assert place == position
            position = 0 if token == END else position + 1


@pytest.mark.parametrize("lengths", [(12,), (1, 11), (3, 4, 5), (1,) * 12])
def test_a_packed_sequence_gives_what_its_documents_give_one_by_one(lengths: tuple[int, ...]) -> None:
    model, (tokens, targets) = make(END), packed(*lengths, sequences=2)
    alone = make(None)  # one document at a time needs no mask
    whole = logits(model, tokens, targets)
    parts = [part.split(lengths, dim=1) for part in (tokens, targets)]
    for sequence in range(2):
        for index, (document, follows) in enumerate(zip(*parts, strict=True)):
            start = 12 * sequence + sum(lengths[:index])
            expected = logits(alone, document[sequence : sequence + 1], follows[sequence : sequence + 1])
            found = whole[start : start + len(expected)]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_documents_one_by_one() -> None:
    (tokens, targets), lengths = packed(3, 4, 5), (3, 4, 5)
    together, alone = make(END), make(None)
    together(tokens, targets).backward()
    for document, follows in zip(tokens.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True):
        alone(document, follows).backward()
    for found, expected in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-11)


def test_without_a_mask_documents_see_each_other() -> None:
    tokens, targets = packed(3, 4, 5)
    joined, masked = logits(make(None), tokens, targets), logits(make(END), tokens, targets)
    torch.testing.assert_close(joined[:3], masked[:3], rtol=0, atol=1e-12)
    assert (joined[3:] - masked[3:]).abs().amax(dim=1).min() > 1e-3


def attention_inputs(
    device: str, dtype: torch.dtype, size: int, value_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 4, 64, size, dtype=torch.float64, generator=generator)
    return query.to(device, dtype), key.to(device, dtype), value[..., :value_size].to(device, dtype)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
    ends = (tokens == END).long()
    number = (ends.cumsum(1) - ends).to(query.device)
    mask = (number[:, :, None] == number[:, None, :]).tril()[:, None]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def test_attention_is_that_of_a_block_mask() -> None:
    tokens, _ = packed(10, 1, 30, 23, sequences=2)
    inputs = attention_inputs("cpu", torch.float64, 8)
    found = attend(*inputs, find_documents(tokens, END, CPU))
    torch.testing.assert_close(found, masked_attention(*inputs, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (64, 40), (12, 12)])
def test_attention_in_any_precision_is_that_of_a_block_mask(
    device: str, dtype: torch.dtype, size: int, value_size: int
) -> None:
    """Both of the same rounded inputs. On a card with FlashAttention over documents where it has it, else document by
    document."""
    tokens, _ = packed(10, 1, 30, 23, sequences=2)
    documents = find_documents(tokens, END, torch.device(device))
    inputs, tolerance = attention_inputs(device, dtype, size, value_size), TOLERANCES[dtype]
    results = []
    for wide, mixed in (
        (False, lambda q, k, v: attend(q, k, v, documents)),
        (True, lambda q, k, v: masked_attention(q, k, v, tokens)),
    ):
        leaves = [(x.float() if wide else x).detach().requires_grad_() for x in inputs]
        output = mixed(*leaves)
        output.float().square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [64, 12])
def test_cards_have_attention_over_documents(dtype: torch.dtype, size: int) -> None:
    modern = torch.cuda.get_device_capability() >= (8, 0)
    query, _, value = attention_inputs("cuda", dtype, size)
    assert has_flash(query, value) == (modern and dtype != torch.float32 and size == 64)
