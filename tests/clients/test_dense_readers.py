"""Models whose code reads the weights of their linear layers, made sparse: as with dense weights times the mask."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from g2gnet import G2GLinear, sparsify


def swin():
    """torchvision's, whose attention multiplies by ``qkv.weight`` itself."""
    model = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], 2.0, 0.0, 0.0, 0.0, num_classes=2)
    return model, {"x": torch.rand(2, 3, 32, 32)}


def timm_vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    return model, {"x": torch.rand(2, 3, 32, 32)}


def t5():
    """Asks for ``wo.weight.dtype``; its head is tied to the embeddings."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    tokens = torch.randint(40, (2, 7))
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "labels": tokens}


def bert():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(intermediate_size=32, **sizes, **dropout)
    return BertForSequenceClassification(config), {"input_ids": torch.randint(40, (2, 7)), "labels": torch.arange(2)}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": torch.rand(2, 5, 16)}


def results(model, inputs):
    output = model(**inputs)
    return [output] if isinstance(output, torch.Tensor) else [output["loss"], output["logits"]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [swin, timm_vit, t5, bert, encoder])
def test_a_sparse_model_is_the_dense_one_with_a_masked_weight(make, training):
    model, inputs = make()
    masked = copy.deepcopy(model)
    sparsify(model, block_size=4, generator=torch.Generator().manual_seed(0))
    replaced = {name: layer for name, layer in model.named_modules() if isinstance(layer, G2GLinear)}
    assert len(replaced) >= 4
    with torch.no_grad():
        for name, layer in replaced.items():
            masked.get_submodule(name).weight *= layer.mask.to_dense()
    found = []
    for each in (model, masked):
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            found.append(results(each.train(training), inputs))
    ours, expected = found
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if training:
        ours[0].sum().backward()
        expected[0].sum().backward()
        for name, layer in replaced.items():
            gradient = masked.get_submodule(name).weight.grad * layer.mask.to_dense()
            torch.testing.assert_close(layer.mask.unpack(layer.values.grad), gradient, rtol=1e-3, atol=1e-5)


def test_t5_keeps_its_tie_and_a_sparse_head_cannot_be_tied_in_silence():
    model, _ = t5()
    sparsify(model, block_size=4)
    assert model.lm_head.weight is model.shared.weight
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, G2GLinear)
    model, _ = bert()
    head = sparsify(nn.Linear(16, 40), block_size=4)
    with pytest.raises(AttributeError, match=r"weight cannot be assigned: .*G2GLinear.from_linear"):
        head.weight = model.bert.embeddings.word_embeddings.weight
