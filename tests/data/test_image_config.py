"""preprocessor_config.json in every form, checked by what Hugging Face makes of the same file."""

import numpy as np
import pytest
from PIL import Image

from vlm.data.image import CLIP_MEAN, CLIP_STD, ImageSettings, process
from vlm.data.image_config import read_image_config, write_image_config
from vlm.errors import UserError

OLD = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "size": 224,
}
NEW = OLD | {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_convert_rgb": True,
}
VARIANTS = [
    {},
    {"size": {"height": 90, "width": 70}, "do_center_crop": False},
    {"size": [90, 70], "crop_size": {"height": 60, "width": 70}},
    {"size": 64, "crop_size": 64, "resample": 2},
    {"do_resize": False, "crop_size": 50},
    {"do_rescale": False},
    {"do_normalize": False},
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5], "rescale_factor": 0.01},
]


@pytest.mark.parametrize("config", [OLD, NEW, {}, {"image_processor": NEW, "processor_class": "AltCLIPProcessor"}])
def test_all_forms_of_the_same_settings(config):
    assert read_image_config(config, "x") == ImageSettings()


@pytest.mark.parametrize("config", VARIANTS)
def test_reading_means_what_hugging_face_means_and_writing_keeps_it(config):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (83, 101, 3), np.uint8))
    settings = read_image_config(config, "x")
    for form in (config, write_image_config(settings)):
        if not isinstance(form.get("size"), list):
            expected = module.CLIPImageProcessorPil(**form)(image, return_tensors="np")["pixel_values"][0]
            np.testing.assert_array_equal(process(image, settings), np.moveaxis(expected, 0, -1))
        again = read_image_config(form, "x")
        np.testing.assert_array_equal(process(image, again), process(image, settings))


def test_a_bare_number_is_a_square_where_the_family_says_so():
    assert read_image_config({"size": 384}, "x").mode == "shortest_edge"
    settings = read_image_config({"size": 384, "do_center_crop": False}, "x", square=True)
    assert settings.output_size == (384, 384)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"shortest_edge": 224, "longest_edge": 600}}, "size: expected"),
        ({"size": "224"}, "size: expected"),
        ({"size": {"shortest_edge": "224"}}, "image size"),
        ({"crop_size": {"height": 3}}, "crop_size: expected"),
        ({"do_resize": "yes"}, "do_resize: expected true or false"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_mean": [1, 2]}, "image_mean: expected three numbers"),
        ({"image_std": [0, 1, 1]}, "must be positive"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a number"),
        ({"resample": 9}, "resample: expected a number from 0 to 5"),
        ({"resample": 2.5}, "resample: expected"),
    ],
)
def test_wrong_values_are_named(config, message):
    with pytest.raises(UserError, match=f"^folder/p.json: .*{message}"):
        read_image_config(config, "folder/p.json")
