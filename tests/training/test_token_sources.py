"""Tokens of a cache and of images are the same; evaluation looks at all classes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from tests.training.data.pictures import write_folder
from tests.training.token_cache_util import tiny_vae
from var_fast.errors import UserError
from var_fast.training.data import Augmentation, open_images
from var_fast.training.ranks import Ranks
from var_fast.training.token_cache import TokenCache
from var_fast.training.token_sources import CachedTokens, EncodedImages
from var_fast.training.write_token_cache import write_token_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "tokens"
    write_token_cache(folder, out, tiny_vae(), batch=4, shard_images=4)
    return TokenCache.open(out)


def images_of(folder, vae, **options):
    train = open_images(folder, "train")
    val = open_images(folder, "val", classes=train.classes)
    return EncodedImages(train, val, Augmentation(vae.quantize.v_patch_nums[-1] * vae.downsample), **options)


def test_held_out_tokens_are_those_of_the_centre_whichever_the_source(folder, cache):
    vae = cache.tokenizer()
    for limit in (None, 4):
        from_cache = CachedTokens(cache, limit).held_out(vae, Ranks())
        from_images = images_of(folder, vae, held_out_images=limit).held_out(vae, Ranks())
        assert torch.equal(from_cache[0], from_images[0].long()) and torch.equal(from_cache[1], from_images[1])
    assert from_cache[1].tolist() == [0, 0, 1, 2]  # 4 of 6: of all three classes


def test_batches_have_the_same_labels_in_the_same_order(folder, cache):
    vae = cache.tokenizer()
    made = [
        list(islice(source.batches(3, Ranks(), 4, 2, seed=1), 4))
        for source in (CachedTokens(cache), images_of(folder, vae))
    ]
    for ours, theirs in zip(*made):
        assert [part.label_B.tolist() for part in ours] == [part.label_B.tolist() for part in theirs]
        assert len(ours) == 2 and ours[0].tokens_BL.shape == (2, sum(pn * pn for pn in vae.quantize.v_patch_nums))
        assert theirs[0].images_u8.dtype == torch.uint8
        tokens_BL, label_B = images_of(folder, vae).tokens_of(theirs[0], vae)
        assert tokens_BL.shape == ours[0].tokens_BL.shape and torch.equal(label_B, theirs[0].label_B)


def test_other_data_is_told_by_the_facts(folder, cache, tmp_path):
    vae = cache.tokenizer()
    other = write_folder(tmp_path / "other", per_class=4)
    assert images_of(folder, vae).facts() == images_of(folder, vae).facts() != images_of(other, vae).facts()
    write_token_cache(folder, tmp_path / "tokens", vae, batch=4, shard_images=4, crops=2)
    assert CachedTokens(cache).facts() != CachedTokens(TokenCache.open(tmp_path / "tokens")).facts()


def test_unreadable_validation_pictures_are_named_and_no_others_lost(tmp_path):
    folder, vae = write_folder(tmp_path / "pictures"), tiny_vae()
    for path in sorted((folder / "val").rglob("*.png"))[:3]:
        path.write_bytes(b"")
    source = images_of(folder, vae)
    assert len(source.held_out(vae, Ranks())[1]) == 3 and len(source.skipped) == 3
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 6 images can be read"):
        images_of(folder, vae).held_out(vae, Ranks())
