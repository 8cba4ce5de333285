"""What a model promises besides its outputs: independence of the batch, masks, vocabularies, backbones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import placeholder_vocabulary

from d2zero.model import D2Zero, ModelConfig, build
from d2zero.model.classifier import background_embedding
from d2zero.model.decoder import attention_mask, attention_masks
from d2zero.model.positions import pixel_centres, sine_positions
from d2zero.training.config import shapes
from d2zero_runtime import D2ZeroError, Vocabulary


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_batch_equals_its_images_one_by_one(small_model: D2Zero) -> None:
    images = [drawn(96, 96), drawn(70, 90, 1), drawn(96, 130, 2), drawn(96, 96, 3)]
    together = small_model.predict_raw(images)
    for row, image in enumerate(images):
        alone = small_model.predict_raw([image])
        height, width = (side // 4 for side in alone.padded_sizes[0])
        torch.testing.assert_close(together.class_logits[row], alone.class_logits[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(
            together.mask_logits[row, :, :height, :width], alone.mask_logits[0], atol=1e-4, rtol=0
        )
        assert together.padded_sizes[row] == alone.padded_sizes[0]


def test_equal_images_give_equal_rows(small_model: D2Zero) -> None:
    out = small_model.predict_raw([drawn(96, 96)] * 3)
    np.testing.assert_array_equal(out.class_logits[0], out.class_logits[2])
    np.testing.assert_array_equal(out.mask_logits[0], out.mask_logits[1])


def test_predictions_of_a_mixed_list_refer_to_each_image(small_model: D2Zero) -> None:
    images = [drawn(50, 80), drawn(120, 64, 1)]
    together = small_model.predict(images, score_threshold=0.0)
    for image, detections in zip(images, together, strict=True):
        assert detections.image_size == image.shape[:2]
        alone = small_model.predict([image], score_threshold=0.0)[0]
        np.testing.assert_allclose(detections.scores, alone.scores, atol=1e-5)


def test_raw_shapes(small_model: D2Zero) -> None:
    out = small_model.predict_raw([drawn(65, 97)])
    assert out.class_logits.shape == (1, 15, 37)
    assert out.mask_logits.shape == (1, 15, 24, 32)


def test_every_head_is_given_in_training(small_model: D2Zero) -> None:
    images = torch.randn(2, 3, 64, 64)
    heads = small_model(images, small_model.class_embeddings[:5], all_heads=True)
    assert [head.class_logits.shape for head in heads] == [(2, 15, 6)] * 4


def test_other_weights_are_not_the_files(small_model: D2Zero) -> None:
    small_model.checkpoint = "hash of a file"
    shorter = small_model.with_decoder_layers(1)
    assert shorter.checkpoint == "hash of a file"
    small_model.load_state_dict(small_model.state_dict())
    assert small_model.checkpoint == "" and small_model.segmenter().contract.checkpoint == ""
    assert shorter.train().checkpoint == ""


def test_embeddings_live_in_the_state(small_model: D2Zero) -> None:
    assert small_model.state_dict()["class_embeddings"].shape == (36, 64)
    assert small_model.to(torch.float64).class_embeddings.dtype == torch.float64


def test_vocabulary_can_be_replaced(small_model: D2Zero) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    small_model.set_vocabulary(Vocabulary(tuple("abcde"), rows, seen=np.array([True, True, False, False, False])))
    image = drawn(96, 96)
    out = small_model.predict_raw([image])
    assert out.class_logits.shape == (1, 15, 6)
    for mode in ("gzsis", "zsis", "gzsis-copy-paste"):
        detections = small_model.postprocess(out, [(96, 96)], [(48, 48)], mode)[0]
        assert set(detections.names) <= (set("cde") if mode == "zsis" else set("abcde"))


def test_vocabulary_of_another_width_or_encoder_is_refused(small_model: D2Zero) -> None:
    with pytest.raises(D2ZeroError, match="width 64, the vocabulary has 300"):
        small_model.set_vocabulary(placeholder_vocabulary())
    other = replace(small_model.vocabulary, source={"encoder": "word2vec"})
    with pytest.raises(D2ZeroError, match=r"shapes-attributes.*word2vec"):
        small_model.set_vocabulary(other)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_wrong_images_are_refused(small_model: D2Zero, image: np.ndarray) -> None:
    with pytest.raises(D2ZeroError, match=r"\(H, W, 3\) uint8"):
        small_model.predict_raw([image])


def test_no_images_and_wrong_counts_are_refused(small_model: D2Zero) -> None:
    with pytest.raises(D2ZeroError, match="empty list"):
        small_model.predict_raw([])
    out = small_model.predict_raw([drawn(32, 32)])
    with pytest.raises(D2ZeroError, match="2 input sizes"):
        small_model.postprocess(out, [(32, 32)] * 2, [(32, 32)])


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_any_timm_backbone_serves(name: str) -> None:
    options = {"img_size": 64} if name.startswith("swin") else {}
    config = replace(shapes().model, backbone=name, backbone_options=options)
    model = build(config, build_vocabulary()).eval()
    out = model.predict_raw([drawn(64, 64)])
    assert out.mask_logits.shape == (1, 15, 16, 16)


def build_vocabulary() -> Vocabulary:
    return Vocabulary(("a", "b"), np.eye(2, 64, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet5000"}, "no backbone 'resnet5000'"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_options": {}}, "needs"),
        ({"hidden_dim": 100}, "multiple of 32"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"semantic_dim": 30}, "semantic_dim must be a multiple"),
    ],
)
def test_impossible_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        build(replace(shapes().model, **change), build_vocabulary())


def test_configuration_survives_json() -> None:
    config = shapes().model
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(D2ZeroError, match="newer d2zero"):
        ModelConfig.from_dict({**config.to_dict(), "warp_drive": 1})


def test_a_query_blocked_everywhere_attends_everywhere() -> None:
    logits = torch.full((1, 3, 8, 8), -1.0)
    logits[0, 1, :4] = 1.0
    blocked = attention_mask(logits, (4, 4))
    assert blocked.shape == (1, 3, 16)
    assert not blocked[0, 0].any() and not blocked[0, 2].any()
    assert blocked[0, 1].tolist() == [False] * 8 + [True] * 8


def test_attention_masks_may_be_given(small_model: D2Zero) -> None:
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        heads = small_model(images, all_heads=True)
        last, own = heads[-1], attention_masks([head.mask_logits for head in heads], (96, 64))
        assert [mask.shape[2] for mask in own] == [3 * 2, 6 * 4, 12 * 8]
        assert torch.equal(small_model(images, attention_masks=own)[-1].mask_logits, last.mask_logits)
        own[0][1, 5, 2] ^= True
        other = small_model(images, attention_masks=own)[-1].mask_logits
    assert torch.equal(other[0], last.mask_logits[0]) and not torch.equal(other[1, 5], last.mask_logits[1, 5])


def test_each_image_decides_for_itself_whether_it_has_background() -> None:
    features = torch.rand(2, 4, 3, 3) + 0.1
    logits = torch.ones(2, 1, 3, 3)
    logits[1, 0, 0] = -1  # image 1 has background, image 0 has none
    together = background_embedding(features, logits)
    for row in (0, 1):
        alone = background_embedding(features[row : row + 1], logits[row : row + 1])
        torch.testing.assert_close(together[row], alone[0])
    expected = torch.nn.functional.normalize(features[0].mean((1, 2)), dim=0)
    torch.testing.assert_close(together[0], expected)


def test_positions_as_specified() -> None:
    found = sine_positions(2, 3, 8)
    for channel, row, column in ((0, 1, 0), (1, 0, 2), (5, 1, 1), (6, 0, 0)):
        axis, length, pair = (row, 2, channel) if channel < 4 else (column, 3, channel - 4)
        angle = 2 * np.pi * (axis + 1) / (length + 1e-6) / 10_000 ** (2 * (pair // 2) / 4)
        assert float(found[channel, row, column]) == pytest.approx((np.sin, np.cos)[pair % 2](angle), abs=1e-6)
    centres = pixel_centres([(1, 2), (2, 1)])
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
