"""What reads images, and vision-language models loaded from folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from shared.config.schema import ModelTable
from shared.engines.checkpoint import checkpoint_tensors
from shared.engines.folder import write_folder
from shared.models import ImageError, ModelError, load_images, load_model, load_skeleton, load_tokenizer
from shared.models.images import ImageReader
from shared.weights import load_into, manifest_of
from tests.engines.families import IMAGE, image, image_prompt, reader, tiny, tokenizer
from tests.staged import stage

MODEL = tiny("qwen2_5_vl")


def known() -> ImageReader:
    taken = reader(MODEL)
    assert taken is not None
    return taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vl")
    write_folder(MODEL, tokenizer(), made, known())
    MODEL.save_pretrained(made)
    return made


@pytest.mark.parametrize("size", [(56, 84), (3, 90), (300, 90), (61, 133), (1, 1), (2000, 1500)])
def test_pixels_and_tokens_are_those_of_hugging_faces_processor(size: tuple[int, int]) -> None:
    picture = image(*size)
    wanted = known().processor(images=[Image.fromarray(picture)], return_tensors="pt")
    tokens = int(wanted["image_grid_thw"].prod()) // 4
    prompt = known().expand([5, IMAGE, 6], [picture])
    assert prompt == [5, *[IMAGE] * tokens, 6]
    pixels = known().read(prompt, [picture])
    assert pixels is not None
    assert torch.equal(pixels.values, wanted["pixel_values"])
    assert torch.equal(pixels.grids, wanted["image_grid_thw"])
    assert pixels.places == ((1, 1 + tokens),)


def test_positions_are_those_of_the_model() -> None:
    images = [image(84, 140), image(112, 56, 1), image(56, 56, 2)]
    prompt = image_prompt(MODEL, images)
    pixels = known().read(prompt, images)
    assert pixels is not None
    ids = torch.tensor([prompt])
    types = (ids == IMAGE).int()
    expected, offset = MODEL.model.get_rope_index(ids, types, image_grid_thw=pixels.grids)
    found = pixels.positions(len(prompt) + 4, known().merge)
    assert torch.equal(found[:, : len(prompt)], expected[:, 0])
    behind = torch.arange(len(prompt), len(prompt) + 4) + offset[0]
    assert torch.equal(found[:, len(prompt) :], behind.expand(3, -1))


def test_equal_pixels_in_another_grid_have_another_name_and_equal_images_the_same() -> None:
    plain = np.full((56, 112, 3), 30, dtype=np.uint8)
    pictures = [plain, plain.transpose(1, 0, 2).copy(), plain.copy(), image(56, 112)]
    pixels = known().read(image_prompt(MODEL, pictures), pictures)
    assert pixels is not None
    first, turned, again, other = pixels.names()
    assert first == again
    assert len({first, turned, other}) == 3


def test_a_prompt_without_one_image_token_an_image_is_not_expanded() -> None:
    with pytest.raises(ImageError, match=r"one image token \(50\) in the prompt for each image, got 2 for 1 images"):
        known().expand([IMAGE, 4, IMAGE], [image(56, 56)])


def test_a_folder_gives_model_skeleton_tokenizer_and_reader(folder: Path) -> None:
    table = ModelTable(path=str(folder))
    loaded = load_model(table, 0, weights=True)
    assert manifest_of(load_skeleton(table)) == manifest_of(loaded) == manifest_of(MODEL)
    assert stage(loaded).digest == stage(MODEL).digest
    assert load_tokenizer(table).convert_tokens_to_ids("<|image_pad|>") == IMAGE
    taken = load_images(table)
    assert taken is not None
    assert taken.token == IMAGE
    assert taken.expand([IMAGE], [image(84, 112)]) == [IMAGE] * 12


def test_the_staged_weights_hold_the_vision_tower(folder: Path) -> None:
    bare = load_model(ModelTable(path=str(folder)), 0, weights=False)
    names = {spec.name for spec in manifest_of(bare)}
    assert names == set(dict(MODEL.named_parameters()))
    assert "model.visual.merger.mlp.2.weight" in names
    load_into(bare, stage(MODEL).tensors)
    picture = image(84, 112)
    prompt = image_prompt(MODEL, [picture])
    pixels = known().read(prompt, [picture])
    assert pixels is not None
    inputs = {
        "input_ids": torch.tensor([prompt]),
        "pixel_values": pixels.values,
        "image_grid_thw": pixels.grids,
        "mm_token_type_ids": (torch.tensor([prompt]) == IMAGE).int(),
    }
    with torch.no_grad():
        assert torch.equal(bare(**inputs).logits, MODEL(**inputs).logits)


def test_engines_get_the_names_that_published_checkpoints_have(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in checkpoint_tensors(stage(tiny("qwen2_5_vl", 1)).tensors)}
    heads = {".".join(name.split(".")[:2]) for name in tensors}
    assert heads == {
        "visual.patch_embed",
        "visual.blocks",
        "visual.merger",
        "model.embed_tokens",
        "model.layers",
        "model.norm",
    }
    write_folder(MODEL, None, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert stage(again).digest == stage(tiny("qwen2_5_vl", 1)).digest
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()


def test_a_folder_that_does_not_say_how_images_are_read_is_named(tmp_path: Path) -> None:
    write_folder(MODEL, tokenizer(), tmp_path)
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json beside a vision-language model"):
        load_images(ModelTable(path=str(tmp_path)))


def test_a_model_of_text_alone_has_no_reader(tmp_path: Path) -> None:
    write_folder(tiny("qwen2"), None, tmp_path)
    assert load_images(ModelTable(path=str(tmp_path))) is None
