"""Masks, layouts and variants of open_clip's towers, and its patch dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import farl_kernels
from farl_kernels.integrations import torch_modules
from farl_kernels.integrations.open_clip import is_causal_mask


@pytest.fixture
def attention_calls(monkeypatch):
    """The `causal` of every fused attention."""
    calls = []

    def recorded(qkv, *, causal=False, **options):
        calls.append(causal)
        return farl_kernels.masked_attention_packed(qkv, causal=causal, **options)

    monkeypatch.setattr(torch_modules, "masked_attention_packed", recorded)
    return calls


def test_causal_mask_is_recognised(of_library, attention_calls) -> None:
    subject = of_library("open_clip", "ViT-B-16")
    report = subject.accelerate(subject.model)
    assert report.notes == ["attn_mask is the causal mask of 2 blocks, known by identity"]
    subject.run(subject.model)
    assert attention_calls == [False, False, True, True]
    # Also after the buffer was replaced, as by a move to another device.
    subject.model.to(torch.float32)
    subject.run(subject.model)
    assert attention_calls[4:] == [False, False, True, True]


def test_causal_mask_is_recognised_by_the_compiler(of_library) -> None:
    """Nothing in the graph uses the mask: the identity of tensors is known while tracing."""
    subject = of_library("open_clip", "ViT-B-16")
    subject.accelerate(subject.model)
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    want = subject.run(subject.model)[0]
    compiled = torch.compile(subject.model.encode_text, fullgraph=True, backend=record)
    text = compiled(subject.inputs["text"])
    assert torch.allclose(text, subject.model.encode_text(subject.inputs["text"]), rtol=1e-12)
    assert want.isfinite().all() and len(graphs) == 1
    assert not any(node.users for node in graphs[0].graph.nodes if "attn_mask" in str(node.target))


@pytest.mark.parametrize("owner", ["other tensor", "changed"])
def test_other_masks_run_as_before(owner, of_library, check_equal, attention_calls) -> None:
    """A mask that is not the tower's own is applied as it is."""
    subject = of_library("open_clip", "ViT-B-16")
    other = subject.model.attn_mask.clone()
    other[:, 0] = float("-inf")  # the first token is hidden from all others
    other[0, 0] = 0.0
    if owner == "changed":
        subject.model.attn_mask = other
        truth = subject.run(subject.model)
        report = subject.accelerate(subject.model)
        assert report.notes == ["attn_mask is not a causal mask: attention under it runs as before"]
    else:
        plain = subject.run(subject.model)
        subject.model.attn_mask = other
        truth = subject.run(subject.model)
        assert not torch.allclose(plain[0], truth[0])
        subject.model.attn_mask = other.fill_(float("-inf")).triu_(1)
        subject.accelerate(subject.model)
        other = truth_mask(other)
        tower = subject.model.transformer
        inner = type(tower).forward
        tower.forward = lambda x, attn_mask=None: inner(tower, x, attn_mask=other)
    check_equal(subject.run(subject.model), truth)
    assert True not in attention_calls


def truth_mask(like):
    mask = torch.full_like(like, float("-inf")).triu(1)
    mask[:, 0] = float("-inf")
    mask[0, 0] = 0.0
    return mask


def test_is_causal_mask() -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    assert is_causal_mask(mask)
    for other in (torch.zeros(4, 4), mask.mT, mask[:3], mask[None], torch.full((4, 4), float("-inf")).triu(2)):
        assert not is_causal_mask(other)


def test_copied_block_stays_with_its_tower(of_library) -> None:
    import copy

    subject = of_library("open_clip", "ViT-B-16")
    subject.accelerate(subject.model)
    block = copy.deepcopy(subject.model.transformer.resblocks[0])
    assert block.causal_mask.owner is subject.model
    model = copy.deepcopy(subject.model)
    assert model.transformer.resblocks[0].causal_mask.owner is model


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_batch_second(tower, of_library, check_equal, attention_calls) -> None:
    subject = of_library("open_clip", "ViT-B-16")
    transformer = subject.model.visual.transformer if tower == "visual" else subject.model.transformer
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    truth = subject.run(subject.model)
    subject.accelerate(subject.model)
    check_equal(subject.run(subject.model), truth)
    assert attention_calls == [False, False, True, True]


