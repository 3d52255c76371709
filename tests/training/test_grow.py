"""A grown target computes what the smaller one did, and learns with all its parts."""

import pytest
import torch

from ssd_repro.errors import InputError
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.training.grow import grow, new_order


@pytest.fixture
def small():
    torch.manual_seed(0)
    lm = SpeechLM(small_qwen2(32, 64, 3, 4, 2, 20), 50).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.normal_(
                1.0 if "norm" in name else 0.0, 1.0 if "embed" in name else 0.2
            )  # as training leaves them
    return lm


@pytest.mark.parametrize("sizes", [(48, 96, 7, 6, 2), (64, 64, 3, 8, 4), (32, 64, 24, 4, 2), (32, 80, 3, 4, 2)])
def test_a_grown_target_has_the_same_logits_and_every_new_part_a_gradient(small, sizes):
    grown = grow(small, *sizes)
    text, speech = torch.randint(20, (2, 5)), torch.randint(50, (2, 9))

    def logits(lm):
        return lm(torch.cat((lm.model.embed_tokens(text), lm.speech_embedding(speech)), 1))

    with torch.no_grad():
        torch.testing.assert_close(logits(grown), logits(small), atol=1e-4, rtol=0)
    for _ in range(2):  # a new part that is read at random and written as zeros learns from the second step on
        logits(grown).logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter -= 0.01 * parameter.grad / (parameter.grad.norm() + 1e-9)
    for name, parameter in grown.named_parameters():
        rows = parameter.grad.flatten(1).abs().sum(0) if parameter.dim() > 1 else parameter.grad
        assert name.endswith("k_proj.bias") or rows.ne(0).float().mean() > 0.9, name  # softmax knows no key bias


def test_where_the_new_layers_stand():
    order = new_order(12, 24)
    assert [index for index, fresh in order if not fresh] == list(range(12))
    assert order[:3] == [(0, False), (1, False), (2, False)]  # the draft's bottom layers are the old ones
    assert [fresh for _, fresh in order[-6:]] == 5 * [True] + [False]  # its top layers are free to learn
    for old in range(1, 13):
        for layers in range(max(old, 2), 30):
            order = new_order(old, layers)
            assert len(order) == layers and [i for i, fresh in order if not fresh] == list(range(old))
            assert all(0 <= i < old for i, _ in order)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((16, 64, 3, 4, 2), "hidden is 16; a target of 32 can grow, not shrink"),
        ((32, 64, 2, 4, 2), "layers is 2; a target of 3"),
        ((64, 64, 3, 4, 2), "heads of 16, 2 for each key"),
        ((32, 64, 3, 4, 4), "heads of 8, 1 for each key"),
    ],
)
def test_what_cannot_grow_is_told(small, sizes, sentence):
    with pytest.raises(InputError, match=sentence):
        grow(small, *sizes)