@pytest.mark.parametrize(
    "options",
    [
        {"text_cfg": {"no_causal_mask": True}},
        {"text_cfg": {"ls_init_value": 0.3}},
        {"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}},
        {"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 4}},
        {"vision_cfg": {"qk_norm": True}},
    ],
    ids=str,
)
def test_options(options, of_library, check_equal) -> None:
    subject = of_library("open_clip", "ViT-B-16", **options)
    truth = subject.run(subject.model)
    report = subject.accelerate(subject.model)
    check_equal(subject.run(subject.model), truth)
    if "attentional_pool" in str(options):
        assert {x.kind for x in report.left} == {"AttentionalPooler", "MultiheadAttention"}
    elif "qk_norm" in str(options):
        assert {x.kind for x in report.left} == {"CustomResidualAttentionBlock", "Attention"}
    else:
        assert not report.left, report


def test_timm_tower(of_library, check_equal) -> None:
    import timm

    subject = of_library("open_clip", "ViT-B-16")
    options = {"depth": 1, "img_size": 32, "embed_dim": 48, "num_heads": 3, "num_classes": 512}
    subject.model.visual = timm.create_model("vit_base_patch16_224", **options).double()
    truth = subject.run(subject.model)
    report = subject.accelerate(subject.model)
    assert any(x.name == "visual.blocks.0.attn" for x in report.replaced) and not report.left
    check_equal(subject.run(subject.model), truth)


def test_padding_masks_run_as_before(check_equal, of_library, attention_calls) -> None:
    """A class token at the end (CoCa) makes a mask of causal order and padding in every call."""
    import open_clip

    subject = of_library("open_clip", "ViT-B-16")
    text = open_clip.transformer.TextTransformer(20, 100, 48, 3, 2, embed_cls=True, output_dim=8).double()
    ids = subject.inputs["text"]
    ids[:, 12:] = 0
    subject = type(subject)(subject.accelerate, text, {"text": ids})
    truth = subject.run(text)
    report = subject.accelerate(text)
    assert report.notes == ["attn_mask is combined with a padding mask in every call: that attention runs as before"]
    check_equal(subject.run(text), truth)
    assert attention_calls == []


class TestMultiheadAttention:
    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(12, 3, batch_first=True).double()
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
        return attention

    @staticmethod
    def fuse(attention):
        attention.__class__ = torch_modules.MultiheadAttention
        return attention

    @pytest.mark.parametrize(
        ("options", "fused"),
        [
            ({"need_weights": False}, True),
            ({"need_weights": True}, False),
            ({"need_weights": True, "average_attn_weights": False}, False),
            ({"need_weights": False, "attn_mask": torch.ones(5, 5).tril() == 0}, False),
            ({"need_weights": False, "attn_mask": torch.ones(5, 5).tril() == 0, "is_causal": True}, True),
            ({"need_weights": False, "key_padding_mask": torch.arange(5).expand(2, 5) > 2}, True),
            ({"need_weights": False, "key_padding_mask": torch.randn(2, 5).double()}, False),
        ],
        ids=["plain", "weights", "all weights", "unknown mask", "causal mask", "padding", "padding by numbers"],
    )
    @pytest.mark.parametrize("grad", [True, False])
    def test_calls(self, attention, options, fused, grad, attention_calls) -> None:
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            want = attention.eval()(x, x, x, **options)
            got = self.fuse(attention)(x, x, x, **options)
        assert torch.allclose(got[0], want[0], rtol=1e-12)
        assert (got[1] is None) == (want[1] is None)
        assert got[1] is None or torch.equal(got[1], want[1])
        assert len(attention_calls) == fused

    def test_cross_attention_and_unbatched(self, attention, attention_calls) -> None:
        x, y = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
        calls = [(x, y, y), (x[0], x[0], x[0])]
        want = [attention(*call, need_weights=False)[0] for call in calls]
        self.fuse(attention)
        assert all(torch.equal(attention(*c, need_weights=False)[0], w) for c, w in zip(calls, want, strict=True))
        assert attention_calls == []

    def test_causal_without_mask_is_the_same_error(self, attention) -> None:
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="attn_mask"):
            self.fuse(attention)(x, x, x, need_weights=False, is_causal=True)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"dropout": 0.1}, "dropout > 0"),
            ({"kdim": 4}, "other widths"),
            ({"add_bias_kv": True}, "appends"),
            ({"add_zero_attn": True}, "appends"),
        ],
    )
    def test_left(self, options, reason) -> None:
        assert reason in str(torch_modules.multihead_attention_rule(nn.MultiheadAttention(12, 3, **options)))


class TestPatchDropout:
    @pytest.mark.parametrize("exclude_first_token", [True, False])
    def test_distribution(self, exclude_first_token) -> None:
        """Distinct patches in their places, every patch and every order equally often; the class token always."""
        from open_clip.transformer import PatchDropout

        from farl_kernels.integrations import open_clip_modules

        torch.manual_seed(0)
        module = PatchDropout(0.5, exclude_first_token).train()
        tokens, first = 6 + exclude_first_token, int(exclude_first_token)
        x = torch.arange(tokens).expand(20000, tokens)[:, :, None].double().requires_grad_()
        want = module(x)
        module.__class__ = open_clip_modules.PatchDropout
        got = module(x)
        assert got.shape == want.shape == (20000, 3 + first, 1)
        if exclude_first_token:
            assert (got[:, 0] == 0).all()
        patches = got[:, first:, 0].detach().long()
        assert all(len(set(row)) == 3 for row in patches[:1000].tolist())
        for place in range(3):
            counts = torch.bincount(patches[:, place] - first, minlength=6).double()
            # 5 degrees of freedom: 20.5 is passed by 999 of 1000.
            assert ((counts - 20000 / 6) ** 2 / (20000 / 6)).sum() < 20.5
        got.sum().backward()
        assert x.grad is not None and x.grad.sum() == got.numel()

    def test_in_a_model(self, of_library) -> None:
        subject = of_library("open_clip", "ViT-B-16", vision_cfg={"patch_dropout": 0.5})
        want = subject.run(subject.model.eval())[0]
        report = subject.accelerate(subject.model)
        assert any(x.kind == "PatchDropout" for x in report.replaced)
        assert torch.allclose(subject.run(subject.model)[0], want, rtol=1e-12)
        lengths = []
        subject.model.visual.ln_pre.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
        dropped, grads = subject.run(subject.model.train())
        # The class token and two of four patches.
        assert lengths == [3] and not torch.allclose(dropped, want)
        assert all(grad.isfinite().all() for grad in grads.values())
        report.undo()
        assert type(subject.model.visual.patch_dropout).__module__ == "open_clip.transformer"
